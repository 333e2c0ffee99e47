"""Each shift of a SIMPLER scene changes what its axis says and nothing else.

The last tests need ManiSkill, its assets and a renderer, and are skipped without.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from refusals import Command, refuses
from spear.embodiments.observations import IMAGE_KEY
from spear.embodiments.simpler_widowx import POSE_KEY
from spear.evaluate.agents import Agent
from spear.evaluate.noise import NOISE_LEVELS
from spear.evaluate.options import EpisodeOptions, SimplerOptions
from spear.evaluate.runner import run_evaluation
from spear.evaluate.simpler import run
from spear.evaluate.simpler.photograph import (
    GAMMA,
    CameraView,
    measure_photographed_fraction,
    relight,
    reproject_table_and_dome_with_mirrored_margins,
)
from spear.evaluate.simpler.run import Simpler
from spear.evaluate.simpler.shifts import (
    FLAT_TASKS,
    SIMPLER_AXES,
    TASK_WORDS,
    SceneShift,
    compute_quat_turning_x_axis_to,
    parse_simpler_shift,
    sample_camera,
    sample_instruction,
    sample_photograph_with_other_background,
    select_shiftable_tasks,
)
from spear.evaluate.simpler.tasks import TASKS, Moment
from spear.evaluate.simpler.world import SimplerProcess
from spear.geometry import quat_rotate
from spear.sim.shifts import CAMERA_LEVELS, LEVELS, POLITE_PREFIXES, CameraLevel, Shift
from spear.sim.worlds import CameraOrbit, sample_downward_light_direction
from spear.types import Array

CARROT_TASK = "PutCarrotOnPlateInScene-v1"
CUBE_TASK = "StackGreenCubeOnYellowCubeBakedTexInScene-v1"
EGGPLANT_TASK = "PutEggplantInBasketScene-v1"
TABLE_Z_M = -0.0005  # of SIMPLER's table in the robot's base frame


@pytest.fixture
def camera() -> CameraView:
    """A camera 0.5 m above the table, which looks forward and down at 45°."""
    right = [0.0, -1.0, 0.0]
    down = [-math.sqrt(0.5), 0.0, -math.sqrt(0.5)]
    forward = [math.sqrt(0.5), 0.0, -math.sqrt(0.5)]
    return CameraView(
        position=np.array([-0.2, 0.0, 0.5]),
        rotation=np.column_stack([right, down, forward]),
        focal_px=200.0,
        center_px=(79.5, 59.5),
        size_px=(160, 120),
    )


@pytest.fixture
def photograph() -> Array:
    """A picture [120, 160, 3] whose colors change slowly from pixel to pixel."""
    columns, rows = np.meshgrid(np.arange(160), np.arange(120))
    return np.stack([60 + columns // 2, 50 + rows, 120 - columns // 4], axis=-1).astype(np.uint8)


def make_generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# The camera


@pytest.mark.parametrize("level", LEVELS)
def test_the_camera_moves_around_the_same_point_within_its_level(
    camera: CameraView, level: int
) -> None:
    limits = CAMERA_LEVELS[level]
    target = camera.compute_target(TABLE_Z_M)
    orbit_before = CameraOrbit.around(tuple(target), tuple(camera.position))

    for seed in range(20):
        moved = sample_camera(camera, TABLE_Z_M, limits, make_generator(seed))

        orbit = CameraOrbit.around(tuple(target), tuple(moved.position))
        np.testing.assert_allclose(moved.compute_target(TABLE_Z_M), target, atol=1e-9)
        turn_deg = (orbit.azimuth_deg - orbit_before.azimuth_deg + 180) % 360 - 180
        assert abs(turn_deg) <= limits.azimuth_deg + 1e-6
        assert abs(orbit.elevation_deg - orbit_before.elevation_deg) <= limits.elevation_deg + 1e-6
        assert abs(moved.fovy_deg - camera.fovy_deg) <= limits.fovy_deg + 1e-6
        ratio = orbit.distance_m / orbit_before.distance_m
        assert 1 / limits.distance_factor - 1e-6 <= ratio <= limits.distance_factor + 1e-6


def test_a_camera_that_does_not_move_keeps_its_orientation(camera: CameraView) -> None:
    """Also its roll about the optical axis, which a camera that only looks at a point lacks."""
    roll = math.radians(20)
    turn = np.array(
        [[math.cos(roll), -math.sin(roll), 0], [math.sin(roll), math.cos(roll), 0], [0, 0, 1]]
    )
    rolled = CameraView(
        camera.position, camera.rotation @ turn, camera.focal_px, camera.center_px, camera.size_px
    )
    nowhere = CameraLevel(azimuth_deg=0, elevation_deg=0, distance_factor=1, fovy_deg=0)

    moved = sample_camera(rolled, TABLE_Z_M, nowhere, make_generator())

    np.testing.assert_allclose(moved.position, rolled.position, atol=1e-9)
    np.testing.assert_allclose(moved.rotation, rolled.rotation, atol=1e-9)
    assert moved.focal_px == pytest.approx(rolled.focal_px)


def test_from_its_own_camera_a_photograph_looks_as_it_is(
    camera: CameraView, photograph: Array
) -> None:
    assert (
        reproject_table_and_dome_with_mirrored_margins(photograph, camera, camera, TABLE_Z_M)
        == photograph
    ).all()


def test_a_point_of_the_table_has_the_same_color_from_everywhere(
    camera: CameraView, photograph: Array
) -> None:
    point = np.array([0.33, 0.05, TABLE_Z_M])
    column, row = np.rint(camera.project(point)).astype(int)

    for seed in range(10):
        moved = sample_camera(camera, TABLE_Z_M, CAMERA_LEVELS[2], make_generator(seed))
        view = reproject_table_and_dome_with_mirrored_margins(photograph, camera, moved, TABLE_Z_M)

        moved_column, moved_row = np.rint(moved.project(point)).astype(int)
        difference = view[moved_row, moved_column].astype(int) - photograph[row, column]
        assert np.abs(difference).max() <= 3  # colors change by up to 1 per pixel


def test_the_photograph_shows_less_of_what_a_camera_sees_the_more_it_moves(
    camera: CameraView,
) -> None:
    fractions = []
    for level in LEVELS:
        of_level = []
        for seed in range(20):
            moved = sample_camera(camera, TABLE_Z_M, CAMERA_LEVELS[level], make_generator(seed))
            of_level.append(measure_photographed_fraction(camera, moved, TABLE_Z_M))
        fractions.append(np.mean(of_level))

    assert measure_photographed_fraction(camera, camera, TABLE_Z_M) == 1
    assert fractions == sorted(fractions, reverse=True)


# Light and background


def test_a_light_is_turned_to_its_direction() -> None:
    x_axis = torch.tensor([1.0, 0, 0], dtype=torch.float64)

    for seed in range(10):
        direction = sample_downward_light_direction(make_generator(seed))

        shining = quat_rotate(torch.from_numpy(compute_quat_turning_x_axis_to(direction)), x_axis)
        np.testing.assert_allclose(shining.numpy(), direction, atol=1e-9)


def test_light_of_twice_the_strength_makes_a_photograph_brighter_by_its_gamma(
    photograph: Array,
) -> None:
    brighter = relight(photograph, np.array([2.0, 2.0, 2.0]))

    np.testing.assert_allclose(brighter, photograph * 2 ** (1 / GAMMA), atol=0.51)


def test_the_background_of_level_1_differs_from_the_photograph_by_one_color(
    camera: CameraView, photograph: Array
) -> None:
    shifted = sample_photograph_with_other_background(
        photograph, camera, TABLE_Z_M, 1, make_generator(3)
    )

    difference = shifted.astype(int) - photograph
    is_unclipped = ((shifted > 0) & (shifted < 255)).all(axis=-1)
    assert is_unclipped.mean() > 0.5
    assert np.ptp(difference[is_unclipped], axis=0).max() <= 1  # of rounding
    assert np.abs(difference).max() <= 0.25 * 255 + 1
    assert np.abs(difference).max() > 1


@pytest.mark.parametrize("level", [2, 3])
def test_the_background_of_higher_levels_has_a_single_hue(
    camera: CameraView, photograph: Array, level: int
) -> None:
    shifted = sample_photograph_with_other_background(
        photograph, camera, TABLE_Z_M, level, make_generator(5)
    )

    is_unclipped = ((shifted > 40) & (shifted < 255)).all(axis=-1)
    shares = shifted[is_unclipped] / shifted[is_unclipped].sum(axis=-1, keepdims=True)
    assert len(shares) > 100
    assert np.ptp(shares, axis=0).max() < 0.02
    assert shifted.std() > 5  # light, shade and texture remain


# Language


@pytest.mark.parametrize("task", TASK_WORDS)
@pytest.mark.parametrize("level", LEVELS)
def test_an_instruction_has_the_words_of_its_level(task: str, level: int) -> None:
    words = TASK_WORDS[task]

    for seed in range(10):
        text = sample_instruction(task, -0.1, 0.1, level, make_generator(seed))

        is_polite = text.startswith(tuple(POLITE_PREFIXES))
        assert is_polite == (level >= 2)
        if level == 1:
            assert words.source.seen[0] in text
            assert words.target.seen[0] in text
        if level == 2:
            assert any(name in text for name in words.source.unseen)
        if level == 3:
            assert f"thing left of the {words.target.seen[0]}" in text


def test_an_object_right_of_the_target_is_called_so() -> None:
    text = sample_instruction(CARROT_TASK, 0.1, 0.0, 3, make_generator())

    assert "the thing right of the plate" in text


def test_an_object_in_front_of_the_target_keeps_a_name() -> None:
    """1 cm to the side is neither left nor right."""
    text = sample_instruction(CARROT_TASK, 0.01, 0.0, 3, make_generator())

    assert "thing" not in text
    assert any(name in text for name in TASK_WORDS[CARROT_TASK].source.unseen)


# Which shifts there are


@pytest.mark.parametrize("axis", ["layout", "robot:1"])
def test_an_axis_that_simpler_lacks_is_refused_with_those_that_it_has(axis: str) -> None:
    refuses("Give camera, light, background, language or noise", parse_simpler_shift, axis)


def test_the_command_refuses_such_an_axis_before_anything_runs(
    run_refused_command: Command, tmp_path: Any
) -> None:
    message = run_refused_command(
        "evaluate", "simpler", "--policy", "oracle", "--shift", "layout", "--out",
        str(tmp_path / "out"),
    )  # fmt: skip

    assert "--shift layout is not possible in SIMPLER" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shift", ["camera", "background:3", "all"])
def test_tasks_whose_goal_is_on_the_photograph_are_left_out(shift: str) -> None:
    assert select_shiftable_tasks((), shift) == FLAT_TASKS
    refuses("Give --tasks", select_shiftable_tasks, (EGGPLANT_TASK,), shift)


@pytest.mark.parametrize("shift", [None, "light:3", "language", "noise:1"])
def test_other_shifts_are_of_all_tasks(shift: str | None) -> None:
    assert select_shiftable_tasks((), shift) == tuple(TASKS)
    assert select_shiftable_tasks((EGGPLANT_TASK,), shift) == (EGGPLANT_TASK,)


def test_a_shift_is_fixed_by_task_level_and_seed() -> None:
    def draw(task: str, level: int, seed: int) -> float:
        return SceneShift(Shift("camera", level), seed).make_generator(task).random()

    assert draw(CUBE_TASK, 1, 7) == draw(CUBE_TASK, 1, 7)
    assert len({draw(CUBE_TASK, 1, 7), draw(CUBE_TASK, 2, 7), draw(CUBE_TASK, 1, 8)}) == 3
    assert draw(CUBE_TASK, 1, 7) != draw(CARROT_TASK, 1, 7)


# Noise, with a process that only records what it is asked


class RecordingProcess:
    """Stands for `SimplerProcess`. The arm does nothing, and the image is a striped one.

    scene_shifts  the shifts with which scenes began.
    rows          the commands that were executed.
    """

    scene_shifts: Sequence[SceneShift | None] = []
    rows: Sequence[Array] = []

    def __init__(self, task: str, assets: object) -> None:
        self._steps = 0

    def reset(
        self, start: int, image: bool, is_off_grid: bool, scene_shift: SceneShift | None
    ) -> Moment:
        RecordingProcess.scene_shifts = [*RecordingProcess.scene_shifts, scene_shift]
        self._steps = 0
        return self._make_moment()

    def run(self, rows: Array, image: bool, filming: bool) -> Moment:
        RecordingProcess.rows = [*RecordingProcess.rows, *rows]
        self._steps += len(rows)
        return self._make_moment()

    def close(self) -> None:
        pass

    def _make_moment(self) -> Moment:
        picture = np.full((480, 640, 3), 40, np.uint8)
        picture[:, ::16] = 220
        pose = np.array([0.3, 0, 0.2, 1, 0, 0, 0, 1], np.float32)
        observation = {POSE_KEY: pose, "prompt": "put carrot on plate", IMAGE_KEY: picture}
        truth: Any = None  # only the oracle reads it
        return Moment(observation, truth, False, False, False, False, 0, self._steps)


class ForwardAgent(Agent):
    """Moves forward with a closed gripper, and keeps the images that it sees."""

    name = "forward"
    needs_images = True
    image_sizes: Mapping[str, tuple[int, int]] = {"external": (192, 128)}

    def __init__(self) -> None:
        self.images: list[Array] = []

    def choose_action_chunks(
        self, envs: Sequence[Any], observations: Sequence[Mapping[str, Any]]
    ) -> Sequence[Array]:
        self.images += [observation[IMAGE_KEY] for observation in observations]
        forward = np.array([[0.01, 0, 0, 1, 0, 0, 0, 0]] * 5, np.float32)
        return [forward for _ in envs]


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> type[RecordingProcess]:
    monkeypatch.setattr(run, "SimplerProcess", RecordingProcess)
    monkeypatch.setattr(RecordingProcess, "scene_shifts", [])
    monkeypatch.setattr(RecordingProcess, "rows", [])
    return RecordingProcess


def run_one_episode(shift: str | None) -> ForwardAgent:
    """Run one episode in which three of five actions are executed before the next inference."""
    simulator = Simpler(SimplerOptions(batch_size=1, replan_steps=3, shift=shift))
    agent = ForwardAgent()
    run_evaluation(simulator, agent, {CARROT_TASK: [30]}, {}, EpisodeOptions())
    return agent


def test_noise_makes_images_worse_at_the_size_of_the_policy(
    recording: type[RecordingProcess],
) -> None:
    clear = run_one_episode(shift=None).images[0]
    first = run_one_episode(shift="noise:2").images
    second = run_one_episode(shift="noise:2").images

    assert clear.shape == (480, 640, 3)
    assert first[0].shape == (128, 171, 3)
    assert (first[0] == second[0]).all()  # the same seed and step
    assert (first[0] != first[1]).any()  # the same seed, another step


@pytest.mark.parametrize("level", LEVELS)
def test_noise_makes_actions_late(recording: type[RecordingProcess], level: int) -> None:
    """The arm stands still, and the gripper stays as it was commanded last: open, then closed."""
    num_late = math.ceil(NOISE_LEVELS[level].latency_ms / 200)  # a control step takes 200 ms

    run_one_episode(shift=f"noise:{level}")

    rows = np.array(recording.rows)
    still = np.abs(rows[:, :6]).max(axis=1) < 1e-6
    assert still[: num_late + 3].tolist() == [True] * num_late + [False] * 3
    assert still[num_late + 3]
    assert rows[:num_late, 6].tolist() == [1] * num_late
    assert (rows[num_late:, 6] < 0).all()
    assert len(rows) == TASKS[CARROT_TASK].max_steps


def test_other_shifts_make_no_action_late(recording: type[RecordingProcess]) -> None:
    run_one_episode(shift="light:3")

    assert np.abs(np.array(recording.rows)[:, 0]).min() > 0
    assert recording.scene_shifts == [SceneShift(Shift("light", 3), 30)]


# In ManiSkill


def test_the_arm_and_the_objects_begin_the_same_whatever_the_shift(
    process: SimplerProcess,
) -> None:
    usual = process.reset(5, image=False).truth

    for axis in SIMPLER_AXES:
        shifted = process.reset(5, False, False, SceneShift(Shift(axis, 3), 5)).truth
        np.testing.assert_array_equal(shifted.source, usual.source)
        np.testing.assert_array_equal(shifted.goal, usual.goal)
        np.testing.assert_array_equal(shifted.measured, usual.measured)


@pytest.mark.parametrize("axis", ["camera", "light", "background"])
def test_a_shift_of_the_picture_is_the_same_each_time_and_leaves_the_instruction(
    process: SimplerProcess, axis: str
) -> None:
    scene_shift = SceneShift(Shift(axis, 2), 5)
    usual = process.reset(5, image=True).observation
    first = process.reset(5, True, False, scene_shift).observation
    second = process.reset(5, True, False, scene_shift).observation

    assert (first[IMAGE_KEY] == second[IMAGE_KEY]).all()
    assert (first[IMAGE_KEY] != usual[IMAGE_KEY]).mean() > 0.5
    assert first["prompt"] == usual["prompt"]


@pytest.mark.parametrize("axis", ["language", "noise"])
def test_other_shifts_leave_the_picture(process: SimplerProcess, axis: str) -> None:
    usual = process.reset(5, image=True).observation
    shifted = process.reset(5, True, False, SceneShift(Shift(axis, 2), 5)).observation

    assert (shifted[IMAGE_KEY] == usual[IMAGE_KEY]).all()
    assert (shifted["prompt"] == usual["prompt"]) == (axis == "noise")


def test_nothing_of_a_shift_remains_in_the_next_scene(process: SimplerProcess) -> None:
    before = process.reset(5, image=True).observation

    for axis in SIMPLER_AXES:
        process.reset(5, True, False, SceneShift(Shift(axis, 3), 5))
    after = process.reset(5, image=True).observation

    assert (after[IMAGE_KEY] == before[IMAGE_KEY]).all()
    assert after["prompt"] == before["prompt"]
