"""LIBERO's robot: what clients send becomes SPEAR-1's observation, and actions become commands.

libero.json was recorded in LIBERO: what robosuite reports, where hand and fingers are, and how the
arm moves under commands. No test here needs LIBERO.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from refusals import refuses
from spear.embodiments import load
from spear.embodiments.libero import (
    BASE_POSITION_KEY,
    CONTROLLER_STEP_S,
    CONTROLLER_STEPS_PER_ACTION,
    DAMPING,
    MAX_TRANSLATION_M,
    STIFFNESS,
    predict_after_controller_step,
)
from spear.geometry import quat_exp, quat_to_matrix
from spear.types import Array

RECORDED = json.loads((Path(__file__).parent / "data" / "libero.json").read_text("utf-8"))
ROBOT = load("libero")
VLA_EVAL_ROBOT = load("libero_vla_eval")
NUM_ACTIONS = 5
"""How often a recorded motion repeats its action."""
LAST_STEPS_OF_ACTIONS = np.arange(1, NUM_ACTIONS + 1) * CONTROLLER_STEPS_PER_ACTION - 1


def compute_rotation_vector(quaternion_xyzw: list[float]) -> Array:
    """The rotation vector of a quaternion, as openpi's client computes it."""
    x, y, z, w = quaternion_xyzw
    angle = 2 * np.arccos(np.clip(w, -1, 1))
    return angle * np.array([x, y, z]) / np.sqrt(1 - w * w)


def make_observation(recorded_observation: dict[str, Any]) -> dict[str, Any]:
    """What openpi's LIBERO client sends, with a picture whose left half is white."""
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:, :16] = 255
    vector = compute_rotation_vector(recorded_observation["eef_quat_xyzw"])
    return {
        "observation/image": picture,
        "observation/wrist_image": picture,
        "observation/state": np.concatenate(
            [recorded_observation["eef_pos"], vector, recorded_observation["gripper_qpos"]]
        ),
        "prompt": "put the bowl on the plate",
    }


@pytest.mark.parametrize("recorded_observation", RECORDED["observations"])
class TestObservations:
    def test_the_position_is_in_the_frame_of_the_base(
        self, recorded_observation: dict[str, Any]
    ) -> None:
        observation = {
            **make_observation(recorded_observation),
            BASE_POSITION_KEY: recorded_observation["base"],
        }

        state = ROBOT.read(observation)["observation/state"]

        expected = np.subtract(recorded_observation["eef_pos"], recorded_observation["base"])
        np.testing.assert_allclose(state[:3], expected, atol=1e-6)

    def test_the_base_of_a_client_that_does_not_send_it_is_found(
        self, recorded_observation: dict[str, Any]
    ) -> None:
        observation = make_observation(recorded_observation)

        with_base = ROBOT.read({**observation, BASE_POSITION_KEY: recorded_observation["base"]})
        without_base = ROBOT.read(observation)

        np.testing.assert_allclose(
            without_base["observation/state"], with_base["observation/state"], atol=1e-6
        )

    def test_the_z_axis_points_from_the_fingers_to_the_hand(
        self, recorded_observation: dict[str, Any]
    ) -> None:
        state = ROBOT.read(make_observation(recorded_observation))["observation/state"]

        z_axis = quat_to_matrix(torch.from_numpy(np.float64(state[3:7])))[:, 2].numpy()

        to_hand = np.subtract(recorded_observation["hand"], recorded_observation["eef_pos"])
        np.testing.assert_allclose(z_axis, to_hand / np.linalg.norm(to_hand), atol=2e-3)

    def test_the_fingers_close_along_the_y_axis(self, recorded_observation: dict[str, Any]) -> None:
        state = ROBOT.read(make_observation(recorded_observation))["observation/state"]

        rotation = quat_to_matrix(torch.from_numpy(np.float64(state[3:7]))).numpy()

        between = np.subtract(
            recorded_observation["left_finger"], recorded_observation["right_finger"]
        )
        in_ee_frame = rotation.T @ between
        np.testing.assert_allclose(in_ee_frame[[0, 2]], 0, atol=1e-3)  # m

    def test_the_opening_is_the_distance_of_the_fingers(
        self, recorded_observation: dict[str, Any]
    ) -> None:
        state = ROBOT.read(make_observation(recorded_observation))["observation/state"]

        left, right = recorded_observation["gripper_qpos"]
        widest = 0.08  # m, between open fingers
        assert state[7] == pytest.approx((left - right) / widest, abs=1e-6)


def test_pictures_are_mirrored_back() -> None:
    observation = ROBOT.read(make_observation(RECORDED["observations"][0]))

    for key in ("observation/image", "observation/wrist_image"):
        picture = observation[key]
        assert (picture[:, :16] == 0).all()
        assert (picture[:, 16:] == 255).all()


class TestVlaEval:
    """The same robot, as AllenAI's harness sends it."""

    def test_it_reads_the_same_as_from_openpi_client(self) -> None:
        openpi_observation = make_observation(RECORDED["observations"][0])
        harness_observation = {
            "images": {
                "agentview": openpi_observation["observation/image"],
                "wrist": openpi_observation["observation/wrist_image"],
            },
            "states": openpi_observation["observation/state"],
            "controller_states": np.zeros(8),
            "task_description": openpi_observation["prompt"],
        }

        from_harness = VLA_EVAL_ROBOT.read(harness_observation)

        expected = ROBOT.read(openpi_observation)
        assert sorted(from_harness) == sorted(expected)
        for key, value in expected.items():
            np.testing.assert_array_equal(from_harness[key], value)

    def test_a_missing_camera_is_named_with_the_parameter_that_brings_it(self) -> None:
        observation = VLA_EVAL_ROBOT.example()
        del observation["images"]["wrist"]

        refuses("images has no 'wrist'.*Set send_wrist_image", VLA_EVAL_ROBOT.read, observation)

    def test_an_error_of_the_state_names_the_key_of_the_harness(self) -> None:
        observation = VLA_EVAL_ROBOT.example()
        observation["states"] = np.full(8, 100.0)

        refuses(r"states\[0:3\]", VLA_EVAL_ROBOT.read, observation)


class TestCommands:
    def test_steps_to_the_goal_are_meters_and_radians_about_base_axes(self) -> None:
        state = np.array([0.4, 0, 0.2, 1, 0, 0, 0, 1])
        turn = np.array([0.1, -0.2, 0.05])
        action = np.array([[0.01, -0.02, 0.03, *quat_exp(torch.from_numpy(turn)).numpy(), 1]])

        rows = ROBOT.controls["pose_steps"].convert(action, state, {})

        np.testing.assert_allclose(rows[0], [0.01, -0.02, 0.03, *turn, -1], atol=1e-6)

    def test_a_gripper_command_is_minus_one_to_open_and_one_to_close(self) -> None:
        state = np.array([0.4, 0, 0.2, 1, 0, 0, 0, 1])
        actions = np.array([[0, 0, 0, 1, 0, 0, 0, 1], [0, 0, 0, 1, 0, 0, 0, 0]], np.float32)

        rows = ROBOT.controls["osc_pose"].convert(actions, state, {})

        assert rows.shape == (8, 7)  # four controller steps per action
        assert rows[:, 6].tolist() == [-1] * 4 + [1] * 4

    def test_controller_commands_never_leave_their_range(self) -> None:
        state = np.array([0.4, 0, 0.2, 1, 0, 0, 0, 1])
        action = np.array([[0.3, 0, 0, *quat_exp(torch.tensor([0, 0, 3.0])).numpy(), 1]])

        rows = ROBOT.controls["osc_pose"].convert(action, state, {})

        assert np.abs(rows).max() == 1

    @pytest.mark.parametrize("motion", RECORDED["motions"])
    def test_a_goal_is_the_measured_pose_moved_by_the_action(self, motion: dict[str, Any]) -> None:
        """The commands were executed in LIBERO. The controller adds each to the measured pose, and
        their sum is the action's goal, up to the error of the predicted motion."""
        actions = np.repeat(np.array([motion["action"]]), NUM_ACTIONS, axis=0)
        rows = ROBOT.controls["osc_pose"].convert(actions, np.array(motion["state"]), {})
        measured_before = np.array([motion["state"][:3], *[p[:3] for p in motion["poses"][:-1]]])

        commanded = measured_before + MAX_TRANSLATION_M * rows[:, :3]

        first_of_each = measured_before[::CONTROLLER_STEPS_PER_ACTION]  # [NUM_ACTIONS, 3]
        goals = np.repeat(first_of_each + actions[:, :3], CONTROLLER_STEPS_PER_ACTION, axis=0)
        errors_m = np.linalg.norm(commanded - goals, axis=1)
        assert errors_m[0] < 1e-4  # nothing was predicted yet
        # Seen in the recorded motions: 11 mm in the first action, from rest, and 6 mm later.
        assert errors_m.max() < 0.015
        assert errors_m[CONTROLLER_STEPS_PER_ACTION:].max() < 0.008

    @pytest.mark.parametrize("motion", RECORDED["motions"])
    def test_commands_lead_to_where_steps_from_measured_poses_lead(
        self, motion: dict[str, Any]
    ) -> None:
        """The recorded arm executed five actions in both ways, `osc_pose` without measuring."""
        with_commands = np.array(motion["poses"])[LAST_STEPS_OF_ACTIONS, :3]
        with_steps = np.array(motion["poses_with_pose_steps"])[:, :3]

        distances_m = np.linalg.norm(with_commands - with_steps, axis=1)

        assert distances_m[0] < 0.002  # after the first action
        assert distances_m[-1] < 0.009  # after five actions, on ways of 54 to 122 mm

    def test_an_action_in_the_middle_begins_where_the_arm_is_expected(self) -> None:
        """A motion is as long as its actions only if the arm has no lag."""
        state = np.array([0.4, 0, 0.2, 1, 0, 0, 0, 1])
        actions = np.repeat(np.array([[0.02, 0, 0, 1, 0, 0, 0, 1]]), NUM_ACTIONS, axis=0)

        rows = ROBOT.controls["osc_pose"].convert(actions, state, {})

        first_rows = rows[::CONTROLLER_STEPS_PER_ACTION]
        np.testing.assert_allclose(first_rows[:, 0], 0.02 / MAX_TRANSLATION_M, atol=1e-6)

    def test_the_predicted_motion_solves_the_equation_of_the_controller(self) -> None:
        """Compared with an integration in small steps of e″ = −STIFFNESS e − DAMPING e′."""
        position, speed, goal = np.array([0.1]), np.array([-0.3]), np.array([0.15])
        num_small_steps = 20_000
        small_step_s = CONTROLLER_STEP_S / num_small_steps

        predicted_position, predicted_speed = predict_after_controller_step(position, speed, goal)
        for _ in range(num_small_steps):
            speed = speed + small_step_s * (STIFFNESS * (goal - position) - DAMPING * speed)
            position = position + small_step_s * speed

        np.testing.assert_allclose(predicted_position, position, atol=1e-5)
        np.testing.assert_allclose(predicted_speed, speed, atol=1e-4)
