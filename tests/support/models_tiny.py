"""The preset `TINY` of a few thousand parameters, models of this preset, and random inputs."""

import dataclasses
from functools import partial
from typing import Any

import torch

from spear import flow
from spear.models.presets import (
    Preset,
    build_spear1_config,
    build_vlm_config,
    make_gemma_fields,
    make_image_encoder_fields,
)
from spear.models.spear1 import Spear1ForActionPrediction
from spear.models.vlm import SpearVLMForConditionalGeneration
from spear.types import Action

TEXT_SIZES = make_gemma_fields(
    width=32, num_layers=2, num_heads=4, intermediate_size=48, head_dim=8, initializer_range=0.2
)
TINY = Preset(
    name="tiny",
    image_sizes={"external": (48, 32), "wrist": (32, 32)},
    stem="conv",
    vision=make_image_encoder_fields(
        width=24, num_layers=2, num_heads=2, intermediate_size=32, patch_size=16, image_size=32
    ),
    moge=make_image_encoder_fields(
        width=16, num_layers=5, num_heads=2, mlp_ratio=2, patch_size=16, image_size=32
    ),
    text=TEXT_SIZES,
    expert={**TEXT_SIZES, "hidden_size": 16},
    vocabulary_size=40,
    bins=24,
)
FIRST_COORDINATE_ID = TINY.vocabulary_size  # id of the first 3D token, after all words


def make_vlm(seed: int = 0, **changes: Any) -> SpearVLMForConditionalGeneration:
    """Make a SPEAR-VLM with random weights; `changes` are changed fields of the preset."""
    torch.manual_seed(seed)
    config = build_vlm_config(dataclasses.replace(TINY, **changes))
    return SpearVLMForConditionalGeneration(config).eval()


def make_spear1(seed: int = 0, **changes: Any) -> Spear1ForActionPrediction:
    """Make a SPEAR-1 with random weights; `changes` are changed fields of the preset."""
    torch.manual_seed(seed)
    config = build_spear1_config(dataclasses.replace(TINY, **changes))
    return Spear1ForActionPrediction(config).eval()


def draw_pixels(
    batch: int, seed: int = 0, views: tuple[str, ...] = ("external", "wrist")
) -> dict[str, torch.Tensor]:
    """Draw random images, view → [batch, 3, h, w] uint8."""
    generator = torch.Generator().manual_seed(seed)
    images = {}
    for view in views:
        width, height = TINY.image_sizes[view]
        shape = (batch, 3, height, width)
        images[view] = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return images


def draw_text(
    rows: int, length: int, seed: int = 0, last: int = FIRST_COORDINATE_ID
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw random token ids [rows, length] and their attention mask; padding is on the right.

    Ids are at least 3, because smaller ones are special tokens, and below `last`. The rows have
    different lengths: the first has no padding, the second one token of padding, the third two,
    the fourth none, and so on.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, last, (rows, length), generator=generator)
    num_padding = torch.arange(rows)[:, None] % 3
    mask = (torch.arange(length) < length - num_padding).long()
    return ids * mask, mask  # the id of padding is 0


def to_left_padded(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the padding of right-padded ids to the left."""
    rows = [
        torch.cat([row[row_mask == 0], row[row_mask == 1]])
        for row, row_mask in zip(ids, mask, strict=True)
    ]
    return torch.stack(rows), mask.flip(1)


def draw_actions(*shape: int, seed: int = 0) -> Action:
    """Draw random actions of a shape such as [batch, horizon].

    The rotations are unit quaternions whose scalar part is not negative.
    """
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.nn.functional.normalize(torch.randn((*shape, 4), generator=generator), dim=-1)
    scalar = rotation[..., :1]
    rotation = rotation * torch.where(scalar < 0, -1.0, 1.0)
    translation = torch.randn((*shape, 3), generator=generator)
    gripper = torch.randn((*shape, 1), generator=generator)
    return Action(translation, rotation, gripper)


def sample_by_reference(
    model: Any,
    inputs: dict[str, Any],
    noise: Action,
    steps: int,
    committed: flow.CommittedPrefix | None = None,
) -> torch.Tensor:
    """Sample actions [B, H, 8] by the network as it is trained, without optimized inference.

    The samples are the reference for the optimized implementations.
    """
    prefix_inputs = {name: value for name, value in inputs.items() if name != "state"}
    with torch.no_grad():
        prefix = model.encode_prefix(**prefix_inputs)
        predict = partial(model.predict, prefix, inputs["state"])
        return flow.integrate(predict, noise, steps, model.flow_config, committed).to_vector()
