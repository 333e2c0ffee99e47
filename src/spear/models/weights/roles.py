"""What the weights of a checkpoint with unknown names may be, by names, shapes and positions.

The result is a guess for people who write rules for names (`names_SOURCE.toml`). Nothing is loaded.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spear.models.presets import build_spear1_config, get_preset
from spear.models.spear1 import Spear1ForActionPrediction
from spear.models.weights.load import rename_prefixes

Shape = tuple[int, ...]

MIN_COMMON_PARTS = 2
"""Two names probably mean the same if at least this many of their last parts are equal, such as
"q_proj.weight". One part is too few, because nearly all names end with "weight" or "bias"."""

MIN_COMMON_SHAPES = 0.5
"""Two stacks of layers are taken for the same network if they have at least this fraction of their
weights' shapes in common (our choice). The DINOv2 of a checkpoint that stores queries, keys and
values as one weight (see `JOINED_LAYERS`) still has 0.7 of the shapes in common with ours."""

JOINED_LAYERS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers with the same input, which some networks store as one weight, row after row."""

_NUMBER = re.compile(r"\b\d+\b")  # "7" in "layers.7.norm2"


@dataclass(frozen=True)
class WeightGroup:
    """Weights of one shape, whose names differ only in the numbers of the layers.

    name     The common name, with * for each number: "layers.*.norm.weight".
    shape    The shape of each weight.
    members  The names of the weights, with their numbers.
    """

    name: str
    shape: Shape
    members: tuple[str, ...]

    @property
    def count(self) -> int:
        """How many weights these are."""
        return len(self.members)

    @property
    def stack(self) -> str | None:
        """The name of the stack of layers that has these weights: the name until the first *.

        None, if the names have no number.
        """
        stack_name, star, _ = self.name.partition("*")
        return stack_name if star else None


@dataclass(frozen=True)
class Role:
    """What a group of a checkpoint's weights may be.

    group       The group.
    candidates  The groups of SPEAR-1 that the evidence speaks for.
    evidence    What group and candidates have in common: "name and shape"; "shape and position",
                where the position is the stack of layers that the group belongs to (a stack is
                recognized by its shapes); "joined shapes and position", if the group is all of the
                candidates in one weight; "shape"; or "name", if the shape differs. "" if neither
                the name nor the shape is one of SPEAR-1.
    """

    group: WeightGroup
    candidates: tuple[WeightGroup, ...]
    evidence: str

    @property
    def is_settled(self) -> bool:
        """Whether one candidate remains whose shape is the group's."""
        return len(self.candidates) == 1 and "shape" in self.evidence


def guess_weight_roles(
    stored_shapes: Mapping[str, Shape],
    preset: str = "spear1",
    renamed: Sequence[tuple[str, str]] = (),
) -> list[Role]:
    """Guess what the weights of a checkpoint are in a SPEAR-1 of this preset.

    Args:
        stored_shapes: Name -> shape of each weight in the checkpoint.
        preset: Name of the preset.
        renamed: Rules (old prefix, new prefix) that are applied to the names before they are
            compared, as in `names_SOURCE.toml`.

    Returns:
        A role for each group of weights, in the order of the checkpoint.
    """
    with torch.device("meta"):
        model = Spear1ForActionPrediction(build_spear1_config(get_preset(preset)))
    expected_shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    expected_groups = group_weights(expected_shapes)
    groups = group_weights(stored_shapes)
    expected_stacks = _match_stacks(groups, expected_groups)

    roles = []
    for group in groups:
        name = rename_prefixes(group.name, renamed)
        candidates = expected_groups
        is_stack_known = group.stack in expected_stacks
        if is_stack_known:
            stack = expected_stacks[group.stack]
            candidates = [candidate for candidate in expected_groups if candidate.stack == stack]
        roles.append(_match_group_to_candidates(group, name, candidates, is_stack_known))
    return roles


def group_weights(shapes: Mapping[str, Shape]) -> list[WeightGroup]:
    """Group weights, given as name -> shape, by shape and by name without its numbers."""
    members: dict[tuple[str, Shape], list[str]] = {}
    for name, shape in shapes.items():
        members.setdefault((mask_numbers(name), shape), []).append(name)
    return [WeightGroup(name, shape, tuple(names)) for (name, shape), names in members.items()]


def mask_numbers(name: str) -> str:
    """Return a weight's name with * for each number."""
    return _NUMBER.sub("*", name)


def insert_numbers(pattern: str, stored_name: str) -> str:
    """Return a name of ours, with the numbers of a stored weight's name for each * in it.

    Without as many * in the pattern as numbers in the name, the pattern is returned as it is.

    >>> insert_numbers("expert.layers.*.norm", "blocks.7.n")
    'expert.layers.7.norm'
    """
    numbers_in_name = _NUMBER.findall(stored_name)
    if pattern.count("*") != len(numbers_in_name):
        return pattern
    for number in numbers_in_name:
        pattern = pattern.replace("*", number, 1)
    return pattern


# --- Stacks of layers ---


def _match_stacks(
    groups: Sequence[WeightGroup], expected_groups: Sequence[WeightGroup]
) -> dict[str | None, str]:
    """Match each stack of the checkpoint with the stack of SPEAR-1 whose shapes it has.

    Returns:
        Name of a stack in the checkpoint -> name in SPEAR-1, of the stacks of which only one fits.
    """
    expected_stacks = _list_stacks(expected_groups)
    matches: dict[str | None, str] = {}
    for name, shapes in _list_stacks(groups).items():
        # For each stack of SPEAR-1: the number of common shapes, divided by the number of shapes
        # that at least one of both stacks has.
        fractions = {
            expected_name: (shapes & expected).total() / (shapes | expected).total()
            for expected_name, expected in expected_stacks.items()
        }
        max_fraction = max(fractions.values())
        best_names = [
            expected_name
            for expected_name, fraction in fractions.items()
            if fraction == max_fraction
        ]
        if max_fraction >= MIN_COMMON_SHAPES and len(best_names) == 1:
            matches[name] = best_names[0]
    return matches


def _list_stacks(groups: Sequence[WeightGroup]) -> dict[str, Counter[tuple[Shape, int]]]:
    """Return the stacks by name, each with its (shape, number of layers) and their counts."""
    stacks: dict[str, Counter[tuple[Shape, int]]] = {}
    for group in groups:
        if group.stack is not None:
            stacks.setdefault(group.stack, Counter())[group.shape, group.count] += 1
    return stacks


# --- Single groups ---


def _match_group_to_candidates(
    group: WeightGroup,
    compared_name: str,
    expected_groups: Sequence[WeightGroup],
    is_stack_known: bool,
) -> Role:
    """Guess the role of one group, whose name is compared as `compared_name`.

    `expected_groups` are those of its stack, if the stack is known, otherwise all.
    """
    same_shape = [expected for expected in expected_groups if expected.shape == group.shape]
    same_name_and_shape = _find_groups_with_most_similar_names(compared_name, same_shape)
    if same_name_and_shape:
        return Role(group, tuple(same_name_and_shape), "name and shape")
    if same_shape:
        evidence = "shape and position" if is_stack_known else "shape"
        # If the checkpoint's network has as many layers as SPEAR-1's, its group has the same count.
        same_count = [expected for expected in same_shape if expected.count == group.count]
        return Role(group, tuple(same_count or same_shape), evidence)
    if is_stack_known:
        joined = _find_parts_of_joined_group(group, expected_groups)
        if joined:
            return Role(group, joined, "joined shapes and position")
    same_name = _find_groups_with_most_similar_names(compared_name, expected_groups)
    return Role(group, tuple(same_name), "name" if same_name else "")


def _find_parts_of_joined_group(
    group: WeightGroup, stack_groups: Sequence[WeightGroup]
) -> tuple[WeightGroup, ...]:
    """Return the groups of a stack whose weights, joined row after row, have `group`'s shape.

    Returns an empty tuple if no layers in `JOINED_LAYERS` do.
    """
    for layers in JOINED_LAYERS:
        for kind in ("weight", "bias"):
            joined_groups = []
            for layer in layers:
                joined_groups += [
                    member for member in stack_groups if member.name.endswith(f".{layer}.{kind}")
                ]
            if len(joined_groups) < len(layers):
                continue
            num_rows = sum(member.shape[0] for member in joined_groups)
            if (num_rows, *joined_groups[0].shape[1:]) == group.shape:
                return tuple(joined_groups)
    return ()


def _find_groups_with_most_similar_names(
    name: str, candidates: Sequence[WeightGroup]
) -> list[WeightGroup]:
    """Return the candidates whose names have the most parts at their ends in common with `name`.

    They have at least `MIN_COMMON_PARTS` in common. A candidate of the same name is returned alone.
    """
    similar: list[WeightGroup] = []
    most_common = MIN_COMMON_PARTS
    for candidate in candidates:
        if candidate.name == name:
            return [candidate]
        num_common = _count_common_parts_at_end(name, candidate.name)
        if num_common > most_common:
            similar = []
            most_common = num_common
        if num_common == most_common:
            similar.append(candidate)
    return similar


def _count_common_parts_at_end(first: str, second: str) -> int:
    """Return how many parts two names have in common at their ends.

    >>> _count_common_parts_at_end("a.layers.*.mlp.fc1.weight", "b.h.*.mlp.fc1.weight")
    4
    """
    count = 0
    pairs = zip(reversed(first.split(".")), reversed(second.split(".")), strict=False)
    for first_part, second_part in pairs:
        if first_part != second_part:
            break
        count += 1
    return count


# --- The first mapping file ---


def format_mapping(roles: Sequence[Role], source: str) -> str:
    """Format roles as a first mapping file (TOML), which a person completes.

    Args:
        roles: The roles of all groups of a checkpoint.
        source: The checkpoint's path or name, for the comment.
    """
    settled = [role for role in roles if role.is_settled]
    joined = [role for role in roles if role.evidence.startswith("joined")]
    unknown = [role for role in roles if not role.candidates]
    settled_or_joined_or_unknown = [*settled, *joined, *unknown]
    open_roles = [role for role in roles if role not in settled_or_joined_or_unknown]
    num_groups_by_name = Counter(role.group.name for role in roles)
    ambiguous_names = {name for name, count in num_groups_by_name.items() if count > 1}

    lines = [
        f"# A first mapping of the names in {json.dumps(source)}, by `spear convert roles`.",
        "# Nobody has verified it. * stands for a layer's number.",
        "verified = false",
        "",
        "[settled] # name in the checkpoint -> our name: one candidate",
        *_format_entries(settled, ambiguous_names),
        "",
        "[joined] # name in the checkpoint -> our names, row after row",
        *_format_entries(joined, ambiguous_names),
        "",
        "[open] # several candidates, or one of another shape: choose one, and move it to settled",
        *_format_entries(open_roles, ambiguous_names),
        "",
        "[unknown] # SPEAR-1 has no such name or shape: the shape",
        *_format_entries(unknown, ambiguous_names),
        "",
        "[unused] # pattern of names -> why SPEAR-1 needs no such weights",
    ]
    return "\n".join(lines) + "\n"


def _format_entries(roles: Sequence[Role], ambiguous_names: Collection[str]) -> list[str]:
    """Format the lines of a part of the mapping file. JSON's strings and lists are valid TOML.

    A group has one line for all its weights. If other groups have the same name, each weight of the
    group has its own.
    """
    lines = []
    for role in roles:
        stored_names = [role.group.name]
        if role.group.name in ambiguous_names:
            stored_names = list(role.group.members)
        for stored_name in stored_names:
            our_names = [insert_numbers(group.name, stored_name) for group in role.candidates]
            value: Any = our_names or list(role.group.shape)
            if role.is_settled:
                value = our_names[0]
            line = f"{json.dumps(stored_name)} = {json.dumps(value)}"
            lines.append(f"{line} # by {role.evidence}" if role.evidence else line)
    return lines
