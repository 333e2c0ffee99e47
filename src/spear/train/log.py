"""What a run says about itself: a progress line, `log.jsonl`, TensorBoard, and batches that were skipped."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import safe_open
from safetensors.torch import save
from torch.utils._pytree import tree_flatten_with_path

from spear.util.files import write_bytes, write_text
from spear.util.progress import ProgressBar

FOLDER = "not-finite"
"""Where in a run's folder the batches are whose loss or gradient is not finite."""


class Logger:
    """Progress on screen, `log.jsonl` and TensorBoard events (when it is installed) in a run's folder.

    What was said of steps after `first_step` is dropped: they will be run again.
    """

    def __init__(self, out: Path, first_step: int, total: int, every: int = 20) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.total, self.every = total, every
        self.started, self.first = time.perf_counter(), first_step
        self.waited, self.written = 0.0, self.started
        path = out / "log.jsonl"
        lines = (
            path.read_text("utf-8", "replace").splitlines(keepends=True) if path.is_file() else []
        )
        write_text(path, "".join(line for line in lines if _step(line) <= first_step))
        self.file = path.open("a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.board: Any = None
        else:
            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1)
        self.bar, self.info = ProgressBar(out.name, total, "steps", first_step), ""

    def __enter__(self) -> Self:
        self.bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.__exit__(*error)
        self.file.close()
        if self.board is not None:
            self.board.close()

    def log(
        self, step: int, values: Mapping[str, float], lr: float = 0.0, waited: float = 0.0
    ) -> None:
        """Count a finished step (0-based); every so often, and at the last, write its values down.

        waited: seconds that the step waited for its batch.
        """
        done = step + 1
        self.waited += waited
        if done % self.every == 0 or done == self.total:
            now = time.perf_counter()
            rate = (done - self.first) / (now - self.started)
            stalled = self.waited / max(now - self.written, 1e-9)
            self.waited, self.written = 0.0, now
            numbers = {k: v if math.isfinite(v) else None for k, v in values.items()}
            row = {
                "step": done,
                **numbers,
                "lr": lr,
                "steps_per_s": rate,
                "data_wait": round(stalled, 4),
            }
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            if self.board is not None:
                for key, value in {
                    **values,
                    "lr": lr,
                    "steps_per_s": rate,
                    "data_wait": stalled,
                }.items():
                    self.board.add_scalar(key, value, done)
            short = " ".join(f"{k} {v:.3f}" for k, v in values.items() if k != "grad_norm")
            self.info = f"waits for data {stalled:.0%}, {short}"
        self.bar.update(done, self.info)


@dataclass
class NotFinite(Exception):
    """A step that was not done, because its loss or its gradient is not finite; the weights are as before.

    what      "loss" or "gradient". values: the loss, its parts and the gradient's norm.
    suspects  this process's pieces, from 0, that may be the cause: of a gradient, all.
    """

    what: str
    suspects: list[int]
    values: dict[str, float]


def save_batch(out: Path, step: int, number: int, seed: int, batch: dict[str, Any]) -> None:
    """Write a piece's batch, tensors in dicts, under `out`, by paths such as "questions/input_ids".

    number: of the piece; with the seed it gives the random numbers (`spear.train.optimize.step_generator`).
    """
    leaves: Any = tree_flatten_with_path(batch)[0]
    tensors = {"/".join(key.key for key in place): value.contiguous() for place, value in leaves}
    path = out / FOLDER / f"step-{step + 1:08d}-piece-{number:08d}.safetensors"
    write_bytes(
        path, save(tensors, {"batch": json.dumps({"step": step, "number": number, "seed": seed})})
    )


def load_batch(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """A batch that `save_batch` wrote, and its step (from 0), number and seed."""
    batch: dict[str, Any] = {}
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["batch"])
        for key in file.keys():  # noqa: SIM118  (no mapping)
            *folders, name = key.split("/")
            place = batch
            for folder in folders:
                place = place.setdefault(folder, {})
            place[name] = file.get_tensor(key)
    return batch, about


def _step(line: str) -> float:
    """Of which step a line of the log is; infinite for one that is broken, as the last may be cut off."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, LookupError, TypeError):
        return math.inf
