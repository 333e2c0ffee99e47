"""SIMPLER in ManiSkill: its conventions, the oracle, recording, an episode of the nano policy.

Most tests need ManiSkill, its assets and a renderer, and are skipped without.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pytest
import torch

from refusals import Command, refuses
from spear import embodiments
from spear.data.store.episode_store import EpisodeStore
from spear.evaluate.agents import load_agent
from spear.evaluate.compare import find_published_tables_of_same_tasks
from spear.evaluate.options import EpisodeOptions
from spear.evaluate.results import load_results
from spear.evaluate.runner import run_evaluation
from spear.evaluate.simpler import world
from spear.evaluate.simpler.frames import fit_frame_and_drop_cut_instances
from spear.evaluate.simpler.record import record_demonstrations, record_episode
from spear.evaluate.simpler.run import OracleAgent, Simpler
from spear.evaluate.simpler.tasks import MIN_START_OFFSET_M, TASKS, Task
from spear.evaluate.simpler.world import SimplerProcess
from spear.geometry import apply_action, quat_distance, quat_exp
from spear.labels.fit.image import unproject
from spear.labels.pipeline import label_with_ground_truth
from spear.sim_data.demonstrations import SETTINGS_FILE
from spear.types import Array, Frame
from spear.util.images import decode_image

EXAMPLE = Path(__file__).parents[3] / "examples" / "simpler_task.py"
TASK = "StackGreenCubeOnYellowCubeBakedTexInScene-v1"
CUBE_SIDE_M = 0.03
TABLE_HEIGHT_M = 0.8695  # z in the world


@pytest.fixture
def frame() -> Frame:
    """A slanted plane with a cube, a speck of a few pixels, and an object at the right side."""
    depth = np.broadcast_to(np.linspace(0.5, 1.5, 640, dtype=np.float32), (480, 640)).copy()
    instances = np.zeros((480, 640), np.int32)
    instances[200:300, 300:420] = 1
    instances[:3, 60:63] = 2
    instances[100:200, 590:] = 3
    intrinsics = np.array([[620.0, 0, 319.5], [0, 620, 239.5], [0, 0, 1]])
    image = np.random.default_rng(0).integers(0, 255, (480, 640, 3)).astype(np.uint8)
    return Frame(image, depth, instances, {1: "cube", 2: "speck", 3: "cut"}, intrinsics)


def measure_cube(frame: Frame) -> tuple[Array, Array]:
    """Return the mean [3] and the extent [3] of the cube's points in the camera frame, m."""
    assert frame.depth is not None
    assert frame.intrinsics is not None
    points = unproject(frame.depth, frame.intrinsics)[frame.instances == 1]
    return points.mean(axis=0), np.ptp(points, axis=0)


def test_a_fitted_frame_has_its_size_and_whole_objects(frame: Frame) -> None:
    """The speck is too small, and the border cuts the object at the side."""
    fitted = fit_frame_and_drop_cut_instances(frame, (192, 128), "here")

    assert fitted.image.shape == (128, 192, 3)
    assert fitted.names == {1: "cube"}
    assert fitted.source == "here"


def test_bars_of_a_fitted_frame_have_no_depth(frame: Frame) -> None:
    """A frame of 640 x 480 fills 171 of 192 columns, behind 10 empty ones."""
    fitted = fit_frame_and_drop_cut_instances(frame, (192, 128), "here")

    assert fitted.depth is not None
    is_colored = np.any(fitted.image, axis=-1)
    assert (fitted.depth[:, :10] == 0).all()
    assert (fitted.depth[:, 10:181] > 0).all()
    has_depth = fitted.depth > 0
    assert (is_colored == has_depth).mean() > 0.99


def test_a_fitted_frame_shows_the_same_points(frame: Frame) -> None:
    center, extent = measure_cube(frame)

    fitted_center, fitted_extent = measure_cube(
        fit_frame_and_drop_cut_instances(frame, (192, 128), "here")
    )

    # A pixel of the fitted frame is about 6 mm wide at the cube.
    np.testing.assert_allclose(fitted_center, center, atol=0.006)
    np.testing.assert_allclose(fitted_extent, extent, atol=0.006)


@pytest.mark.parametrize(
    "command",
    [
        "evaluate simpler --policy oracle --num-scenes 1 --out out",
        "record simpler --num-episodes 1 --out out",
        "label simpler:10000-10001 --out out",
    ],
)
def test_without_maniskill_a_command_says_how_to_install_it(
    command: str,
    run_refused_command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(world, "find_spec", lambda name: None)

    message = run_refused_command(command.split())

    assert "SIMPLER needs mani_skill. Install it: pip install 'spear-vla[simpler]'" in message
    assert not list(tmp_path.iterdir())


def stay(num_steps: int, opening: float) -> Array:
    """Make commands [num_steps, 7] that only move the gripper (1 = open, -1 = closed)."""
    return np.array([[0, 0, 0, 0, 0, 0, opening]] * num_steps, np.float32)


def test_the_robot_observes_its_camera_its_instruction_and_its_pose(
    process: SimplerProcess,
) -> None:
    robot = embodiments.load("simpler_widowx")

    moment = process.reset(5, image=True)

    state = robot.read(moment.observation)["observation/state"]
    assert moment.observation["observation/image"].shape == (480, 640, 3)
    assert moment.observation["prompt"] == "stack the green block on the yellow block"
    np.testing.assert_allclose(state[:7], moment.truth.measured, atol=1e-6)


def test_an_action_moves_the_commanded_pose_as_it_says(process: SimplerProcess) -> None:
    """The commanded pose moves at once. The arm follows in some steps, and the gripper closes."""
    robot = embodiments.load("simpler_widowx")
    moment = process.reset(5, image=True)
    state = robot.read(moment.observation)["observation/state"]
    translation = torch.tensor([0.01, -0.02, 0.015], dtype=torch.float64)
    rotation = quat_exp(torch.tensor([0.1, -0.2, 0.15]))
    action = np.array([[*translation, *rotation, 0.0]], np.float32)
    _, control = robot.select_control(None)
    rows = control.convert(action, state, moment.observation)

    moved = process.run(rows, image=False).truth
    settled = process.run(stay(4, -1), image=False).truth

    start = torch.from_numpy(moment.truth.commanded)
    exact_action = torch.from_numpy(np.float64(action[0]))
    expected_position, expected_rotation = apply_action(
        start[:3], start[3:], exact_action[:3], exact_action[3:7]
    )
    commanded_rotation = torch.from_numpy(moved.commanded[3:])
    settled_rotation = torch.from_numpy(settled.measured[3:])
    np.testing.assert_allclose(moved.commanded[:3], expected_position.numpy(), atol=1e-6)
    assert float(quat_distance(commanded_rotation, expected_rotation)) < 1e-3
    np.testing.assert_allclose(settled.measured[:3], expected_position.numpy(), atol=3e-3)
    assert float(quat_distance(settled_rotation, expected_rotation)) < 0.02
    assert not moved.is_commanded_open
    assert moment.truth.opening > 0.98
    assert settled.opening < 0.02


def test_a_start_is_the_same_whatever_ran_before(process: SimplerProcess) -> None:
    commands = np.array([[0.02, 0, -0.03, 0, 0, 0.05, 1]] * 4, np.float32)

    runs = []
    for start in (3, 7, 3):
        at_start = process.reset(start, image=False).truth
        moved = process.run(commands, image=False).truth
        runs.append(np.concatenate([at_start.source, at_start.goal, moved.measured]))

    first_run, other_start, second_run = runs
    assert (first_run == second_run).all()
    assert not np.allclose(first_run[:3], other_start[:3])  # positions of the object to move


@pytest.mark.parametrize(("task", "start"), [("PutEggplantInBasketScene-v1", 59), (TASK, 0)])
def test_the_oracle_succeeds(simpler: Simpler, task: str, start: int) -> None:
    """In start 59 of the eggplant, the gripper rests on the rim of the sink and trembles."""
    results, _ = run_evaluation(simpler, OracleAgent(), {task: [start]}, {}, EpisodeOptions())

    (outcome,) = results.outcomes
    assert outcome.success
    assert outcome.reached
    assert outcome.grasped
    assert not outcome.wrong_object_moved
    assert outcome.unreachable == 0
    assert outcome.steps < TASKS[task].max_steps


def test_a_demonstration_recovers_and_repeats(process: SimplerProcess) -> None:
    """Disturbances are masked, and the same seed gives the same demonstration."""
    demonstration = record_episode(process, TASK, 10_001, (171, 128))
    repeated = record_episode(process, TASK, 10_001, (171, 128))

    assert demonstration.success
    assert demonstration.action is not None
    assert demonstration.action_mask is not None
    num_masked = (~demonstration.action_mask).sum()
    assert 0 < num_masked < len(demonstration) / 2
    np.testing.assert_array_equal(demonstration.position, repeated.position)


def test_a_demonstration_starts_off_the_grid(process: SimplerProcess) -> None:
    official = [process.reset(start, image=False).truth for start in range(TASKS[TASK].num_starts)]
    recorded = process.reset(10_001, image=False, is_off_grid=True).truth

    # From each official start, the larger one of the two objects' distances.
    recorded_pair = np.stack([recorded.source[:2], recorded.goal[:2]])
    distances_m = []
    for truth in official:
        official_pair = np.stack([truth.source[:2], truth.goal[:2]])
        distances_m.append(np.linalg.norm(recorded_pair - official_pair, axis=1).max())
    # Half of the offset, because objects still move when they settle.
    assert min(distances_m) > MIN_START_OFFSET_M / 2
    # Starts are drawn from an area that is larger than the grid on each side.
    half_grid_m = np.ptp([truth.goal[:2] for truth in official], axis=0) / 2
    assert (half_grid_m + MIN_START_OFFSET_M < TASKS[TASK].max_offset_m).all()
    arm_offset_m = np.linalg.norm(recorded.measured[:3] - official[0].measured[:3])
    assert arm_offset_m > 1e-3


@pytest.fixture
def labeled_frames(process: SimplerProcess) -> list[Frame]:
    """Frames of six scenes for labeling."""
    return [process.build_and_render_scene(seed, (384, 256)) for seed in range(10_000, 10_006)]


def test_scenes_for_labels_leave_those_of_evaluations_as_they_were(
    process: SimplerProcess,
) -> None:
    """The scene with the most objects is looked at last, so that its clutter would be seen."""
    image_before = process.reset(3, image=True).observation["observation/image"]
    frames = [process.build_and_render_scene(seed, (384, 256)) for seed in range(10_000, 10_006)]
    num_objects = [len(frame.names) for frame in frames]
    process.build_and_render_scene(10_000 + int(np.argmax(num_objects)), (384, 256))

    image_after = process.reset(3, image=True).observation["observation/image"]

    assert (image_after == image_before).all()


def test_scenes_for_labels_have_clutter(labeled_frames: list[Frame]) -> None:
    """So the scenes differ in their objects."""
    kinds = {("carrot" in frame.names.values(), len(frame.names)) for frame in labeled_frames}
    assert len(kinds) > 1


def test_labels_of_the_scenes_are_true(labeled_frames: list[Frame]) -> None:
    """The blocks are cubes of 3 cm that lie on the table."""
    sizes_m = []
    heights_m = []
    for frame in labeled_frames:
        label = next(label_with_ground_truth(iter([frame])))
        for labeled in label.objects:
            if labeled.box3d is None or not labeled.name.endswith("block"):
                continue
            assert frame.extrinsics is not None
            sizes_m.append(np.sort(labeled.box3d.size))
            # z in the world: the third row of the transform from the camera to the world.
            height = frame.extrinsics[2, :3] @ labeled.box3d.center + frame.extrinsics[2, 3]
            heights_m.append(height)

    expected_height_m = TABLE_HEIGHT_M + CUBE_SIDE_M / 2
    assert len(sizes_m) >= 6
    np.testing.assert_allclose(np.median(sizes_m, axis=0), CUBE_SIDE_M, atol=0.004)
    np.testing.assert_allclose(np.median(heights_m), expected_height_m, atol=0.006)


def test_recording_continues_after_what_is_written(
    simpler: Simpler, shared: Path, tmp_path: Path
) -> None:
    assets = shared / "assets" / "simpler"
    seeds = range(10_000, 10_002)

    options: dict[str, Any] = {"height": 128, "workers": 1, "assets": assets}
    first_counts = record_demonstrations(tmp_path, [TASK], seeds[:1], **options)
    counts = record_demonstrations(tmp_path, [TASK], seeds, **options)

    store = EpisodeStore(tmp_path / TASK)
    # (number of successful demonstrations, number of demonstrations) of each task.
    assert first_counts == {TASK: (1, 1)}
    assert counts == {TASK: (2, 2)}
    assert store.source(0) == f"simpler/{TASK}/10000"
    assert store.source(1) == f"simpler/{TASK}/10001"
    assert decode_image(store.image(1, 0, "external") or b"").shape == (128, 171, 3)


def test_recording_does_not_mix_two_settings(
    simpler: Simpler, shared: Path, tmp_path: Path
) -> None:
    assets = shared / "assets" / "simpler"
    options: dict[str, Any] = {"height": 128, "workers": 1, "assets": assets}
    record_demonstrations(tmp_path, [TASK], range(10_000, 10_001), **options)
    (tmp_path / TASK / SETTINGS_FILE).write_text('{"assets": "of another version"}')

    more_seeds = range(10_000, 10_002)
    refuses("assets", record_demonstrations, tmp_path, [TASK], more_seeds, **options)


class ScriptCase(NamedTuple):
    """A run of a changed copy of the example script.

    arguments  the script's arguments.
    old_text   text of the example that is replaced.
    new_text   what it is replaced by.
    output     pattern of what the run prints.
    assets     the environment variable MS_ASSET_DIR of the run. The folder "." has no assets, so
               the script must name their folder.
    """

    arguments: str
    old_text: str
    new_text: str
    output: str
    assets: str = "assets"


SCRIPT_CASES = {
    "its scene": ScriptCase(
        arguments="record 1 mine",
        old_text="self._evaluate(",
        new_text="dict(success=self._evaluate()['success'])  # (",
        output="1 of 1 ",
    ),
    "its assets": ScriptCase(
        arguments="evaluate 1 oracle",
        old_text="(NAME,)",
        new_text="(NAME,), assets=Path(__file__).with_name('assets')",
        output="1 of 1 ",
        assets=".",
    ),
    "starts that differ": ScriptCase(
        arguments="evaluate 1 oracle",
        old_text="num_starts=24",
        new_text="num_starts=12",
        output="SpearError: .*Task",
    ),
    "no guard of the main program": ScriptCase(
        arguments="evaluate 1 oracle",
        old_text='__name__ == "__main__"',
        new_text="True",
        output="SpearError: .*__main__",
    ),
}


@pytest.mark.parametrize("case", SCRIPT_CASES.values(), ids=SCRIPT_CASES)
def test_a_task_is_one_file(
    simpler: Simpler, shared: Path, tmp_path: Path, case: ScriptCase
) -> None:
    """The processes that a script starts find its task and its assets, or say what is wrong."""
    script = EXAMPLE.read_text().replace(case.old_text, case.new_text)
    (tmp_path / "task.py").write_text(script)
    (tmp_path / "assets").symlink_to(shared / "assets" / "simpler")

    completed = subprocess.run(
        [sys.executable, "task.py", *case.arguments.split()],
        cwd=tmp_path,
        env={**os.environ, "MS_ASSET_DIR": case.assets},
        capture_output=True,
        text=True,
        check=False,
    )

    output = completed.stderr if completed.returncode else completed.stdout
    assert re.search(case.output, output.replace("\n", " ")), completed.stderr


def test_a_command_back_is_obeyed_at_once(process: SimplerProcess) -> None:
    """Commands forward, of which the arm cannot follow the last ones, do not add up."""
    process.reset(0, image=False)
    # A row of a command: translation [3] in m, rotation [3] in rad, gripper (1 = open).
    forward = [0.1, 0, 0, 0, 0, 0, 1]
    backward = [-0.1, 0, 0, 0, 0, 0, 1]

    stretched = process.run(np.array([forward] * 12, np.float32), image=False)
    returned = process.run(np.array([backward] * 2, np.float32), image=False)

    assert stretched.unreachable > 5  # of 12 steps
    assert np.linalg.norm(stretched.truth.commanded[:3]) < 0.8
    assert returned.unreachable == stretched.unreachable
    assert returned.truth.measured[0] < stretched.truth.measured[0] - 0.02


@pytest.fixture
def nano_folder(simpler: Simpler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with the results and the film of one short episode of nano.

    Seed 30 is start 30 - 24 = 6, because there are 24 starts.
    """
    short_task = Task(num_starts=24, max_steps=6, num_grasp_directions=4)
    monkeypatch.setitem(TASKS, TASK, short_task)
    options = EpisodeOptions(videos=1, out=tmp_path)
    run_evaluation(simpler, load_agent("nano"), {TASK: [30]}, {}, options)
    return tmp_path


def test_nano_runs_and_is_compared_with_published_results(nano_folder: Path) -> None:
    results = load_results(nano_folder)

    (outcome,) = results.outcomes
    (published,) = find_published_tables_of_same_tasks(results)
    cells: list[Any] = published.cells([("nano", results)])
    assert (outcome.seed, outcome.steps) == (30, 6)  # to the time limit
    assert "SPEAR-1 (published)" in [line[0] for line in cells]


def test_nano_is_filmed(nano_folder: Path) -> None:
    (film,) = nano_folder.glob("*.mp4")

    with av.open(str(film)) as container:
        num_frames = sum(1 for _ in container.decode(video=0))

    num_states = 1 + 6  # the start, and the state after each step
    assert num_frames == num_states + 5  # the last frame stays for a second, at 5 Hz
