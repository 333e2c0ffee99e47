"""A conversion: weights matched by name and shape first, read piece by piece after, and saved as a folder."""

import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedConfig

from spear.errors import SpearError, summarize_error
from spear.models.weights.folders import is_simulator_only, write_provenance
from spear.models.weights.load import (
    ModelT,
    StoredCheckpoint,
    WeightReader,
    check_finite,
    quiet_transformers,
)
from spear.util.files import check_new_folder

Status = Literal["loaded", "new", "left out", "missing", "refused"]
PROBLEMS: tuple[Status, ...] = ("missing", "refused")
_EXPERT = ("expert", "state_proj", "action_")
"""Beginnings of the names of weights that are the action expert's."""
MOST = "5GB"
"""The most that one file of weights holds."""
_NUMBER = re.compile(r"\b\d+\b")
_ABOUT = {
    "spear_vlm": ("SPEAR-VLM", "image-text-to-text", "answers 3D questions about images"),
    "spear1": ("SPEAR-1", "robotics", "controls a robot"),
}
"""model_type -> title, the Hub's pipeline tag and use."""


@dataclass(frozen=True)
class WeightStatus:
    """One weight. name: ours; for what is left out or refused, the checkpoint's.

    note  loaded: where from; new: its initialisation; else why.
    """

    name: str
    shape: tuple[int, ...]
    status: Status
    note: str


@dataclass(frozen=True)
class ConversionReport:
    """Every weight of a conversion: the new model's and the checkpoints'. Prints as a table."""

    keys: Sequence[WeightStatus]

    def with_status(self, *status: Status) -> list[WeightStatus]:
        """The keys of these statuses."""
        return [key for key in self.keys if key.status in status]

    def check(self, where: str) -> None:
        """Raise `SpearError` when weights are missing or refused: how many, and the first of each kind."""
        if wrong := [
            (keys[0], len(keys)) for status in PROBLEMS if (keys := self.with_status(status))
        ]:
            said = (
                f"weights {k.status}: {n}, first {k.name} {list(k.shape)} ({k.note})"
                for k, n in wrong
            )
            also = "compare with `spear convert expected`, or report this line"
            raise SpearError(f"checkpoint does not fit: {where}: {'; '.join(said)}: {also}")

    def fold_layers(self) -> list[tuple[WeightStatus, int]]:
        """The keys, each with a count: numbered layers are one line, unless something is wrong with them."""
        groups: dict[tuple[str, ...], list[WeightStatus]] = {}
        for key in self.keys:
            place = key.name if key.status in PROBLEMS else _NUMBER.sub("*", key.name)
            like = (place, str(key.shape), key.status, _NUMBER.sub("*", key.note))
            groups.setdefault(like, []).append(key)
        ends = ((keys[0], keys[-1], len(keys)) for keys in groups.values())
        return [
            (WeightStatus(_span(a.name, b.name), a.shape, a.status, _span(a.note, b.note)), n)
            for a, b, n in ends
        ]

    def num_parameters(self) -> int:
        """Parameters of the new model."""
        return sum(math.prod(key.shape) for key in self.with_status("loaded", "new"))

    def module_table(self) -> str:
        """Parameters per module, and of each model as a whole."""
        modules: dict[str, list[int]] = {}
        whole = {"SPEAR-VLM": [0, 0], "action expert": [0, 0], "all": [0, 0]}
        for key in self.with_status("loaded", "new"):
            part = "action expert" if key.name.startswith(_EXPERT) else "SPEAR-VLM"
            for count in (modules.setdefault(_module(key.name), [0, 0]), whole[part], whole["all"]):
                count[key.status == "new"] += math.prod(key.shape)
        if not any(whole["action expert"]):
            whole = {"SPEAR-VLM": whole["all"]}
        rows = [("module", "parameters", "loaded", "new")]
        rows += [
            (name, f"{a + b:,}", f"{a:,}", f"{b:,}")
            for name, (a, b) in {**modules, **whole}.items()
        ]
        return _columns(rows, right=(1, 2, 3))

    def __str__(self) -> str:
        rows = [("status", "weight", "shape", "number", "from")]
        for key, count in self.fold_layers():
            rows.append(
                (key.status, key.name, " × ".join(map(str, key.shape)) or "1", str(count), key.note)
            )
        counts = {status: len(self.with_status(status)) for status in get_args(Status)}
        total = ", ".join(f"{n} {s}" for s, n in counts.items() if n or s in ("loaded", "new"))
        return f"{_columns(rows, right=(3,))}\n\n{self.module_table()}\n\n{total}"


@dataclass(frozen=True)
class Conversion(Generic[ModelT]):
    """A new model whose every weight has been found a place, before any is read.

    config    the new model's. report: what became of each weight.
    parts     what reads the loaded weights, in the order that keeps memory low.
    dtype     of the sources, and so of the result unless another is asked for.
    sources   role -> path or name, for messages and the model card.
    tokenizer a Hugging Face tokenizer with the 3D tokens, where the sources had one.
    """

    cls: type[ModelT]
    config: PreTrainedConfig
    report: ConversionReport
    parts: Sequence[WeightReader]
    dtype: torch.dtype
    sources: Mapping[str, str]
    tokenizer: Any = None

    def check(self) -> None:
        """Raise `SpearError`, naming the first, when a weight is missing or refused."""
        self.report.check(", ".join(self.sources.values()))

    def run(self, dtype: torch.dtype | None = None, seed: int = 0) -> ModelT:
        """The model in evaluation mode, on the CPU. The same seed gives the same new weights.

        Beside the weights in `dtype` there is never more in memory than a piece of a file and the covariance
        of the embeddings. Raises `SpearError` when a weight is missing, refused or not finite.
        """
        self.check()
        dtype = dtype or self.dtype
        weights: dict[str, Tensor] = {}
        for part in self.parts:
            weights |= part(dtype, torch.Generator().manual_seed(seed))
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            torch.manual_seed(seed)
            loaded: Any = self.cls.from_pretrained(
                None, config=self.config, state_dict=weights, dtype=dtype, output_loading_info=True
            )
        model, info = loaded
        new = {key.name for key in self.report.with_status("new") if "[" not in key.name}
        assert set(info["missing_keys"]) == new and not info["unexpected_keys"], (
            "the report is wrong"
        )
        check_finite(model, ", ".join(self.sources.values()))
        return model.eval()

    def save(
        self,
        folder: Path,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        also: Callable[[Path], Any] | None = None,
    ) -> ModelT:
        """`run`, and write the model as sharded safetensors with a model card, whole or not at all.

        `recipe.json` says what the model was made of. also: writes more files into the folder
        (`Processor.save`). Raises `SpearError` as `run` does, for a folder that holds something already, and
        when it cannot be written or does not fit on the disk.
        """
        check_new_folder(folder)
        self.check()
        part = folder.with_name(f".part-{folder.name}-{os.getpid()}")
        size = self.report.num_parameters() * (dtype or self.dtype).itemsize
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            free = shutil.disk_usage(part).free
            if free < size:
                lacks = f"{size / 1e9:.1f} GB to be written, {free / 1e9:.1f} GB free"
                raise SpearError(
                    f"no room for {folder.parent}: {lacks}: make room, or give another folder"
                )
            model = self.run(dtype, seed)
            with quiet_transformers():
                model.save_pretrained(part, max_shard_size=MOST)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(part)
            if also is not None:
                also(part)
            made = {
                "converted": dict(self.sources),
                "dtype": str(model.dtype).removeprefix("torch."),
                "seed": seed,
                "simulator_only": all(
                    is_simulator_only(Path(source)) for source in self.sources.values()
                ),
            }
            write_provenance(part, made)
            (part / "README.md").write_text(self._card(folder.name), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            part.replace(folder)
        except (OSError, SafetensorError) as error:
            raise SpearError(
                f"cannot write {folder}: {summarize_error(error)}: give another folder"
            ) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return model

    def _card(self, name: str) -> str:
        """The README.md, with the header that the Hub reads. The licence is that of PaliGemma's weights."""
        title, pipeline, use = _ABOUT[self.config.model_type]
        new = [key for key, _ in self.report.fold_layers() if key.status == "new"]
        fresh = ["These weights are new and untrained:", ""]
        fresh += [f"- `{key.name}` {list(key.shape)}: {key.note}" for key in new]
        template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
        return template.format(
            name=name,
            title=title,
            pipeline=pipeline,
            use=use,
            made="\n".join(f"- {role}: `{source}`" for role, source in self.sources.items()),
            fresh="\n".join(fresh) if new else "Every weight was loaded; none is new.",
            table=self.report.module_table(),
            module=self.cls.__module__,
            cls=self.cls.__name__,
        )


def match_weights(
    wanted: Mapping[str, Tensor], shards: StoredCheckpoint, stored: Mapping[str, str], where: str
) -> tuple[list[WeightStatus], dict[str, str]]:
    """Find the weights of a model in a checkpoint.

    wanted  our names -> tensors (their shapes count, so the meta device will do).
    stored  names as ours would be -> names in `shards`.
    where   the checkpoint, for the notes.
    Returns a key for each (loaded, missing, or refused for its shape) and the names of the loaded ones:
    ours -> stored. Raises `SpearError` for a dtype that is not plain floating point.
    """
    keys: list[WeightStatus] = []
    names: dict[str, str] = {}
    for ours, tensor in wanted.items():
        shape = tuple(tensor.shape)
        if ours not in stored:
            keys.append(WeightStatus(ours, shape, "missing", f"not in {where}"))
            continue
        theirs = stored[ours]
        shards.dtype(theirs)
        found = shards.weights[theirs].shape
        if found != shape:
            note = f"its shape is {list(found)}, its config says {list(shape)}"
            keys.append(WeightStatus(theirs, found, "refused", note))
        else:
            keys.append(WeightStatus(ours, shape, "loaded", f"{where}: {theirs}"))
            names[ours] = theirs
    return keys, names


def report_unused_weights(
    stored: Mapping[str, str], shards: StoredCheckpoint, unused: Mapping[str, str], what: str
) -> Iterator[WeightStatus]:
    """The keys of weights that the new model has no place for: left out where it is known why, else refused.

    stored: names as ours would be -> names in `shards`. unused: patterns of the former's beginnings -> why
    they are of no use. what: the model, for the note of refused ones.
    """
    for ours, name in stored.items():
        why = next((reason for pattern, reason in unused.items() if re.match(pattern, ours)), None)
        note = f"{what} has no such weight" if why is None else why
        yield WeightStatus(
            name, shards.weights[name].shape, "refused" if why is None else "left out", note
        )


def _module(name: str) -> str:
    """The part of the model that a weight belongs to: its first name, of the two Gemmas the first two."""
    inside = name.removeprefix("vlm.")
    parts = inside.split("[")[0].split(".")
    depth = 2 if parts[0] in ("language_model", "expert") else 1
    return name[: len(name) - len(inside)] + ".".join(parts[:depth])


def _span(first: str, last: str) -> str:
    """ "layers.0.x" and "layers.17.x" -> "layers.0…17.x"."""
    ends = iter(_NUMBER.findall(last))

    def both(match: re.Match[str]) -> str:
        end = next(ends)
        return match[0] if match[0] == end else f"{match[0]}…{end}"

    return _NUMBER.sub(both, first)


def _columns(rows: Sequence[tuple[str, ...]], right: tuple[int, ...]) -> str:
    """Rows as lines with aligned columns; those of `right` are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    formats = [f"{'>' if i in right else '<'}{width}" for i, width in enumerate(widths)]
    return "\n".join("  ".join(map(format, row, formats)).rstrip() for row in rows)
