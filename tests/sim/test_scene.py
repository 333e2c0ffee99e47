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
    clutter_scene,
    sample_scene,
)
from spear.sim.world import World


@pytest.mark.parametrize("family", FAMILIES)
def test_same_seed_same_scene_and_other_seeds_differ(family: str) -> None:
    assert sample_scene(family, 7) == sample_scene(family, 7)
    scenes = [sample_scene(family, seed) for seed in range(30)]
    assert (
        len({scene.objects for scene in scenes}) == 30
        and len({scene.instruction for scene in scenes}) >= 6
    )
    assert len({scene.appearance.camera for scene in scenes}) == 30


@pytest.mark.parametrize("family", [*FAMILIES, "clutter"])
def test_objects_lie_apart_inside_the_workspace_and_stay_where_they_are_put(family: str) -> None:
    for seed in range(12):
        scene = clutter_scene(seed) if family == "clutter" else sample_scene(family, seed)
        for i, one in enumerate(scene.objects):
            assert 0.36 < one.position[0] < 0.64 and abs(one.position[1]) < 0.24
            for other in scene.objects[:i]:
                apart = math.dist(one.position[:2], other.position[:2])
                assert apart > OBJECT_KINDS[one.kind].radius + OBJECT_KINDS[other.kind].radius
        if family != "clutter":
            placed = np.array([thing.position for thing in scene.objects])
            np.testing.assert_allclose(World(scene).start, placed, atol=2e-3)


def test_each_family_casts_its_roles_and_names_them() -> None:
    assert all(len(set(templates)) >= 6 for templates in TEMPLATES.values())
    for seed in range(30):
        scenes = {f: sample_scene(f, seed) for f in FAMILIES}
        kinds = {f: [t.kind for t in scene.objects] for f, scene in scenes.items()}
        assert kinds["put_on"][1] in PUT_ON[kinds["put_on"][0]]
        assert kinds["put_in_basket"][0] == "basket" and kinds["put_in_basket"][1] in IN_BASKET
        assert kinds["spoon_on_towel"][:2] == ["towel", "spoon"]
        assert {*kinds["stack_cube"][:2]} <= {*CUBES} and kinds["stack_cube"][0] != kinds[
            "stack_cube"
        ][1]
        for family, names in kinds.items():
            assert 2 <= len(names) <= 5 and len(set(names)) == len(names)
            for name in names[:2]:
                assert any(
                    word in scenes[family].instruction for word in SYNONYMS.get(name, (name,))
                )
