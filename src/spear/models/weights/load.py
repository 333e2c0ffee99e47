"""Loading of checkpoints, which are checked before they are loaded.

A checkpoint is a folder with a config and safetensors, local or on the Hugging Face Hub.
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from spear.errors import SpearError, check_known, format_count, summarize_error
from spear.models.weights.folders import warn_about_changed_files
from spear.util.files import read_json, refuse_lfs_pointer
from spear.util.foreign_paths import join_inside
from spear.util.network import check_hub_reachable_or_cached, is_hub_name, is_hub_reachable
from spear.util.pretrained import load_pretrained

ModelT = TypeVar("ModelT", bound=PreTrainedModel)

FLOAT_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""Name of a floating-point type in safetensors -> PyTorch's type."""

HUB_TOKENIZER_PATTERNS = ["*.json", "tokenizer.model", "*.jinja"]
"""The files of a repository on the Hub that a tokenizer needs."""

HUB_FILE_PATTERNS = [*HUB_TOKENIZER_PATTERNS, "*.safetensors"]
"""The files of a repository on the Hub that belong to a checkpoint."""

MAX_READ_BYTES = 8 * 2**20
"""How many bytes of a weight are read at a time. The file is closed after each read, so that these
bytes do not stay in memory."""

DIGEST_TAIL_BYTES = 4096
"""How many bytes at the end of each weight `hash_weight_tails` reads. At the end of the embeddings
are those of the 3D tokens."""

# What the error of `read_json` advises if config.json is missing or broken.
_NEEDS_WHOLE_CHECKPOINT = "give the folder of a whole checkpoint"


# --- Whole models ---


def load(cls: type[ModelT], folder: Path | str, dtype: torch.dtype | None = None) -> ModelT:
    """Load a model that `save_pretrained` has saved, in evaluation mode.

    Args:
        cls: Class of the model.
        folder: Folder of the model.
        dtype: Precision of the weights. None keeps the precision that the config names.

    Raises:
        SpearError: A file is missing or truncated, or the checkpoint has another architecture or
            other shapes. The message names the file.

    Example:
        >>> model = load(Spear1ForActionPrediction, "runs/spear1")  # doctest: +SKIP
    """
    folder = Path(folder)
    if dtype is not None and not dtype.is_floating_point:
        raise SpearError(
            f"weights cannot be {dtype}. Give a floating-point type, such as float32 or bfloat16."
        )
    read_compatible_config(cls, folder)
    warn_about_changed_files(folder)
    try:
        with quiet_transformers():
            loaded = load_pretrained(
                cls,
                folder,
                dtype=dtype or "auto",
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
            )
    except SpearError:
        raise
    except Exception as error:  # any kind: wrong numbers in a config break the networks
        raise SpearError(
            f"the checkpoint {folder} cannot be loaded ({summarize_error(error)}). Copy it again."
        ) from error
    model, loading_info = loaded
    _check_loading_info(loading_info, folder)
    check_finite(model, str(folder))
    return model.eval()


def _check_loading_info(loading_info: Mapping[str, Any], folder: Path) -> None:
    """Raise `SpearError` if Transformers found weights that do not fit the model."""
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = loading_info[problem]
        if not keys:
            continue
        # A mismatched key is a tuple of the name and two shapes, other keys are names.
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)
        raise SpearError(
            f"the weights in {folder} do not fit its config, with {len(names)} "
            f"{problem.replace('_', ' ')}, first {names[0]}. Save the model again."
        )


def check_finite(model: nn.Module, source_in_message: str) -> None:
    """Raise `SpearError` if a weight contains NaN or infinity. The message names the weight."""
    for name, weight in model.state_dict().items():
        if weight.numel() == 0:
            continue
        smallest, largest = weight.aminmax()
        if not smallest.isfinite() or not largest.isfinite():
            raise SpearError(
                f"{name} of {source_in_message} contains NaN or infinity. Copy it again, or give "
                "another dtype."
            )


def read_compatible_config(cls: type[PreTrainedModel], folder: Path) -> PreTrainedConfig:
    """Return the config of a checkpoint of `cls`. The weights are listed and checked, not read.

    Raises:
        SpearError: The folder is not a whole checkpoint of `cls`, or its weights are quantized.
    """
    if not folder.is_dir():
        raise SpearError(
            f"there is no checkpoint {folder}. Give a folder with config.json and safetensors."
        )
    architecture = read_model_type(folder)
    assert cls.config_class is not None
    expected = cls.config_class.model_type
    if (architecture, expected) == ("spear_vlm", "spear1"):
        raise SpearError(
            f"{folder} is a SPEAR-VLM, which cannot act. Train a policy from it with `spear "
            "train … --init`."
        )
    check_known("architecture", [expected], architecture, location=str(folder / "config.json"))
    checkpoint = StoredCheckpoint.open(folder, expected)
    checkpoint.compute_common_dtype(checkpoint.weights)  # raises SpearError for quantized weights
    return checkpoint.read_config(cls.config_class)


def read_model_type(folder: Path) -> str:
    """Return the `model_type` of a checkpoint, which is in its config.

    Raises:
        SpearError: The config is missing or broken.
    """
    return str(read_json(folder / "config.json", _NEEDS_WHOLE_CHECKPOINT).get("model_type"))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """A context that suppresses Transformers' progress bars, and its warnings about weights, which
    we check ourselves."""
    had_progress_bar = logging.is_progress_bar_enabled()
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_progress_bar:
            logging.enable_progress_bar()


# --- Stored weights ---


@dataclass(frozen=True)
class StoredTensor:
    """A weight in a file.

    file   The file.
    shape  The weight's shape.
    dtype  The name of its type in safetensors ("F32", "BF16", "I8" …).
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint whose weights have been listed, not read.

    folder   The folder of the checkpoint.
    config   The content of config.json, or an empty dict if there is none.
    weights  Name of a weight -> the file, shape and type of the weight.
    """

    folder: Path
    config: Mapping[str, Any]
    weights: Mapping[str, StoredTensor]

    @staticmethod
    def open(name: Path | str, kind_in_messages: str) -> "StoredCheckpoint":
        """List the weights of a local folder, or of a repository on the Hub.

        Args:
            name: The folder, or the name on the Hub.
            kind_in_messages: What messages call the checkpoint, such as "PaliGemma". It is not
                checked.

        Raises:
            SpearError: The checkpoint is not found, incomplete or broken.
        """
        folder = get_or_download_checkpoint(name, kind_in_messages)
        weights: dict[str, StoredTensor] = {}
        for file in _list_weight_files(folder):
            for key, tensor in _list_tensors(file).items():
                if key in weights:
                    raise SpearError(
                        f"{key} is in two files, {weights[key].file} and {file}."
                        " Remove one of them."
                    )
                weights[key] = tensor
        if not weights:
            raise SpearError(f"the checkpoint {folder} contains no weights. Copy it again.")
        config_file = folder / "config.json"
        config: Mapping[str, Any] = {}
        if config_file.is_file():
            config = read_json(config_file, _NEEDS_WHOLE_CHECKPOINT)
        return StoredCheckpoint(folder, config, weights)

    def get_dtype(self, key: str) -> torch.dtype:
        """The dtype of a weight. Raise `SpearError` if it is no plain floating-point type."""
        tensor = self.weights[key]
        if tensor.dtype not in FLOAT_DTYPES:
            raise SpearError(
                f"{key} in {tensor.file} is {tensor.dtype}. Use a checkpoint in float32, "
                "bfloat16 or float16, not a quantized one."
            )
        return FLOAT_DTYPES[tensor.dtype]

    def compute_common_dtype(self, keys: Iterable[str]) -> torch.dtype:
        """The smallest dtype that represents all of these weights (at least one) exactly.

        Raise `SpearError` if a weight has no plain floating-point type.
        """
        return functools.reduce(torch.promote_types, map(self.get_dtype, keys))

    def map_to_stored_names(self, rules: Iterable[tuple[str, str]]) -> dict[str, str]:
        """Return new name -> stored name of all weights, with new names from `rename_prefixes`.

        Raises:
            SpearError: Two weights get the same name.
        """
        # If two weights get the same name, the second replaces the first in `stored_names`.
        stored_names = {rename_prefixes(name, rules): name for name in self.weights}
        replaced = self.weights.keys() - stored_names.values()
        if replaced:
            first = min(replaced)
            second = stored_names[rename_prefixes(first, rules)]
            raise SpearError(
                f"{first} and {second} in {self.folder} are one weight under two names. Remove "
                "one of them."
            )
        return stored_names

    def hash_weight_tails(self) -> str:
        """A hash of the names, the shapes and the last values of all weights.

        All weights are part of it, because a training may change only a few of them. Only their
        last values are, because reading all values would take long.
        """
        digest = hashlib.sha256()
        for path in sorted({tensor.file for tensor in self.weights.values()}):
            with path.open("rb") as file:
                # A file of safetensors has 8 bytes with the length of its header, then the header,
                # then the data. The header has the place of each weight in the data.
                header_bytes = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(header_bytes))
                data_begin = 8 + header_bytes
                for key in sorted(header.keys() & self.weights.keys()):
                    digest.update(f"{key} {header[key]}".encode())
                    begin, end = header[key]["data_offsets"]
                    tail_begin = max(begin, end - DIGEST_TAIL_BYTES)
                    file.seek(data_begin + tail_begin)
                    digest.update(file.read(end - tail_begin))
        return digest.hexdigest()

    def read_config(self, config_class: Any) -> Any:
        """Return the config as an object of `config_class`.

        Raises:
            SpearError: The class does not accept the config's fields.
        """
        try:
            return config_class.from_dict(dict(self.config))
        except Exception as error:  # any kind, such as the errors of the decorator `strict`
            # An error of `strict` has a cause, which says what is wrong.
            reason = summarize_error(error.__cause__ or error)
            raise SpearError(
                f"the config {self.folder / 'config.json'} is broken ({reason}). Copy it again."
            ) from error

    def read_pieces(self, key: str) -> Iterator[tuple[slice, Tensor]]:
        """Read a weight [rows, …] piece by piece, and yield the range of rows with each piece.

        A piece is valid only until the next one is read.
        """
        self.get_dtype(key)  # raises SpearError for quantized weights
        tensor = self.weights[key]
        row_bytes = max(1, math.prod(tensor.shape[1:]) * 4)  # 4 bytes per number, as in float32
        rows_per_piece = max(1, MAX_READ_BYTES // row_bytes)
        for begin in range(0, tensor.shape[0], rows_per_piece):
            row_range = slice(begin, begin + rows_per_piece)
            with safe_open(tensor.file, framework="pt") as opened:
                yield row_range, opened.get_slice(key)[row_range]

    def read_into(self, key: str, out: Tensor) -> Tensor:
        """Read a weight, piece by piece, into the tensor `out` of the same shape, and return it."""
        for row_range, piece in self.read_pieces(key):
            out[row_range].copy_(piece)
        return out


def _list_weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint folder: those in the index, or the single file.

    Raises:
        SpearError: A file is missing, the index is broken, or there is both an index and a file
            that is not in it.
    """
    index = folder / "model.safetensors.index.json"
    single_file = folder / "model.safetensors"
    files = [single_file]
    if index.is_file():
        try:
            file_names = read_json(index, "copy it again")["weight_map"].values()
            files = sorted({join_inside(folder, name) for name in file_names})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            refuse_lfs_pointer(index, index)
            raise SpearError(f"the index {index} is broken ({error}). Copy it again.") from error
        if single_file.is_file() and single_file not in files:
            raise SpearError(
                f"{index} and {single_file.name} are two checkpoints in one folder. Remove the "
                "older one."
            )
    for file in files:
        if not file.is_file():
            raise SpearError(f"{file} is missing. Copy the checkpoint again.")
    return files


def _list_tensors(file: Path) -> dict[str, StoredTensor]:
    """Return name -> tensor for a safetensors file. Raise `SpearError` if the file is broken."""
    tensors = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                tensor_slice = opened.get_slice(key)
                tensors[key] = StoredTensor(
                    file, tuple(tensor_slice.get_shape()), tensor_slice.get_dtype()
                )
    except (SafetensorError, OSError) as error:
        refuse_lfs_pointer(file, file)
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise SpearError(f"the checkpoint {file} is broken ({reason}). Copy it again.") from error
    return tensors


# --- Reading weights under other names ---

WeightReader = Callable[[torch.dtype, torch.Generator], dict[str, Tensor]]
"""A function (dtype, generator) that reads some weights of a new model, and returns them by name.

The weights have this dtype. If some of them are drawn, the random numbers come from the
generator."""


def make_weight_reader(
    checkpoint: StoredCheckpoint, stored_names: Mapping[str, str], factor: float = 1.0
) -> WeightReader:
    """Return a reader of weights under new names.

    Args:
        checkpoint: The checkpoint.
        stored_names: New name -> stored name.
        factor: A number that all weights are multiplied by.
    """

    def file_and_name(new_name: str) -> tuple[str, str]:
        return str(checkpoint.weights[stored_names[new_name]].file), new_name

    # Read one file after the other.
    new_names = sorted(stored_names, key=file_and_name)

    def read(dtype: torch.dtype, _: torch.Generator) -> dict[str, Tensor]:
        weights = {}
        for new_name in new_names:
            stored_name = stored_names[new_name]
            buffer = torch.empty(checkpoint.weights[stored_name].shape, dtype=dtype)
            weights[new_name] = checkpoint.read_into(stored_name, buffer)
        if factor == 1.0:
            return weights
        return {name: factor * weight for name, weight in weights.items()}

    return read


def make_zero_reader(shapes: Mapping[str, tuple[int, ...]]) -> WeightReader:
    """Return a reader of new weights that are zero. `shapes` maps their names to their shapes."""

    def read(dtype: torch.dtype, _: torch.Generator) -> dict[str, Tensor]:
        return {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}

    return read


def make_prefixed_reader(reader: WeightReader, prefix: str) -> WeightReader:
    """Return a reader of the same weights, whose names begin with `prefix`."""

    def read(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
        weights = reader(dtype, generator)
        return {f"{prefix}{name}": weight for name, weight in weights.items()}

    return read


def rename_prefixes(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """Replace the beginning of a name by all rules (old prefix, new prefix), one after another.

    A rule applies to the name that the rules before it made, so several rules can change one name.

    >>> rename_prefixes("model.dit.norm", [("model.", ""), ("dit.", "expert.")])
    'expert.norm'
    """
    for old_prefix, new_prefix in rules:
        if name.startswith(old_prefix):
            name = new_prefix + name.removeprefix(old_prefix)
    return name


def describe_tensor_differences(
    expected: Mapping[str, tuple[int, ...]], present: Mapping[str, tuple[int, ...]]
) -> str:
    """Describe in one line how a file's tensors differ from the expected ones, or return "".

    The line has the number of tensors with each problem, and the first of them.

    Args:
        expected: Name -> shape of the expected tensors.
        present: Name -> shape of the tensors in the file.
    """
    missing = [f"{name} {list(expected[name])}" for name in expected if name not in present]
    unknown = [f"{name} {list(present[name])}" for name in present if name not in expected]
    misshapen = []
    for name, shape in expected.items():
        if name in present and present[name] != shape:
            misshapen.append(f"{name} {list(present[name])}, not {list(shape)}")

    problems = []
    for problem, descriptions in (
        ("missing", missing),
        ("unknown", unknown),
        ("of the wrong shape", misshapen),
    ):
        if descriptions:
            count = format_count(len(descriptions), "weights")
            problems.append(f"{count} {problem}, first {min(descriptions)}")
    return "; ".join(problems)


# --- Where checkpoints are ---


def get_or_download_checkpoint(name: Path | str, kind_in_messages: str) -> Path:
    """Return the folder of a checkpoint, which is `name` itself or, for a name on the Hub, the
    folder in the cache.

    Raises:
        SpearError: There is no such checkpoint. The message calls it `kind_in_messages`.
    """
    description = f"{kind_in_messages} {name}"
    return _get_or_download_folder(
        name, description, "config.json and safetensors", HUB_FILE_PATTERNS
    )


def get_or_download_tokenizer(name: Path | str) -> Path:
    """Return the folder of a tokenizer, as `get_or_download_checkpoint` does, without weights."""
    return _get_or_download_folder(
        name, f"tokenizer {name}", "tokenizer.json", HUB_TOKENIZER_PATTERNS
    )


def _get_or_download_folder(
    name: Path | str, description: str, content: str, patterns: Sequence[str]
) -> Path:
    """Return a local folder, or download the files with the names `patterns` from the Hub.

    Messages say what was not found by `description`, and what its folder contains by `content`.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists() or not is_hub_name(str(name)):
        raise SpearError(
            f"there is no {description}. Give its folder ({content}), or its name on the Hub."
        )
    return download_from_hub(str(name), "a local folder", patterns=patterns)


def download_from_hub(
    name: str,
    alternative_in_message: str,
    file: str | None = None,
    patterns: Sequence[str] = HUB_FILE_PATTERNS,
) -> Path:
    """Download one file or the checkpoint of a repository, unless the cache has it, and return its
    path.

    Args:
        name: Name on the Hub, perhaps with @REVISION.
        alternative_in_message: What the message tells the user to give instead, if there is no
            network.
        file: The name of the file. None downloads the files with the names `patterns`, and the path
            is their folder.
        patterns: By default the files of a checkpoint.

    Raises:
        SpearError: The download fails. The message says why.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    check_hub_reachable_or_cached(name, alternative_in_message)
    repository, _, revision = name.partition("@")
    options: dict[str, Any] = {
        "revision": revision or None,
        "local_files_only": not is_hub_reachable(),
    }
    try:
        if file is not None:
            return Path(hf_hub_download(repository, file, **options))
        return Path(snapshot_download(repository, allow_patterns=list(patterns), **options))
    except Exception as error:  # errors of the Hub's client and of the network have no common base
        raise SpearError(
            f"{name} cannot be loaded from the Hugging Face Hub ({summarize_error(error)}). "
            f"Check the name and the network, or give {alternative_in_message}."
        ) from error


def describe_source(name: Path | str, folder: Path) -> str:
    """Describe a source so that it can be found again: a name on the Hub gets its revision.

    `folder` is the folder that was read. In the cache of the Hub, the folder's name is the
    revision.
    """
    is_cached = folder.parent.name == "snapshots"
    if is_cached and is_hub_name(str(name)) and "@" not in str(name):
        return f"{name}@{folder.name}"
    return str(name)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer in a folder, without running code of the folder.

    Raises:
        SpearError: There is no tokenizer, or it is broken.
    """
    try:
        return load_pretrained(AutoTokenizer, folder, local_files_only=True)
    except SpearError:
        raise
    except Exception as error:  # the parser of tokenizers raises plain `Exception`s
        for file in sorted(folder.glob("token*")):
            refuse_lfs_pointer(file, file)
        raise SpearError(
            f"the tokenizer in {folder} is broken ({summarize_error(error)}). Copy it again."
        ) from error
