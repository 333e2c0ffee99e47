"""Conversion of a SPEAR-1 that another program has saved, whose weights have other names.

A mapping file (TOML) says which name of theirs is which of ours. `spear convert roles --save-names`
writes a first one, which a person completes.
"""

import copy
import dataclasses
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spear.errors import SpearError, check_known, format_count, summarize_error
from spear.models.presets import build_spear1_config, get_preset
from spear.models.processing import check_paligemma_tokens
from spear.models.spear1 import Spear1ForActionPrediction
from spear.models.weights.conversion import (
    Conversion,
    ConversionReport,
    WeightStatus,
    list_statuses_of_unused_weights,
    match_weights,
)
from spear.models.weights.load import (
    StoredCheckpoint,
    WeightReader,
    describe_source,
    get_or_download_tokenizer,
    load_tokenizer,
    make_weight_reader,
    rename_prefixes,
)
from spear.models.weights.roles import insert_numbers, mask_numbers
from spear.tokens import TOKEN_FORMAT, extend_tokenizer
from spear.util.files import read_utf8_bytes

SOURCE = "SPEAR-1"
"""What reports call the checkpoint."""

MAX_MAPPING_BYTES = 10 * 2**20  # a mapping that lists every tensor has less than 1 MB
MAX_CHOICES = 3  # of an open name that a message lists

AUTHORS_MAPPING = Path(__file__).with_name("names_spear1_franka.toml")

FIELDS_OF_OTHER_COMMANDS = ("repository", "small_files", "settings")
"""Fields of `names_spear1_franka.toml` that other commands read."""


@dataclass(frozen=True, kw_only=True)
class WeightMapping:
    """How a checkpoint names the weights of a SPEAR-1. * in a name stands for a layer's number.

    verified  Whether somebody has compared the actions of the converted policy with the authors'.
    renamed   Rules (old prefix, new prefix) for names that are neither settled nor joined.
    settled   Stored name -> our name.
    joined    Stored name -> our names, whose weights are its rows, in this order.
    open      Stored name -> our names of which a person has to choose one.
    unknown   Stored name -> its shape, for a person to read. The conversion refuses such weights.
    unused    Patterns that match beginnings of names -> why SPEAR-1 needs no such weights. The
              names are those after `renamed`.
    """

    verified: bool = False
    renamed: Sequence[tuple[str, str]] = ()
    settled: Mapping[str, str] = field(default_factory=dict)
    joined: Mapping[str, Sequence[str]] = field(default_factory=dict)
    open: Mapping[str, Sequence[str]] = field(default_factory=dict)
    unknown: Mapping[str, Sequence[int]] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)

    def map_to_our_names(self, stored_names: Iterable[str]) -> dict[str, list[str]]:
        """Return stored name -> our names. A weight has several of ours if it is joined of them.

        Raises:
            SpearError: Two weights get the same name.
        """
        our_names: dict[str, list[str]] = {}
        stored_names_by_ours: dict[str, str] = {}
        for stored_name in stored_names:
            our_names[stored_name] = self._translate_to_our_names(stored_name)
            for our_name in our_names[stored_name]:
                first_name = stored_names_by_ours.setdefault(our_name, stored_name)
                if first_name != stored_name:
                    raise SpearError(
                        f"{first_name} and {stored_name} are both {our_name} by the mapping."
                        " Correct one of them."
                    )
        return our_names

    def _translate_to_our_names(self, stored_name: str) -> list[str]:
        """Return our names of one weight. An entry for its whole name goes before one with *."""
        for pattern in (stored_name, mask_numbers(stored_name)):
            if pattern in self.settled:
                return [insert_numbers(self.settled[pattern], stored_name)]
            if pattern in self.joined:
                return [insert_numbers(name, stored_name) for name in self.joined[pattern]]
        return [rename_prefixes(stored_name, self.renamed)]


def read_mapping(file: Path) -> WeightMapping:
    """Read a mapping file.

    Raises:
        SpearError: The file cannot be read, or has an unknown or wrong field, or leaves a choice
            open.
    """
    from pydantic import TypeAdapter

    our_fields = [mapping_field.name for mapping_field in dataclasses.fields(WeightMapping)]
    try:
        content = tomllib.loads(read_utf8_bytes(file, MAX_MAPPING_BYTES).decode())
        mapping = TypeAdapter(WeightMapping).validate_python(content)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or summarize_error(error)
        raise SpearError(
            f"{file} is no mapping of names ({reason}). Write one with `spear convert roles "
            "--save-names`."
        ) from error
    for name in content:
        check_known("field", [*our_fields, *FIELDS_OF_OTHER_COMMANDS], name, location=str(file))
    if mapping.open:
        first_name, choices = next(iter(mapping.open.items()))
        raise SpearError(
            f"{file} leaves {format_count(len(mapping.open), 'names')} open, first {first_name} "
            f"({' or '.join(choices[:MAX_CHOICES])}). Move each to the table `settled`, with one "
            "name of ours."
        )
    return mapping


def plan_mapped(
    checkpoint: Path | str,
    mapping_file: Path | None = None,
    size: str = "spear1",
    tokenizer: Path | str | None = None,
) -> Conversion[Spear1ForActionPrediction]:
    """Plan the conversion of a SPEAR-1 whose weights have the names of a mapping file.

    All names and shapes are checked; no weights are read yet.

    Args:
        checkpoint: The SPEAR-1 in safetensors, given as a folder or a name on the Hub.
        mapping_file: The mapping file. By default it is that of the authors' release, which nobody
            has verified.
        size: The preset whose networks the checkpoint has.
        tokenizer: The folder of PaliGemma's tokenizer, or a name on the Hub. None makes a model
            without tokenizer.

    Raises:
        SpearError: The checkpoint is missing, incomplete or broken, the mapping is wrong, or the
            tokenizer does not fit the preset.
    """
    stored = StoredCheckpoint.open(checkpoint, SOURCE)
    mapping_file = mapping_file or AUTHORS_MAPPING
    mapping = read_mapping(mapping_file)
    config = build_spear1_config(get_preset(size))
    # The weights that the model needs. On the meta device they have only shapes.
    with torch.device("meta"):
        expected = Spear1ForActionPrediction(copy.deepcopy(config)).state_dict()

    # Weights that are one of ours, and those that are joined of several.
    names: dict[str, str] = {}
    joined_weights: list[JoinedWeight] = []
    for stored_name, our_names in mapping.map_to_our_names(stored.weights).items():
        if len(our_names) > 1:
            joined_weights.append(JoinedWeight(stored_name, our_names))
        else:
            names[our_names[0]] = stored_name
    joined_names = {name for joined in joined_weights for name in joined.our_names}

    wanted = {name: weight for name, weight in expected.items() if name not in joined_names}
    entries, loaded_names = match_weights(wanted, stored, names, SOURCE)
    fitting_weights = []
    for joined in joined_weights:
        joined_entries = joined.list_statuses(stored, expected)
        entries += joined_entries
        if all(entry.status == "loaded" for entry in joined_entries):
            fitting_weights.append(joined)
    leftover_names = {our: stored_name for our, stored_name in names.items() if our not in expected}
    entries += list_statuses_of_unused_weights(leftover_names, stored, mapping.unused, SOURCE)

    sources = {
        SOURCE: describe_source(checkpoint, stored.folder),
        "mapping": str(mapping_file),
    }
    loaded_tokenizer = None
    if tokenizer is not None:
        loaded_tokenizer = _load_and_extend_tokenizer(tokenizer, config.vlm_config)
        sources["tokenizer"] = describe_source(tokenizer, get_or_download_tokenizer(tokenizer))
    return Conversion(
        model_class=Spear1ForActionPrediction,
        config=config,
        report=ConversionReport(entries),
        readers=[
            make_weight_reader(stored, loaded_names),
            _make_joined_reader(stored, fitting_weights, expected),
        ],
        dtype=stored.compute_common_dtype(stored.weights),
        sources=sources,
        tokenizer=loaded_tokenizer,
    )


@dataclass(frozen=True)
class JoinedWeight:
    """A stored weight that consists of several of ours, row after row.

    stored_name  Its name in the checkpoint.
    our_names    Our names, in the order of the rows.
    """

    stored_name: str
    our_names: Sequence[str]

    def list_statuses(
        self, stored: StoredCheckpoint, expected: Mapping[str, Tensor]
    ) -> list[WeightStatus]:
        """Return the status of each weight of ours, or that the stored weight is refused."""
        stored_shape = stored.weights[self.stored_name].shape
        unknown_names = [name for name in self.our_names if name not in expected]
        if unknown_names:
            note = f"{SOURCE} has no {unknown_names[0]}"
            return [WeightStatus(self.stored_name, stored_shape, "refused", note)]
        shapes = [tuple(expected[name].shape) for name in self.our_names]
        joined_shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        if stored_shape != joined_shape:
            note = f"its shape is {list(stored_shape)}, joined ours are {list(joined_shape)}"
            return [WeightStatus(self.stored_name, stored_shape, "refused", note)]
        entries = []
        for name, rows in self.list_rows(expected):
            note = f"{SOURCE}: {self.stored_name}, rows {rows.start} to {rows.stop - 1}"
            entries.append(WeightStatus(name, tuple(expected[name].shape), "loaded", note))
        return entries

    def list_rows(self, expected: Mapping[str, Tensor]) -> Iterator[tuple[str, slice]]:
        """Yield our names, each with its rows of the stored weight."""
        begin = 0
        for name in self.our_names:
            end = begin + expected[name].shape[0]
            yield name, slice(begin, end)
            begin = end


def _make_joined_reader(
    stored: StoredCheckpoint, joined_weights: Sequence[JoinedWeight], expected: Mapping[str, Tensor]
) -> WeightReader:
    """Return a reader that splits joined weights into ours."""

    def read(dtype: torch.dtype, _: torch.Generator) -> dict[str, Tensor]:
        weights = {}
        for joined in joined_weights:
            shape = stored.weights[joined.stored_name].shape
            whole = stored.read_into(joined.stored_name, torch.empty(shape, dtype=dtype))
            for name, rows in joined.list_rows(expected):
                weights[name] = whole[rows].clone()
        return weights

    return read


def _load_and_extend_tokenizer(name: Path | str, vlm_config: Any) -> Any:
    """Load a tokenizer, and add the 3D tokens unless it has them.

    Raises:
        SpearError: The tokenizer is missing, or its 3D tokens have other ids than the model's.
    """
    folder = get_or_download_tokenizer(name)
    tokenizer = load_tokenizer(folder)
    check_paligemma_tokens(tokenizer)
    first_id = extend_tokenizer(tokenizer, vlm_config.coordinate_bins).start
    if first_id != vlm_config.coordinate_start:
        raise SpearError(
            f"the tokenizer in {folder} has {TOKEN_FORMAT.format(0)} as token {first_id}, the "
            f"preset as token {vlm_config.coordinate_start}. Give the tokenizer of the checkpoint."
        )
    return tokenizer
