"""Networks of Transformers by name: from the Hugging Face Hub, or from a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from spear.errors import SpearError

_FAILURES = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    SafetensorError,
)
"""What `from_pretrained` raises on names that do not exist and on broken files."""


def load_model(cls: Any, kind: str, model: str, device: str, dtype: str, also: tuple[str, ...] = ()) -> Any:
    """A network, in evaluation mode on a device.

    Args:
        cls: its class in Transformers.
        kind: its `model_type` there.
        model: name on the Hub, or folder of `config.json` and `model.safetensors`.
        device: "cpu", "cuda", "cuda:1", ….
        dtype: "float32", "bfloat16" or "float16", of weights and activations.
        also: other kinds of which this network is a part.

    Raises:
        SpearError: there is no such model or no network, it is of another kind, or weights are missing.
    """
    from transformers import AutoConfig

    if dtype not in ("float32", "bfloat16", "float16"):
        raise SpearError(f"dtype {dtype!r}: give float32, bfloat16 or float16")
    path = _locate(model)
    config = _load(AutoConfig, path, model, kind)
    if config.model_type not in (kind, *also):
        raise SpearError(f"{model}: a {config.model_type} model, not {kind}: give a {kind} model")
    network, info = _load(
        cls, path, model, kind, dtype=getattr(torch, dtype), output_loading_info=True, use_safetensors=True
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise SpearError(
            f"{model}: {len(lacking)} weights are missing (first {lacking[0]}): give the whole model"
        )
    try:
        return network.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise SpearError(f"device {device!r}: {_first_line(error)}: choose another device") from error


def load_processor(cls: Any, kind: str, model: str) -> Any:
    """The processor that goes with a network; arguments and errors as of `load_model`."""
    return _load(cls, _locate(model), model, kind)


@contextmanager
def enough_memory(images: int) -> Iterator[None]:
    """Turns a full accelerator into a `SpearError`, after which the pipeline tries fewer images at a time."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SpearError(f"memory is full with {images} images at a time: give a smaller batch") from error


def digest(text: str) -> str:
    """Eight hexadecimal digits that tell long settings apart in a component's name."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _locate(model: str) -> str:
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists() or model.startswith((".", "/", "~", "\\")) or model.count("/") > 1:
        raise SpearError(f"{model}: no such folder: give the folder of a model, or its name on the Hub")
    return model


def _load(cls: Any, path: str, model: str, kind: str, **options: Any) -> Any:
    try:
        return cls.from_pretrained(path, **options)
    except _FAILURES as error:
        raise SpearError(
            f"{model}: cannot load this {kind} model ({_first_line(error)}): check its name and the network, or give a "
            "folder that holds it"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
