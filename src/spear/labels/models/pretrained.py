"""Networks of Transformers by name: from the Hugging Face Hub, or from a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from spear.errors import SpearError, format_count, summarize_error
from spear.models.devices import choose_device
from spear.util.network import explain_hub_unreachable, is_hub_name


def load_model(cls: Any, kind: str, model: str, device: str, also: tuple[str, ...] = ()) -> Any:
    """A network, in evaluation mode on a device.

    cls     its class in Transformers.
    kind    its `model_type` there.
    model   name on the Hub, or folder of `config.json` and `model.safetensors`.
    device  see `choose_device`.
    also    other kinds of which this network is a part.

    Raises `SpearError`: there is no such model or no network, it is of another kind, or weights are missing.
    """
    from transformers import AutoConfig

    where = choose_device(device)
    config = load_processor(AutoConfig, kind, model)
    if config.model_type not in (kind, *also):
        raise SpearError(f"{model}: a {config.model_type} model, not {kind}: give a {kind} model")
    how = {"dtype": torch.float32, "output_loading_info": True, "use_safetensors": True}
    network, info = load_processor(cls, kind, model, **how)
    if lacking := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise SpearError(
            f"{model}: weights are missing ({len(lacking)}, first {lacking[0]}): give it whole"
        )
    network.register_forward_hook(refuse_nan)
    return network.to(where).eval()


def refuse_nan(network: Any, given: Any, said: Any) -> None:
    """A forward hook: `SpearError` for NaN in what a network says, which would pass for an empty image."""
    for name, value in vars(said).items():
        if isinstance(value, torch.Tensor) and value.isnan().any():
            raise SpearError(f"{type(network).__name__}: says NaN ({name}): give other weights")


@contextmanager
def explain_full_memory(images: int) -> Iterator[None]:
    """Turns a full accelerator into a `SpearError`, after which the pipeline tries fewer images at a time."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SpearError(
            f"memory is full with {format_count(images, 'images')} at a time: give fewer"
        ) from error


def load_processor(cls: Any, kind: str, model: str, **options: Any) -> Any:
    """The processor that goes with a network (or another part); arguments and errors as of `load_model`."""
    path = Path(model).expanduser()
    local = path.exists() or not is_hub_name(model)
    if local and not path.is_dir():
        raise SpearError(
            f"{model}: no such folder: give the folder of a model, or its name on the Hub"
        )
    options["local_files_only"] = local or bool(explain_hub_unreachable())
    name, _, revision = (str(path), "", "") if local else model.partition("@")
    try:
        return cls.from_pretrained(name, revision=revision or "main", **options)
    except (
        Exception
    ) as error:  # names that do not exist and broken files raise errors of many kinds
        why = f"cannot load this {kind} model ({summarize_error(error)})"
        raise SpearError(
            f"{model}: {why}: check name and network, or give {kind}=FOLDER"
        ) from error
