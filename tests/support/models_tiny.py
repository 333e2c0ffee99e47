"""A preset of a few thousand parameters, and random inputs for it, for tests of the models."""

import dataclasses
from functools import partial
from typing import Any

import torch

from spear import flow
from spear.models.presets import (
    Preset,
    build_spear1_config,
    build_vlm_config,
    gemma_fields,
    network_fields,
)
from spear.models.spear1 import Spear1ForActionPrediction
from spear.models.vlm import SpearVLMForConditionalGeneration
from spear.types import Action

TEXT = gemma_fields(32, 2, 4, intermediate_size=48, head_dim=8, initializer_range=0.2)
TINY = Preset(
    name="tiny",
    image_sizes={"external": (48, 32), "wrist": (32, 32)},
    stem="conv",
    vision=network_fields(24, 2, 2, intermediate_size=32, patch_size=16, image_size=32),
    moge=network_fields(16, 5, 2, mlp_ratio=2, patch_size=16, image_size=32),
    text=TEXT,
    expert={**TEXT, "hidden_size": 16},
    vocabulary=40,
    bins=24,
)
START = TINY.vocabulary


def vlm(seed: int = 0, **changes: Any) -> SpearVLMForConditionalGeneration:
    """A random SPEAR-VLM of the tiny preset; changes are to the preset."""
    torch.manual_seed(seed)
    return SpearVLMForConditionalGeneration(
        build_vlm_config(dataclasses.replace(TINY, **changes))
    ).eval()


def spear1(seed: int = 0, **changes: Any) -> Spear1ForActionPrediction:
    torch.manual_seed(seed)
    return Spear1ForActionPrediction(
        build_spear1_config(dataclasses.replace(TINY, **changes))
    ).eval()


def pixels(
    batch: int, seed: int = 0, views: tuple[str, ...] = ("external", "wrist")
) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {view: (batch, 3, *TINY.image_sizes[view][::-1]) for view in views}
    return {v: torch.randint(0, 256, s, generator=g, dtype=torch.uint8) for v, s in shapes.items()}


def text(
    rows: int, length: int, seed: int = 0, last: int = START
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and a right-padding mask with rows of different lengths."""
    ids = torch.randint(3, last, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(length) < length - torch.arange(rows)[:, None] % 3).long()
    return ids * mask, mask


def left_padded(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    turned = [
        torch.cat([row[keep == 0], row[keep == 1]]) for row, keep in zip(ids, mask, strict=True)
    ]
    return torch.stack(turned), mask.flip(1)


def actions(*shape: int, seed: int = 0) -> Action:
    """Random chunks with unit quaternions."""
    g = torch.Generator().manual_seed(seed)
    rotation = torch.nn.functional.normalize(torch.randn(*shape, 4, generator=g), dim=-1)
    rotation = rotation * torch.where(rotation[..., :1] < 0, -1.0, 1.0)
    return Action(
        torch.randn(*shape, 3, generator=g), rotation, torch.randn(*shape, 1, generator=g)
    )


def reference(
    model: Any,
    given: dict[str, Any],
    noise: Action,
    steps: int,
    committed: flow.CommittedPrefix | None = None,
) -> torch.Tensor:
    """Step by step through the network that is trained, with nothing worked out before."""
    with torch.no_grad():
        prefix = model.encode_prefix(**{k: v for k, v in given.items() if k != "state"})
        predict = partial(model.predict, prefix, given["state"])
        return flow.integrate(predict, noise, steps, model.flow, committed).to_vector()
