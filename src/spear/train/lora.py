"""LoRA: the VLM's language model learns through two small matrices beside each of its own, by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from spear.errors import SpearError

if TYPE_CHECKING:
    from peft import LoraConfig

TARGETS = r"(.*\.)?language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
"""The modules that get one: every linear layer of the language model, none of the encoders' or the
expert's."""
_PEFT_ROOT = "base_model.model."
"""What PEFT's files put before a module's name."""


def add_adapters(model: torch.nn.Module, rank: int, alpha: float) -> None:
    """Put LoRA matrices beside the layers in `TARGETS`, in place; at first they change nothing.

    A weight W [out, in] acts as W + alpha / rank · B A, with A [rank, in] random and B [out, rank] zero.
    Raises `SpearError` when PEFT is missing.
    """
    config = _config(rank, alpha)
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, model)


def is_adapter(name: str) -> bool:
    """Whether the parameter of this name belongs to a LoRA."""
    return ".lora_A." in name or ".lora_B." in name


def save_adapters(model: torch.nn.Module, folder: Path, rank: int, alpha: float) -> None:
    """Write the LoRA matrices as PEFT writes them: adapter_config.json and adapter_model.safetensors."""
    tensors = {
        _PEFT_ROOT + name.replace(".default.", "."): parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if is_adapter(name)
    }
    folder.mkdir(parents=True, exist_ok=True)
    _config(rank, alpha).save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def merge_adapters(model: torch.nn.Module) -> None:
    """Add the LoRA matrices to the weights beside them and take them out: a plain model again."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            adapted: Any = module
            adapted.merge()
            model.set_submodule(name, adapted.get_base_layer())
    vars(model).pop("peft_config", None)


def _config(rank: int, alpha: float) -> LoraConfig:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise SpearError('LoRA needs PEFT, which is not installed: pip install "spear-vla[lora]"') from error
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS)  # type: ignore[arg-type]
