"""Checkpoints of a run: everything needed to continue as if it had never stopped. No pickle.

A checkpoint is a folder `step-00001000/` with `state.json` and one safetensors file per process that had
something to write (PyTorch's distributed checkpoint, in its Hugging Face format): whole tensors by name, read
on any number of processes, sharded or not, on any device. It is written in the background from a copy, under
a temporary name, and renamed when all processes are done, so it is whole or absent.
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
from spear.util.files import read_as

INSTEAD = "delete that folder to continue from the one before"
_NAME = "step-" + 8 * "[0-9]"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_FAILED = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, CheckpointException)
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process needs none


class Settings(BaseModel, extra="allow"):
    """What of a run's settings is asked for when it continues."""

    seed: int
    pieces: PositiveInt
    about: dict[str, Any]
    optimization: dict[str, Any] = {}


class State(BaseModel, extra="allow"):
    """What is asked for of `state.json`; counts: parameter → steps that it took; files: those beside it."""

    settings: Settings
    step: NonNegativeInt
    skipped: NonNegativeInt
    counts: dict[str, float]
    files: list[str] = []
    minutes: float = 0.0
    earlier: list[dict[str, Any]] = []


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint with the highest step in `folder` and its `State`, as a dict, or None.

    Raises `SpearError` for one that cannot be read.
    """
    path = max(folder.glob(f"{_NAME}/state.json"), default=None)
    if path is None:
        return None
    state = read_as(State, path, INSTEAD)
    for name in state.files:
        if not (path.parent / name).is_file():
            raise SpearError(
                f"{path.parent / name}: is missing: copy the folder again, or {INSTEAD}"
            )
    return path.parent, state.model_dump()


class Checkpoints:
    """The newest two checkpoints of a stepper's state in a folder. All processes save and load together."""

    def __init__(self, folder: Path, stepper: Stepper) -> None:
        self.folder, self.stepper = folder, stepper
        self._names: dict[torch.Tensor, str] = {
            p: name for name, p in stepper.model.named_parameters()
        }
        self._group = dist.new_group(backend="gloo") if parallel.world() > 1 else None
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
        """Copy what there is to keep and begin to write it as the checkpoint of `step`.

        Waits for the one before. Raises `SpearError` when that could not be written.
        """
        self.wait()
        steps = {self._names[p]: s["step"] for p, s in self.stepper.optimizer.state.items()}
        # A GPU is waited for once, not for every parameter.
        counts = dict(
            zip(steps, torch.stack([*steps.values()]).tolist() if steps else [], strict=True)
        )
        tensors = sorted(self._tensors().items(), key=lambda item: -item[1].numel())
        copies = {
            key: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for place, (key, tensor) in enumerate(
                tensors
            )  # what all have, they take turns to write
            if isinstance(tensor, DTensor) or place % parallel.world() == parallel.rank()
        }
        state = {**state, "step": step, "counts": counts}
        self._pending = self._writer.submit(self._write, step, copies, state)

    def wait(self) -> None:
        """Until what was begun is written. Raises `SpearError` when it could not be."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except _FAILED as error:
            what = f"a checkpoint cannot be written to {self.folder} ({_reason(error)})"
            cure = "make room there; the same command continues from the one before"
            raise SpearError(f"{what}: {cure}") from error

    def _write(self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        final = self.folder / f"step-{step:08d}"
        part = self.folder / f".part-{final.name}"
        main = parallel.rank() == 0
        if main:
            for left in self.folder.glob(".part-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            part.mkdir(parents=True)
        if self._group is not None:
            dist.barrier(self._group)
        writer = HuggingFaceStorageWriter(str(part), save_distributed=True)
        dcp.save(
            tensors, storage_writer=writer, process_group=self._group, no_dist=self._group is None
        )
        if main:  # which hears of it when every process is done
            files = sorted(path.name for path in part.iterdir())
            (part / "state.json").write_text(
                json.dumps({**state, "files": files}, indent=1), "utf-8"
            )
            shutil.rmtree(final, ignore_errors=True)
            os.replace(part, final)
            for old in sorted(self.folder.glob(_NAME))[:-2]:
                shutil.rmtree(old, ignore_errors=True)

    def load(self, path: Path, counts: dict[str, float]) -> None:
        """Put a checkpoint back into the stepper, in place. counts: as in its state.

        Raises `SpearError` when it cannot be read or is of another model.
        """
        try:
            reader = HuggingFaceStorageReader(str(path))
            stored = reader.read_metadata().state_dict_metadata
            self._make_moments(counts)
            tensors = self._tensors()
            for key, tensor in tensors.items():
                if key not in stored or stored[key].size != tensor.shape:  # type: ignore[union-attr]
                    what = f"checkpoint {path} is of another model or other settings ({key})"
                    raise SpearError(f"{what}: use a new --out folder")
            dcp.load(
                tensors,
                storage_reader=reader,
                process_group=self._group,
                no_dist=self._group is None,
            )
        except _FAILED as error:
            raise SpearError(
                f"checkpoint {path} cannot be read ({_reason(error)}): {INSTEAD}"
            ) from error

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The tensors themselves: parameters and buffers, averaged weights, moments."""
        out = {f"model.{key}": tensor for key, tensor in self.stepper.model.state_dict().items()}
        out |= {f"ema.{key}": tensor for key, tensor in (self.stepper.ema or {}).items()}
        for parameter, name in self._names.items():
            moments = self.stepper.optimizer.state.get(parameter, {})
            out |= {f"{kind}.{name}": moments[kind] for kind in _MOMENTS if kind in moments}
        return out

    def _make_moments(self, counts: dict[str, float]) -> None:
        """Give the parameters that have taken steps moments to read into, as their optimiser would."""
        state = self.stepper.optimizer.state
        for parameter in self.stepper.learning.values():
            state.pop(parameter, None)
            if (count := counts.get(self._names[parameter])) is not None:
                made = {kind: torch.zeros_like(parameter) for kind in _MOMENTS}
                state[parameter] = {"step": torch.full((), count, device=parameter.device), **made}


def _reason(error: BaseException) -> str:
    """The last line: PyTorch's messages begin with the traceback of another process."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
