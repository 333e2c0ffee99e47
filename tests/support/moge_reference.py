"""MoGe with weights that a rule makes from their names, and a small MoGe for other tests.

The reference outputs were computed with weights of the same rule, which the README in their folder
explains: the CRC of a weight's name is the seed, and the fan-in gives the scale. Then a few weights
are changed so that the x and y of the predicted points are about those of the view plane, because
otherwise no camera would fit the points.

The view plane is where each pixel's coordinates (u, v) lie at depth 1; MoGe's networks get them as
two input channels.
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


def make_weight(name: str, shape: list[int]) -> torch.Tensor:
    """Make the weight of this shape that the rule gives to a name."""
    if name.endswith("image_mean"):
        return torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    if name.endswith("image_std"):
        return torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(shape, generator=generator)
    # The numbers below are those of the rule.
    if name.endswith("gamma"):  # layer scale
        return 0.1 + 0.02 * noise
    if len(shape) == 1:  # weights of norms are about 1, biases about 0
        mean = float(name.endswith("weight"))
        return 0.02 * noise + mean
    if len(shape) == 3:  # class token and position embeddings
        return noise * 0.3
    fan_in = noise.numel() / shape[0]
    return noise * fan_in**-0.5


def pass_view_plane_through(weights: Weights) -> None:
    """Change weights in place so that the x and y of the points are about u and v."""
    if "head.projects.0.weight" in weights:
        _pass_view_plane_through_v1(weights)
    else:
        _pass_view_plane_through_v2(weights)


def _pass_view_plane_through_v1(weights: Weights) -> None:
    """Pass u and v through the two last layers of the head of MoGe v1."""
    first_weight = weights["head.output_block.0.0.weight"]
    first_bias = weights["head.output_block.0.0.bias"]
    last_weight = weights["head.output_block.0.2.weight"]
    first_weight[:4] = 0
    first_bias[:4] = 0
    last_weight[:2] *= 0.2  # what the other channels add to x and y stays small
    last_weight[:, :4] = 0
    # A ReLU follows the first weight, so four of its rows carry u, -u, v and -v. The channels of u
    # and v are the last two (-2 and -1).
    for row in range(4):
        axis = row // 2
        sign = 1.0 - 2.0 * (row % 2)
        first_weight[row, axis - 2, 1, 1] = sign  # [out, in, kernel row, kernel column]
        last_weight[axis, row] = sign


def _pass_view_plane_through_v2(weights: Weights) -> None:
    """Pass u and v through the neck and the points head of MoGe v2."""
    identity = torch.eye(2)
    for module_name in ("neck", "points_head"):
        weights[f"{module_name}.resamplers.3.1.weight"][:2] = 0
        weights[f"{module_name}.input_blocks.4.weight"][:2] = 0
        weights[f"{module_name}.input_blocks.4.weight"][:2, :2, 0, 0] = identity
    last_weight = weights["points_head.output_blocks.4.weight"]
    # What the other channels add to x, y and z stays small.
    last_weight *= torch.tensor([0.05, 0.05, 0.25]).view(3, 1, 1, 1)
    last_weight[:, :2] = 0
    last_weight[:2, :2, 0, 0] = identity


@cache
def load_description(shared: Path, version: int) -> dict[str, Any]:
    """Load v1.json or v2.json: the config, shapes and samples of the weights, the test cases."""
    return json.loads((shared / "fixtures" / "moge" / f"v{version}.json").read_text())


@cache
def load_arrays(shared: Path, case: str) -> dict[str, Array]:
    """Load the inputs and expected outputs of a test case, by name."""
    with np.load(shared / "fixtures" / "moge" / f"{case}.npz") as data:
        return {name: data[name] for name in data.files}


@cache
def make_checkpoint(shared: Path, version: int) -> Checkpoint:
    """Make the checkpoint with which the reference outputs were computed."""
    description = load_description(shared, version)
    weights = {
        name: make_weight(name, entry["shape"]) for name, entry in description["state_dict"].items()
    }
    pass_view_plane_through(weights)
    return Checkpoint(Path(f"reference-v{version}.pt"), weights, description["config"], version)


@cache
def build_reference_model(shared: Path, version: int) -> MogeV1 | MogeV2:
    """Build the model whose reference outputs were computed."""
    return build_moge(make_checkpoint(shared, version))


@cache
def build_small_v1() -> MogeV1:
    """Make a MoGe v1 with a small encoder and random weights.

    It predicts a valid point for every pixel, and a camera fits its points.
    """
    torch.manual_seed(0)
    config = {
        "encoder": "dinov2_vits14",
        "remap_output": "exp",
        "dim_proj": 32,
        "dim_upsample": (32, 32, 32),
        "num_tokens_range": (6, 24),
    }
    model = MogeV1(config).eval()
    weights = model.state_dict()
    pass_view_plane_through(weights)
    # The logit of the mask. A sigmoid makes it 0.95, so that all points are valid.
    weights["head.output_block.1.2.bias"][:] = 3.0
    return model


def relative_error(actual: torch.Tensor, expected: Array) -> float:
    """Return the largest difference divided by the largest expected value, of finite values."""
    expected_tensor = torch.as_tensor(expected)
    is_finite = actual.isfinite() & expected_tensor.isfinite()
    assert actual.shape == expected_tensor.shape
    assert is_finite.any()
    difference = (actual - expected_tensor)[is_finite]
    return float(difference.abs().max() / expected_tensor[is_finite].abs().max())
