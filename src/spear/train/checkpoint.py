"""Checkpoints of a run: everything needed to continue as if it had never stopped. No pickle.

A checkpoint is a folder `step-00001000/` with `state.json` and one safetensors file per process
that had something to write (PyTorch's distributed checkpoint, in its Hugging Face format). The
files contain whole tensors by name, so that any number of processes can read them, sharded or not,
on any device. A checkpoint is written in the background, from a copy, under a temporary name, and
renamed when all processes are done. It is therefore complete or absent.
"""

import json
import os
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import BaseModel, NonNegativeInt, PositiveInt
from safetensors import SafetensorError
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from spear.errors import SpearError
from spear.train import parallel
from spear.train.optimize import Stepper
from spear.util.files import read_json_as

NUM_KEPT = 2  # checkpoints that stay in a run's folder: the newest, and one in case it is damaged
ADVICE = "delete that folder to continue from the checkpoint before it"
_FOLDER_PATTERN = "step-" + 8 * "[0-9]"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_STORAGE_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    SafetensorError,
    CheckpointException,
)
# A single process needs no torch.distributed.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class RunSettings(BaseModel, extra="allow"):
    """The settings in a checkpoint that a resumed run is compared with."""

    seed: int
    pieces: PositiveInt
    about: dict[str, Any]  # what the run is made from; a resumed run must have the same
    optimization: dict[str, Any] = {}


class CheckpointState(BaseModel, extra="allow"):
    """What `state.json` must contain.

    step     number of steps that the run has done.
    skipped  number of steps that were skipped because they were not finite.
    counts   parameter name -> number of updates that it has had.
    files    names of the files that belong to the checkpoint.
    minutes  time that the run took so far, over all its processes' lives.
    earlier  settings that were changed when the run was resumed.
    """

    settings: RunSettings
    step: NonNegativeInt
    skipped: NonNegativeInt
    counts: dict[str, float]
    files: list[str] = []
    minutes: float = 0.0
    earlier: list[dict[str, Any]] = []


def find_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the checkpoint in `folder` with the highest step, and its `CheckpointState` as a dict.

    Returns None if there is no checkpoint. Raises `SpearError` for one that cannot be read.
    """
    path = max(folder.glob(f"{_FOLDER_PATTERN}/state.json"), default=None)
    if path is None:
        return None
    state = read_json_as(CheckpointState, path, ADVICE)
    for name in state.files:
        file = path.parent / name
        if not file.is_file():
            raise SpearError(f"{file} is missing. Copy the folder again, or {ADVICE}.")
    return path.parent, state.model_dump()


class Checkpoints:
    """The newest checkpoints of a stepper, in a folder. All processes save and load together."""

    def __init__(self, folder: Path, stepper: Stepper) -> None:
        self._folder = folder
        self._stepper = stepper
        self._name_of: dict[torch.Tensor, str] = {
            parameter: name for name, parameter in stepper.model.named_parameters()
        }
        self._group = dist.new_group(backend="gloo") if parallel.get_world_size() > 1 else None
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except SpearError:
            if kind is None:
                raise
        finally:
            self._writer.shutdown()

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copy the stepper's tensors and begin to write them as the checkpoint of `step`.

        This waits until the checkpoint before is written, and raises `SpearError` if that failed.
        """
        self.wait()
        copies = self._copy_tensors()
        state = {**state, "step": step, "counts": self._count_updates()}
        self._pending = self._writer.submit(self._write, step, copies, state)

    def wait(self) -> None:
        """Wait until the last checkpoint is written. Raises `SpearError` if that failed."""
        pending = self._pending
        self._pending = None
        if pending is None:
            return
        try:
            pending.result()
        except _STORAGE_ERRORS as error:
            raise SpearError(
                f"a checkpoint cannot be written to {self._folder} ({_last_line(error)}). Free "
                "some space there; the same command continues from the checkpoint before."
            ) from error

    def load(self, path: Path, counts: dict[str, float]) -> None:
        """Read a checkpoint into the stepper, in place; `counts` are those of its state.

        Raises `SpearError` if the checkpoint cannot be read or is of another model.
        """
        try:
            reader = HuggingFaceStorageReader(str(path))
            stored = reader.read_metadata().state_dict_metadata
            self._create_moments(counts)
            tensors = self._collect_tensors()
            for key, tensor in tensors.items():
                if key not in stored or stored[key].size != tensor.shape:  # type: ignore[union-attr]
                    raise SpearError(
                        f"checkpoint {path} is of another model or other settings ({key}). "
                        "Use a new --out folder."
                    )
            dcp.load(
                tensors,
                storage_reader=reader,
                process_group=self._group,
                no_dist=self._group is None,
            )
        except _STORAGE_ERRORS as error:
            reason = _last_line(error)
            raise SpearError(f"checkpoint {path} cannot be read ({reason}): {ADVICE}") from error

    def _count_updates(self) -> dict[str, float]:
        """Return how many updates each parameter has had."""
        counters = {}
        for parameter, state in self._stepper.optimizer.state.items():
            counters[self._name_of[parameter]] = state["step"]
        if not counters:
            return {}
        # Stacked, so that a GPU is waited for once and not for every parameter.
        counts = torch.stack(list(counters.values())).tolist()
        return dict(zip(counters, counts, strict=True))

    def _copy_tensors(self) -> dict[str, torch.Tensor]:
        """Copy to the CPU what this process writes.

        These are its parts of sharded tensors, and of the tensors that all processes have, the
        largest first, every N-th one.
        """
        tensors = sorted(self._collect_tensors().items(), key=lambda item: -item[1].numel())
        copies = {}
        for position, (key, tensor) in enumerate(tensors):
            is_own_turn = position % parallel.get_world_size() == parallel.get_rank()
            if isinstance(tensor, DTensor) or is_own_turn:
                copies[key] = tensor.detach().to(
                    "cpu", copy=True, memory_format=torch.contiguous_format
                )
        return copies

    def _write(self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Write a checkpoint, in the background thread of every process."""
        final = self._folder / f"step-{step:08d}"
        unfinished = self._folder / f".part-{final.name}"
        is_first_process = parallel.get_rank() == 0

        if is_first_process:
            for remnant in self._folder.glob(".part-*"):  # of a process that was killed
                shutil.rmtree(remnant, ignore_errors=True)
            unfinished.mkdir(parents=True)
        if self._group is not None:
            dist.barrier(self._group)

        # In the first process this returns when all processes are done.
        dcp.save(
            tensors,
            storage_writer=HuggingFaceStorageWriter(str(unfinished), save_distributed=True),
            process_group=self._group,
            no_dist=self._group is None,
        )

        if is_first_process:
            files = sorted(path.name for path in unfinished.iterdir())
            state_text = json.dumps({**state, "files": files}, indent=1)
            (unfinished / "state.json").write_text(state_text, "utf-8")
            shutil.rmtree(final, ignore_errors=True)
            os.replace(unfinished, final)
            for old in sorted(self._folder.glob(_FOLDER_PATTERN))[:-NUM_KEPT]:
                shutil.rmtree(old, ignore_errors=True)

    def _collect_tensors(self) -> dict[str, torch.Tensor]:
        """Return the stepper's tensors by key: parameters and buffers, EMA weights, moments."""
        tensors = {}
        for name, tensor in self._stepper.model.state_dict().items():
            tensors[f"model.{name}"] = tensor
        for name, tensor in (self._stepper.ema or {}).items():
            tensors[f"ema.{name}"] = tensor
        for parameter, name in self._name_of.items():
            moments = self._stepper.optimizer.state.get(parameter, {})
            for kind in _MOMENTS:
                if kind in moments:
                    tensors[f"{kind}.{name}"] = moments[kind]
        return tensors

    def _create_moments(self, counts: dict[str, float]) -> None:
        """Give parameters that have been updated moments to read into, as the optimizer would."""
        state = self._stepper.optimizer.state
        for parameter in self._stepper.trainable.values():
            state.pop(parameter, None)
            count = counts.get(self._name_of[parameter])
            if count is not None:
                moments = {kind: torch.zeros_like(parameter) for kind in _MOMENTS}
                counter = torch.full((), count, device=parameter.device)
                state[parameter] = {"step": counter, **moments}


def _last_line(error: BaseException) -> str:
    """Return an error's last line: PyTorch's begin with the traceback of another process."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip()
