"""Each shift changes what its axis says, as far as its level allows, and nothing else."""

import dataclasses
import math

import numpy as np
import pytest

from spear.errors import SpearError
from spear.sim.objects import TASK_FREE_KINDS
from spear.sim.scene import (
    FAMILIES,
    NOMINAL_START_POSITION_M,
    SYNONYMS,
    TEMPLATES,
    SceneSpec,
    sample_scene,
)
from spear.sim.shifts import (
    AXES,
    CAMERA_LEVELS,
    LEVELS,
    NUM_CLUTTER,
    SCENE_AXES,
    TRAINING_START_RANGE_M,
    UNSEEN_SYNONYMS,
    UNSEEN_TEMPLATES,
    Shift,
    describe_by_relation,
    shift_scene,
)
from spear.sim.textures import UNSEEN_TEXTURES
from spear.sim.worlds import CameraOrbit

# Axis -> the fields of `SceneSpec` that it changes.
CHANGED_FIELDS = {
    "camera": {"appearance"},
    "light": {"appearance"},
    "background": {"appearance"},
    "layout": {"objects"},
    "robot": {"ee_position", "ee_rotation"},
    "language": {"instruction"},
    "noise": set(),
}
# Axis -> the fields of `SceneAppearance` that it may change.
CHANGED_LOOK_FIELDS = {
    "camera": {"camera", "fovy_deg", "has_four_walls"},
    "light": {"light", "diffuse", "ambient"},
    "background": {"surfaces"},
}


def find_differing_fields(first: object, second: object) -> set[str]:
    """The fields in which two objects of the same dataclass differ."""
    names = [field.name for field in dataclasses.fields(first)]  # type: ignore[arg-type]
    return {name for name in names if getattr(first, name) != getattr(second, name)}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("axis", AXES)
def test_a_shift_changes_only_what_its_axis_names(axis: str, level: int) -> None:
    scene = sample_scene("put_on", 5)

    shifted = shift_scene(scene, Shift(axis, level))

    assert find_differing_fields(scene, shifted) == CHANGED_FIELDS[axis]
    if axis in CHANGED_LOOK_FIELDS:
        assert (
            find_differing_fields(scene.appearance, shifted.appearance) <= CHANGED_LOOK_FIELDS[axis]
        )


@pytest.mark.parametrize("axis", SCENE_AXES)
def test_the_same_seed_gives_the_same_shift(axis: str) -> None:
    scene = sample_scene("put_in_basket", 9)

    assert shift_scene(scene, Shift(axis, 2)) == shift_scene(scene, Shift(axis, 2))


@pytest.mark.parametrize("level", LEVELS)
def test_the_camera_moves_within_its_level(level: int) -> None:
    limits = CAMERA_LEVELS[level]

    for seed in range(30):
        scene = sample_scene("stack_cube", seed)
        orbit_before = CameraOrbit.of(scene.appearance)
        orbit_after = CameraOrbit.of(shift_scene(scene, Shift("camera", level)).appearance)

        assert abs(orbit_after.azimuth_deg - orbit_before.azimuth_deg) <= limits.azimuth_deg + 1e-6
        assert (
            abs(orbit_after.elevation_deg - orbit_before.elevation_deg)
            <= limits.elevation_deg + 1e-6
        )
        ratio = orbit_after.distance_m / orbit_before.distance_m
        assert 1 / limits.distance_factor - 1e-6 <= ratio <= limits.distance_factor + 1e-6


def test_the_background_of_level_3_has_only_unseen_textures() -> None:
    scene = sample_scene("put_on", 2)

    surfaces = shift_scene(scene, Shift("background", 3)).appearance.surfaces

    assert {material for material, _ in surfaces.values()} <= set(UNSEEN_TEXTURES)


@pytest.mark.parametrize("level", [2, 3])
def test_clutter_is_of_unseen_kinds_from_level_2(level: int) -> None:
    counts = []
    for seed in range(10):
        scene = sample_scene("put_on", seed)
        added = shift_scene(scene, Shift("layout", level)).objects[len(scene.objects) :]
        counts.append(len(added))

        assert {placed_object.kind for placed_object in added} <= set(TASK_FREE_KINDS)

    assert np.mean(counts) > 0.8 * NUM_CLUTTER[level]  # a full table has no room for all


@pytest.mark.parametrize("level", LEVELS)
def test_the_gripper_begins_outside_the_range_of_training(level: int) -> None:
    for seed in range(30):
        scene = shift_scene(sample_scene("put_on", seed), Shift("robot", level))
        offset = np.abs(np.array(scene.ee_position) - NOMINAL_START_POSITION_M)
        yaw = 2 * math.atan2(scene.ee_rotation[3], scene.ee_rotation[0])

        assert offset.max() >= TRAINING_START_RANGE_M
        assert abs(yaw) >= math.radians(30) - 1e-9  # training turns the gripper by up to 30°


def list_seen_instructions() -> set[str]:
    """The instructions of 300 training scenes of each family (training's seeds begin at 10,000)."""
    texts = set()
    for family in FAMILIES:
        for seed in range(10_000, 10_300):
            texts.add(sample_scene(family, seed).instruction)
    return texts


def test_shifted_instructions_were_never_seen() -> None:
    trained_instructions = list_seen_instructions()

    for family in FAMILIES:
        for level in LEVELS:
            text = shift_scene(sample_scene(family, 3), Shift("language", level)).instruction
            assert text not in trained_instructions


def test_unseen_words_do_not_stand_among_those_of_training() -> None:
    for name, templates in UNSEEN_TEMPLATES.items():
        assert not set(templates) & set(TEMPLATES[name])
    for kind, synonyms in UNSEEN_SYNONYMS.items():
        new_words = set(synonyms) - {kind}  # the kind's plain name may occur in both
        assert not new_words & set(SYNONYMS.get(kind, ()))


def find_scene_with_a_relation() -> SceneSpec:
    """The first scene whose source (object 1) can be described by where it lies."""
    for seed in range(100):
        scene = sample_scene("put_on", seed)
        if describe_by_relation(scene, 1):
            return scene
    raise AssertionError("no scene has an object that a relation describes")


def test_a_relation_names_another_object_of_the_scene() -> None:
    scene = find_scene_with_a_relation()

    description = describe_by_relation(scene, 1)

    assert description is not None
    _, _, anchor = description.rpartition(" of the ")  # for example "thing left of the plate"
    assert anchor in {placed_object.kind for placed_object in scene.objects}
    assert anchor != scene.objects[1].kind


@pytest.mark.parametrize("text", ["camera:4", "camera:x", "camera:"])
def test_a_level_that_does_not_exist_is_refused(text: str) -> None:
    with pytest.raises(SpearError, match="camera:1, camera:2 or camera:3"):
        Shift.parse(text)


def test_an_axis_alone_is_its_second_level() -> None:
    assert Shift.parse("light") == Shift("light", 2)
