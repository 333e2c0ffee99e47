"""The one training loop. It knows steps, checkpoints and logs; it knows nothing about images or robots.

A run is a pure function of (task, settings, seed): the batch of step k depends on (seed, k) alone, and so
does every random draw inside the model, so that a killed run continues to the same losses, bit for bit on
CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from spear.errors import SpearError
from spear.train import checkpoint, parallel
from spear.train.optimize import Batch, Optimization, Stepper, Task, learning_rate


class _Steps(torch.utils.data.Dataset[Batch]):
    def __init__(self, task: Task) -> None:
        self.task = task

    def __getitem__(self, step: int) -> Batch:
        return self.task.batch(step)

    def __len__(self) -> int:
        raise TypeError("a run has no last batch of its own")


def batches(task: Task, first: int, last: int, workers: int, accumulate: int = 1) -> Iterator[Batch]:
    """The batches of steps first … last-1, in order, made ahead by `workers` processes (0: in this one).

    `accumulate` of them per step: those that as many processes would take.
    """
    numbers = (n for step in range(first, last) for n in parallel.numbers(step, accumulate))
    loader = torch.utils.data.DataLoader(
        _Steps(task),
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_one_thread if workers else None,
    )
    return iter(loader)


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


class Logger:
    """Progress on screen, `log.jsonl` and TensorBoard events (when it is installed) in a run's folder.

    Lines of steps from `first_step` on are dropped: they will be run again.
    """

    def __init__(self, out: Path, first_step: int, total: int, every: int = 20, quiet: bool = False) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.total, self.every = total, every
        self.started, self.first = time.perf_counter(), first_step
        _keep_lines_until(out / "log.jsonl", first_step)
        self.file = (out / "log.jsonl").open("a")
        self.board = _tensorboard(out)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[info]}"),
            disable=quiet,
        )
        self.row = self.bar.add_task(out.name, total=total, completed=first_step, info="")

    def __enter__(self) -> Logger:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        self.file.close()
        if self.board is not None:
            self.board.close()

    def log(self, step: int, values: Mapping[str, torch.Tensor], lr: float = 0.0) -> None:
        """Count a finished step (0-based); every so often, and at the last, write its values down."""
        done = step + 1
        if done % self.every == 0 or done == self.total:
            numbers = {k: v.item() for k, v in values.items()}
            rate = (done - self.first) / (time.perf_counter() - self.started)
            self.file.write(json.dumps({"step": done, **numbers, "lr": lr, "steps_per_s": rate}) + "\n")
            self.file.flush()
            if self.board is not None:
                for key, value in numbers.items():
                    self.board.add_scalar(key, value, done)
            short = " ".join(f"{k} {v:.3f}" for k, v in numbers.items() if k != "grad_norm")
            self.bar.update(self.row, info=f"{rate:.1f} steps/s  {short}")
        self.bar.update(self.row, completed=done)


def run(
    task: Task,
    opt: Optimization,
    out: Path,
    seed: int,
    workers: int = 1,
    save_every: int = 500,
    log_every: int = 20,
    quiet: bool = False,
) -> dict[str, torch.Tensor]:
    """Train to `opt.steps`, continuing from the newest checkpoint in `out/checkpoints` if there is one.

    Returns the averaged (EMA) weights by parameter name, or the plain ones when averaging is off.
    Raises `SpearError` for a checkpoint of another seed or model, or when the loss is not finite.
    """
    stepper = Stepper(task, opt, seed)
    folder = out / "checkpoints"
    latest = checkpoint.find_latest(folder)
    first = 0
    settings = json.loads(
        json.dumps({"seed": seed, "processes": parallel.world(), "optimization": dataclasses.asdict(opt)})
    )
    if latest is not None:
        state = checkpoint.load(latest, stepper.model, stepper.ema, stepper.optimizer)
        for key in ("seed", "processes"):
            if state["settings"].get(key, settings[key]) != settings[key]:
                raise SpearError(
                    f"{out} holds a run with another seed or number of processes: use the same, or a new --out"
                )
        first = int(state["step"])
    main = parallel.rank() == 0
    with Logger(out, first, opt.steps, log_every, quiet) if main else contextlib.nullcontext() as logger:
        ahead = batches(task, first, opt.steps, workers, opt.accumulate)
        for step in range(first, opt.steps):
            values = stepper(step, *itertools.islice(ahead, opt.accumulate))
            if logger is None:
                continue
            logger.log(step, values, opt.lr * learning_rate(step, opt))
            if (step + 1) % save_every == 0 or step + 1 == opt.steps:
                checkpoint.save(
                    folder, step + 1, stepper.model, stepper.ema, stepper.optimizer, {"settings": settings}
                )
    parallel.wait()
    return stepper.result()


def _keep_lines_until(log: Path, step: int) -> None:
    """Drop log lines of steps that the checkpoint does not contain, and a line that was cut off."""
    if log.is_file():
        lines = []
        for line in log.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    lines.append(line + "\n")
            except ValueError:
                continue
        log.write_text("".join(lines))


def _tensorboard(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"))
