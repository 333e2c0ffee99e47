"""Conversion of published checkpoints to a new model, and the report about it.

A conversion has two phases. First it is planned: the weights that the new model needs are matched,
by name and shape, with those in the checkpoints. Then it is run: the weights are read piece by
piece, and the model is saved.
"""

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

from spear.errors import SpearError, format_count, summarize_error
from spear.models.weights.folders import is_simulator_only, write_provenance
from spear.models.weights.load import (
    ModelT,
    StoredCheckpoint,
    WeightReader,
    check_finite,
    quiet_transformers,
)
from spear.util.files import check_new_or_empty_folder
from spear.util.pretrained import load_pretrained

Status = Literal["loaded", "new", "left out", "missing", "refused"]
"""The status of a weight in a conversion; see `WeightStatus`."""
PROBLEMS: tuple[Status, ...] = ("missing", "refused")
"""With a weight of such a status, the conversion cannot be run."""

MAX_SHARD_SIZE = "5GB"
"""The largest size of one file of weights."""

EXPERT_PREFIXES = ("expert", "state_proj", "action_")
"""Beginnings of the names of weights that belong to the action expert."""

_NUMBER = re.compile(r"\b\d+\b")  # "7" in "layers.7.norm2"


@dataclass(frozen=True)
class CardText:
    """Texts of the model card that depend on the architecture.

    title     Name of the architecture.
    pipeline  Its tag on the Hub.
    use       What the model does, as the end of the sentence "It …".
    """

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
"""`model_type` of a config -> texts."""


@dataclass(frozen=True)
class WeightStatus:
    """What a conversion does with one weight, of the new model or of a checkpoint.

    name    Our name of a weight that is loaded, new or missing. The checkpoint's name of a weight
            that is left out or refused.
    shape   The weight's shape.
    status  "loaded" from a checkpoint; "new", with initial values; "missing" in the checkpoint; or
            about a weight of the checkpoint, "left out" because the new model needs no such weight,
            or "refused" because it does not fit the new model.
    note    The source of a loaded weight, the initialization of a new one, otherwise the reason.
    """

    name: str
    shape: tuple[int, ...]
    status: Status
    note: str


@dataclass(frozen=True)
class ConversionReport:
    """A report about all weights of the new model and of the checkpoints. `str` makes a table.

    entries  What the conversion does with each of these weights.
    """

    entries: Sequence[WeightStatus]

    def select_by_status(self, *statuses: Status) -> list[WeightStatus]:
        """Return the weights that have one of these statuses."""
        return [entry for entry in self.entries if entry.status in statuses]

    def check(self, source_in_message: str) -> None:
        """Raise `SpearError` if weights are missing or refused.

        The message says how many there are, and names the first of each status.
        """
        problems = []
        for status in PROBLEMS:
            entries = self.select_by_status(status)
            if entries:
                first = entries[0]
                problems.append(
                    f"{format_count(len(entries), 'weights')} {status}, first {first.name} "
                    f"{list(first.shape)} ({first.note})"
                )
        if problems:
            raise SpearError(
                f"the checkpoint {source_in_message} does not fit ({'; '.join(problems)}). Compare "
                "it with `spear convert expected`, or report this line."
            )

    def fold_layers(self) -> list[tuple[WeightStatus, int]]:
        """Return pairs (weight, number of weights), one pair for the same weight of all layers.

        The pair's weight has the range of the layers' numbers in its name, for example
        "expert.layers.0…17.mlp.up_proj.weight". Missing and refused weights are never merged over
        layers.
        """
        # Weights are in a group if they differ only in the numbers in their names and notes.
        groups: dict[tuple[str, ...], list[WeightStatus]] = {}
        for entry in self.entries:
            is_problem = entry.status in PROBLEMS
            name = entry.name if is_problem else _NUMBER.sub("*", entry.name)
            group = (name, str(entry.shape), entry.status, _NUMBER.sub("*", entry.note))
            groups.setdefault(group, []).append(entry)

        folded = []
        for entries in groups.values():
            first = entries[0]
            last = entries[-1]
            name = _join_names_with_number_ranges(first.name, last.name)
            note = _join_names_with_number_ranges(first.note, last.note)
            folded.append((WeightStatus(name, first.shape, first.status, note), len(entries)))
        return folded

    def count_parameters(self) -> int:
        """Return the number of parameters of the new model."""
        return sum(math.prod(entry.shape) for entry in self.select_by_status("loaded", "new"))

    def format_module_table(self) -> str:
        """Return a table of the numbers of parameters of each module, and of each whole model."""
        modules: dict[str, _ParameterCount] = {}
        vlm = _ParameterCount()
        expert = _ParameterCount()
        total = _ParameterCount()
        for entry in self.select_by_status("loaded", "new"):
            module_count = modules.setdefault(_get_module_name(entry.name), _ParameterCount())
            model_count = expert if entry.name.startswith(EXPERT_PREFIXES) else vlm
            for parameter_count in (module_count, model_count, total):
                parameter_count.add(entry)

        counts = {**modules, "SPEAR-VLM": vlm}
        if expert.num_loaded or expert.num_new:
            counts |= {"action expert": expert, "all": total}
        rows = [("module", "parameters", "loaded", "new")]
        for name, parameter_count in counts.items():
            num_loaded = parameter_count.num_loaded
            num_new = parameter_count.num_new
            rows.append((name, f"{num_loaded + num_new:,}", f"{num_loaded:,}", f"{num_new:,}"))
        return _format_columns(rows, right_aligned=(1, 2, 3))

    def __str__(self) -> str:
        rows = [("status", "weight", "shape", "number", "from")]
        for entry, num_weights in self.fold_layers():
            shape = " × ".join(map(str, entry.shape)) or "1"
            rows.append((entry.status, entry.name, shape, str(num_weights), entry.note))

        totals = []
        for status in get_args(Status):
            num_with_status = len(self.select_by_status(status))
            if num_with_status > 0 or status in ("loaded", "new"):
                totals.append(f"{num_with_status} {status}")
        weight_table = _format_columns(rows, right_aligned=(3,))
        return f"{weight_table}\n\n{self.format_module_table()}\n\n{', '.join(totals)}"


@dataclass
class _ParameterCount:
    """Numbers of parameters that are loaded and new."""

    num_loaded: int = 0
    num_new: int = 0

    def add(self, entry: WeightStatus) -> None:
        """Count the parameters of a weight that is loaded or new."""
        if entry.status == "new":
            self.num_new += math.prod(entry.shape)
        else:
            self.num_loaded += math.prod(entry.shape)


@dataclass(frozen=True)
class Conversion(Generic[ModelT]):
    """A planned conversion: for each weight of the new model the source is known, but none is read.

    model_class  Class of the new model.
    config       Config of the new model.
    report       The status of each weight.
    readers      Functions that read the loaded weights, in the order that needs least memory.
    dtype        Precision of the sources, and of the new model by default.
    sources      Role of a source -> its path or name, for messages and the model card.
    tokenizer    A Hugging Face tokenizer with the 3D tokens. None if the sources had no tokenizer.
    """

    model_class: type[ModelT]
    config: PreTrainedConfig
    report: ConversionReport
    readers: Sequence[WeightReader]
    dtype: torch.dtype
    sources: Mapping[str, str]
    tokenizer: Any = None

    def check(self) -> None:
        """Raise `SpearError` if a weight is missing or refused. The message names the first."""
        self.report.check(", ".join(self.sources.values()))

    def run(self, dtype: torch.dtype | None = None, seed: int = 0) -> ModelT:
        """Build the model and read its weights.

        The memory has to have room for the weights in `dtype`, a piece of a file, and the
        covariance of the embeddings.

        Args:
            dtype: Precision of the weights. None takes the precision of the sources.
            seed: The seed of new weights.

        Returns:
            The model in evaluation mode, on the CPU.

        Raises:
            SpearError: A weight is missing, refused or not finite.
        """
        self.check()
        dtype = dtype or self.dtype
        weights: dict[str, Tensor] = {}
        for read in self.readers:
            weights |= read(dtype, torch.Generator().manual_seed(seed))
        names_from_readers = set(weights)

        with torch.random.fork_rng(devices=[]), quiet_transformers():
            torch.manual_seed(seed)
            loaded = load_pretrained(
                self.model_class,
                None,  # no folder, because the weights are given
                config=self.config,
                state_dict=weights,
                dtype=dtype,
                output_loading_info=True,
            )
        model, loading_info = loaded

        # The weights that no reader made are missing for Transformers, and the model initialized
        # them. They must be those that the report calls new. A name like "name[…]" stands for some
        # rows of a weight, whose reader has also drawn the new rows.
        new_names = {
            entry.name for entry in self.report.select_by_status("new") if "[" not in entry.name
        }
        new_names -= names_from_readers
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
        """Run the conversion, and write the model with a model card.

        The folder appears when everything is written. Its recipe.json names the sources.

        Args:
            folder: A new or empty folder.
            dtype: Precision of the weights. None takes the precision of the sources.
            seed: The seed of new weights.
            save_more: Writes more files into the folder it gets, such as `Processor.save`.

        Raises:
            SpearError: A weight is missing, refused or not finite; the folder is not empty; or the
                model cannot be written or does not fit on the disk.
        """
        check_new_or_empty_folder(folder)
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
                f"{folder} cannot be written ({summarize_error(error)}). Give another folder."
            ) from error
        finally:
            shutil.rmtree(partial_folder, ignore_errors=True)
        return model

    def _check_disk_space(self, partial_folder: Path, dtype: torch.dtype) -> None:
        """Raise `SpearError` if the disk of `partial_folder` has no room for the weights."""
        needed_bytes = self.report.count_parameters() * dtype.itemsize
        free_bytes = shutil.disk_usage(partial_folder).free
        if free_bytes < needed_bytes:
            raise SpearError(
                f"{partial_folder.parent} has no room, because {needed_bytes / 1e9:.1f} GB are "
                f"to be written and {free_bytes / 1e9:.1f} GB are free. Make room, or give "
                "another folder."
            )

    def _write(
        self,
        model: ModelT,
        partial_folder: Path,
        model_name: str,
        seed: int,
        save_more: Callable[[Path], Any] | None,
    ) -> None:
        """Write weights, tokenizer, provenance and model card of a model called `model_name`."""
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
        (partial_folder / "README.md").write_text(self._make_card(model_name), encoding="utf-8")

    def _make_card(self, model_name: str) -> str:
        """Return the text of README.md, with the header that the Hub reads.

        The license is that of PaliGemma's weights.
        """
        card_text = CARD_TEXTS[self.config.model_type]
        new_weights = []
        for entry, _ in self.report.fold_layers():
            if entry.status == "new":
                new_weights.append(f"- `{entry.name}` {list(entry.shape)}: {entry.note}")
        new_weights_text = "Every weight was loaded; none is new."
        if new_weights:
            new_weights_text = "\n".join(["These weights are new and untrained:", "", *new_weights])
        source_lines = [f"- {role}: `{source}`" for role, source in self.sources.items()]

        template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
        return template.format(
            name=model_name,
            title=card_text.title,
            pipeline=card_text.pipeline,
            use=card_text.use,
            made="\n".join(source_lines),
            fresh=new_weights_text,
            table=self.report.format_module_table(),
            module=self.model_class.__module__,
            cls=self.model_class.__name__,
        )


# --- Matching ---


def match_weights(
    expected: Mapping[str, Tensor],
    checkpoint: StoredCheckpoint,
    stored_names: Mapping[str, str],
    source_in_notes: str,
) -> tuple[list[WeightStatus], dict[str, str]]:
    """Find the weights of a model in a checkpoint.

    Args:
        expected: The weights that the model needs: our name -> tensor. Only the tensors' shapes are
            read, so they may be on the meta device.
        checkpoint: The checkpoint.
        stored_names: Our name of each weight in the checkpoint -> its name in the checkpoint.
        source_in_notes: What the notes call the checkpoint.

    Returns:
        The status of each expected weight: "loaded", "missing", or "refused" for its shape. And for
        the loaded weights, our name -> the name in the checkpoint.

    Raises:
        SpearError: A weight is not plain floating point.
    """
    entries: list[WeightStatus] = []
    loaded_names: dict[str, str] = {}
    for our_name, tensor in expected.items():
        shape = tuple(tensor.shape)
        if our_name not in stored_names:
            entries.append(WeightStatus(our_name, shape, "missing", f"not in {source_in_notes}"))
            continue
        stored_name = stored_names[our_name]
        checkpoint.get_dtype(stored_name)  # raises SpearError for quantized weights
        stored_shape = checkpoint.weights[stored_name].shape
        if stored_shape != shape:
            note = f"its shape is {list(stored_shape)}, its config says {list(shape)}"
            entries.append(WeightStatus(stored_name, stored_shape, "refused", note))
        else:
            entries.append(
                WeightStatus(our_name, shape, "loaded", f"{source_in_notes}: {stored_name}")
            )
            loaded_names[our_name] = stored_name
    return entries, loaded_names


def list_statuses_of_unused_weights(
    stored_names: Mapping[str, str],
    checkpoint: StoredCheckpoint,
    unused: Mapping[str, str],
    model_name: str,
) -> Iterator[WeightStatus]:
    """Report the weights of a checkpoint that the new model does not have.

    A weight is left out if `unused` has a reason for it. Otherwise it is refused.

    Args:
        stored_names: Our name of each such weight -> its name in the checkpoint.
        checkpoint: The checkpoint.
        unused: Patterns that match beginnings of our names -> why the model needs no such weights.
        model_name: What the notes of refused weights call the model.
    """
    for our_name, stored_name in stored_names.items():
        shape = checkpoint.weights[stored_name].shape
        reason = _find_reason(our_name, unused)
        if reason is not None:
            yield WeightStatus(stored_name, shape, "left out", reason)
        else:
            yield WeightStatus(stored_name, shape, "refused", f"{model_name} has no such weight")


def _find_reason(name: str, unused: Mapping[str, str]) -> str | None:
    """Return the reason of the first pattern in `unused` that matches the name, or None."""
    for pattern, reason in unused.items():
        if re.match(pattern, name):
            return reason
    return None


# --- Printing ---


def _get_module_name(weight_name: str) -> str:
    """The module that a weight belongs to: the first part of the weight's name, or two parts.

    It is two parts for the two Gemmas, so that their embeddings and layers are separate modules.
    """
    prefix = "vlm." if weight_name.startswith("vlm.") else ""
    inner_name = weight_name.removeprefix(prefix)
    name_without_rows = inner_name.split("[")[0]  # "name" of the rows "name[:10]"
    name_parts = name_without_rows.split(".")
    num_parts = 2 if name_parts[0] in ("language_model", "expert") else 1
    return prefix + ".".join(name_parts[:num_parts])


def _join_names_with_number_ranges(first: str, last: str) -> str:
    """Join two names that differ only in numbers, with the range of each number.

    >>> _join_names_with_number_ranges("layers.0.x", "layers.17.x")
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
    lines = []
    for row in rows:
        cells = []
        for index, (text, width) in enumerate(zip(row, widths, strict=True)):
            cells.append(text.rjust(width) if index in right_aligned else text.ljust(width))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
