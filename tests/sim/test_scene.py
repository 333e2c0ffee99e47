"""Scenes: the same seed gives the same scene, and a scene is one that can be played."""

import math

import numpy as np
import pytest

from spear.sim.objects import CUBES, OBJECT_KINDS
from spear.sim.scene import (
    FAMILIES,
    IN_BASKET,
    PUT_ON,
    SYNONYMS,
    TEMPLATES,
    SceneSpec,
    sample_clutter_scene,
    sample_scene,
)
from spear.sim.world import World

NUM_SEEDS = 30


def sample(family: str, seed: int) -> SceneSpec:
    """The scene of a task family, or of "clutter", which has no task."""
    return sample_clutter_scene(seed) if family == "clutter" else sample_scene(family, seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_scene(family: str) -> None:
    assert sample_scene(family, 7) == sample_scene(family, 7)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_seeds_give_other_scenes(family: str) -> None:
    scenes = [sample_scene(family, seed) for seed in range(NUM_SEEDS)]

    assert len({scene.objects for scene in scenes}) == NUM_SEEDS
    assert len({scene.appearance.camera for scene in scenes}) == NUM_SEEDS
    assert len({scene.instruction for scene in scenes}) >= 6  # each family has 6 templates or more


@pytest.mark.parametrize("family", [*FAMILIES, "clutter"])
def test_objects_lie_inside_the_workspace(family: str) -> None:
    """The workspace is 0.37 … 0.63 m along x and -0.23 … 0.23 m along y, here with 1 cm more."""
    for seed in range(12):
        for item in sample(family, seed).objects:
            assert 0.36 < item.position[0] < 0.64
            assert abs(item.position[1]) < 0.24


@pytest.mark.parametrize("family", [*FAMILIES, "clutter"])
def test_objects_lie_apart(family: str) -> None:
    for seed in range(12):
        objects = sample(family, seed).objects
        for index, first in enumerate(objects):
            for second in objects[:index]:
                distance_m = math.dist(first.position[:2], second.position[:2])
                first_radius_m = OBJECT_KINDS[first.kind].radius
                second_radius_m = OBJECT_KINDS[second.kind].radius
                assert distance_m > first_radius_m + second_radius_m


@pytest.mark.parametrize("family", FAMILIES)
def test_objects_stay_where_they_are_put(family: str) -> None:
    """A `World` simulates the first moments of a scene; no object moves by more than 2 mm."""
    for seed in range(12):
        scene = sample_scene(family, seed)
        expected = np.array([item.position for item in scene.objects])

        np.testing.assert_allclose(World(scene).start_positions, expected, atol=2e-3)


def list_kinds(family: str, seed: int) -> list[str]:
    """The kinds of a scene's objects: target, source, distractors."""
    return [item.kind for item in sample_scene(family, seed).objects]


class TestRoles:
    """The first object is the target, the second the source, others are distractors."""

    def test_put_on(self) -> None:
        for seed in range(NUM_SEEDS):
            target, source, *_ = list_kinds("put_on", seed)

            assert source in PUT_ON[target], seed

    def test_put_in_basket(self) -> None:
        for seed in range(NUM_SEEDS):
            target, source, *_ = list_kinds("put_in_basket", seed)

            assert target == "basket", seed
            assert source in IN_BASKET, seed

    def test_spoon_on_towel(self) -> None:
        for seed in range(NUM_SEEDS):
            assert list_kinds("spoon_on_towel", seed)[:2] == ["towel", "spoon"], seed

    def test_stack_cube(self) -> None:
        for seed in range(NUM_SEEDS):
            target, source, *_ = list_kinds("stack_cube", seed)

            assert {target, source} <= set(CUBES), seed
            assert target != source, seed

    @pytest.mark.parametrize("family", FAMILIES)
    def test_distractors_are_few_and_different(self, family: str) -> None:
        for seed in range(NUM_SEEDS):
            kinds = list_kinds(family, seed)

            assert 2 <= len(kinds) <= 5, seed  # target, source and up to three distractors
            assert len(set(kinds)) == len(kinds), seed

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_instruction_names_source_and_target(self, family: str) -> None:
        for seed in range(NUM_SEEDS):
            instruction = sample_scene(family, seed).instruction

            for kind in list_kinds(family, seed)[:2]:
                words = SYNONYMS.get(kind, (kind,))
                assert any(word in instruction for word in words), seed


@pytest.mark.parametrize("name", TEMPLATES)
def test_instructions_have_several_wordings(name: str) -> None:
    assert len(set(TEMPLATES[name])) >= 6
