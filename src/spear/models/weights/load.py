"""Checkpoints: folders with a config and safetensors, local or on the Hub, checked before they are loaded."""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from spear.errors import SpearError, check_known, summarize_error
from spear.models.weights.folders import warn_about_changed_files
from spear.util.files import read_json
from spear.util.network import check_available_on_hub, explain_hub_unreachable, is_hub_name

ModelT = TypeVar("ModelT", bound=PreTrainedModel)
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
"""The files of a repository on the Hub that belong to a checkpoint."""
_WHOLE = "give the folder of a whole checkpoint"
_PIECE = 8 * 2**20
"""Bytes read at a time. A file is closed after each piece, so that what was read of it leaves the memory."""
_END = 4096
"""Bytes at the end of each weight that `digest` reads: in embeddings, where the 3D tokens are."""


def load(cls: type[ModelT], folder: Path | str, dtype: torch.dtype | None = None) -> ModelT:
    """The model of a class saved in a folder by `save_pretrained`, in evaluation mode.

    dtype: None keeps the one that its config names. Raises SpearError, naming the file, when something is
    missing or truncated, or the checkpoint is of another architecture or shape.
    """
    folder = Path(folder)
    if dtype is not None and not dtype.is_floating_point:
        raise SpearError(
            f"wrong dtype: {dtype}: weights are floating-point: give float32 or bfloat16"
        )
    check_checkpoint(cls, folder)
    warn_about_changed_files(folder)
    how: Any = dict.fromkeys(
        ("local_files_only", "output_loading_info", "ignore_mismatched_sizes"), True
    )
    try:
        with quiet_transformers():
            loaded: Any = cls.from_pretrained(folder, dtype=dtype or "auto", **how)
    except Exception as error:  # of its networks too, which wrong numbers break
        raise SpearError(f"cannot load checkpoint: {folder}: {summarize_error(error)}") from error
    model, info = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info[problem])
            what = f"{len(names)} {problem.replace('_', ' ')}, first {names[0]}"
            raise SpearError(
                f"checkpoint does not fit its config: {folder}: {what}: save the model again"
            )
    check_finite(model, str(folder))
    return model.eval()


def check_finite(model: nn.Module, where: str) -> None:
    """Raise SpearError, naming the first, when a weight is NaN or infinite."""
    for name, weight in model.state_dict().items():
        if weight.numel() and not all(end.isfinite() for end in weight.aminmax()):
            raise SpearError(
                f"{where}: {name} is NaN or infinite: copy it again, or give another dtype"
            )


def read_architecture(folder: Path) -> str:
    """The `model_type` of a checkpoint folder. Raises SpearError when its config is missing or broken."""
    return str(read_json(folder / "config.json", _WHOLE).get("model_type"))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Transformers without progress bars, and without warnings about weights, which we check ourselves."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def check_checkpoint(cls: type[PreTrainedModel], folder: Path) -> PreTrainedConfig:
    """The config of a checkpoint of `cls`, whose weights are listed, not read.

    Raises SpearError for a folder that is not a whole checkpoint of `cls`, or one of quantised weights.
    """
    if not folder.is_dir():
        raise SpearError(
            f"checkpoint not found: {folder}: give a folder with config.json and safetensors"
        )
    kind = read_architecture(folder)
    assert cls.config_class is not None
    wanted = cls.config_class.model_type
    if (kind, wanted) == ("spear_vlm", "spear1"):
        raise SpearError(
            f"{folder}: is a SPEAR-VLM: train a policy from it with `spear train … --init`"
        )
    check_known(f"architecture in {folder / 'config.json'}:", [wanted], kind)
    shards = StoredCheckpoint.open(folder, wanted)
    shards.precision(shards.weights)
    return shards.read_config(cls.config_class)


@dataclass(frozen=True)
class StoredTensor:
    """A weight in a file; dtype as safetensors calls it ("F32", "BF16", "I8" …)."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint folder whose weights have been listed, not read. config: of config.json, or empty."""

    folder: Path
    config: Mapping[str, Any]
    weights: Mapping[str, StoredTensor]

    @staticmethod
    def open(name: Path | str, what: str) -> "StoredCheckpoint":
        """A local folder, or a name on the Hub. what: the kind of checkpoint, for the error messages.

        Raises `SpearError` when it is not found, incomplete or broken.
        """
        folder = find_checkpoint(name, what)
        weights: dict[str, StoredTensor] = {}
        for file in _weight_files(folder):
            try:
                with safe_open(file, framework="pt") as opened:
                    for key in opened.keys():  # noqa: SIM118
                        if key in weights:
                            raise SpearError(
                                f"{key} is in two files: {weights[key].file} and {file}"
                            )
                        part = opened.get_slice(key)
                        weights[key] = StoredTensor(file, tuple(part.get_shape()), part.get_dtype())
            except (SafetensorError, OSError) as error:
                raise SpearError(f"broken checkpoint: {file}: {error}: copy it again") from error
        if not weights:
            raise SpearError(f"checkpoint incomplete: {folder} holds no weights: copy it again")
        file = folder / "config.json"
        return StoredCheckpoint(folder, read_json(file, _WHOLE) if file.is_file() else {}, weights)

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of a weight. Raises `SpearError` unless it is a plain floating-point one."""
        stored = self.weights[key]
        if stored.dtype not in _FLOATS:
            cure = "use a checkpoint in float32, bfloat16 or float16, not a quantised one"
            raise SpearError(f"wrong dtype: {key} in {stored.file} is {stored.dtype}: {cure}")
        return _FLOATS[stored.dtype]

    def names(self, rules: Iterable[tuple[str, str]]) -> dict[str, str]:
        """The weights, renamed by these rules -> stored names. `SpearError` where two become one."""
        names = {rename_prefixes(stored, rules): stored for stored in self.weights}
        if lost := self.weights.keys() - names.values():
            both = f"{min(lost)} and {names[rename_prefixes(min(lost), rules)]}"
            raise SpearError(
                f"{self.folder}: {both} are one weight under two names: remove one of them"
            )
        return names

    def precision(self, keys: Iterable[str]) -> torch.dtype:
        """The dtype that holds these weights, of which there are some. Raises as `dtype` does."""
        return functools.reduce(torch.promote_types, map(self.dtype, keys))

    def digest(self) -> str:
        """A hash of all weights' names, shapes and ends: a training may change few of them."""
        digest = hashlib.sha256()
        for path in sorted({stored.file for stored in self.weights.values()}):
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
                for key in sorted(header.keys() & self.weights.keys()):
                    digest.update(f"{key} {header[key]}".encode())
                    first, last = header[key]["data_offsets"]
                    begin = max(first, last - _END)
                    file.seek(8 + size + begin)
                    digest.update(file.read(last - begin))
        return digest.hexdigest()

    def read_config(self, kind: Any) -> Any:
        """The config, of this class. Raises `SpearError` where its fields are not such a config's."""
        try:
            return kind.from_dict(dict(self.config))
        except Exception as error:  # of all kinds, those of `strict` among them
            where, why = self.folder / "config.json", summarize_error(error.__cause__ or error)
            raise SpearError(f"broken config: {where}: {why}: copy it again") from error

    def pieces(self, key: str) -> Iterator[tuple[slice, Tensor]]:
        """A weight [rows, …] in pieces of some rows, each with its place in the whole; to be used at once."""
        self.dtype(key)
        stored = self.weights[key]
        rows = max(1, _PIECE // max(1, math.prod(stored.shape[1:]) * 4))
        for first in range(0, stored.shape[0], rows):
            place = slice(first, first + rows)
            with safe_open(stored.file, framework="pt") as opened:
                yield place, opened.get_slice(key)[place]

    def read_into(self, key: str, out: Tensor) -> Tensor:
        """A weight into a tensor of its shape, which is returned, piece by piece."""
        for place, piece in self.pieces(key):
            out[place].copy_(piece)
        return out


WeightReader = Callable[[torch.dtype, torch.Generator], dict[str, Tensor]]
"""Some of a new model's weights, by name, in a dtype; what is random in them comes from the generator."""


def make_weight_reader(
    shards: StoredCheckpoint, names: Mapping[str, str], sign: float = 1.0
) -> WeightReader:
    """The weights of `shards` under new names (new -> stored), file after file, times `sign`."""
    order = sorted(names, key=lambda ours: (str(shards.weights[names[ours]].file), ours))

    def part(dtype: torch.dtype, _: torch.Generator) -> dict[str, Tensor]:
        read = {}
        for ours in order:
            out = torch.empty(shards.weights[names[ours]].shape, dtype=dtype)
            read[ours] = shards.read_into(names[ours], out)
        return read if sign == 1.0 else {ours: sign * weight for ours, weight in read.items()}

    return part


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder. Raises `SpearError` where there is none, or a broken one."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the errors of its parser have no class of their own
        raise SpearError(
            f"broken tokenizer: {folder}: {summarize_error(error)}: copy it again"
        ) from error


def rename_prefixes(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """A name whose beginning is exchanged, by one rule (there, here) after the other."""
    for there, here in rules:
        name = here + name.removeprefix(there) if name.startswith(there) else name
    return name


def describe_tensor_differences(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> str:
    """What is wrong with a file's tensors, in one line: how many, and the first with its shape; or ""."""
    other = [name for name in expected if name in found and found[name] != expected[name]]
    wrong = (
        ("missing", [f"{name} {list(expected[name])}" for name in expected if name not in found]),
        ("unknown", [f"{name} {list(found[name])}" for name in found if name not in expected]),
        ("of the wrong shape", [f"{n} {list(found[n])}, not {list(expected[n])}" for n in other]),
    )
    return "; ".join(
        f"weights {what}: {len(names)}, first {min(names)}" for what, names in wrong if names
    )


def find_checkpoint(name: Path | str, what: str) -> Path:
    """The folder of a checkpoint: a local one, or, for a name on the Hub, the one it is kept in."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists() or not is_hub_name(str(name)):
        needed = "its folder (config.json and safetensors), or its name on the Hub"
        raise SpearError(f"{what} not found: {folder}: give {needed}")
    return download_from_hub(str(name), "a local folder")


def download_from_hub(name: str, instead: str, file: str | None = None) -> Path:
    """One file of a repository, or (file None) the folder of its checkpoint, from the local cache if there.

    instead: what to give when there is no network. Raises `SpearError`, naming the reason.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    check_available_on_hub(name, instead)
    repository, _, revision = name.partition("@")
    which: dict[str, Any] = {
        "revision": revision or None,
        "local_files_only": bool(explain_hub_unreachable()),
    }
    try:
        if file is not None:
            return Path(hf_hub_download(repository, file, **which))
        return Path(snapshot_download(repository, allow_patterns=_HUB_FILES, **which))
    except Exception as error:  # the client's errors and its transport's have no common base
        what, cure = (
            f"cannot get {name} from the Hugging Face Hub",
            "check the name and the network",
        )
        raise SpearError(f"{what}: {summarize_error(error)}: {cure}, or give {instead}") from error


def describe_source(name: Path | str, folder: Path) -> str:
    """What was read, to be found again: a name on the Hub with its revision, which its folder is called."""
    unsaid = is_hub_name(str(name)) and "@" not in str(name) and folder.parent.name == "snapshots"
    return f"{name}@{folder.name}" if unsaid else str(name)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors of a checkpoint folder. Raises `SpearError` when one of them is missing."""
    index, alone = folder / "model.safetensors.index.json", folder / "model.safetensors"
    files = [alone]
    if index.is_file():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files = sorted({folder / name for name in names})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise SpearError(f"broken checkpoint: {index}: {error}: copy it again") from error
        if alone.is_file() and alone not in files:
            raise SpearError(
                f"two checkpoints in one folder: {index} and {alone.name}: remove the older"
            )
    for file in files:
        if not file.is_file():
            raise SpearError(f"checkpoint incomplete: {file} is missing: copy it again")
    return files
