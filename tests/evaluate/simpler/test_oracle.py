"""SIMPLER without ManiSkill: frames in closed form, the oracle through adapter and controller."""

import dataclasses
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from refusals import refuses
from spear import embodiments
from spear.embodiments.simpler_widowx import POSE_KEY
from spear.evaluate.simpler import oracle, record
from spear.evaluate.simpler.tasks import (
    MIN_START_OFFSET_M,
    MIN_START_TURN_RAD,
    TASKS,
    Truth,
    is_official,
    sample_off_grid_start,
)
from spear.evaluate.simpler.world import _to_ee_pose, compute_opening, is_at_rest, to_base_frame
from spear.types import Array

DOWN = Rotation.from_matrix([[0, 0, 1], [0, 1, 0], [-1, 0, 0]])
SIZES = {
    "PutCarrotOnPlateInScene-v1": ([0.115, 0.032, 0.038], [0.11, 0.11, 0.006]),
    "PutEggplantInBasketScene-v1": ([0.078, 0.037, 0.038], [0.13, 0.08, 0.002]),
    "PutSpoonOnTableClothInScene-v1": ([0.14, 0.035, 0.026], [0.1, 0.1, 0.01]),
    "StackGreenCubeOnYellowCubeBakedTexInScene-v1": ([0.03, 0.03, 0.03], [0.03, 0.03, 0.03]),
}


class Table:
    """The controller's law: the arm is at its target at once, objects stick to closed fingers."""

    def __init__(self, task: str, at: Array, yaw: float) -> None:
        self.robot = embodiments.load("simpler_widowx")
        self.task, self.sizes = task, [np.array(s) for s in SIZES[task]]
        self.position = np.array([0.29, 0.0, 0.13])
        self.link = Rotation.from_euler("y", 3, degrees=True) * DOWN
        self.open, self.changed, self.waits = True, False, [False]
        self.source, self.turn = (
            np.array([*at, self.sizes[0][2] / 2]),
            Rotation.from_euler("z", yaw),
        )
        self.goal = np.array([0.32, -0.08, self.sizes[1][2] / 2])
        self.held: Array | None = None
        self.taken_across = 0.0

    def truth(self) -> Truth:
        pose = np.concatenate([self.position, (self.link * DOWN.inv()).as_quat(scalar_first=True)])
        return Truth(
            commanded=pose,
            measured=pose,
            opening=1.0 if self.open else 0.6 if self.held is not None else 0.0,
            open=self.open,
            still=self.waits[-1],
            closing=self.changed and not self.open,
            source=np.concatenate([self.source, self.turn.as_quat(scalar_first=True)]),
            source_size=self.sizes[0],
            goal=np.concatenate([self.goal, [1, 0, 0, 0]]),
            goal_size=self.sizes[1],
        )

    def act(self) -> None:
        truth = self.truth()
        pose = np.concatenate(
            [self.position, self.link.as_quat(scalar_first=True), [truth.opening]]
        )
        seen = {
            "observation/image": np.zeros((48, 64, 3), np.uint8),
            POSE_KEY: pose,
            "prompt": "go",
        }
        state = self.robot.read(seen)["observation/state"]
        self.command(
            self.robot.select_control(None)[1].convert(
                oracle.choose_action(self.task, truth)[None], state, seen
            )[0]
        )

    def command(self, row: Array) -> None:
        assert np.linalg.norm(row[:3]) <= oracle.MAX_STEP + 1e-6
        self.position = self.position + row[:3]
        self.link = Rotation.from_euler("XYZ", row[3:6]) * self.link
        self.changed, self.open = (row[6] > 0) != self.open, bool(row[6] > 0)
        self.waits.append(not self.changed and np.abs(row[:6]).max() < 1e-4)
        offset = self.source - self.position
        if not self.open and self.changed and np.linalg.norm(offset) < 0.035:
            self.held = offset
            fingers = (self.link * DOWN.inv()).as_matrix()[:, 1]
            self.taken_across = abs(float(fingers @ self.turn.as_matrix()[:, 0]))
        if self.open and self.held is not None:
            self.held = None
            over = np.abs(self.source - self.goal)[:2].max() < 0.04
            self.source[2] = self.sizes[0][2] / 2 + (
                self.goal[2] + self.sizes[1][2] / 2 if over else 0
            )
        if self.held is not None:
            self.source = self.position + self.held


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("at", "yaw"), [((0.38, 0.1), 0.3), ((0.24, 0.06), -1.4)])
def test_the_oracle_brings_the_object(task: str, at: tuple[float, float], yaw: float) -> None:
    table = Table(task, np.array(at), yaw)
    table.open = False  # the fingers closed on nothing: it tries again
    for _ in range(TASKS[task].max_steps):
        table.act()
    assert table.open
    while table.waits[-1]:  # at the end
        table.waits.pop()
    assert sum(table.waits) == 1  # while its fingers close
    assert np.linalg.norm(table.source[:2] - table.goal[:2]) < 0.006
    assert table.position[2] > table.source[2] + 0.08
    assert table.taken_across < 0.1 or ("Cube" in task and table.taken_across > 0.99)


def test_poses_and_the_opening_are_to_ee_pose() -> None:
    base = np.array([0.147, 0.028, 0.870, 0, 0, 0, 1])  # turned by half a turn about z
    turned = Rotation.from_euler("z", 90, degrees=True)
    found = to_base_frame(
        base, np.array([-0.235, -0.075, 0.8875, *turned.as_quat(scalar_first=True)])
    )
    np.testing.assert_allclose(found[:3], [0.382, 0.103, 0.0175], atol=1e-9)
    assert (Rotation.from_quat(found[3:], scalar_first=True) * turned).magnitude() < 1e-9

    # The end-effector is parallel to the base when the gripper points down.
    link = np.array([0.3, 0.0, 0.1, *DOWN.as_quat(scalar_first=True)])
    np.testing.assert_allclose(_to_ee_pose(link), [0.3, 0.0, 0.1, 1, 0, 0, 0], atol=1e-9)
    openings = [compute_opening(np.full(2, q)) for q in (0.014, 0.015, 0.026, 0.037, 0.038)]
    assert openings == pytest.approx([0, 0, 0.5, 1, 1])


def test_rest_is_judged_by_the_pose() -> None:
    truth = Table("PutEggplantInBasketScene-v1", np.array([0.3, 0.1]), 0.0).truth()
    trembling, moving = (truth.measured + np.array([d, 0, 0, 0, 0, 0, 0]) for d in (1e-4, 2e-3))
    assert is_at_rest(
        truth, trembling, truth.opening
    )  # joints at 0.03 rad/s that press on something go nowhere
    assert not is_at_rest(truth, moving, truth.opening)
    assert not is_at_rest(truth, truth.measured, truth.opening - 0.1)  # the fingers close


def test_starts_off_the_grid_are_none_of_the_official_ones() -> None:
    """On a grid as ManiSkill's of the carrot: four corners, two orientations."""
    corners = np.array([[x, y, 0.88] for x in (-0.235, -0.085) for y in (-0.075, 0.075)])
    places = np.array([[a, b] for a in corners for b in corners if a is not b])
    turns = np.array([[[1.0, 0, 0, 0]] * 2, [[0.5**0.5, 0, 0, 0.5**0.5], [1, 0, 0, 0]]])
    task = TASKS["PutCarrotOnPlateInScene-v1"]
    starts = [sample_off_grid_start(task, seed, places, turns) for seed in range(300)]
    for start in starts:
        nearest = np.linalg.norm(places[:, :, :2] - start.places[:, :2], axis=-1).max(axis=1).min()
        off = Rotation.from_quat(turns[:, 0], scalar_first=True).inv()
        turned = (off * Rotation.from_quat(start.turns[0], scalar_first=True)).magnitude().min()
        assert nearest >= MIN_START_OFFSET_M or turned >= MIN_START_TURN_RAD
        assert np.linalg.norm(start.places[0] - start.places[1]) >= task.min_distance_m
        assert (abs(start.places[:, :2] - [-0.16, 0]) <= 0.1).all() and turned <= np.pi / 4 + 1e-9
        near = dataclasses.replace(
            start, places=places[3] + 0.5 * MIN_START_OFFSET_M, turns=turns[1]
        )
        assert is_official(near, places, turns)
    np.testing.assert_array_equal(
        sample_off_grid_start(task, 7, places, turns).places, starts[7].places
    )
    assert len({start.places.tobytes() for start in starts}) == 300
    fixed = sample_off_grid_start(
        task, 0, np.stack([corners, *corners[[[2] * 4, [1] * 4]]], axis=1), turns[:, [0, 1, 1]]
    )
    np.testing.assert_array_equal(fixed.places[1:], corners[[2, 1]])
    crowded = dataclasses.replace(task, min_distance_m=0.6)
    refuses("min_distance_m", sample_off_grid_start, crowded, 0, places, turns)


def test_a_recording_that_is_left_waits_for_no_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    left, in_time = threading.Event(), list[bool]()
    monkeypatch.setattr(record, "SimplerProcess", lambda *_: SimpleNamespace(close=left.set))
    monkeypatch.setattr(
        record, "record_episode", lambda _, __, n, *___: in_time.append(n == 0 or left.wait(9))
    )
    episodes = record.record_episodes("task", range(8), (4, 4), workers=1)
    next(episodes)
    del episodes
    assert all(in_time)
