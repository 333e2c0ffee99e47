"""A conversion: weights are matched by name and shape first, read piece by piece after, and
saved."""

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
from spear.util.pretrained import load_pretrained

Status = Literal["loaded", "new", "left out", "missing", "refused"]
PROBLEMS: tuple[Status, ...] = ("missing", "refused")

MAX_SHARD_SIZE = "5GB"
"""The most that one file of weights contains."""

EXPERT_PREFIXES = ("expert", "state_proj", "action_")
"""Beginnings of the names of weights that are the action expert's."""

_NUMBER = re.compile(r"\b\d+\b")


@dataclass(frozen=True)
class CardText:
    """What the model card says of an architecture; pipeline: its tag on the Hub."""

    title: str
    pipeline: str
    use: str


CARD_TEXTS = {
    "spear_vlm": CardText(
        title="SPEAR-VLM",
        pipeline="image-text-to-text",
        use="answers 3D questions about images",
    ),
    "spear1": CardText(title="SPEAR-1", pipeline="robotics", use="controls a robot"),
}
"""By `model_type`."""


@dataclass(frozen=True)
class WeightStatus:
    """What becomes of one weight.

    name    our name; of weights that are left out or refused, the checkpoint's.
    shape   of the weight.
    status  loaded, new, left out (of the checkpoint), missing (in it), or refused.
    note    of loaded weights: where from; of new ones: their initialization; otherwise the reason.
    """

    name: str
    shape: tuple[int, ...]
    status: Status
    note: str


@dataclass(frozen=True)
class ConversionReport:
    """Every weight of a conversion: the new model's and the checkpoints'. It prints as a table.

    keys  The status of each of these weights.
    """

    keys: Sequence[WeightStatus]

    def with_status(self, *statuses: Status) -> list[WeightStatus]:
        """Return the weights of these statuses."""
        return [key for key in self.keys if key.status in statuses]

    def check(self, source: str) -> None:
        """Raise `SpearError` when weights are missing or refused: how many, and the first of
        each."""
        problems = []
        for status in PROBLEMS:
            keys = self.with_status(status)
            if keys:
                first = keys[0]
                problems.append(
                    f"weights {status}: {len(keys)}, first {first.name} {list(first.shape)}"
                    f" ({first.note})"
                )
        if problems:
            raise SpearError(
                f"checkpoint does not fit: {source}: {'; '.join(problems)}."
                " Compare it with `spear convert expected`, or report this line."
            )

    def fold_layers(self) -> list[tuple[WeightStatus, int]]:
        """Return the weights with counts: numbered layers become one line, unless they have a
        problem."""
        groups: dict[tuple[str, ...], list[WeightStatus]] = {}
        for key in self.keys:
            is_problem = key.status in PROBLEMS
            name = key.name if is_problem else _NUMBER.sub("*", key.name)
            group = (name, str(key.shape), key.status, _NUMBER.sub("*", key.note))
            groups.setdefault(group, []).append(key)

        folded = []
        for keys in groups.values():
            first, last = keys[0], keys[-1]
            name = _join_numbers(first.name, last.name)
            note = _join_numbers(first.note, last.note)
            folded.append((WeightStatus(name, first.shape, first.status, note), len(keys)))
        return folded

    def num_parameters(self) -> int:
        """Return the number of parameters of the new model."""
        return sum(math.prod(key.shape) for key in self.with_status("loaded", "new"))

    def module_table(self) -> str:
        """Return a table of the parameters per module, and of each model as a whole."""
        modules: dict[str, _ParameterCount] = {}
        vlm, expert, total = _ParameterCount(), _ParameterCount(), _ParameterCount()
        for key in self.with_status("loaded", "new"):
            module = modules.setdefault(_module_name(key.name), _ParameterCount())
            model = expert if key.name.startswith(EXPERT_PREFIXES) else vlm
            for count in (module, model, total):
                count.add(key)

        counts = {**modules, "SPEAR-VLM": vlm}
        if expert.loaded or expert.new:
            counts |= {"action expert": expert, "all": total}
        rows = [("module", "parameters", "loaded", "new")]
        for name, count in counts.items():
            total_text = f"{count.loaded + count.new:,}"
            rows.append((name, total_text, f"{count.loaded:,}", f"{count.new:,}"))
        return _format_columns(rows, right_aligned=(1, 2, 3))

    def __str__(self) -> str:
        rows = [("status", "weight", "shape", "number", "from")]
        for key, count in self.fold_layers():
            shape = " × ".join(map(str, key.shape)) or "1"
            rows.append((key.status, key.name, shape, str(count), key.note))

        totals = []
        for status in get_args(Status):
            count = len(self.with_status(status))
            if count > 0 or status in ("loaded", "new"):
                totals.append(f"{count} {status}")
        weight_table = _format_columns(rows, right_aligned=(3,))
        return f"{weight_table}\n\n{self.module_table()}\n\n{', '.join(totals)}"


@dataclass
class _ParameterCount:
    loaded: int = 0
    new: int = 0

    def add(self, key: WeightStatus) -> None:
        if key.status == "new":
            self.new += math.prod(key.shape)
        else:
            self.loaded += math.prod(key.shape)


@dataclass(frozen=True)
class Conversion(Generic[ModelT]):
    """A new model for whose every weight a source is known, before any is read.

    model_class  class of the new model.
    config       its config.
    report       what becomes of each weight.
    readers      read the loaded weights, in the order that needs least memory.
    dtype        of the sources, and so of the result unless another is asked for.
    sources      role -> path or name, for messages and the model card.
    tokenizer    a Hugging Face tokenizer with the 3D tokens, where the sources had one.
    """

    model_class: type[ModelT]
    config: PreTrainedConfig
    report: ConversionReport
    readers: Sequence[WeightReader]
    dtype: torch.dtype
    sources: Mapping[str, str]
    tokenizer: Any = None

    def check(self) -> None:
        """Raise `SpearError`, which names the first, when a weight is missing or refused."""
        self.report.check(", ".join(self.sources.values()))

    def run(self, dtype: torch.dtype | None = None, seed: int = 0) -> ModelT:
        """Build the model and read its weights.

        Besides the weights in `dtype`, memory never holds more than a piece of a file and the
        covariance of the embeddings.

        Args:
            dtype: Precision of the weights; None takes that of the sources.
            seed: The same seed gives the same new weights.

        Returns:
            The model in evaluation mode, on the CPU.

        Raises:
            SpearError: If a weight is missing, refused or not finite.
        """
        self.check()
        dtype = dtype or self.dtype
        weights: dict[str, Tensor] = {}
        for read in self.readers:
            weights |= read(dtype, torch.Generator().manual_seed(seed))

        with torch.random.fork_rng(devices=[]), quiet_transformers():
            torch.manual_seed(seed)
            loaded = load_pretrained(
                self.model_class,
                None,
                config=self.config,
                state_dict=weights,
                dtype=dtype,
                output_loading_info=True,
            )
        model, loading_info = loaded

        # Parts of a weight, "name[…]", have been read or drawn together.
        new_names = {key.name for key in self.report.with_status("new") if "[" not in key.name}
        assert set(loading_info["missing_keys"]) == new_names, "the report is wrong"
        assert not loading_info["unexpected_keys"], "the report is wrong"
        check_finite(model, ", ".join(self.sources.values()))
        return model.eval()

    def save(
        self,
        folder: Path,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        save_more: Callable[[Path], Any] | None = None,
    ) -> ModelT:
        """Run the conversion, and write the model with a model card, whole or not at all.

        recipe.json says what the model was made from.

        Args:
            folder: A new or empty folder.
            dtype: As of `run`.
            seed: As of `run`.
            save_more: Writes more files into the folder (`Processor.save`).

        Raises:
            SpearError: As `run` does, for a folder that contains something already, and when the
                model cannot be written or does not fit on the disk.
        """
        check_new_folder(folder)
        self.check()
        partial_folder = folder.with_name(f".part-{folder.name}-{os.getpid()}")
        try:
            shutil.rmtree(partial_folder, ignore_errors=True)
            partial_folder.mkdir(parents=True)
            self._check_disk_space(partial_folder, dtype or self.dtype)
            model = self.run(dtype, seed)
            self._write(model, partial_folder, folder.name, seed, save_more)
            shutil.rmtree(folder, ignore_errors=True)
            partial_folder.replace(folder)
        except (OSError, SafetensorError) as error:
            raise SpearError(
                f"cannot write {folder}: {summarize_error(error)}. Give another folder."
            ) from error
        finally:
            shutil.rmtree(partial_folder, ignore_errors=True)
        return model

    def _check_disk_space(self, partial_folder: Path, dtype: torch.dtype) -> None:
        needed_bytes = self.report.num_parameters() * dtype.itemsize
        free_bytes = shutil.disk_usage(partial_folder).free
        if free_bytes < needed_bytes:
            raise SpearError(
                f"no room for {partial_folder.parent}: {needed_bytes / 1e9:.1f} GB to be written,"
                f" {free_bytes / 1e9:.1f} GB free. Make room, or give another folder."
            )

    def _write(
        self,
        model: ModelT,
        partial_folder: Path,
        name: str,
        seed: int,
        save_more: Callable[[Path], Any] | None,
    ) -> None:
        with quiet_transformers():
            model.save_pretrained(partial_folder, max_shard_size=MAX_SHARD_SIZE)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(partial_folder)
        if save_more is not None:
            save_more(partial_folder)
        source_folders = [Path(source) for source in self.sources.values()]
        write_provenance(
            partial_folder,
            {
                "converted": dict(self.sources),
                "dtype": str(model.dtype).removeprefix("torch."),
                "seed": seed,
                "simulator_only": all(map(is_simulator_only, source_folders)),
            },
        )
        (partial_folder / "README.md").write_text(self._make_card(name), encoding="utf-8")

    def _make_card(self, name: str) -> str:
        """Return the README.md, with the header that the Hub reads. The license is that of
        PaliGemma's weights."""
        card_text = CARD_TEXTS[self.config.model_type]
        new_weights = []
        for key, _ in self.report.fold_layers():
            if key.status == "new":
                new_weights.append(f"- `{key.name}` {list(key.shape)}: {key.note}")
        fresh = "Every weight was loaded; none is new."
        if new_weights:
            fresh = "\n".join(["These weights are new and untrained:", "", *new_weights])

        template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
        return template.format(
            name=name,
            title=card_text.title,
            pipeline=card_text.pipeline,
            use=card_text.use,
            made="\n".join(f"- {role}: `{source}`" for role, source in self.sources.items()),
            fresh=fresh,
            table=self.report.module_table(),
            module=self.model_class.__module__,
            cls=self.model_class.__name__,
        )


# --- Matching ---


def match_weights(
    expected: Mapping[str, Tensor], shards: StoredCheckpoint, stored: Mapping[str, str], source: str
) -> tuple[list[WeightStatus], dict[str, str]]:
    """Find the weights of a model in a checkpoint.

    Args:
        expected: Our names -> tensors, whose shapes count (the meta device will do).
        shards: The checkpoint.
        stored: Its names, renamed to ours -> names in `shards`.
        source: The checkpoint, for the notes.

    Returns:
        The status of each (loaded, missing, or refused for its shape), and the names of the loaded
        ones: ours -> stored.

    Raises:
        SpearError: If a dtype is not plain floating point.
    """
    keys: list[WeightStatus] = []
    loaded_names: dict[str, str] = {}
    for our_name, tensor in expected.items():
        shape = tuple(tensor.shape)
        if our_name not in stored:
            keys.append(WeightStatus(our_name, shape, "missing", f"not in {source}"))
            continue
        stored_name = stored[our_name]
        shards.dtype(stored_name)  # raises for quantized weights
        stored_shape = shards.weights[stored_name].shape
        if stored_shape != shape:
            note = f"its shape is {list(stored_shape)}, its config says {list(shape)}"
            keys.append(WeightStatus(stored_name, stored_shape, "refused", note))
        else:
            keys.append(WeightStatus(our_name, shape, "loaded", f"{source}: {stored_name}"))
            loaded_names[our_name] = stored_name
    return keys, loaded_names


def report_unused_weights(
    stored: Mapping[str, str], shards: StoredCheckpoint, unused: Mapping[str, str], model_name: str
) -> Iterator[WeightStatus]:
    """Report the weights that the new model has no place for.

    They are left out where the reason is known, and otherwise refused.

    Args:
        stored: Their names, renamed to ours -> names in `shards`.
        shards: The checkpoint.
        unused: Patterns of the beginnings of our names -> why such weights are of no use.
        model_name: The model, for the note of refused weights.
    """
    for our_name, stored_name in stored.items():
        shape = shards.weights[stored_name].shape
        reason = _find_reason(our_name, unused)
        if reason is not None:
            yield WeightStatus(stored_name, shape, "left out", reason)
        else:
            yield WeightStatus(stored_name, shape, "refused", f"{model_name} has no such weight")


def _find_reason(name: str, unused: Mapping[str, str]) -> str | None:
    for pattern, reason in unused.items():
        if re.match(pattern, name):
            return reason
    return None


# --- Printing ---


def _module_name(weight_name: str) -> str:
    """The module that a weight belongs to: its first name, of the two Gemmas the first two."""
    inner_name = weight_name.removeprefix("vlm.")
    prefix = weight_name[: len(weight_name) - len(inner_name)]
    name_parts = inner_name.split("[")[0].split(".")
    depth = 2 if name_parts[0] in ("language_model", "expert") else 1
    return prefix + ".".join(name_parts[:depth])


def _join_numbers(first: str, last: str) -> str:
    """Join two names that differ in numbers.

    >>> _join_numbers("layers.0.x", "layers.17.x")
    'layers.0…17.x'
    """
    last_numbers = iter(_NUMBER.findall(last))

    def join(match: re.Match[str]) -> str:
        last_number = next(last_numbers)
        return match[0] if match[0] == last_number else f"{match[0]}…{last_number}"

    return _NUMBER.sub(join, first)


def _format_columns(rows: Sequence[tuple[str, ...]], right_aligned: tuple[int, ...]) -> str:
    """Return rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    formats = []
    for index, width in enumerate(widths):
        alignment = ">" if index in right_aligned else "<"
        formats.append(f"{alignment}{width}")
    lines = ["  ".join(map(format, row, formats)).rstrip() for row in rows]
    return "\n".join(lines)
