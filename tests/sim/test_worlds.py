"""Worlds change the surroundings of a scene and nothing of its task.

"lab:3" is laboratory number 3, whose surroundings are the same in all its scenes; "wild", "varied"
and "colorful" have other surroundings in each scene.
"""

import numpy as np
import pytest

from spear.errors import SpearError
from spear.sim.objects import TASK_FREE_KINDS
from spear.sim.render import render_frame
from spear.sim.scene import sample_clutter_scene, sample_scene
from spear.sim.world import GRIPPER_NAME, World
from spear.sim.worlds import CameraOrbit, get_lab_of_scene, place_in_world, with_invisible_robot


@pytest.mark.parametrize("world", ["wild", "varied", "colorful", "lab:3", "colorful-lab:3"])
def test_a_world_keeps_the_task(world: str) -> None:
    scene = sample_scene("put_on", 7)

    placed = place_in_world(scene, world)

    assert placed.objects[: len(scene.objects)] == scene.objects  # clutter follows after them
    assert placed.instruction == scene.instruction
    assert placed.ee_position == scene.ee_position
    assert placed.appearance != scene.appearance


def test_the_default_world_changes_nothing() -> None:
    scene = sample_scene("stack_cube", 3)

    assert place_in_world(scene, "default") is scene


@pytest.mark.parametrize("world", ["wild", "varied", "colorful", "lab:3", "colorful-lab:3"])
def test_the_same_seed_gives_the_same_world(world: str) -> None:
    scene = sample_scene("put_on", 7)

    assert place_in_world(scene, world) == place_in_world(scene, world)


@pytest.mark.parametrize("kind", ["lab", "colorful-lab"])
def test_all_scenes_of_a_lab_look_alike(kind: str) -> None:
    first = place_in_world(sample_scene("put_on", 7), f"{kind}:3").appearance
    second = place_in_world(sample_scene("stack_cube", 8), f"{kind}:3").appearance
    other_lab = place_in_world(sample_scene("put_on", 7), f"{kind}:4").appearance

    assert first == second
    assert first != other_lab


def test_every_wild_scene_looks_different() -> None:
    wild_looks = [
        place_in_world(sample_scene("put_on", seed), "wild").appearance for seed in range(20)
    ]

    assert len({wild_look.camera for wild_look in wild_looks}) == 20
    assert len({wild_look.surfaces["table"] for wild_look in wild_looks}) == 20


def test_wild_cameras_stay_in_their_ranges() -> None:
    nominal = CameraOrbit.of(sample_scene("put_on", 0).appearance)

    for seed in range(50):
        wild_look = place_in_world(sample_scene("put_on", seed), "wild").appearance
        orbit = CameraOrbit.of(wild_look)

        # Ranges of `_sample_wild_look`: elevation 15° … 70°, azimuth ± 60° around that of the
        # default world, which itself varies by up to 5°, view angle 30° … 65°.
        assert 15 <= orbit.elevation_deg <= 70
        assert abs(orbit.azimuth_deg - nominal.azimuth_deg) < 65
        assert 30 <= wild_look.fovy_deg <= 65


def test_a_colorful_world_has_the_default_table_and_a_camera_within_30_degrees() -> None:
    for seed in range(40):
        scene = sample_scene("put_on", seed)
        colorful = place_in_world(scene, "colorful").appearance
        turn_deg = (
            CameraOrbit.of(colorful).azimuth_deg - CameraOrbit.of(scene.appearance).azimuth_deg
        )

        assert abs(turn_deg) <= 30
        assert colorful.target == scene.appearance.target
        assert colorful.table_half_size_m == scene.appearance.table_half_size_m
        assert colorful.table_height_m == scene.appearance.table_height_m


def test_half_of_the_varied_cameras_are_near_the_one_of_the_default_world() -> None:
    distances_deg = []
    for seed in range(400):
        scene = sample_scene("put_on", seed)
        default_azimuth_deg = CameraOrbit.of(scene.appearance).azimuth_deg
        varied = place_in_world(scene, "varied").appearance
        distances_deg.append(abs(CameraOrbit.of(varied).azimuth_deg - default_azimuth_deg))

    # A change is 60° times two uniform numbers of 0 … 1, whose product has the median 0.187.
    assert np.median(distances_deg) == pytest.approx(60 * 0.187, abs=2.5)
    assert 50 < max(distances_deg) < 60


def test_clutter_is_of_kinds_that_no_task_uses() -> None:
    scenes = [sample_scene("put_on", seed) for seed in range(20)]
    clutter = []
    for scene in scenes:
        clutter += place_in_world(scene, "wild").objects[len(scene.objects) :]

    assert clutter
    assert {placed_object.kind for placed_object in clutter} <= set(TASK_FREE_KINDS)


def test_pictures_without_the_robot_do_not_show_it() -> None:
    scene = place_in_world(sample_clutter_scene(10_004), "wild")

    rendered = render_frame(World(scene), "external", (168, 126))
    hidden = render_frame(World(with_invisible_robot(scene)), "external", (168, 126))

    assert GRIPPER_NAME in rendered.names.values()
    assert GRIPPER_NAME not in hidden.names.values()
    assert not np.array_equal(rendered.image, hidden.image)


def test_true_boxes_project_onto_their_objects_in_any_camera() -> None:
    frame = render_frame(
        World(place_in_world(sample_clutter_scene(10_001), "wild")), "external", (280, 210)
    )
    assert frame.boxes
    assert frame.instances is not None
    assert frame.intrinsics is not None

    for instance, vertices in frame.boxes.items():
        rows, columns = np.nonzero(frame.instances == instance)
        # The box's vertices in the image, [8, 2] pixels.
        projected = vertices @ frame.intrinsics.T
        pixels = projected[:, :2] / projected[:, 2:]

        # The object's pixels are within the vertices' range, with a tolerance of 2 pixels.
        assert pixels[:, 0].min() - 2 <= columns.min()
        assert columns.max() <= pixels[:, 0].max() + 2
        assert pixels[:, 1].min() - 2 <= rows.min()
        assert rows.max() <= pixels[:, 1].max() + 2


def test_scenes_are_spread_over_the_labs() -> None:
    labs = {get_lab_of_scene(seed, num_labs=4) for seed in range(10_000, 10_040)}

    assert labs == {"lab:0", "lab:1", "lab:2", "lab:3"}


def test_scenes_are_spread_over_colorful_labs_in_the_same_way() -> None:
    scene = sample_scene("put_on", 1_007)

    placed = place_in_world(scene, "colorful-labs:4")

    assert placed == place_in_world(scene, "colorful-lab:3")  # 1007 modulo 4


def test_an_unknown_world_is_refused() -> None:
    with pytest.raises(SpearError, match="no world 'mars'"):
        place_in_world(sample_scene("put_on", 0), "mars")
