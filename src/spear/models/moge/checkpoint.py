"""MoGe's published checkpoints: a local file or a name on the Hugging Face Hub -> our networks.

A checkpoint is a `.pt` file {"model_config": …, "model": …}. Names and shapes are checked one by one.
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spear.errors import SpearError, summarize_error
from spear.models.moge.networks import ENCODERS, MogeV1, MogeV2, dinov2_config
from spear.models.vision import IMAGENET_MEAN, IMAGENET_STD, MogeEncoder
from spear.models.weights.load import (
    describe_tensor_differences,
    download_from_hub,
    rename_prefixes,
)
from spear.util.network import is_hub_name

Weights = Mapping[str, Tensor]
Prefixes = tuple[tuple[str, str], ...]
"""Beginnings of our names, and those of the checkpoint in their place."""

_PREFIXES: dict[int, Prefixes] = {
    1: (("encoder.backbone.", "backbone."),),
    2: (("output_projections.", "encoder.output_projections."),),
}
_DINOV2 = (
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.cls_token", "cls_token"),
    ("encoder.layer.", "blocks."),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("layernorm.", "norm."),
    ("attention.o_proj.", "attn.proj."),
    ("attention.q_proj.", "attn.qkv."),
    ("attention.k_proj.", "attn.qkv."),
    ("attention.v_proj.", "attn.qkv."),
)
"""Parts of names in Transformers' DINOv2 -> in DINOv2's own code."""
_BACKBONE = {1: "backbone.", 2: "encoder.backbone."}
_CONSTANTS = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint in memory: weights under their own names, config, and version (1 or 2)."""

    path: Path
    weights: Weights
    config: Mapping[str, Any]
    version: int


def load_moge(name: Path | str) -> MogeV1 | MogeV2:
    """A MoGe v1 or MoGe-2 in evaluation mode, float32, on the CPU.

    name: a local `.pt` file, or a name on the Hub ("Ruicheng/moge-vitl" is v1, "Ruicheng/moge-2-vitl-normal"
    is MoGe-2 with metric scale). Raises `SpearError` when it is not found or no MoGe, its config is not
    supported, or weights are missing, unknown or of another shape.
    """
    return build_moge(read_checkpoint(name))


def build_moge(checkpoint: Checkpoint) -> MogeV1 | MogeV2:
    """`load_moge` from a checkpoint in memory, whose tensors are copied."""
    try:
        with torch.device("meta"):
            model = (MogeV1 if checkpoint.version == 1 else MogeV2)(checkpoint.config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"MoGe v{checkpoint.version} cannot be built from the config in {checkpoint.path}"
        why = f"{type(error).__name__} {error}"
        raise SpearError(f"{what}: {why}: use one of the published checkpoints") from error
    unused = {name for name in checkpoint.weights if name.startswith("normal_head.")}
    _fill(model, checkpoint, _match(model, checkpoint, _PREFIXES[checkpoint.version], unused))
    return model.eval()


def fill_encoder(encoder: MogeEncoder, checkpoint: Checkpoint) -> None:
    """Fill the encoder of a SPEAR-VLM with that of a published MoGe, in place; the heads are left out.

    Raises `SpearError` as `load_moge` does, and when the encoder is of another size or resamples its position
    embeddings in another way.
    """
    _fill(encoder, checkpoint, match_encoder(encoder, checkpoint))


def match_encoder(encoder: MogeEncoder, checkpoint: Checkpoint) -> dict[str, str]:
    """The encoder's names -> the checkpoint's, checked as `fill_encoder` does, without reading weights."""
    offset = getattr(encoder.backbone.config, "position_offset", 0.0)
    if offset != 0.1:
        has = f"its position_offset is {offset}"
        raise SpearError(f"encoder does not fit {checkpoint.path}: {has}: MoGe needs 0.1")
    prefix = _BACKBONE[checkpoint.version]
    heads = {k for k in checkpoint.weights if not k.startswith(prefix)}
    return _match(encoder, checkpoint, (("backbone.", prefix),), heads)


def make_encoder_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The `moge_config` of a SPEAR-VLM that a checkpoint's encoder fits, told from its width."""
    width = checkpoint.weights[f"{_BACKBONE[checkpoint.version]}cls_token"].shape[-1]
    names = {size[0]: name for name, size in ENCODERS.items()}
    if width not in names:
        raise SpearError(
            f"MoGe config not supported: encoder of width {width}: known are {sorted(names)}"
        )
    config = dinov2_config(names[width])
    fields = ("hidden_size", "mlp_ratio", "num_hidden_layers", "num_attention_heads", "patch_size")
    more = ("image_size", "use_mask_token", "position_offset")
    return {name: getattr(config, name) for name in fields + more}


def read_checkpoint(name: Path | str) -> Checkpoint:
    """Read a local file, or one from the Hub; see `load_moge`."""
    path = Path(name)
    if not path.is_file():
        if path.exists() or path.suffix == ".pt" or not is_hub_name(str(name)):
            known = "a name on the Hub such as Ruicheng/moge-vitl"
            raise SpearError(f"MoGe checkpoint not found: {path}: give a .pt file, or {known}")
        path = download_from_hub(str(name), "a local model.pt", file="model.pt")
    weights, config = _read(path)
    version = 2 if "encoder.backbone.cls_token" in weights else 1
    if f"{_BACKBONE[version]}cls_token" not in weights:
        raise SpearError(
            f"not a MoGe checkpoint: {path} has no backbone.cls_token: download it again"
        )
    if not isinstance(config, dict):
        raise SpearError(
            f"checkpoint incomplete: {path} has no model_config: use the published file"
        )
    return Checkpoint(path, weights, config, version)


def _fill(model: nn.Module, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
    """Put the weights in place. names: ours -> the checkpoint's."""
    state = {}
    for ours, name in names.items():
        weight = checkpoint.weights[name]
        if ".attn.qkv." in name:  # queries, keys and values are one in MoGe
            weight = weight.chunk(3)["qkv".index(ours.split("attention.")[1][0])]
        state[ours] = weight.to(torch.float32, copy=True)
    model.load_state_dict(state, assign=next(model.parameters()).is_meta)


def _match(
    model: nn.Module, checkpoint: Checkpoint, prefixes: Prefixes, unused: set[str]
) -> dict[str, str]:
    """Our names -> the checkpoint's. Each of its names is used, or in `unused`, or else refused."""
    weights, where = checkpoint.weights, f"checkpoint does not fit: {checkpoint.path}"
    expected = get_published_shapes(model, checkpoint.version, prefixes)
    # DINOv2's own training needs the mask token, MoGe does not.
    left = {f"{_BACKBONE[checkpoint.version]}mask_token", *unused} - set(expected)
    found = {name: tuple(weight.shape) for name, weight in weights.items() if name not in left}
    if wrong := describe_tensor_differences(expected, found):
        raise SpearError(f"{where}: {wrong}: download it again, or report this line")
    for name, values in _CONSTANTS.items():
        key = name if checkpoint.version == 1 else f"encoder.{name}"
        if not torch.allclose(weights[key].float().flatten(), torch.tensor(values), atol=1e-3):
            raise SpearError(
                f"{where}: {key} is not ImageNet's: use one of the published checkpoints"
            )
    return {ours: to_published_name(ours, prefixes) for ours in model.state_dict()}


def get_published_shapes(
    model: nn.Module, version: int, prefixes: Prefixes | None = None
) -> dict[str, tuple[int, ...]]:
    """The shapes of what a checkpoint must hold for a model, by the checkpoint's names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for ours, tensor in model.state_dict().items():
        name = to_published_name(ours, _PREFIXES[version] if prefixes is None else prefixes)
        shapes[name] = ((3 if ".attn.qkv." in name else 1) * tensor.shape[0], *tensor.shape[1:])
    return shapes | {
        f"{'' if version == 1 else 'encoder.'}{name}": (1, 3, 1, 1) for name in _CONSTANTS
    }


def to_published_name(ours: str, prefixes: Prefixes) -> str:
    """The checkpoint's name of one of our weights."""
    if "backbone." in ours:
        for here, there in _DINOV2:
            ours = ours.replace(here, there)
    return rename_prefixes(ours, prefixes)


def _read(path: Path) -> tuple[Weights, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        why = f"{path} is not a PyTorch file of tensors and plain data alone"
        raise SpearError(f"checkpoint refused: {why}: use the published file") from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise SpearError(
            f"broken checkpoint: {path}: {summarize_error(error)}: download it again"
        ) from error
    weights = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise SpearError(
            f"not a MoGe checkpoint: {path} holds no weights by name: use the published file"
        )
    return weights, content.get("model_config")
