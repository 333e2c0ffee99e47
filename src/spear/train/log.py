"""The record of a run: a progress line, `log.jsonl`, TensorBoard events, and skipped batches."""

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

SKIPPED_BATCHES = (
    "not-finite"  # folder in a run's folder: batches whose loss or gradient is inf, nan
)


class Logger:
    """Writes a run's progress to the screen, to `log.jsonl`, and to TensorBoard if it is installed.

    Lines in `log.jsonl` about steps after `first_step` are removed, because a resumed run repeats
    these steps.
    """

    def __init__(self, out: Path, first_step: int, num_steps: int, log_every: int = 20) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._first_step = first_step
        self._num_steps = num_steps
        self._log_every = log_every
        self._start_time = time.perf_counter()
        self._last_line_time = self._start_time
        self._waited_s = 0.0  # since the last line
        self._file = _open_log(out / "log.jsonl", first_step)
        self._board = _open_tensorboard(out / "tensorboard", first_step)
        self._info = ""
        self.bar = ProgressBar(out.name, num_steps, "steps", first_step)

    def __enter__(self) -> Self:
        self.bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.__exit__(*error)
        self._file.close()
        if self._board is not None:
            self._board.close()

    def log(
        self, step: int, values: Mapping[str, float], lr: float = 0.0, waited_s: float = 0.0
    ) -> None:
        """Count a finished step (0-based), and write its values every `log_every` steps.

        The values of the last step are always written. waited_s: how long the step waited for its
        batch.
        """
        num_done = step + 1
        self._waited_s += waited_s
        if num_done % self._log_every == 0 or num_done == self._num_steps:
            self._write(num_done, values, lr)
        self.bar.update(num_done, self._info)

    def _write(self, num_done: int, values: Mapping[str, float], lr: float) -> None:
        now = time.perf_counter()
        steps_per_s = (num_done - self._first_step) / (now - self._start_time)
        data_wait = self._waited_s / max(now - self._last_line_time, 1e-9)
        self._waited_s = 0.0
        self._last_line_time = now

        json_values = {
            name: value if math.isfinite(value) else None for name, value in values.items()
        }
        row = {
            "step": num_done,
            **json_values,
            "lr": lr,
            "steps_per_s": steps_per_s,
            "data_wait": round(data_wait, 4),
        }
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

        if self._board is not None:
            rates = {"lr": lr, "steps_per_s": steps_per_s, "data_wait": data_wait}
            for name, value in {**values, **rates}.items():
                self._board.add_scalar(name, value, num_done)

        shown_values = [
            f"{name} {value:.3f}" for name, value in values.items() if name != "grad_norm"
        ]
        self._info = f"waits for data {data_wait:.0%}, {' '.join(shown_values)}"


def _open_log(path: Path, first_step: int) -> Any:
    """Open `log.jsonl` for appending, after removing the lines about steps after `first_step`."""
    text = path.read_text("utf-8", "replace") if path.is_file() else ""
    lines = text.splitlines(keepends=True)
    write_text(path, "".join(line for line in lines if _step_of(line) <= first_step))
    return path.open("a", encoding="utf-8")


def _step_of(line: str) -> float:
    """Return the step of a line in the log; infinity for a broken line, such as a cut off last one.

    >>> _step_of('{"step": 20, "loss": 0.5}' + chr(10)), _step_of('{"step": 4')
    (20.0, inf)
    """
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, LookupError, TypeError):
        return math.inf


def _open_tensorboard(folder: Path, first_step: int) -> Any:
    """Return a writer of TensorBoard events, or None if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=first_step + 1)


@dataclass
class NonFiniteStep(Exception):
    """A step that was not carried out because its loss or its gradient is not finite.

    quantity        "loss" or "gradient".
    suspect_pieces  indices, from 0, of this process's pieces that may be the cause; for a gradient,
                    all of them.
    values          the loss, its parts and the gradient's norm.
    """

    quantity: str
    suspect_pieces: list[int]
    values: dict[str, float]


def save_batch(out: Path, step: int, number: int, seed: int, batch: dict[str, Any]) -> None:
    """Write a piece of a batch, tensors in dicts, to OUT/not-finite.

    The keys of the file are paths such as "questions/input_ids". The piece's number and the seed
    determine its random numbers (`spear.train.optimize.step_generator`).
    """
    leaves: Any = tree_flatten_with_path(batch)[0]
    tensors = {}
    for keys, tensor in leaves:
        tensors["/".join(key.key for key in keys)] = tensor.contiguous()

    metadata = {"batch": json.dumps({"step": step, "number": number, "seed": seed})}
    path = out / SKIPPED_BATCHES / f"step-{step + 1:08d}-piece-{number:08d}.safetensors"
    write_bytes(path, save(tensors, metadata))


def load_batch(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Read a piece of a batch that `save_batch` wrote.

    Returns:
        The batch, and a dict of its step (from 0), its number and the run's seed.
    """
    batch: dict[str, Any] = {}
    with safe_open(path, "pt") as file:
        origin = json.loads(file.metadata()["batch"])
        for key in file.keys():  # noqa: SIM118  (a file is no mapping)
            *groups, name = key.split("/")
            group_values = batch
            for group in groups:
                group_values = group_values.setdefault(group, {})
            group_values[name] = file.get_tensor(key)
    return batch, origin
