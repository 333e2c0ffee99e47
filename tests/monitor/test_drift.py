"""The drift monitor of a policy: what it reports, that it does so once, and about which robot."""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from spear.embodiments import load
from spear.monitor.distribution import TrainingDistribution
from spear.monitor.drift import (
    MAX_NOTICES,
    NOTICE_PERIOD_S,
    NUM_FIRST_OBSERVATIONS,
    OBSERVATION_INTERVAL,
    NoticeLimit,
)
from spear.monitor.observations import examine_observations
from spear.policy import Spear1Policy
from spear.serve.service import Service
from spear.types import Action, Array

STATE = np.array([0.45, 0, 0.2, 0, 1, 0, 0, 1], np.float32)
"""A state in the middle of the training data: position (m), quaternion (w x y z), open gripper."""
CLOSED_STATE = STATE * [1, 1, 1, 1, 1, 1, 1, 0]
ONE_METER_IN_Y = np.array([0, 1, 0, 0, 0, 0, 0, 0])
ROTATION_TURNED_BY_180_DEG = [0, 1, 2, 4, 3, 5, 6, 7]
"""Indices of the state's numbers, with w and x of the quaternion exchanged.

The quaternion (0, 1, 0, 0) of `STATE` then becomes (1, 0, 0, 0), half a turn away.
"""


def make_image() -> Array:
    """Make a reddish image [210, 280, 3] that becomes brighter to the right and the bottom."""
    down, across = np.mgrid[:70:210j, :140:280j]  # 0 … 70 in 210 rows, 0 … 140 in 280 columns
    brightness = down + across
    return (brightness[..., None] + [20, 10, 0]).astype(np.uint8)


IMAGE = make_image()
SQUARE_IMAGE = IMAGE[:, :210]  # 210 × 210 pixels, as wrist images are square


def make_observation(**changes: Any) -> dict[str, Any]:
    """Make an observation like those of training, except for the changed keys."""
    return {
        "observation/image": IMAGE,
        "observation/state": STATE,
        "prompt": "put the carrot on the plate",
        "seed": 1,
        **changes,
    }


def make_distribution(images: dict[str, Array]) -> TrainingDistribution:
    """Summarize two training steps with an open gripper.

    Args:
        images: Camera → image, which is the same in both steps.
    """
    batch = {
        "position": np.array([[0.3, -0.1, 0.1], [0.6, 0.1, 0.3]]),
        "rotation": np.eye(4)[[1, 1]],  # twice the quaternion (0, 1, 0, 0)
        "gripper": np.ones(2),
        "action": np.ones((2, 5, 8)),
        "views": {camera: [True, True] for camera in images},
        "images": {camera: np.stack([image, image]) for camera, image in images.items()},
    }
    return TrainingDistribution.from_batches([batch], mean_initial_opening=0.9)


def make_constant_policy(
    policy: Spear1Policy, action: torch.Tensor, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> Spear1Policy:
    """Return a copy of a policy, with a new monitor, that always predicts the same action [8]."""
    actions = Action.from_vector(action.expand(batch_size, 5, 8))  # chunks of 5 actions
    constant = dataclasses.replace(policy)
    monkeypatch.setattr(constant, "predict", lambda inputs: actions)
    return constant


def collect_notices(policy: Spear1Policy, observations: Sequence[dict[str, Any]]) -> list[str]:
    """Return the notices that the monitor gives about observations, in order."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for observation in observations:
            policy.prepare_inputs([observation])
    messages = [str(warning.message) for warning in caught]
    return [message for message in messages if "unlike" in message or "wrist" in message]


def test_exchanged_cameras_are_found() -> None:
    expected = make_distribution({"left": IMAGE, "right": 255 - IMAGE})

    findings = examine_observations(
        expected, STATE[None], {"left": 255 - IMAGE.transpose(2, 0, 1)[None]}
    )

    assert any("exchanged with camera 'right'" in finding.message for finding in findings)


def test_an_observation_like_those_of_training_brings_no_notice(nano: Spear1Policy) -> None:
    policy = dataclasses.replace(nano, training_distribution=make_distribution({"external": IMAGE}))

    assert collect_notices(policy, [make_observation()]) == []


# Changed keys of an observation, and a part of the notice about them.
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observation/image": IMAGE[..., ::-1]}, "Red and blue of camera 'external'"),
        ({"observation/image": IMAGE[:, ::-1]}, "'external' is as if flipped left to right"),
        ({"observation/image": np.zeros_like(IMAGE)}, "'external' shows nothing"),
        (  # the policy of this test was trained with the external camera only
            {"observation/wrist_image": SQUARE_IMAGE},
            "observation/wrist_image, but the policy was trained without that camera",
        ),
        ({"observation/state": STATE + ONE_METER_IN_Y}, "y is 1.00 m"),
        ({"observation/state": STATE[ROTATION_TURNED_BY_180_DEG]}, "turned by 180°"),
        ({"observation/state": CLOSED_STATE}, "gripper begins at 0.00"),
    ],
)
def test_what_is_unlike_training_is_reported_once(
    nano: Spear1Policy, changes: dict[str, Array], message: str
) -> None:
    policy = dataclasses.replace(nano, training_distribution=make_distribution({"external": IMAGE}))
    observation = make_observation(**changes)

    notices = collect_notices(policy, [observation, observation])

    assert len(notices) == 1
    assert message in notices[0]


# The robots of the two observations in each batch, and a word of each notice that is expected: the
# second robot's gripper begins closed, and stays closed although it is commanded to open.
@pytest.mark.parametrize(
    ("robots", "expected"),
    [
        pytest.param(["a", "b"], ["begins", "opposite"], id="named"),
        pytest.param([], [], id="unnamed"),
    ],
)
def test_robots_that_are_answered_together_are_checked_one_by_one(
    nano: Spear1Policy,
    robots: list[str],
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    open_gripper = torch.eye(8)[[3, 7]].sum(0)  # no motion; 3 is the quaternion's w
    policy = make_constant_policy(nano, open_gripper, batch_size=2, monkeypatch=monkeypatch)
    service = Service(policy, load("generic"))
    rng = np.random.default_rng(0)
    open_robot = {
        "observation/image": rng.integers(0, 256, (210, 280, 3), dtype=np.uint8),
        "observation/wrist_image": rng.integers(0, 256, (112, 112, 3), dtype=np.uint8),
        "observation/state": STATE,
        "prompt": "put the carrot on the plate",
    }
    closed_robot = {**open_robot, "observation/state": CLOSED_STATE}

    service.answer([open_robot, open_robot])  # without robots, like the example of a server's start
    for _ in range(NUM_FIRST_OBSERVATIONS + 1):
        service.answer([open_robot, closed_robot], robots)

    messages = [str(warning.message) for warning in recwarn]
    notices = [message for message in messages if "gripper" in message]
    assert len(notices) == len(expected)
    for notice, words in zip(notices, expected, strict=True):
        assert notice.startswith("robot 2: ")  # the observations of the start count for no robot
        assert words in notice


def test_a_robot_that_comes_late_is_compared_with_training_as_the_first_one_was(
    nano: Spear1Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    stay = torch.eye(8)[3]  # no motion, gripper closed
    policy = make_constant_policy(nano, stay, batch_size=2, monkeypatch=monkeypatch)
    service = Service(policy, load("generic"))
    usual = load("generic").example()
    # 1 m to the left, and with a closed gripper.
    far_state = usual["observation/state"] + np.eye(8)[1] - np.eye(8)[7]
    far_and_closed = {**usual, "observation/state": far_state}

    def count_notices(robot: str, observation: dict[str, Any]) -> tuple[int, int]:
        """Send an observation twice, and count the notices about its gripper and its position."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                service.answer([usual, observation], ["first", robot])
        messages = " ".join(str(warning.message) for warning in caught)
        return messages.count("gripper begins"), messages.count("y is 1.00 m")

    # Each call sends four observations of the first robot.
    for _ in range(NUM_FIRST_OBSERVATIONS // 4 + 1):
        assert count_notices("first", usual) == (0, 0)

    assert count_notices("second", far_and_closed) == (1, 1)
    assert count_notices("third", far_and_closed) == (1, 1)


# None: nothing fails. Arm and image both stay as they are, which is no fault.
@pytest.mark.parametrize("failure", ["frozen", "shows nothing", None])
def test_a_failing_camera_is_reported_once(
    nano: Spear1Policy,
    failure: str | None,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    stay = torch.eye(8)[3]  # no motion, gripper closed
    policy = make_constant_policy(nano, stay, batch_size=1, monkeypatch=monkeypatch)
    observation = {**load("generic").example(), "seed": 0}

    for step in range(NUM_FIRST_OBSERVATIONS + OBSERVATION_INTERVAL + 1):
        # A frozen image shows only after the arm moved for many steps of 2 mm.
        if failure == "frozen":
            observation["observation/state"][0] += 0.002
        if failure == "shows nothing" and step >= NUM_FIRST_OBSERVATIONS:
            observation["observation/image"] = np.zeros_like(observation["observation/image"])
        policy.infer(observation)

    messages = [str(warning.message) for warning in recwarn]
    notices = [message for message in messages if "camera 'external'" in message.lower()]
    if failure is None:
        assert not notices
    else:
        assert len(notices) == 1
        assert failure in notices[0]


def test_a_flood_of_notices_ends_with_one_that_says_so() -> None:
    now_s = 0.0
    limit = NoticeLimit(lambda: now_s)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for robot in range(10 * MAX_NOTICES):
            limit.print_or_drop_unless_suppressed(f"robot {robot}: the camera is frozen.")
    messages = [str(warning.message) for warning in caught]

    assert len(messages) == MAX_NOTICES + 1
    assert messages[-2] == f"robot {MAX_NOTICES - 1}: the camera is frozen."
    assert "Further ones are left out" in messages[-1]


def test_after_a_while_notices_are_printed_again() -> None:
    now_s = 0.0
    limit = NoticeLimit(lambda: now_s)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        for _ in range(2 * MAX_NOTICES):
            limit.print_or_drop_unless_suppressed("the camera is frozen.")
    now_s = NOTICE_PERIOD_S + 1

    with pytest.warns(match="the gripper does the opposite"):
        limit.print_or_drop_unless_suppressed("the gripper does the opposite")
