"""Loading networks of Transformers from the Hugging Face Hub or from a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from spear.errors import SpearError, format_count, summarize_error
from spear.models.devices import prepare_device
from spear.util.network import is_hub_name, is_hub_reachable
from spear.util.pretrained import load_pretrained


def load_model(
    cls: Any, kind: str, model: str, device: str, larger_model_kinds: tuple[str, ...] = ()
) -> Any:
    """Load a network, in evaluation mode, on a device.

    Args:
        cls: The network's class in Transformers.
        kind: The network's `model_type` in Transformers.
        model: Name on the Hub, or folder with `config.json` and `model.safetensors`.
        device: "auto", or a device name of PyTorch (`prepare_device`).
        larger_model_kinds: Kinds of larger models that contain this network. They are accepted,
            too.

    Raises:
        SpearError: The model does not exist or cannot be downloaded, it is of another kind, or
            some of its weights are missing.
    """
    from transformers import AutoConfig

    torch_device = prepare_device(device)
    config = load_pretrained_part(AutoConfig, kind, model)
    if config.model_type not in (kind, *larger_model_kinds):
        raise SpearError(
            f"{model} is a {config.model_type} model, not a {kind} model. Give a {kind} model."
        )
    network, info = load_pretrained_part(
        cls,
        kind,
        model,
        dtype=torch.float32,
        output_loading_info=True,
        use_safetensors=True,
    )
    missing = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
    if missing:
        raise SpearError(
            f"{model} lacks {format_count(len(missing), 'weights')}, the first is {missing[0]}. "
            "Give the complete model."
        )
    network.register_forward_hook(refuse_nan)
    return network.to(torch_device).eval()


def refuse_nan(network: Any, inputs: Any, outputs: Any) -> None:
    """A forward hook that raises `SpearError` if an output contains NaN.

    Without the hook, an image whose scores are NaN would look like an image without objects.
    """
    for name, value in vars(outputs).items():
        if isinstance(value, torch.Tensor) and value.isnan().any():
            raise SpearError(f"{type(network).__name__} puts out NaN ({name}). Use other weights.")


@contextmanager
def translate_out_of_memory_errors(num_images: int) -> Iterator[None]:
    """In the `with` block, turn PyTorch's out-of-memory error into a `SpearError`.

    After a `SpearError` the pipeline tries the batch again, one image at a time.

    Args:
        num_images: Number of images in the batch, for the error message.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SpearError(
            f"memory is full with {format_count(num_images, 'images')} at a time. Use a smaller "
            "--batch-size or --max-size."
        ) from error


def load_pretrained_part(cls: Any, kind: str, model: str, **options: Any) -> Any:
    """Load one part of a pretrained model: its config, its network or its processor.

    Args:
        cls: The part's class in Transformers.
        kind: The network's `model_type` in Transformers, for error messages.
        model: Name on the Hub, perhaps with @REVISION, or folder.
        options: Options of the class's `from_pretrained`.

    Raises:
        SpearError: The model does not exist, or it cannot be downloaded or loaded.
    """
    path = Path(model).expanduser()
    is_local = path.exists() or not is_hub_name(model)
    if is_local and not path.is_dir():
        raise SpearError(
            f"{model} is no folder. Give the folder of a model, or its name on the Hub."
        )
    options["local_files_only"] = is_local or not is_hub_reachable()
    name = str(path)
    revision = ""
    if not is_local:
        name, _, revision = model.partition("@")
    try:
        return load_pretrained(cls, name, revision=revision or "main", **options)
    except SpearError:
        raise
    except Exception as error:  # unknown names and broken files raise errors of many kinds
        raise SpearError(
            f"{model} cannot be loaded as a {kind} model ({summarize_error(error)}). Check the "
            f"name and the network connection, or give {kind}=FOLDER."
        ) from error
