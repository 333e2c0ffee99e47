"""Labeled images of LIBERO's tasks. One test needs LIBERO, and is skipped without."""

import contextlib

import numpy as np
import pytest

from refusals import refuses
from spear.errors import SpearError
from spear.evaluate.libero import environment
from spear.evaluate.libero.label import (
    LIGHT_FACTOR,
    LIGHT_TINT,
    list_jobs,
    name_object,
    render_labeled_frame,
    sample_appearance_changes,
)
from spear.evaluate.libero.process import LiberoProcess
from spear.evaluate.libero.record import PROTOCOL
from spear.evaluate.libero.suites import NUM_TASKS
from spear.labels.fit.image import unproject
from spear.sim.world import GRIPPER_NAME

SEEDS = range(10_000, 10_100)


def has_libero() -> bool:
    try:
        environment.resolve_python()
    except SpearError:
        return False
    return True


@pytest.mark.parametrize(
    ("libero_name", "name"),
    [
        ("akita_black_bowl_2", "black bowl"),
        ("wooden_cabinet_1", "wooden cabinet"),
        ("alphabet_soup_1", "alphabet soup"),
        ("", GRIPPER_NAME),
    ],
)
def test_objects_have_the_names_of_instructions(libero_name: str, name: str) -> None:
    assert name_object(libero_name) == name


def test_only_the_tasks_of_the_named_suites_are_labeled() -> None:
    jobs = list_jobs(["libero_object"], range(10_000, 10_040))

    assert len({task for task, _ in jobs}) == NUM_TASKS
    assert all(task.startswith("libero_object-") for task, _ in jobs)
    assert sum(len(seeds) for _, seeds in jobs) == NUM_TASKS * 40


def test_an_unknown_suite_is_refused() -> None:
    refuses("libero_space", list_jobs, ["libero_space"], range(10_000, 10_001))


def test_about_half_of_the_images_have_another_camera() -> None:
    num_moved = sum("camera" in sample_appearance_changes(seed) for seed in SEEDS)

    assert 35 < num_moved < 65


def test_the_light_stays_in_its_range() -> None:
    for seed in SEEDS:
        light = sample_appearance_changes(seed)["light"]

        assert light.min() >= LIGHT_FACTOR[0] - LIGHT_TINT
        assert light.max() <= LIGHT_FACTOR[1] + LIGHT_TINT


@pytest.mark.slow
@pytest.mark.skipif(
    not has_libero(), reason="LIBERO's environment is missing: spear evaluate libero --setup"
)
def test_masks_and_depth_show_where_objects_are() -> None:
    with contextlib.closing(
        LiberoProcess("libero_object", 0, PROTOCOL.seed, fast_rendering=True)
    ) as process:
        frame = render_labeled_frame(process, "libero_object-0", SEEDS[0], (168, 126))
        moment = process.run(np.zeros((0, 7)), max_episode_steps=1)

    assert frame.depth is not None
    assert frame.instances is not None
    assert frame.extrinsics is not None
    assert frame.intrinsics is not None
    points = unproject(frame.depth, frame.intrinsics)
    number = next(number for number, name in frame.names.items() if name == "alphabet soup")
    in_camera = points[frame.instances == number].mean(axis=0)
    in_base = frame.extrinsics[:3, :3] @ in_camera + frame.extrinsics[:3, 3]
    box = moment.objects["alphabet_soup_1"]
    # The mean of the visible surface is nearer to the camera than the middle, by half the can.
    np.testing.assert_allclose(in_base[:2], box.pose[:2], atol=0.05)
