"""Tiny training tasks, and functions that run them or recipes in this or in several processes."""

import json
import math
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from models_tiny import FIRST_COORDINATE_ID, TINY, draw_actions, draw_pixels, draw_text, make_spear1
from spear.data.store.episode_store import EpisodeStore, WeightedStore
from spear.errors import SpearError
from spear.models.presets import build_spear1_config, build_vlm_config
from spear.models.processing import Processor, train_tokenizer
from spear.models.spear1 import NUM_STATE_FEATURES, Spear1ForActionPrediction
from spear.tokens import CoordinateTokenizer
from spear.train import loop
from spear.train.loop import RunOptions
from spear.train.optimize import Task
from spear.train.options import Optimization, Recipe, TrainingInputs
from spear.train.recipes import get_recipe
from spear.train.run import train
from spear.train.tasks import VlaTask

EMBEDDINGS = "vlm.language_model.embed_tokens.weight"


def run_loop(
    task: Task,
    opt: Optimization,
    out: Path,
    run_settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Run the training loop in this process, with every step in the log; return its result.

    options: fields of `RunOptions`.
    """
    run_options = RunOptions(**{"workers": 0, "log_every": 1, **options})
    return loop.run(task, opt, out, run_options, run_settings)


def run_recipe(
    recipe: str | Recipe,
    out: Path,
    labels: Path | None = None,
    store: EpisodeStore | None = None,
    init: Path | None = None,
    moge: Path | None = None,
    **changes: Any,
) -> Path:
    """Train a recipe in this process on the CPU, and return the folder of weights, `out/final`.

    Args:
        recipe: the recipe, or its name.
        out: the folder of the run.
        labels: folder of labeled images to train on.
        store: episodes to train on.
        init: folder of the weights to begin with.
        moge: folder of the depth encoder to begin with.
        changes: changed settings of the recipe.
    """
    if isinstance(recipe, str):
        recipe = get_recipe(recipe)
    inputs = TrainingInputs(
        labels=[] if labels is None else [labels],
        # (name, store, sampling weight) of each dataset.
        episodes=[] if store is None else [WeightedStore("made", store, 1.0)],
        init=init,
        init_depth_encoder=moge,
    )
    options = RunOptions(workers=0, log_every=1)
    return train(recipe.with_changes(**changes), out, inputs, options, "cpu")


def save_policy(folder: Path) -> Path:
    """Save a SPEAR-1 of the tiny preset with random weights, from which a training can begin."""
    coordinates = CoordinateTokenizer.fit([0.0, 1.0], TINY.bins)
    processor = Processor(train_tokenizer(["push it"]), coordinates, TINY.image_sizes)
    vlm = build_vlm_config(TINY, len(processor.tokenizer), processor.coordinate_ids.start)
    torch.manual_seed(0)
    Spear1ForActionPrediction(build_spear1_config(TINY, vlm)).save_pretrained(folder)
    processor.save(folder)
    return folder


def read_log(out: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's log."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def read_losses(out: Path) -> list[float | None]:
    """Return the losses in a run's log; None for a loss that was not finite."""
    return [row["loss"] for row in read_log(out)]


class Regression:
    """A small task whose batches depend on the step alone.

    Args:
        scale: factor on the loss.
        delay_s: seconds that each loss takes longer.
    """

    def __init__(self, scale: float = 1.0, delay_s: float = 0.0) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
        )
        self.scale = scale
        self.delay_s = delay_s

    def batch(self, step: int) -> dict[str, Any]:
        return {"x": torch.randn(8, 4, generator=torch.Generator().manual_seed(step))}

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Any:
        time.sleep(self.delay_s)
        x = batch["x"]  # [8, 4]
        noise = 0.1 * torch.randn(8, 1, generator=generator)
        target = x.sum(-1, keepdim=True).sin() + noise
        error = self.model(x) - target
        return self.scale * error.square().mean(), {"absolute": error.abs().mean()}


class NonFiniteRegression(Regression):
    """A task whose loss is not finite in some steps.

    Args:
        bad_steps: the steps whose loss is not finite.
        in_gradient: whether the loss is finite in these steps, and only its gradient is not.
    """

    def __init__(self, bad_steps: set[int], in_gradient: bool = False) -> None:
        super().__init__()
        self.bad_steps = bad_steps
        self.in_gradient = in_gradient

    def batch(self, step: int) -> dict[str, Any]:
        is_bad = torch.tensor(float(step in self.bad_steps))
        # A stored batch has to keep tensors in dicts, too, so this one is in a dict.
        return {**super().batch(step), "nested": {"is_bad": is_bad}}

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Any:
        loss, loss_terms = super().loss(batch, generator)
        if not batch["nested"]["is_bad"]:
            return loss, loss_terms
        if not self.in_gradient:
            return loss * math.nan, loss_terms
        # `weight - weight.detach()` is always 0, so its root adds nothing to the loss. But the
        # slope of a root at 0 is infinite, so the gradient is not finite.
        weight = self.model[0].weight.sum()
        zero_with_infinite_slope = (weight - weight.detach()).abs().sqrt()
        return loss + zero_with_infinite_slope, loss_terms


class PolicyTask:
    """Trains a tiny SPEAR-1 as `VlaTask` does, on random actions and questions.

    Of the token embeddings only those of the 3D tokens learn, as in `VlmTask`.
    """

    trainable_rows = {EMBEDDINGS: (FIRST_COORDINATE_ID, FIRST_COORDINATE_ID + TINY.bins)}  # noqa: RUF012

    def __init__(self) -> None:
        self.model = make_spear1()
        self.recipe = get_recipe("nano-vla").with_changes(question_weight=0.5, flow_samples=2)

    def batch(self, step: int) -> dict[str, Any]:
        """Make a batch of two steps of robots, of which one has no wrist image, and of three
        questions about two images."""
        ids, mask = draw_text(rows=2, length=6, seed=step)
        question_ids, question_mask = draw_text(rows=3, length=8, seed=step + 1)
        is_answer = (torch.arange(8) > 3).long() * question_mask  # [3, 8]: the last tokens
        ignored_label = -100  # the loss of cross-entropy leaves out tokens with this label
        questions = {
            "pixel_values": draw_pixels(2, seed=step, views=("external",)),
            "image_index": torch.tensor([0, 0, 1]),
            "input_ids": question_ids,
            "attention_mask": question_mask,
            "token_type_ids": is_answer,
            "labels": torch.where(is_answer.bool(), question_ids, ignored_label),
        }
        return {
            "pixel_values": draw_pixels(2, seed=step),
            "view_mask": {
                "external": torch.tensor([True, True]),
                "wrist": torch.tensor([True, False]),
            },
            "input_ids": ids,
            "attention_mask": mask,
            "state": torch.randn(
                2, NUM_STATE_FEATURES, generator=torch.Generator().manual_seed(step)
            ),
            "actions": draw_actions(2, TINY.horizon, seed=step).to_vector(),
            "action_mask": torch.ones(2, TINY.horizon, dtype=torch.bool),
            "questions": questions,
        }

    def loss(self, batch: dict[str, Any], generator: torch.Generator | None) -> Any:
        unused: Any = None  # a loss does not need the processor, the normalizer and the samples
        task = VlaTask(
            self.model,
            processor=unused,
            normalizer=unused,
            samples=unused,
            recipe=self.recipe,
            questions=batch.get("questions"),
        )
        return task.loss(batch, generator)  # type: ignore[arg-type]


def start_processes(
    function: Callable[..., None], root: Path, num_processes: int = 2, *arguments: Any
) -> list[Any]:
    """Call `function(root, *arguments)` in several processes of one run, as `torchrun` does.

    `read_stderr` returns what a process writes on stderr. A process ends with one line and exit
    code 2 for a `SpearError`, as the command does.

    Returns:
        The processes, which have started.
    """
    # A process whose autograd has used a GPU cannot be forked.
    start_method = "forkserver" if torch.backends.cuda.is_built() else "fork"
    context: Any = multiprocessing.get_context(start_method)
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))  # port 0 stands for any free port
        port = str(free_socket.getsockname()[1])

    processes = []
    for rank in range(num_processes):
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": str(num_processes),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
        process = context.Process(
            target=_run_in_new_process, args=(function, root, arguments, environment)
        )
        process.start()
        processes.append(process)
    return processes


def read_stderr(function: Callable[..., None], root: Path, rank: int) -> str:
    """Return what the process with this rank, which `start_processes` started, wrote on stderr."""
    return _get_stderr_file(function, root, rank).read_text()


def _get_stderr_file(function: Callable[..., None], root: Path, rank: int) -> Path:
    """Return the file of what the process with this rank writes on stderr."""
    return root / f"{function.__name__}-{rank}.txt"


def _run_in_new_process(
    function: Callable[..., None],
    root: Path,
    arguments: tuple[Any, ...],
    environment: dict[str, str],
) -> None:
    """Call the function in a process that has just started; its stderr goes to a file."""
    os.environ.update(environment)
    sys.stderr = _get_stderr_file(function, root, int(environment["RANK"])).open("w", buffering=1)
    torch.set_num_threads(1)
    try:
        function(root, *arguments)
    except SpearError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
