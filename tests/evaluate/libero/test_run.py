"""Evaluations in LIBERO's suites, in a simulator without physics that needs no environment of its
own: a gripper that is at once where it is told to be, a bowl, and a plate."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spear.evaluate.libero import run
from spear.evaluate.libero.process import Box, LiberoMoment
from spear.evaluate.options import LiberoOptions
from spear.evaluate.results import Results
from spear.geometry import quat_exp, quat_multiply
from spear.types import Array

TASK = "libero_spatial-0"
BOWL = "bowl_1"
PLATE = "plate_1"
RIM_RADIUS_M = 0.052  # where the fingers close around a bowl's wall
MAX_RIM_OFFSET_M = 0.012
BOWL_HEIGHT_M = 0.056
PLATE_HEIGHT_M = 0.01  # at which a bowl rests on the plate
MAX_PLATE_OFFSET_M = 0.03
UPRIGHT = [1.0, 0.0, 0.0, 0.0]


class KinematicProcess:
    """What `LiberoProcess` does, without LIBERO.

    resets  (state, number of resets) of every episode of all processes.
    """

    instruction = "pick up the bowl and place it on the plate"
    num_states = 2
    goal: Sequence[Sequence[str]] = [["on", BOWL, PLATE]]
    resets: list[tuple[int, int | None]]

    def __init__(self, suite: str, task_index: int, seed: int, fast_rendering: bool) -> None:
        pass

    def reset(
        self,
        state_index: int,
        changes: Mapping[str, Any] | None = None,
        num_resets_since_seeding: int | None = None,
    ) -> LiberoMoment:
        self.resets.append((state_index, num_resets_since_seeding))
        bowl_position = (0.5, 0.1 * state_index, 0.0)
        bowl = Box(
            pose=np.array([*bowl_position, *UPRIGHT]),
            low=np.array([-0.056, -0.056, 0.0]),
            high=np.array([0.056, 0.056, BOWL_HEIGHT_M]),
        )
        plate = Box(
            pose=np.array([0.6, 0.3, 0.0, *UPRIGHT]),
            low=np.array([-0.07, -0.07, 0.0]),
            high=np.array([0.07, 0.07, 0.02]),
        )
        pose = np.array([0.4, 0.0, 0.3, *UPRIGHT])
        self._moment = LiberoMoment(
            pose=pose,
            commanded=pose,
            opening=1.0,
            base=np.zeros(3),
            objects={BOWL: bowl, PLATE: plate},
            regions={},
            joints={},
            gripped_objects=(),
            is_commanded_open=True,
            speed=0.0,
            finger_speed=0.0,
            success=False,
            steps=0,
        )
        return self._moment

    def run(self, pose_steps: Array, max_episode_steps: int) -> LiberoMoment:
        for row in pose_steps:
            self._move(row.astype(np.float64))
        return self._moment

    def close(self) -> None:
        pass

    def _move(self, row: Array) -> None:
        """Move the gripper, and the bowl if the fingers are around its wall."""
        before = self._moment
        turn = quat_exp(torch.from_numpy(row[3:6]))
        orientation = quat_multiply(turn, torch.from_numpy(before.pose[3:])).numpy()
        pose = np.concatenate([before.pose[:3] + row[:3], orientation])
        is_open = bool(row[6] < 0)

        bowl = before.objects[BOWL]
        is_gripped = not is_open and (bool(before.gripped_objects) or is_at_rim(pose, bowl))
        bowl_pose = bowl.pose.copy()
        if is_gripped:
            bowl_pose[:3] += row[:3]
        plate_position = before.objects[PLATE].pose[:3]
        is_above_plate = np.linalg.norm(bowl_pose[:2] - plate_position[:2]) < MAX_PLATE_OFFSET_M
        is_released = bool(before.gripped_objects) and is_open
        if is_released:
            bowl_pose[2] = PLATE_HEIGHT_M if is_above_plate else 0.0

        self._moment = replace(
            before,
            pose=pose,
            commanded=pose,
            opening=1.0 if is_open else 0.1,
            objects={**before.objects, BOWL: replace(bowl, pose=bowl_pose)},
            gripped_objects=(BOWL,) if is_gripped else (),
            is_commanded_open=is_open,
            success=before.success or bool(is_released and is_above_plate),
            steps=before.steps + run.CONTROLLER_STEPS_PER_ACTION,
        )


def is_at_rim(pose: Array, bowl: Box) -> bool:
    """Whether the wall of a bowl is between the fingers."""
    from_middle = np.linalg.norm(pose[:2] - bowl.pose[:2])
    is_low = pose[2] < bowl.pose[2] + BOWL_HEIGHT_M
    return bool(is_low and abs(from_middle - RIM_RADIUS_M) < MAX_RIM_OFFSET_M)


@pytest.fixture
def resets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int | None]]:
    """Make evaluations run without LIBERO; list their resets as (state, number of resets)."""
    all_resets: list[tuple[int, int | None]] = []
    monkeypatch.setattr(run, "LiberoProcess", KinematicProcess)
    monkeypatch.setattr(KinematicProcess, "resets", all_resets, raising=False)
    return all_resets


def evaluate_oracle(out: Path, num_scenes: int) -> Results:
    options = LiberoOptions(
        suites=("libero_spatial",), tasks=(0,), num_scenes=num_scenes, batch_size=1, out=out
    )
    results, _ = run.evaluate_libero(run.OracleAgent(), options)
    return results


def test_the_oracle_succeeds_through_the_actions_of_a_policy(
    tmp_path: Path, resets: list[tuple[int, int | None]]
) -> None:
    results = evaluate_oracle(tmp_path, num_scenes=2)

    assert [outcome.success for outcome in results.outcomes] == [True, True]
    assert [outcome.grasped for outcome in results.outcomes] == [True, True]
    assert run.summarize_suites(results)["libero_spatial"].n == 2


def test_a_state_has_the_same_number_of_resets_in_every_evaluation(
    tmp_path: Path, resets: list[tuple[int, int | None]]
) -> None:
    """The number of resets fixes where cabinet and stove stand."""
    evaluate_oracle(tmp_path, num_scenes=3)

    # There are two states, so the third scene is the first state again.
    assert resets == [(0, 1), (1, 2), (0, 1)]


def test_a_second_evaluation_runs_the_missing_states_only(
    tmp_path: Path, resets: list[tuple[int, int | None]]
) -> None:
    evaluate_oracle(tmp_path, num_scenes=1)

    results = evaluate_oracle(tmp_path, num_scenes=2)

    assert resets == [(0, 1), (1, 2)]
    assert [outcome.seed for outcome in results.outcomes] == [0, 1]
    assert {outcome.family for outcome in results.outcomes} == {TASK}
