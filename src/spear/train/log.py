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

# Folder in a run's folder, for the batches whose loss or gradient was infinite or NaN.
SKIPPED_BATCHES = "not-finite"


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
        self._waited_s = 0.0  # time that steps have waited for batches since the last line
        self._file = _open_log(out / "log.jsonl", first_step)
        self._board = _open_tensorboard(out / "tensorboard", first_step)
        self._info = ""  # the text behind the progress bar
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
        """Count a finished step, and write its values every `log_every` steps.

        The values of the last step are always written.

        Args:
            step: the step's number, from 0.
            values: the loss, its parts and the gradient's norm, by name.
            lr: the step's learning rate.
            waited_s: how long the step waited for its batch.
        """
        num_done = step + 1
        self._waited_s += waited_s
        if num_done % self._log_every == 0 or num_done == self._num_steps:
            self._write(num_done, values, lr)
        self.bar.set_num_done(num_done, self._info)

    def _write(self, num_done: int, values: Mapping[str, float], lr: float) -> None:
        """Write a line about the last of `num_done` steps to all logs."""
        now = time.perf_counter()
        steps_per_s = (num_done - self._first_step) / (now - self._start_time)
        # The fraction of the time since the last line in which training waited for data.
        data_wait = self._waited_s / max(now - self._last_line_time, 1e-9)
        self._waited_s = 0.0
        self._last_line_time = now

        # JSON has no infinity and no NaN.
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
            f"{name} {value:.3g}" for name, value in values.items() if name != "grad_norm"
        ]
        self._info = f"waits for data {data_wait:.0%}, {' '.join(shown_values)}"


def _open_log(path: Path, first_step: int) -> Any:
    """Open `log.jsonl` for appending, after removing the lines about steps after `first_step`."""
    text = path.read_text("utf-8", "replace") if path.is_file() else ""
    lines = text.splitlines(keepends=True)
    write_text(path, "".join(line for line in lines if _read_step_or_infinity(line) <= first_step))
    return path.open("a", encoding="utf-8")


def _read_step_or_infinity(line: str) -> float:
    """Return the step of a line in the log, or infinity for a broken line.

    The last line is broken if the process was killed while writing it: it lacks its end.

    >>> _read_step_or_infinity('{"step": 20, "loss": 0.5}' + chr(10))
    20.0
    >>> _read_step_or_infinity('{"step": 4')
    inf
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

    A step's batch consists of pieces (`spear.train.parallel`), whose losses are computed one by
    one, and one gradient for all of them.

    quantity        what is not finite: "loss" or "gradient".
    suspect_pieces  which of this process's pieces may be the cause, as indices from 0. For a
                    gradient these are all pieces.
    values          the loss, its parts and the gradient's norm, by name.
    """

    quantity: str
    suspect_pieces: list[int]
    values: dict[str, float]


def save_batch(out: Path, step: int, number: int, seed: int, batch: dict[str, Any]) -> None:
    """Write a piece of a batch to the folder `not-finite` in the run's folder.

    Args:
        out: the run's folder.
        step: the step's number, from 0.
        number: the piece's number in the run. With the seed it determines the random numbers that
            the piece's loss was computed with (`spear.train.optimize.make_step_generator`).
        seed: the run's seed.
        batch: the piece: tensors by name, or dicts of tensors by name. A tensor in a dict gets a
            key such as "questions/input_ids" in the file.
    """
    leaves: Any = tree_flatten_with_path(batch)[0]  # pairs of the keys to a tensor, and the tensor
    tensors = {}
    for keys, tensor in leaves:
        tensors["/".join(key.key for key in keys)] = tensor.contiguous()

    metadata = {"batch": json.dumps({"step": step, "number": number, "seed": seed})}
    # Like the log, the file's name counts steps from 1.
    path = out / SKIPPED_BATCHES / f"step-{step + 1:08d}-piece-{number:08d}.safetensors"
    write_bytes(path, save(tensors, metadata))


def load_batch(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Read a piece of a batch that `save_batch` wrote.

    Returns:
        The piece, and a dict with the keys "step", "number" and "seed", which are arguments of
        `save_batch`.
    """
    batch: dict[str, Any] = {}
    with safe_open(path, "pt") as file:
        origin = json.loads(file.metadata()["batch"])
        for key in file.keys():  # noqa: SIM118  (a file is no mapping)
            # "questions/input_ids" goes to batch["questions"]["input_ids"].
            *groups, name = key.split("/")
            group_values = batch
            for group in groups:
                group_values = group_values.setdefault(group, {})
            group_values[name] = file.get_tensor(key)
    return batch, origin
