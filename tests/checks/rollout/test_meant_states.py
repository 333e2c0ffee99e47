"""States that are sent in another form are restored before pictures are compared with them."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from made_rollouts import MadeRobot, make_case
from spear.checks.rollout.case import Case
from spear.checks.rollout.episode import RecordedEpisode
from spear.checks.rollout.meant_states import correct_orientations_and_openings
from spear.types import Array


def send_scalar_last(episode: RecordedEpisode) -> RecordedEpisode:
    """Send x y z w instead of w x y z."""
    return replace(episode, rotation=episode.rotation[:, [1, 2, 3, 0]])


def invert_opening(episode: RecordedEpisode) -> RecordedEpisode:
    """Report 1 for closed."""
    return replace(episode, opening=1 - episode.opening)


def scale_opening(episode: RecordedEpisode) -> RecordedEpisode:
    """Report the opening in meters instead of 0 … 1."""
    return replace(episode, opening=0.08 * episode.opening)


def send_as_meant(episode: RecordedEpisode) -> RecordedEpisode:
    """Send the states in the right form."""
    return episode


def restore(case: Case) -> list[RecordedEpisode]:
    """Restore the states of a case's rollout."""
    return correct_orientations_and_openings(
        case.rollout, case.demonstrations, case.motion, case.gripper
    )


@pytest.mark.parametrize("send", [send_scalar_last, invert_opening, scale_opening, send_as_meant])
def test_states_become_those_that_are_meant(
    send: Callable[[RecordedEpisode], RecordedEpisode],
) -> None:
    correct_rollout = make_case().rollout

    restored = restore(make_case(change=send))

    for episode, expected in zip(restored, correct_rollout, strict=True):
        np.testing.assert_allclose(episode.rotation, expected.rotation, atol=1e-6)
        np.testing.assert_allclose(episode.opening, expected.opening, atol=1e-6)


def test_a_gripper_that_hardly_opens_is_not_taken_for_a_scaled_state() -> None:
    def open_little(action: Array, rotation: Array) -> Array:
        return np.concatenate([action[:7], 0.08 * action[7:]])

    case = make_case(MadeRobot(open_little))

    restored = restore(case)

    for episode, sent in zip(restored, case.rollout, strict=True):
        np.testing.assert_allclose(episode.opening, sent.opening)
