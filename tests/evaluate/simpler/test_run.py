"""SIMPLER in ManiSkill: conventions as we say they are, the oracle, an episode of the nano
policy.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from refusals import refuses
from spear import embodiments
from spear.data.store.episode_store import EpisodeStore
from spear.evaluate.agents import load_agent
from spear.evaluate.compare import find_matching_references
from spear.evaluate.options import EpisodeOptions, SimplerOptions
from spear.evaluate.results import load_results
from spear.evaluate.runner import run_evaluation
from spear.evaluate.simpler.frames import fit_frame
from spear.evaluate.simpler.record import record_demonstrations, record_episode
from spear.evaluate.simpler.run import OracleAgent, Simpler
from spear.evaluate.simpler.tasks import MIN_START_OFFSET_M, TASKS, Task
from spear.evaluate.simpler.world import NoRenderer, SimplerProcess
from spear.geometry import apply_action, quat_distance, quat_exp
from spear.labels.fit.image import unproject
from spear.labels.pipeline import label_with_ground_truth
from spear.sim_data.demonstrations import SETTINGS_FILE
from spear.types import Frame
from spear.util.images import decode_image

EXAMPLE = Path(__file__).parents[3] / "examples" / "simpler_task.py"
TASK = "StackGreenCubeOnYellowCubeBakedTexInScene-v1"


def test_a_fitted_frame_shows_the_same_points() -> None:
    depth = np.broadcast_to(np.linspace(0.5, 1.5, 640, dtype=np.float32), (480, 640)).copy()
    instances = np.zeros((480, 640), np.int32)
    instances[200:300, 300:420], instances[:3, 60:63], instances[100:200, 590:] = 1, 2, 3
    matrix = np.array([[620.0, 0, 319.5], [0, 620, 239.5], [0, 0, 1]])
    image = np.random.default_rng(0).integers(0, 255, (480, 640, 3)).astype(np.uint8)
    frame = Frame(image, depth, instances, {1: "cube", 2: "speck", 3: "cut"}, matrix)
    small = fit_frame(frame, (192, 128), "here")
    assert (
        small.image.shape == (128, 192, 3) and small.names == {1: "cube"} and small.source == "here"
    )
    assert (small.depth[:, :10] == 0).all() and (small.depth[:, 10:181] > 0).all()
    assert (np.any(small.image, axis=-1) == (small.depth > 0)).mean() > 0.99
    cubes = [unproject(one.depth, one.intrinsics)[one.instances == 1] for one in (frame, small)]
    centres = [[points.mean(axis=0), np.ptp(points, axis=0)] for points in cubes]
    np.testing.assert_allclose(*centres, atol=0.006)


@pytest.fixture(scope="module")
def simpler(shared: Path) -> Iterator[Simpler]:
    """The simulator, with one process; skips where ManiSkill, its assets or a renderer are
    missing.
    """
    pytest.importorskip("mani_skill")
    assets = shared / "assets" / "simpler"
    if not assets.is_dir():
        pytest.skip(f"SIMPLER's assets not found at {assets}")
    simulator = Simpler(SimplerOptions(batch_size=1, assets=assets))
    try:
        simulator.open(TASK, 1)[0].reset(0, True)
    except NoRenderer as error:
        pytest.skip(str(error))
    yield simulator
    simulator.close()


@pytest.fixture
def process(simpler: Simpler) -> SimplerProcess:
    return simpler.open(TASK, 1)[0]


def test_an_action_moves_the_commanded_pose_as_it_says(process: SimplerProcess) -> None:
    robot, moment = embodiments.load("simpler_widowx"), process.reset(5, True)
    assert moment.observation["observation/image"].shape == (480, 640, 3)
    assert moment.observation["prompt"] == "stack the green block on the yellow block"
    action = np.array(
        [[0.01, -0.02, 0.015, *quat_exp(torch.tensor([0.1, -0.2, 0.15])), 0.0]], np.float32
    )
    state = robot.read(moment.observation)["observation/state"]
    np.testing.assert_allclose(state[:7], moment.truth.measured, atol=1e-6)
    after = process.run(
        robot.select_control(None)[1].convert(action, state, moment.observation), False
    ).truth
    start, move = torch.from_numpy(moment.truth.commanded), torch.from_numpy(np.float64(action[0]))
    position, rotation = apply_action(start[:3], start[3:], move[:3], move[3:7])
    np.testing.assert_allclose(after.commanded[:3], position.numpy(), atol=1e-6)
    assert (
        float(quat_distance(torch.from_numpy(after.commanded[3:]), rotation)) < 1e-3
        and not after.open
    )
    settled = process.run(np.array([[0, 0, 0, 0, 0, 0, -1]] * 4, np.float32), False).truth
    np.testing.assert_allclose(settled.measured[:3], position.numpy(), atol=3e-3)
    assert float(quat_distance(torch.from_numpy(settled.measured[3:]), rotation)) < 0.02
    assert settled.opening < 0.02 and moment.truth.opening > 0.98


def test_a_start_is_the_same_whatever_ran_before(process: SimplerProcess) -> None:
    rows, ran = np.array([[0.02, 0, -0.03, 0, 0, 0.05, 1]] * 4, np.float32), []
    for start in (3, 7, 3):
        before = process.reset(start, False).truth
        ran.append(
            np.concatenate([before.source, before.goal, process.run(rows, False).truth.measured])
        )
    assert (ran[0] == ran[2]).all() and not np.allclose(ran[0][:3], ran[1][:3])


@pytest.mark.parametrize(("task", "start"), [("PutEggplantInBasketScene-v1", 59), (TASK, 0)])
def test_the_oracle_succeeds(simpler: Simpler, task: str, start: int) -> None:
    """Also where the gripper comes to rest on the rim of the sink, and trembles there."""
    results, _ = run_evaluation(simpler, OracleAgent(), {task: [start]}, {}, EpisodeOptions())
    (outcome,) = results.outcomes
    assert (
        outcome.success and outcome.reached and outcome.grasped and not outcome.wrong_object_moved
    )
    assert outcome.unreachable == 0 and outcome.steps < TASKS[task].max_steps


def test_a_demonstration_starts_off_the_grid_and_recovers(process: SimplerProcess) -> None:
    """Its actions lead along its poses, and lead there again from the same seed."""
    first, again = (record_episode(process, TASK, 10_001, (171, 128)) for _ in range(2))
    assert first.success and first.action is not None and first.action_mask is not None
    assert 0 < (~first.action_mask).sum() < len(first) / 2
    np.testing.assert_array_equal(first.position, again.position)
    official = [process.reset(start, False).truth for start in range(TASKS[TASK].num_starts)]
    assert (
        np.ptp([one.goal[:2] for one in official], axis=0) / 2 + MIN_START_OFFSET_M
        < TASKS[TASK].max_offset_m
    ).all()
    begun = process.reset(10_001, False, other=True).truth
    pairs = [np.stack([one.source[:2], one.goal[:2]]) for one in (begun, *official)]
    assert (
        min(np.linalg.norm(pairs[0] - pair, axis=1).max() for pair in pairs[1:])
        > MIN_START_OFFSET_M / 2
    )
    assert np.linalg.norm(begun.measured[:3] - official[0].measured[:3]) > 1e-3


def test_labels_of_the_scenes_are_true(process: SimplerProcess) -> None:
    """Cubes of 3 cm are labelled as such, at their distance from each other; none is an official
    start; and the scenes of evaluations are as before."""
    before = process.reset(3, True).observation["observation/image"]
    frames = [process.look(seed, (384, 256)) for seed in range(10_000, 10_006)]
    process.look(10_000 + max(range(6), key=lambda number: len(frames[number].names)), (384, 256))
    assert (process.reset(3, True).observation["observation/image"] == before).all()
    seen = [("carrot" in frame.names.values(), len(frame.names)) for frame in frames]
    assert len(set(seen)) > 1, "no clutter"
    boxes = [
        (o, frame) for frame in frames for o in next(label_with_ground_truth(iter([frame]))).objects
    ]
    cubes = [(o, frame) for o, frame in boxes if o.name.endswith("block") and o.box3d is not None]
    assert len(cubes) >= 6
    np.testing.assert_allclose(
        np.median([np.sort(o.box3d.size) for o, _ in cubes], axis=0), 0.03, atol=0.004
    )
    heights = [f.extrinsics[2, :3] @ one.box3d.center + f.extrinsics[2, 3] for one, f in cubes]
    np.testing.assert_allclose(np.median(heights), 0.8695 + 0.015, atol=0.006)  # on the table


def test_recording_goes_on_behind_what_is_written(
    simpler: Simpler, shared: Path, tmp_path: Path
) -> None:
    how = 128, 1, shared / "assets" / "simpler"
    seeds = range(10_000, 10_002)
    assert record_demonstrations(tmp_path, [TASK], seeds[:1], *how) == {TASK: (1, 1)}
    assert record_demonstrations(tmp_path, [TASK], seeds, *how) == {TASK: (2, 2)}
    store = EpisodeStore(tmp_path / TASK)
    assert [store.source(i) for i in range(2)] == [
        f"simpler/{TASK}/{seed}" for seed in (10_000, 10_001)
    ]
    assert decode_image(store.image(1, 0, "external") or b"").shape == (128, 171, 3)
    (tmp_path / TASK / SETTINGS_FILE).write_text('{"assets": "of before"}')
    refuses("assets", record_demonstrations, tmp_path, [TASK], seeds, *how)


@pytest.mark.parametrize(
    "case",
    [
        (
            "1 of 1 ",
            "record 1 mine",
            "self._evaluate(",
            "dict(success=self._evaluate()['success'])  # (",
        ),
        (
            "1 of 1 ",
            "evaluate 1 oracle",
            "(NAME,)",
            "(NAME,), assets=Path(__file__).with_name('assets')",
        ),
        ("SpearError: .*Task", "evaluate 1 oracle", "num_starts=24", "num_starts=12"),
        ("SpearError: .*__main__", "evaluate 1 oracle", '__name__ == "__main__"', "True"),
    ],
)
def test_a_task_is_one_file(
    simpler: Simpler, shared: Path, tmp_path: Path, case: tuple[str, ...]
) -> None:
    """As a script, whose processes find its scene and its assets; what does not fit is said."""
    said, what, was, becomes = case
    (tmp_path / "task.py").write_text(EXAMPLE.read_text().replace(was, becomes))
    (tmp_path / "assets").symlink_to(shared / "assets" / "simpler")
    environment = os.environ | {"MS_ASSET_DIR": "." if was == "(NAME,)" else "assets"}
    command, how = (
        [sys.executable, "task.py", *what.split()],
        {"capture_output": True, "text": True},
    )
    ran = subprocess.run(command, cwd=tmp_path, env=environment, **how)
    assert re.search(said, (ran.stderr if ran.returncode else ran.stdout).replace("\n", " ")), (
        ran.stderr
    )


def test_a_command_back_is_obeyed_at_once(process: SimplerProcess) -> None:
    process.reset(0, False)
    out = process.run(np.array([[0.1, 0, 0, 0, 0, 0, 1]] * 12, np.float32), False)
    assert out.unreachable > 5 and np.linalg.norm(out.truth.commanded[:3]) < 0.8
    back = process.run(np.array([[-0.1, 0, 0, 0, 0, 0, 1]] * 2, np.float32), False)
    assert (
        back.unreachable == out.unreachable
        and back.truth.measured[0] < out.truth.measured[0] - 0.02
    )


def test_nano_runs_and_is_filmed(
    simpler: Simpler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(TASKS, TASK, Task(24, 6, 4))
    run_evaluation(
        simpler, load_agent("nano"), {TASK: [30]}, {}, EpisodeOptions(videos=1, out=tmp_path)
    )
    results = load_results(tmp_path)
    (outcome,) = results.outcomes
    assert (outcome.seed, outcome.steps) == (30, 6)
    (published,) = find_matching_references(results)
    assert "SPEAR-1 (published)" in [line[0] for line in published.cells([("nano", results)])]
    (film,) = tmp_path.glob("*.mp4")
    with av.open(str(film)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 7 + 5
