"""A conversion: weights matched by name and shape first, read piece by piece after, and saved as a folder."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from spear.errors import SpearError, first_line
from spear.models.weights.card import card
from spear.models.weights.keys import Key, KeyReport
from spear.models.weights.load import quiet
from spear.models.weights.shards import Part, Shards

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True)
class Conversion(Generic[Model]):
    """A new model whose every weight has been found a place, before any is read.

    config    the new model's. report: what became of each weight.
    parts     what reads the loaded weights, in the order that keeps memory low.
    dtype     of the sources, and so of the result unless another is asked for.
    sources   role -> path or name, for messages and the model card.
    tokenizer a Hugging Face tokenizer with the 3D tokens, where the sources had one.
    """

    cls: type[Model]
    config: PreTrainedConfig
    report: KeyReport
    parts: Sequence[Part]
    dtype: torch.dtype
    sources: Mapping[str, str]
    tokenizer: Any = None

    def check(self) -> None:
        """Raise `SpearError`, naming the first, when a weight is missing or refused."""
        self.report.check(", ".join(self.sources.values()))

    def run(self, dtype: torch.dtype | None = None, seed: int = 0) -> Model:
        """The model in evaluation mode, on the CPU. The same seed gives the same new weights.

        Built on the meta device and filled weight by weight: beside the weights in `dtype` there is never
        more than a piece of a file and the covariance of the embeddings in memory.
        Raises `SpearError` when a weight is missing or refused.
        """
        self.check()
        dtype = dtype or self.dtype
        weights: dict[str, torch.Tensor] = {}
        for part in self.parts:
            weights |= part(dtype, torch.Generator().manual_seed(seed))
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(seed)
            loaded: Any = self.cls.from_pretrained(
                None, config=self.config, state_dict=weights, dtype=dtype, output_loading_info=True
            )
        model, info = loaded
        new = {key.name for key in self.report.of("new") if "[" not in key.name}
        assert set(info["missing_keys"]) == new and not info["unexpected_keys"], "the report is wrong"
        return model.eval()

    def save(
        self,
        folder: Path,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        shard: str = "5GB",
        also: Callable[[Path], Any] | None = None,
    ) -> Model:
        """`run`, and write the model as sharded safetensors with a model card, whole or not at all.

        The tokenizer is written where there is one; `recipe.json` says what the model was made of.
        shard: the most that one file holds. also: writes more files into the folder (`Processor.save`).
        Raises `SpearError` as `run` does, for a folder that holds something already, and when it cannot be
        written.
        """
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise SpearError(f"{folder} is there already: give a new folder")
        self.check()
        part = folder.with_name(f".part-{folder.name}-{os.getpid()}")
        try:
            with _writing(folder):
                _make_room(part, self.report.parameters() * (dtype or self.dtype).itemsize)
            model = self.run(dtype, seed)
            with _writing(folder), quiet():
                model.save_pretrained(part, max_shard_size=shard)
                if self.tokenizer is not None:
                    self.tokenizer.save_pretrained(part)
                if also is not None:
                    also(part)
                precision = str(model.dtype).removeprefix("torch.")
                made = {"converted": dict(self.sources), "dtype": precision, "seed": seed}
                (part / "recipe.json").write_text(json.dumps(made, indent=1), encoding="utf-8")
                about = card(folder.name, self.config.model_type, self.report, self.sources)
                (part / "README.md").write_text(about, encoding="utf-8")
                shutil.rmtree(folder, ignore_errors=True)
                part.replace(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return model


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns the errors of writing into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise SpearError(f"cannot write {folder}: {first_line(error)}: give another folder") from error


def _make_room(part: Path, size: int) -> None:
    """Make a folder before anything is computed for it. Raises `SpearError` where `size` bytes do not fit."""
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    free = shutil.disk_usage(part).free
    if free < size:
        raise SpearError(
            f"no room for {part.parent}: {size / 1e9:.1f} GB to be written, {free / 1e9:.1f} GB free: "
            "make room, or give a folder elsewhere"
        )


def match(
    wanted: Mapping[str, torch.Tensor], shards: Shards, stored: Mapping[str, str], where: str
) -> tuple[list[Key], dict[str, str]]:
    """Find the weights of a model in a checkpoint.

    wanted  our names -> tensors (their shapes count, so the meta device will do).
    stored  names as ours would be -> names in `shards`.
    where   the checkpoint, for the notes.
    Returns a key for each (loaded, missing, or refused for its shape) and the names of the loaded ones:
    ours -> stored. Raises `SpearError` for a dtype that is not plain floating point.
    """
    keys: list[Key] = []
    names: dict[str, str] = {}
    for ours, tensor in wanted.items():
        shape = tuple(tensor.shape)
        if ours not in stored:
            keys.append(Key(ours, shape, "missing", f"not in {where}"))
            continue
        theirs = stored[ours]
        shards.dtype(theirs)
        found = shards.weights[theirs].shape
        if found != shape:
            note = f"its shape is {list(found)}, its config says {list(shape)}"
            keys.append(Key(theirs, found, "refused", note))
        else:
            keys.append(Key(ours, shape, "loaded", f"{where}: {theirs}"))
            names[ours] = theirs
    return keys, names


def left_over(
    stored: Mapping[str, str], shards: Shards, unused: Mapping[str, str], what: str
) -> Iterator[Key]:
    """The keys of weights that the new model has no place for: left out where it is known why, else refused.

    stored: names as ours would be -> names in `shards`. unused: patterns of the former's beginnings -> why
    they are of no use. what: the model, for the note of refused ones.
    """
    for ours, name in stored.items():
        why = next((reason for pattern, reason in unused.items() if re.match(pattern, ours)), None)
        note = f"{what} has no such weight" if why is None else why
        yield Key(name, shards.weights[name].shape, "refused" if why is None else "left out", note)
