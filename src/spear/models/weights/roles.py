"""What the weights of a checkpoint with unknown names may be, judged by names and shapes.

The result is a guess for people who write rules for names (`names_SOURCE.toml`). Nothing is loaded.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from spear.models.presets import build_spear1_config, get_preset
from spear.models.spear1 import Spear1ForActionPrediction

Shape = tuple[int, ...]

MIN_COMMON_PARTS = 2
"""Names that end with the same so many parts, such as "q_proj.weight", probably mean the same. One
part is too few, because nearly all names end with "weight" or "bias"."""

_NUMBER = re.compile(r"\b\d+\b")


@dataclass(frozen=True)
class WeightGroup:
    """Weights of one shape, whose names differ only in numbers, as those of all layers do.

    name   The names, with * for each number.
    shape  Their shape.
    count  How many weights these are.
    """

    name: str
    shape: Shape
    count: int


@dataclass(frozen=True)
class Role:
    """What a group of a checkpoint's weights may be.

    group       The group.
    candidates  The groups of SPEAR-1 that the evidence speaks for.
    evidence    "name and shape", "shape", or "name" if the shape is another. "" if neither the name
                nor the shape is one of SPEAR-1.
    """

    group: WeightGroup
    candidates: tuple[WeightGroup, ...]
    evidence: str


def guess_roles(stored: Mapping[str, Shape], size: str = "spear1") -> list[Role]:
    """Guess what the weights of a checkpoint are in a SPEAR-1 of the preset `size`.

    Args:
        stored: Name -> shape of each weight in the checkpoint.
        size: The preset.

    Returns:
        A role for each group of weights, in the order of the checkpoint.
    """
    with torch.device("meta"):
        model = Spear1ForActionPrediction(build_spear1_config(get_preset(size)))
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    expected_groups = group_weights(expected)
    return [_guess_role(group, expected_groups) for group in group_weights(stored)]


def group_weights(shapes: Mapping[str, Shape]) -> list[WeightGroup]:
    """Group weights, given as name -> shape, by shape and by name without its numbers."""
    counts: dict[tuple[str, Shape], int] = {}
    for name, shape in shapes.items():
        key = (_NUMBER.sub("*", name), shape)
        counts[key] = counts.get(key, 0) + 1
    return [WeightGroup(name, shape, count) for (name, shape), count in counts.items()]


def _guess_role(group: WeightGroup, expected_groups: list[WeightGroup]) -> Role:
    """Guess the role of one group."""
    same_shape = [expected for expected in expected_groups if expected.shape == group.shape]
    same_name_and_shape = _find_similar_names(group, same_shape)
    if same_name_and_shape:
        return Role(group, tuple(same_name_and_shape), "name and shape")
    if same_shape:
        # Layers of one network are as many here as there.
        same_count = [expected for expected in same_shape if expected.count == group.count]
        return Role(group, tuple(same_count or same_shape), "shape")
    same_name = _find_similar_names(group, expected_groups)
    return Role(group, tuple(same_name), "name" if same_name else "")


def _find_similar_names(group: WeightGroup, candidates: list[WeightGroup]) -> list[WeightGroup]:
    """Return the candidates whose names end most like the group's, and at least in
    `MIN_COMMON_PARTS`."""
    similar: list[WeightGroup] = []
    most_common = MIN_COMMON_PARTS
    for candidate in candidates:
        num_common = _count_common_parts(group.name, candidate.name)
        if num_common > most_common:
            similar = []
            most_common = num_common
        if num_common == most_common:
            similar.append(candidate)
    return similar


def _count_common_parts(first: str, second: str) -> int:
    """Return how many parts two names have in common at their ends.

    >>> _count_common_parts("a.layers.*.mlp.fc1.weight", "b.h.*.mlp.fc1.weight")
    4
    """
    count = 0
    pairs = zip(reversed(first.split(".")), reversed(second.split(".")), strict=False)
    for first_part, second_part in pairs:
        if first_part != second_part:
            break
        count += 1
    return count
