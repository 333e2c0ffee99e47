"""The one training loop. It knows steps, checkpoints and logs; it knows nothing about images or robots.

A run is a pure function of (task, settings, seed): the batch of step k depends on (seed, k) alone, and so
does every random draw inside the model, so that a killed run continues to the same losses, bit for bit on
CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spear.errors import SpearError
from spear.train import checkpoint, parallel
from spear.train.checkpoint import Checkpoints
from spear.train.log import FOLDER, Logger, NotFinite, save_batch
from spear.train.optimize import Batch, Stepper, Task, learning_rate
from spear.train.options import Optimization


@dataclass(frozen=True)
class RunOptions:
    """How a run goes, whatever it trains.

    seed        two runs with the same seed give the same weights.
    workers     processes that make batches ahead; 0: this one does.
    save_every, log_every  steps between checkpoints, and between lines of the log.
    quiet       shows no progress.
    device      where the model is put; None leaves it where it is.
    sharded     weights, gradients, moments and averages are divided among the processes (`parallel.shard`).
    """

    seed: int = 0
    workers: int = 1
    save_every: int = 500
    log_every: int = 20
    quiet: bool = False
    device: torch.device | None = None
    sharded: bool = False


class _Steps(torch.utils.data.Dataset[Batch | SpearError]):
    """The batches by number. An error is returned, since raised in a worker it would bring a traceback."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __getitem__(self, step: int) -> Batch | SpearError:
        try:
            return self.task.batch(step)
        except SpearError as error:
            return error


def batches(
    task: Task, first: int, last: int, workers: int, accumulate: int = 1, device: torch.device = parallel.CPU
) -> Iterator[Batch]:
    """The batches of steps first … last-1, in order, made ahead by `workers` processes (0: in this one).

    `accumulate` of them per step: those that as many processes would take. For a GPU they are in pinned
    memory, from which it copies while it works.
    """
    numbers = (n for step in range(first, last) for n in parallel.numbers(step, accumulate))
    loader = torch.utils.data.DataLoader(
        _Steps(task),
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_one_thread if workers else None,
        pin_memory=device.type == "cuda",
    )
    for batch in loader:
        if isinstance(batch, SpearError):
            raise batch
        yield batch


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def divided(opt: Optimization, out: Path) -> Optimization:
    """`opt` with as many pieces per process as continue the run in `out`; as it is when there is none.

    Raises `SpearError` when the run's pieces cannot be shared among the processes that there are.
    """
    latest = checkpoint.find_latest(out / "checkpoints")
    if latest is None:
        return opt
    pieces = checkpoint.read_state(latest)["settings"]["pieces"]
    if pieces % parallel.world():
        fitting = ", ".join(str(n) for n in range(1, pieces + 1) if pieces % n == 0)
        raise SpearError(
            f"{out} holds a run whose batches have {pieces} piece{'s' if pieces > 1 else ''}, which "
            f"{parallel.world()} processes cannot share: use {fitting}, or a new --out"
        )
    return dataclasses.replace(opt, accumulate=pieces // parallel.world())


def run(
    task: Task,
    opt: Optimization,
    out: Path,
    how: RunOptions | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Train to `opt.steps`, continuing from the newest checkpoint in `out/checkpoints` if there is one.

    about: what the run is of, by name; a run continues only where all of it is the same.
    Returns the averaged (EMA) weights by parameter name, or the plain ones when averaging is off.
    Raises `SpearError` for a checkpoint of another seed, model or run, or of a later step than `opt.steps`;
    after more than `opt.max_skipped` steps that were not finite; when another process of the run is gone.
    """
    how = how or RunOptions()
    opt = divided(opt, out)
    stepper = Stepper(task, opt, how.seed, how.device, how.sharded)
    settings = {
        "seed": how.seed,
        "pieces": parallel.world() * opt.accumulate,
        "optimization": dataclasses.asdict(opt),
        "about": dict(about or {}),
    }
    with Checkpoints(out / "checkpoints", stepper) as checkpoints:
        latest = checkpoint.find_latest(checkpoints.folder)
        first = skipped = 0
        if latest is not None:
            state = checkpoint.read_state(latest)
            _check_same(out, state, settings, opt.steps)
            checkpoints.load(latest, state["counts"])
            first, skipped = state["step"], state["skipped"]
        logger: Logger | contextlib.nullcontext[None] = contextlib.nullcontext()
        if parallel.rank() == 0:
            logger = Logger(out, first, opt.steps, how.log_every, how.quiet)
        try:
            with logger as log:
                ahead = batches(task, first, opt.steps, how.workers, opt.accumulate, stepper.device)
                for step in range(first, opt.steps):
                    begun = time.perf_counter()
                    pieces = list(itertools.islice(ahead, opt.accumulate))
                    waited = time.perf_counter() - begun
                    try:
                        values = stepper(step, *pieces)
                    except NotFinite as problem:
                        skipped, values = skipped + 1, problem.values
                        numbers = parallel.numbers(step, len(pieces))
                        for index in problem.suspects:
                            save_batch(out, step, numbers[index], how.seed, pieces[index])
                        _report(problem, step, skipped, opt.max_skipped, out, log)
                    if log is not None:
                        log.log(step, values, opt.lr * learning_rate(step, opt), waited)
                    if (step + 1) % how.save_every == 0 or step + 1 == opt.steps:
                        checkpoints.save(step + 1, {"settings": settings, "skipped": skipped})
        except RuntimeError as error:
            if not parallel.lost(error):
                raise
            raise SpearError(
                f"process {parallel.rank()}: another process of this run is gone: see what it said; "
                "the same command continues from the last checkpoint"
            ) from error
    parallel.wait()
    return stepper.result()


def _check_same(out: Path, state: Mapping[str, Any], settings: Mapping[str, Any], steps: int) -> None:
    """Raises `SpearError` unless a checkpoint's run is this one, at no later a step."""
    there = {"seed": state["settings"]["seed"], **state["settings"]["about"]}
    here = {"seed": settings["seed"], **settings["about"]}
    for name in there:
        if name in here and there[name] != here[name]:
            raise SpearError(
                f"{out} holds a run with another {name} ({there[name]}, not {here[name]}): "
                "use the same, or a new --out"
            )
    if state["step"] > steps:
        raise SpearError(
            f"{out} holds a run of {state['step']} steps already, more than {steps}: use a new --out"
        )


def _report(problem: NotFinite, step: int, skipped: int, most: int, out: Path, log: Logger | None) -> None:
    """Say that a step was skipped, or, when it was one too many, end the run on all processes."""
    where = f"step {step + 1}: the {problem.what} is not finite"
    if skipped <= most:
        if log is not None:
            log.bar.say(f"{where}: skipped ({skipped} of at most {most}); its batch is in {out / FOLDER}")
        return
    if log is None:
        raise SystemExit(2)  # process 0 says why
    raise SpearError(
        f"{where}, and {most} steps were skipped before: look at their batches in {out / FOLDER}, "
        "lower the learning rate, or allow more (max_skipped)"
    )
