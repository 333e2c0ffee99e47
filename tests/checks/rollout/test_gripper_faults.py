"""A gripper that is inverted, scaled or late has its own name."""

from dataclasses import replace

import numpy as np

from made_rollouts import MadeRobot, make_case
from spear.checks.rollout.case import Doubt, Finding
from spear.checks.rollout.episode import RecordedEpisode
from spear.checks.rollout.gripper_inverted import GripperInvertedCheck
from spear.checks.rollout.gripper_late import GripperLateCheck
from spear.checks.rollout.gripper_scale import GripperScaleCheck
from spear.types import Array


def invert_command(action: Array, rotation: Array) -> Array:
    """Open when the command is to close."""
    return np.concatenate([action[:7], 1 - action[7:]])


def scale_opening(episode: RecordedEpisode) -> RecordedEpisode:
    """Report the opening in meters instead of 0 … 1."""
    return replace(episode, opening=0.08 * episode.opening)


def invert_opening(episode: RecordedEpisode) -> RecordedEpisode:
    """Report 1 for closed."""
    return replace(episode, opening=1 - episode.opening)


def keep_open(episode: RecordedEpisode) -> RecordedEpisode:
    """Command the gripper to stay open."""
    action = episode.action.copy()
    action[:, 7] = 1
    return replace(episode, action=action, opening=np.ones(len(episode)))


def test_a_gripper_that_inverts_its_commands_is_inverted() -> None:
    result = GripperInvertedCheck().examine(make_case(MadeRobot(invert_command)))

    assert isinstance(result, Finding)
    assert "correlation" in result.evidence


def test_an_opening_that_is_sent_inverted_is_inverted() -> None:
    result = GripperInvertedCheck().examine(make_case(change=invert_opening))

    assert isinstance(result, Finding)
    assert result.file.startswith("observe")
    assert "begins at 0.00" in result.evidence


def test_a_gripper_whose_commands_and_openings_are_inverted_is_inverted() -> None:
    result = GripperInvertedCheck().examine(
        make_case(MadeRobot(invert_command), change=invert_opening)
    )

    assert isinstance(result, Finding)
    assert "begins at 0.00" in result.evidence


def test_an_opening_in_another_unit_is_scaled() -> None:
    case = make_case(change=scale_opening)

    result = GripperScaleCheck().examine(case)

    assert isinstance(result, Finding)
    assert "0.08" in result.evidence
    # An opening of 0.08 begins nearly closed, so it may seem inverted, too. That must be less sure.
    inverted = GripperInvertedCheck().examine(case)
    assert inverted is None or result.confidence > 0.9


def test_a_gripper_that_acts_four_steps_later_is_late() -> None:
    # Three steps later than the step after the command.
    result = GripperLateCheck().examine(make_case(MadeRobot(gripper_delay=3)))

    assert isinstance(result, Finding)


def test_a_gripper_that_follows_has_no_fault() -> None:
    case = make_case()

    assert GripperInvertedCheck().examine(case) is None
    assert GripperScaleCheck().examine(case) is None
    assert GripperLateCheck().examine(case) is None


def test_a_gripper_that_closes_when_it_is_to_stay_open_is_inverted() -> None:
    """The command never changes, so openings and commands have no correlation."""

    def close(episode: RecordedEpisode) -> RecordedEpisode:
        opening = np.zeros(len(episode))
        opening[:2] = (1.0, 0.5)  # it begins open
        return replace(keep_open(episode), opening=opening)

    case = make_case(change=close)

    result = GripperInvertedCheck().examine(case)

    assert isinstance(result, Finding)
    assert "measures 0.00 while it is commanded to be open" in result.evidence
    assert GripperScaleCheck().examine(case) is None


def test_a_gripper_that_never_moves_is_not_examined() -> None:
    case = make_case(change=keep_open)

    assert isinstance(GripperInvertedCheck().examine(case), Doubt)
    assert isinstance(GripperLateCheck().examine(case), Doubt)


def test_an_opening_in_meters_is_scaled_and_not_inverted() -> None:
    def stay_open_in_meters(episode: RecordedEpisode) -> RecordedEpisode:
        return scale_opening(keep_open(episode))

    for change in (scale_opening, stay_open_in_meters):
        case = make_case(change=change)

        assert isinstance(GripperScaleCheck().examine(case), Finding)
        assert not isinstance(GripperInvertedCheck().examine(case), Finding)


def test_a_gripper_with_exchanged_levels_is_inverted_although_it_loses_commands() -> None:
    def follow_inverted_commands_late(episode: RecordedEpisode) -> RecordedEpisode:
        command = (np.arange(len(episode)) // 6 % 2).astype(float)
        action = episode.action.copy()
        action[:, 7] = command
        opening = np.where(np.arange(len(episode)) % 6 < 2, command, 1 - command)
        return replace(episode, action=action, opening=opening)

    case = make_case(change=follow_inverted_commands_late)

    assert isinstance(GripperInvertedCheck().examine(case), Finding)
    assert not isinstance(GripperScaleCheck().examine(case), Finding)


def test_a_gripper_that_is_later_than_any_late_action_is_a_fault_of_its_own() -> None:
    for delay in (3, 6):
        result = GripperLateCheck().examine(make_case(MadeRobot(gripper_delay=delay)))

        assert isinstance(result, Finding)
        assert result.is_independent == (delay == 6)


def hold_still(episode: RecordedEpisode) -> RecordedEpisode:
    """Keep the gripper open, whatever is commanded, and measure with a small error."""
    opening = np.where(episode.action[:, 7] > 0.5, 0.99, 1.0)
    return replace(episode, opening=opening)


def end_two_seconds_after_first_command(episode: RecordedEpisode) -> RecordedEpisode:
    """Keep the steps until two seconds after the gripper's command changes for the first time."""
    is_open = episode.action[:, 7] > 0.5
    first_change = int(np.argmax(is_open != is_open[0]))
    end = first_change + round(2 * episode.rate_hz)
    return replace(
        episode,
        position=episode.position[:end],
        rotation=episode.rotation[:end],
        opening=episode.opening[:end],
        action=episode.action[:end],
        is_known=episode.is_known[:end],
        pictures={},
        served=None,
    )


def test_a_gripper_that_has_not_moved_when_its_episodes_end_is_late() -> None:
    def end_before_it_moves(episode: RecordedEpisode) -> RecordedEpisode:
        return end_two_seconds_after_first_command(hold_still(episode))

    case = make_case(change=end_before_it_moves)
    result = GripperLateCheck().examine(case)

    assert isinstance(result, Finding)
    assert "does not move yet in 6 of 6 episodes" in result.evidence
    assert GripperScaleCheck().examine(case) is None


def test_a_gripper_that_never_moves_is_not_late_but_gets_commands_in_another_range() -> None:
    case = make_case(change=hold_still)
    result = GripperScaleCheck().examine(case)

    assert isinstance(result, Finding)
    assert "stays between 0.99 and 1.00" in result.evidence
    assert "range" in result.cure
    assert GripperLateCheck().examine(case) is None


def test_a_gripper_that_is_blocked_in_some_episodes_is_not_late() -> None:
    case = make_case()
    rollout = [hold_still(episode) for episode in case.rollout[:3]] + list(case.rollout[3:])

    assert GripperLateCheck().examine(replace(case, rollout=rollout)) is None


def test_errors_of_measuring_a_gripper_at_rest_are_not_opposed_to_its_commands() -> None:
    result = GripperInvertedCheck().examine(make_case(change=hold_still))

    assert not isinstance(result, Finding)


def test_commands_in_meters_are_scaled_also_if_the_gripper_opens_no_further_to_close() -> None:
    def open_by_eight_percent(episode: RecordedEpisode) -> RecordedEpisode:
        """Open to 0.08 if commanded to open, and hold something wider if commanded to close."""
        opening = np.where(episode.action[:, 7] > 0.5, 0.08, 0.3)
        opening = np.concatenate([[1.0], opening[:-1]])  # one step after the command
        return replace(episode, opening=opening)

    case = make_case(change=open_by_eight_percent)

    assert isinstance(GripperScaleCheck().examine(case), Finding)
    assert not isinstance(GripperInvertedCheck().examine(case), Finding)
