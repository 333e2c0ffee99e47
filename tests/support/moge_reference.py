"""MoGe with weights that a rule makes from their names: the parity data's, and small ones for other tests.

The rule is the README's in the folder of reference outputs: seeded by the CRC of the name, scaled by the
fan-in, then changed a little such that x and y are about the view plane and a sane camera fits.
"""

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spear.models.moge.checkpoint import Checkpoint, build_moge
from spear.models.moge.networks import MogeV1, MogeV2
from spear.models.vision import IMAGENET_MEAN, IMAGENET_STD
from spear.types import Array

Weights = dict[str, torch.Tensor]


def value(name: str, shape: list[int]) -> torch.Tensor:
    if name.endswith(("image_mean", "image_std")):
        return torch.tensor(IMAGENET_MEAN if name.endswith("mean") else IMAGENET_STD).view(
            1, 3, 1, 1
        )
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if name.endswith("gamma"):
        return 0.1 + 0.02 * noise
    if len(shape) == 1:
        return 0.02 * noise + float(name.endswith("weight"))
    return noise * (0.3 if len(shape) == 3 else (noise.numel() / shape[0]) ** -0.5)


def see_the_view_plane(weights: Weights) -> None:
    """Let the x and y channels of the points pass the uv channels on, with a little noise. In place."""
    if "head.projects.0.weight" in weights:
        first, last = "head.output_block.0.0.", weights["head.output_block.0.2.weight"]
        weights[first + "weight"][:4] = 0
        weights[first + "bias"][:4] = 0
        last[:2] *= 0.2
        last[:, :4] = 0
        for row in range(4):  # u, −u, v, −v, since a ReLU follows
            sign = 1.0 - 2.0 * (row % 2)
            weights[first + "weight"][row, row // 2 - 2, 1, 1] = sign
            last[row // 2, row] = sign
        return
    pair = torch.eye(2)
    for part in ("neck.", "points_head."):
        weights[part + "resamplers.3.1.weight"][:2] = 0
        weights[part + "input_blocks.4.weight"][:2] = 0
        weights[part + "input_blocks.4.weight"][:2, :2, 0, 0] = pair
    last = weights["points_head.output_blocks.4.weight"]
    last *= torch.tensor([0.05, 0.05, 0.25]).view(3, 1, 1, 1)
    last[:, :2] = 0
    last[:2, :2, 0, 0] = pair


@cache
def description(shared: Path, version: int) -> dict[str, Any]:
    """v1.json or v2.json: the config, shapes and probes of the weights, and the cases."""
    return json.loads((shared / "fixtures" / "moge" / f"v{version}.json").read_text())


@cache
def arrays(shared: Path, case: str) -> dict[str, Array]:
    with np.load(shared / "fixtures" / "moge" / f"{case}.npz") as data:
        return {name: data[name] for name in data.files}


@cache
def checkpoint(shared: Path, version: int) -> Checkpoint:
    about = description(shared, version)
    weights = {name: value(name, entry["shape"]) for name, entry in about["state_dict"].items()}
    see_the_view_plane(weights)
    return Checkpoint(Path(f"reference-v{version}.pt"), weights, about["config"], version)


@cache
def reference(shared: Path, version: int) -> MogeV1 | MogeV2:
    return build_moge(checkpoint(shared, version))


@cache
def random_v1() -> MogeV1:
    """A MoGe v1 with a small encoder and random weights, which knows every point and fits a camera."""
    torch.manual_seed(0)
    size = {"dim_proj": 32, "dim_upsample": (32, 32, 32), "num_tokens_range": (6, 24)}
    model = MogeV1({"encoder": "dinov2_vits14", "remap_output": "exp", **size}).eval()
    weights = model.state_dict()
    see_the_view_plane(weights)
    weights["head.output_block.1.2.bias"][:] = 3.0
    return model


def error(found: torch.Tensor, expected: Array) -> float:
    """The largest difference over the largest expected value, where both are finite."""
    wanted = torch.as_tensor(expected)
    finite = found.isfinite() & wanted.isfinite()
    assert found.shape == wanted.shape and finite.any()
    return float((found - wanted)[finite].abs().max() / wanted[finite].abs().max())
