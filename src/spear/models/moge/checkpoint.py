"""Load MoGe's published checkpoints, from a local file or the Hugging Face Hub, as our networks.

A checkpoint is a `.pt` file with a dict {"model_config": …, "model": …}. The names and shapes of
all its weights are checked. Our names of weights differ from the checkpoint's in two ways. Some
modules have another name, and the encoder's names are those of Transformers, while the checkpoint
has those of DINOv2's own code.
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spear.errors import SpearError, summarize_error
from spear.models.moge.networks import ENCODERS, MogeV1, MogeV2, make_dinov2_config
from spear.models.vision import IMAGENET_MEAN, IMAGENET_STD, MogeEncoder
from spear.models.weights.load import (
    describe_tensor_differences,
    download_from_hub,
    rename_prefixes,
)
from spear.util.files import refuse_lfs_pointer
from spear.util.network import is_hub_name

Weights = Mapping[str, Tensor]

Prefixes = tuple[tuple[str, str], ...]
"""Pairs (beginning of some of our names, beginning of the checkpoint's names for the same)."""

NAME_PREFIXES: dict[int, Prefixes] = {
    1: (("encoder.backbone.", "backbone."),),
    2: (("output_projections.", "encoder.output_projections."),),
}
"""Version of MoGe -> the prefixes that differ between our names and the checkpoint's."""

BACKBONE_PREFIX = {1: "backbone.", 2: "encoder.backbone."}
"""Version of MoGe -> beginning of the checkpoint's names of the encoder's weights."""

IMAGE_STATISTICS = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
"""Constants that a checkpoint contains, and that are in our code."""

_DINOV2_NAMES = (
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
"""Pairs (part of a name in Transformers' DINOv2, the same part in DINOv2's own code)."""

FUSED_PROJECTIONS = ".attn.qkv."
"""A part of the checkpoint's names of weights that contain those of queries, keys and values, one
after the other."""


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint in memory.

    path     The file.
    weights  Name in the checkpoint -> weight.
    config   The checkpoint's `model_config`.
    version  1 (MoGe) or 2 (MoGe-2).
    """

    path: Path
    weights: Weights
    config: Mapping[str, Any]
    version: int


def load_moge(name: Path | str) -> MogeV1 | MogeV2:
    """Load a MoGe v1 or MoGe-2 in evaluation mode, float32, on the CPU.

    Args:
        name: A local `.pt` file, or a name on the Hub. For example, "Ruicheng/moge-vitl" is a
            MoGe v1, and "Ruicheng/moge-2-vitl-normal" a MoGe-2.

    Raises:
        SpearError: The checkpoint is not found or contains no MoGe, its config is not supported, or
            weights are missing, unknown or of another shape.
    """
    return build_moge(read_checkpoint(name))


def build_moge(checkpoint: Checkpoint) -> MogeV1 | MogeV2:
    """Build a MoGe like `load_moge`, from a checkpoint in memory. Its tensors are copied."""
    network = MogeV1 if checkpoint.version == 1 else MogeV2
    try:
        with torch.device("meta"):
            model = network(checkpoint.config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SpearError(
            f"MoGe v{checkpoint.version} cannot be built from the config in {checkpoint.path}"
            f" ({type(error).__name__} {error}). Use one of the published checkpoints."
        ) from error
    ignorable_names = {name for name in checkpoint.weights if name.startswith("normal_head.")}
    prefixes = NAME_PREFIXES[checkpoint.version]
    names = _match_names(model, checkpoint, prefixes, ignorable_names)
    _fill(model, checkpoint, names)
    return model.eval()


def read_checkpoint(name: Path | str) -> Checkpoint:
    """Read a MoGe from a local file or from the Hub; for `name` and the errors see `load_moge`."""
    path = Path(name)
    if not path.is_file():
        is_path = path.exists() or path.suffix == ".pt"
        if is_path or not is_hub_name(str(name)):
            raise SpearError(
                f"there is no MoGe checkpoint {path}. Give a .pt file, or a name on the Hub "
                "such as Ruicheng/moge-vitl."
            )
        path = download_from_hub(str(name), "a local model.pt", file="model.pt")

    weights, config = _read_file(path)
    version = 2 if "encoder.backbone.cls_token" in weights else 1
    if f"{BACKBONE_PREFIX[version]}cls_token" not in weights:
        raise SpearError(
            f"{path} is no MoGe checkpoint, because it has no backbone.cls_token. Download it "
            "again."
        )
    if not isinstance(config, dict):
        raise SpearError(f"the checkpoint {path} has no model_config. Use the published file.")
    return Checkpoint(path, weights, config, version)


def _read_file(path: Path) -> tuple[Weights, Any]:
    """The weights and the config in a file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        refuse_lfs_pointer(path, path)
        raise SpearError(
            f"the checkpoint {path} is not a PyTorch file of tensors and plain data alone, so "
            "it is not opened. Use the published file."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        refuse_lfs_pointer(path, path)
        raise SpearError(
            f"the checkpoint {path} is broken ({summarize_error(error)}). Download it again."
        ) from error

    weights = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise SpearError(
            f"{path} is no MoGe checkpoint, because it contains no weights by name. Use the "
            "published file."
        )
    return weights, content.get("model_config")


# The encoder alone, for a SPEAR-VLM


def fill_encoder(encoder: MogeEncoder, checkpoint: Checkpoint) -> None:
    """Copy the encoder's weights of a published MoGe into the encoder of a SPEAR-VLM, in place.

    Raises:
        SpearError: The checkpoint contains no MoGe, or its encoder has another size than the
            SPEAR-VLM's, or resamples its position embeddings in another way.
    """
    _fill(encoder, checkpoint, match_encoder_weight_names(encoder, checkpoint))


def match_encoder_weight_names(encoder: MogeEncoder, checkpoint: Checkpoint) -> dict[str, str]:
    """Map the names of the encoder's weights to the checkpoint's names of the same weights.

    Names and shapes are checked, and `SpearError` is raised as by `fill_encoder`. No weights are
    read.
    """
    offset = getattr(encoder.backbone.config, "position_offset", 0.0)
    if offset != 0.1:
        raise SpearError(
            f"the encoder does not fit {checkpoint.path}, because its position_offset is "
            f"{offset}, and MoGe's is 0.1. Set position_offset to 0.1."
        )
    prefix = BACKBONE_PREFIX[checkpoint.version]
    head_names = {name for name in checkpoint.weights if not name.startswith(prefix)}
    return _match_names(encoder, checkpoint, (("backbone.", prefix),), head_names)


def make_encoder_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The `moge_config` for a SPEAR-VLM with the checkpoint's encoder.

    Which of `ENCODERS` it is follows from the width of its class token.
    """
    class_token = checkpoint.weights[f"{BACKBONE_PREFIX[checkpoint.version]}cls_token"]
    width = class_token.shape[-1]
    names = {encoder_width: name for name, (encoder_width, _, _) in ENCODERS.items()}
    if width not in names:
        raise SpearError(
            f"a MoGe encoder of width {width} is not known. Use one of the widths "
            f"{', '.join(map(str, sorted(names)))}."
        )
    config = make_dinov2_config(names[width])
    fields = (
        "hidden_size",
        "mlp_ratio",
        "num_hidden_layers",
        "num_attention_heads",
        "patch_size",
        "image_size",
        "use_mask_token",
        "position_offset",
    )
    return {name: getattr(config, name) for name in fields}


# Names and shapes


def to_published_name(name: str, prefixes: Prefixes) -> str:
    """The checkpoint's name of the weight that we call `name`."""
    if "backbone." in name:
        for our_part, their_part in _DINOV2_NAMES:
            name = name.replace(our_part, their_part)
    return rename_prefixes(name, prefixes)


def to_published_weights(weights: Mapping[str, Tensor], version: int) -> dict[str, Tensor]:
    """The weights of a checkpoint by its own names, image statistics included.

    This is the inverse of reading a checkpoint, for checkpoints that tests and examples make up.

    Args:
        weights: Our name → weight, in the order of a model's `state_dict`.
        version: MoGe's version, 1 or 2.
    """
    published: dict[str, Tensor] = {}
    for our_name, weight in weights.items():
        name = to_published_name(our_name, NAME_PREFIXES[version])
        # Queries, keys and values have the same published name, and come in this order.
        published[name] = torch.cat([published[name], weight]) if name in published else weight
    for constant, values in IMAGE_STATISTICS.items():
        published[_get_published_statistic_name(constant, version)] = torch.tensor(values).view(
            1, 3, 1, 1
        )
    return published


def compute_published_shapes(
    model: nn.Module, version: int, prefixes: Prefixes | None = None
) -> dict[str, tuple[int, ...]]:
    """The shapes that a checkpoint of `model` must have, by the checkpoint's names."""
    if prefixes is None:
        prefixes = NAME_PREFIXES[version]
    shapes: dict[str, tuple[int, ...]] = {}
    for our_name, tensor in model.state_dict().items():
        name = to_published_name(our_name, prefixes)
        num_fused = 3 if FUSED_PROJECTIONS in name else 1
        shapes[name] = (num_fused * tensor.shape[0], *tensor.shape[1:])
    for constant in IMAGE_STATISTICS:
        shapes[_get_published_statistic_name(constant, version)] = (1, 3, 1, 1)
    return shapes


def _get_published_statistic_name(statistic: str, version: int) -> str:
    """The checkpoint's name of one of `IMAGE_STATISTICS`."""
    return statistic if version == 1 else f"encoder.{statistic}"


def _match_names(
    model: nn.Module, checkpoint: Checkpoint, prefixes: Prefixes, ignorable_names: set[str]
) -> dict[str, str]:
    """Map the names of a model's weights to the checkpoint's names of the same weights.

    Raises:
        SpearError: A weight of the model is not in the checkpoint or has another shape; or a weight
            of the checkpoint is neither in the model nor in `ignorable_names`; or an image
            statistic is not ImageNet's.
    """
    version = checkpoint.version
    expected_shapes = compute_published_shapes(model, version, prefixes)
    # DINOv2's own training needs the mask token, MoGe does not.
    mask_token = f"{BACKBONE_PREFIX[version]}mask_token"
    ignored_names = {mask_token, *ignorable_names} - set(expected_shapes)
    shapes = {
        name: tuple(weight.shape)
        for name, weight in checkpoint.weights.items()
        if name not in ignored_names
    }
    differences = describe_tensor_differences(expected_shapes, shapes)
    if differences:
        raise SpearError(
            f"the checkpoint {checkpoint.path} does not fit ({differences}). Download it again, "
            "or report this line."
        )

    for constant, values in IMAGE_STATISTICS.items():
        name = _get_published_statistic_name(constant, version)
        published = checkpoint.weights[name].float().flatten()
        if not torch.allclose(published, torch.tensor(values), atol=1e-3):
            raise SpearError(
                f"{name} of the checkpoint {checkpoint.path} is not ImageNet's. Use one of the "
                "published checkpoints."
            )
    return {name: to_published_name(name, prefixes) for name in model.state_dict()}


def _fill(model: nn.Module, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
    """Copy a checkpoint's weights into a model, in float32.

    `names` maps our names to the checkpoint's.
    """
    state = {}
    for our_name, name in names.items():
        weight = checkpoint.weights[name]
        if FUSED_PROJECTIONS in name:
            queries, keys, values = weight.chunk(3)
            _, name_in_attention = our_name.split("attention.")  # such as "q_proj.weight"
            projection, _ = name_in_attention.split(".")
            weight = {"q_proj": queries, "k_proj": keys, "v_proj": values}[projection]
        state[our_name] = weight.to(torch.float32, copy=True)
    # Tensors of the meta device have no memory to copy to, so they are replaced.
    is_meta = next(model.parameters()).is_meta
    model.load_state_dict(state, assign=is_meta)
