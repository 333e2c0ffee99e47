"""Orientations in another form, starts outside of training, and unseen words are named."""

from dataclasses import replace

import numpy as np
import torch

from made_rollouts import make_case
from spear.checks.rollout.case import Case, Doubt, Finding
from spear.checks.rollout.episode import RecordedEpisode
from spear.checks.rollout.euler_order import EulerOrderCheck
from spear.checks.rollout.quaternion_order import QuaternionOrderCheck
from spear.checks.rollout.start_outside import StartOutsideCheck
from spear.checks.rollout.unseen_instruction import UnseenInstructionCheck
from spear.geometry import euler_to_quat, quat_multiply, quat_to_euler

TILT = torch.tensor([0.95, 0.1, 0.25, 0.1], dtype=torch.float64)
"""A rotation that tilts the gripper, so that the order of angles matters."""


def send_scalar_last(episode: RecordedEpisode) -> RecordedEpisode:
    """Send x y z w instead of w x y z."""
    return replace(episode, rotation=episode.rotation[:, [1, 2, 3, 0]])


def tilt(episode: RecordedEpisode) -> RecordedEpisode:
    """Tilt the gripper."""
    turn = TILT / TILT.norm()
    rotation = quat_multiply(turn, torch.as_tensor(episode.rotation))
    return replace(episode, rotation=rotation.numpy())


def reorder_angles(episode: RecordedEpisode) -> RecordedEpisode:
    """Make the quaternion of the angles by the other convention."""
    angles = quat_to_euler(torch.as_tensor(episode.rotation), "xyz")
    return replace(episode, rotation=euler_to_quat(angles, "XYZ").numpy())


def move_away(episode: RecordedEpisode) -> RecordedEpisode:
    """Begin half a meter away."""
    return replace(episode, position=episode.position + np.array([0.0, 0.5, 0.0]))


def test_quaternions_with_the_scalar_last_are_recognized() -> None:
    case = make_case(change=send_scalar_last)

    result = QuaternionOrderCheck().examine(case)

    assert isinstance(result, Finding)
    assert EulerOrderCheck().examine(case) is None


def test_angles_in_another_order_are_recognized() -> None:
    case = make_case(change=lambda episode: reorder_angles(tilt(episode)))
    tilted = [tilt(episode) for episode in case.demonstrations]

    result = EulerOrderCheck().examine(replace(case, demonstrations=tilted))

    assert isinstance(result, Finding)
    assert "angles xyz read as XYZ" in result.evidence


def test_angles_in_another_order_are_recognized_by_the_moves() -> None:
    def exchange_roll_and_yaw(episode: RecordedEpisode) -> RecordedEpisode:
        angles = quat_to_euler(torch.as_tensor(episode.rotation), "xyz").flip(-1)
        return replace(episode, rotation=euler_to_quat(angles, "xyz").numpy())

    rollout = make_case(change=exchange_roll_and_yaw).rollout

    result = EulerOrderCheck().examine(Case(rollout))

    assert isinstance(result, Finding)
    assert "measures its orientation" in result.evidence


def test_orientations_like_those_of_training_have_no_fault() -> None:
    case = make_case()

    assert QuaternionOrderCheck().examine(case) is None
    assert EulerOrderCheck().examine(case) is None


def test_a_start_far_from_training_is_outside() -> None:
    result = StartOutsideCheck().examine(make_case(change=move_away))

    assert isinstance(result, Finding)
    assert result.confidence > 0.9


def test_a_start_where_training_passes_later_is_less_sure() -> None:
    """Demonstrations drift away by 30 cm, and the rollout starts where they end."""
    case = make_case(num_demonstrations=5)
    drift_m = np.array([0.0, 0.3, 0.0])
    demonstrations = []
    for episode in case.demonstrations:
        position = episode.position + drift_m * np.linspace(0, 1, len(episode))[:, None]
        demonstrations.append(replace(episode, position=position))
    rollout = []
    for episode, demonstration in zip(case.rollout, demonstrations, strict=False):
        position = episode.position - episode.position[0] + demonstration.position[-1]
        rotation = np.tile(demonstration.rotation[-1], (len(episode), 1))
        rollout.append(replace(episode, position=position, rotation=rotation))

    result = StartOutsideCheck().examine(Case(rollout, demonstrations))

    assert isinstance(result, Finding)
    assert result.confidence <= 0.7


def test_a_start_like_those_of_training_is_not_outside() -> None:
    assert StartOutsideCheck().examine(make_case()) is None


def test_the_order_of_the_quaternion_does_not_hide_where_the_arm_starts() -> None:
    moved_case = make_case(change=lambda episode: send_scalar_last(move_away(episode)))

    assert StartOutsideCheck().examine(make_case(change=send_scalar_last)) is None
    assert isinstance(StartOutsideCheck().examine(moved_case), Finding)


def test_few_demonstrations_do_not_tell_the_usual_starts() -> None:
    assert isinstance(StartOutsideCheck().examine(make_case(num_demonstrations=3)), Doubt)


def test_new_words_are_unseen() -> None:
    case = make_case(change=lambda episode: replace(episode, instruction="open the drawer"))

    result = UnseenInstructionCheck().examine(case)

    assert isinstance(result, Finding)
    assert "drawer" in result.evidence


def test_known_words_in_another_order_and_case_are_seen() -> None:
    case = make_case(
        change=lambda episode: replace(episode, instruction="Put the mug on the red plate.")
    )

    assert UnseenInstructionCheck().examine(case) is None


def test_a_start_near_few_scattered_ones_is_not_outside() -> None:
    """Eight starts that are 10 cm apart do not make one that is 14 cm away unusual; 80 do."""
    case = make_case()
    episode = case.rollout[0]

    def start_away(distance_m: float, num_demonstrations: int) -> Case:
        demonstrations = []
        for index in range(num_demonstrations):
            offset_m = np.array([0.1 * index, 0.0, 0.0])
            demonstrations.append(replace(episode, position=episode.position + offset_m))
        offset_m = np.array([-distance_m, 0.0, 0.0])
        rollout = [replace(episode, position=episode.position + offset_m)]
        return replace(case, rollout=rollout, demonstrations=demonstrations)

    check = StartOutsideCheck()
    assert check.examine(start_away(0.14, num_demonstrations=8)) is None
    assert isinstance(check.examine(start_away(0.3, num_demonstrations=8)), Finding)
    assert isinstance(check.examine(start_away(0.14, num_demonstrations=80)), Finding)
