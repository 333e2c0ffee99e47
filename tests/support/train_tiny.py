"""A tiny SPEAR-1 as a training task, short runs of it and of recipes, and processes to run them on."""

import json
import math
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from models_tiny import START, TINY, actions, pixels, spear1, text
from spear.data.store.episode_store import EpisodeStore
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


def go(
    task: Task, opt: Optimization, out: Path, about: Any = None, **how: Any
) -> dict[str, torch.Tensor]:
    """`loop.run` in this process, with every step in the log."""
    return loop.run(task, opt, out, RunOptions(**{"workers": 0, "log_every": 1, **how}), about)


def run_recipe(
    name: str | Recipe,
    out: Path,
    labels: Path | None = None,
    store: EpisodeStore | None = None,
    init: Path | None = None,
    moge: Path | None = None,
    **changes: Any,
) -> Path:
    """`train` with a recipe of this name, changed, in this process on the CPU; returns `out/final`."""
    stage = (get_recipe(name) if isinstance(name, str) else name).with_changes(**changes)
    inputs = TrainingInputs(
        [labels] if labels else (), [("made", store, 1.0)] if store else [], init, moge
    )
    return train(stage, out, inputs, RunOptions(workers=0, log_every=1), "cpu")


def save_policy(folder: Path) -> Path:
    """A random SPEAR-1 of the tiny preset with its tokenizer, to begin a training with."""
    coordinates = CoordinateTokenizer.fit([0.0, 1.0], TINY.bins)
    processor = Processor(train_tokenizer(["push it"]), coordinates, TINY.image_sizes)
    vlm = build_vlm_config(TINY, len(processor.tokenizer), processor.coordinate_ids.start)
    torch.manual_seed(0)
    Spear1ForActionPrediction(build_spear1_config(TINY, vlm)).save_pretrained(folder)
    processor.save(folder)
    return folder


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


class Regression:
    """A small task whose batches depend on the step alone. pause: seconds that a loss takes."""

    def __init__(self, scale: float = 1.0, pause: float = 0.0) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
        )
        self.scale, self.pause = scale, pause

    def batch(self, step: int) -> dict[str, Any]:
        return {"x": torch.randn(8, 4, generator=torch.Generator().manual_seed(step))}

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Any:
        time.sleep(self.pause)
        x, noise = batch["x"], 0.1 * torch.randn(8, 1, generator=generator)
        error = self.model(x) - (x.sum(-1, keepdim=True).sin() + noise)
        return self.scale * error.square().mean(), {"absolute": error.abs().mean()}


class Broken(Regression):
    """The loss, or the gradient alone, of the steps in `bad` is not finite."""

    def __init__(self, bad: set[int], gradient: bool = False) -> None:
        super().__init__()
        self.bad, self.gradient = bad, gradient

    def batch(self, step: int) -> dict[str, Any]:
        return {**super().batch(step), "more": {"broken": torch.tensor(float(step in self.bad))}}

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Any:
        loss, parts = super().loss(batch, generator)
        if batch["more"]["broken"]:
            weight = self.model[0].weight.sum()
            # The root's slope at zero is infinite, its value is not.
            loss = (
                loss + (weight - weight.detach()).abs().sqrt() if self.gradient else loss * math.nan
            )
        return loss, parts


class Acting:
    """`VlaTask` on made-up batches, with `VlmTask`'s embeddings of which some rows learn."""

    trainable_rows = {EMBEDDINGS: (START, START + TINY.bins)}  # noqa: RUF012

    def __init__(self) -> None:
        self.model = spear1()
        self.stage = get_recipe("nano-vla").with_changes(question_weight=0.5, flow_samples=2)

    def batch(self, step: int) -> dict[str, Any]:
        ids, mask = text(2, 6, seed=step)
        asked, there = text(3, 8, seed=step + 1)
        answer = (torch.arange(8) > 3).long() * there
        return {
            "pixel_values": pixels(2, seed=step),
            "view_mask": {
                "external": torch.tensor([True, True]),
                "wrist": torch.tensor([True, False]),
            },
            "input_ids": ids,
            "attention_mask": mask,
            "state": torch.randn(
                2, NUM_STATE_FEATURES, generator=torch.Generator().manual_seed(step)
            ),
            "actions": actions(2, TINY.horizon, seed=step).to_vector(),
            "action_mask": torch.ones(2, TINY.horizon, dtype=torch.bool),
            "questions": {
                "pixel_values": pixels(2, seed=step, views=("external",)),
                "image_index": torch.tensor([0, 0, 1]),
                "input_ids": asked,
                "attention_mask": there,
                "token_type_ids": answer,
                "labels": torch.where(answer.bool(), asked, -100),
            },
        }

    def loss(self, batch: dict[str, Any], generator: torch.Generator | None) -> Any:
        asks, unused = batch.get("questions"), [None] * 3  # it looks only at the batch
        return VlaTask(self.model, *unused, self.stage, asks).loss(batch, generator)  # type: ignore[arg-type]


def start(function: Callable[..., None], root: Path, processes: int = 2, *given: Any) -> list[Any]:
    """Call `function(root, *given)` in so many processes that know of each other; what they say is in `root`.
    As in the command, a `SpearError` is one line and exit code 2."""
    # A process whose autograd has used a GPU cannot be forked.
    context: Any = multiprocessing.get_context(
        "forkserver" if torch.backends.cuda.is_built() else "fork"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    made = []
    for rank in range(processes):
        made.append(
            context.Process(target=_work, args=(function, root, rank, processes, port, *given))
        )
        made[-1].start()
    return made


def said(function: Callable[..., None], root: Path, rank: int) -> str:
    """What a process that `start` started wrote on stderr."""
    return (root / f"{function.__name__}-{rank}.txt").read_text()


def _work(
    function: Callable[..., None], root: Path, rank: int, world: int, port: str, *given: Any
) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(place, WORLD_SIZE=str(world), RANK=str(rank), LOCAL_RANK=str(rank))
    sys.stderr = (root / f"{function.__name__}-{rank}.txt").open("w", buffering=1)
    torch.set_num_threads(1)
    try:
        function(root, *given)
    except SpearError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
