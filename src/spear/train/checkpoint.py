"""Checkpoints of a run: everything needed to continue as if the run had never stopped.

A checkpoint is a folder `step-00001000/` with `state.json` and one safetensors file per process
that had something to write (PyTorch's distributed checkpoint, in its Hugging Face format). There is
no pickle in it. The files contain whole tensors by name, so that any number of processes can read
them, with or without sharding, on any device. A checkpoint is written in the background, from a
copy of the tensors, under a temporary name, and renamed when all processes are done. So a
checkpoint under its final name is always complete.

*Moments* are the optimizer's running averages of each parameter's gradient and squared gradient.
"""

import json
import os
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import BaseModel, NonNegativeInt, PositiveInt
from safetensors import SafetensorError
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from spear.errors import SpearError, to_sentence
from spear.train import parallel
from spear.train.optimize import Stepper
from spear.util.files import read_json_as

NUM_KEPT = 2  # checkpoints that stay in a run's folder: the newest, and one in case it is damaged
REMOVAL_ADVICE = "delete that folder to continue from the checkpoint before it"
_FOLDER_PATTERN = "step-" + 8 * "[0-9]"  # the step with eight digits
_MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's names of the moments
# What reading or writing a checkpoint raises if the disk is full or a file is damaged.
_STORAGE_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    SafetensorError,
    CheckpointException,
)
# PyTorch warns that a checkpoint is saved without torch.distributed; a single process needs none.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class RunSettings(BaseModel, extra="allow"):
    """The settings in a checkpoint that a resumed run is compared with."""

    seed: int
    pieces: PositiveInt  # pieces into which a batch is divided, see `spear.train.parallel`
    about: dict[str, Any]  # what the run is made from; a resumed run must have the same
    optimization: dict[str, Any] = {}  # fields of `spear.train.options.Optimization`


class CheckpointState(BaseModel, extra="allow"):
    """What `state.json` must contain.

    settings  the run's settings.
    step      number of steps that the run has done.
    skipped   number of steps that were skipped because their loss or gradient was not finite.
    counts    parameter name -> number of updates that the parameter has had (the optimizer counts
              in floating-point numbers).
    files     names of the files that belong to the checkpoint.
    minutes   minutes that the run has taken, including the time before it was resumed.
    earlier   earlier values of settings that changed when the run was resumed, as
              `spear.train.loop.list_earlier_settings` returns them.
    """

    settings: RunSettings
    step: NonNegativeInt
    skipped: NonNegativeInt
    counts: dict[str, float]
    files: list[str] = []
    minutes: float = 0.0
    earlier: list[dict[str, Any]] = []


class SavedCheckpoint(NamedTuple):
    """A checkpoint's folder, and its `CheckpointState` as a dict."""

    folder: Path
    state: dict[str, Any]


def find_newest_checkpoint(folder: Path) -> SavedCheckpoint | None:
    """Return the checkpoint in `folder` with the highest step.

    Returns None if there is no checkpoint. Raises `SpearError` for a checkpoint that cannot be
    read.
    """
    # Steps have eight digits, so the highest step has the last name.
    path = max(folder.glob(f"{_FOLDER_PATTERN}/state.json"), default=None)
    if path is None:
        return None
    state = read_json_as(CheckpointState, path, REMOVAL_ADVICE)
    for name in state.files:
        file = path.parent / name
        if not file.is_file():
            raise SpearError(f"{file} is missing. Copy the folder again, or {REMOVAL_ADVICE}.")
    return SavedCheckpoint(path.parent, state.model_dump())


class Checkpoints:
    """Saves and loads the checkpoints of a stepper in a folder, and keeps the newest ones.

    A stepper (`spear.train.optimize.Stepper`) has the model, the optimizer and the EMA weights. All
    processes of a run save together and load together.
    """

    def __init__(self, folder: Path, stepper: Stepper) -> None:
        self._folder = folder
        self._stepper = stepper
        self._name_of: dict[torch.Tensor, str] = {
            parameter: name for name, parameter in stepper.model.named_parameters()
        }
        # The process group of the background threads; None in a single process.
        self._group = dist.new_group(backend="gloo") if parallel.get_world_size() > 1 else None
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending_write: Future[None] | None = None

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

        First this waits until the previous checkpoint is written, and raises `SpearError` if
        writing that one failed.

        Args:
            step: number of steps that the run has done.
            state: the entries of `CheckpointState`, without "step", "counts" and "files", which
                are added here.
        """
        self.wait()
        copies = self._copy_own_tensors()
        state = {**state, "step": step, "counts": self._count_updates()}
        self._pending_write = self._writer.submit(self._write, step, copies, state)

    def wait(self) -> None:
        """Wait until the last checkpoint is written. Raises `SpearError` if writing it failed."""
        pending_write = self._pending_write
        self._pending_write = None
        if pending_write is None:
            return
        try:
            pending_write.result()
        except _STORAGE_ERRORS as error:
            raise SpearError(
                f"a checkpoint cannot be written to {self._folder} ({_get_last_line(error)}). Free "
                "some space there; the same command continues from the checkpoint before."
            ) from error

    def load(self, path: Path, update_counts: dict[str, float]) -> None:
        """Read the checkpoint in the folder `path` into the stepper's tensors.

        Args:
            path: the checkpoint's folder.
            update_counts: parameter name -> number of updates, the entry "counts" of the
                checkpoint's state.

        Raises:
            SpearError: if the checkpoint cannot be read or belongs to another model.
        """
        try:
            reader = HuggingFaceStorageReader(str(path))
            stored_tensors = reader.read_metadata().state_dict_metadata
            self._create_moments(update_counts)
            tensors = self._collect_tensors()
            for key, tensor in tensors.items():
                if key not in stored_tensors or stored_tensors[key].size != tensor.shape:  # type: ignore[union-attr]
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
            reason = _get_last_line(error)
            raise SpearError(
                f"the checkpoint {path} cannot be read ({reason}). {to_sentence(REMOVAL_ADVICE)}"
            ) from error

    def _count_updates(self) -> dict[str, float]:
        """Return how many updates each parameter has had, by the parameter's name."""
        counters = {}
        for parameter, state in self._stepper.optimizer.state.items():
            counters[self._name_of[parameter]] = state["step"]
        if not counters:
            return {}
        # The counters may be on a GPU. Stacked, they need one transfer instead of one each.
        counts = torch.stack(list(counters.values())).tolist()
        return dict(zip(counters, counts, strict=True))

    def _copy_own_tensors(self) -> dict[str, torch.Tensor]:
        """Copy to the CPU the tensors that this process writes.

        A process writes its parts of all sharded tensors. Tensors that every process has whole are
        dealt out to the N processes: sorted by size, every N-th one belongs to this process, so
        that all processes write about as much.
        """
        tensors = self._collect_tensors()
        largest_first = sorted(tensors.items(), key=lambda item: -item[1].numel())  # (key, tensor)
        copies = {}
        for position, (key, tensor) in enumerate(largest_first):
            is_own_turn = position % parallel.get_world_size() == parallel.get_rank()
            if isinstance(tensor, DTensor) or is_own_turn:
                copies[key] = tensor.detach().to(
                    "cpu", copy=True, memory_format=torch.contiguous_format
                )
        return copies

    def _write(self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Write a checkpoint. This runs in the background thread of every process.

        The first process alone creates the folder, writes the state and renames the folder.
        """
        final = self._folder / f"step-{step:08d}"
        unfinished = self._folder / f".part-{final.name}"
        is_first_process = parallel.get_rank() == 0

        if is_first_process:
            for remnant in self._folder.glob(".part-*"):  # what a killed process has left
                shutil.rmtree(remnant, ignore_errors=True)
            unfinished.mkdir(parents=True)
        if self._group is not None:
            dist.barrier(self._group)

        # In the first process `dcp.save` returns when all processes are done.
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
            all_checkpoints = sorted(self._folder.glob(_FOLDER_PATTERN))
            for old_checkpoint in all_checkpoints[:-NUM_KEPT]:
                shutil.rmtree(old_checkpoint, ignore_errors=True)

    def _collect_tensors(self) -> dict[str, torch.Tensor]:
        """Return the stepper's tensors: parameters and buffers, EMA weights, moments.

        A key consists of a prefix for these kinds and the name in the model, for example
        "ema.head.weight".
        """
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

    def _create_moments(self, update_counts: dict[str, float]) -> None:
        """Create zero moments, to be read into, for each parameter that has been updated.

        AdamW itself creates moments at a parameter's first update. `update_counts` has the number
        of updates of each parameter that has moments in the checkpoint.
        """
        state = self._stepper.optimizer.state
        for parameter in self._stepper.trainable.values():
            state.pop(parameter, None)
            count = update_counts.get(self._name_of[parameter])
            if count is not None:
                moments = {kind: torch.zeros_like(parameter) for kind in _MOMENTS}
                counter = torch.full((), count, device=parameter.device)
                state[parameter] = {"step": counter, **moments}


def _get_last_line(error: BaseException) -> str:
    """Return the last line of an error's text.

    PyTorch's errors begin with the traceback of another process; their last line says what failed.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip()
