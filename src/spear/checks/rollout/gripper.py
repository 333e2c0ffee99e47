"""How the gripper follows its commands, in a rollout and in the demonstrations.

Thresholds are chosen on rollouts of nano in the simulator.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spear.checks.gripper import (
    MAX_REST_CHANGE,
    MIN_CORRELATION,
    MIN_MOTION,
    CommandedGripper,
    Following,
    are_opposite,
    correlate_commands_by_delay,
)
from spear.checks.rollout.episode import RecordedEpisode
from spear.checks.rollout.gripper_reactions import OPEN_COMMAND, Reaction, collect_reactions
from spear.types import Array

MIN_COMMAND_CHANGE = 0.5  # commands that vary by less are one and the same command
MAX_DELAY_S = 2.4  # longest delay of a gripper that is looked for
MIN_OPENINGS = 5  # steps with a command to open, with fewer nothing is compared
SETTLING_STEPS = 2  # steps after a change of the command that are not compared
# Median opening while the gripper is commanded to be open, as a share of the one of training. In
# rollouts of nano it is 1.00.
MAX_SCALE = 0.7
MAX_CLOSED_SCALE = 0.04  # the same of a closed gripper; one that opens in meters has about 0.08
MIN_USUAL_OPENING = 0.5  # in training; an open gripper below it is no measure
MIN_UNMOVED_EPISODES = 2  # in which a gripper must not move although its command changes


@dataclass(frozen=True)
class GripperUse:
    """What a gripper does.

    rollout                  the gripper in each episode of the rollout that changes its command.
    following                the delay at which openings follow commands best in the rollout; None
                             if the commands never change.
    training_following       the same in the demonstrations.
    first_openings           the opening at the start of each episode of the rollout.
    training_first_openings  the same in the demonstrations.
    open_level               median opening of the rollout while it is commanded to be open; NaN if
                             it hardly ever is.
    training_open_level      the same in the demonstrations.
    closed_level             median opening of the rollout while it is commanded to be closed; NaN
                             if it hardly ever is.
    reactions                how soon the gripper moves after each change of its command, in each
                             episode of the rollout.
    training_reactions       the same in the demonstrations.
    """

    rollout: Sequence[CommandedGripper]
    following: Following | None
    training_following: Following | None
    first_openings: Array
    training_first_openings: Array
    open_level: float
    training_open_level: float
    closed_level: float
    reactions: Sequence[Sequence[Reaction]]
    training_reactions: Sequence[Sequence[Reaction]]

    @property
    def opposes_commands(self) -> bool:
        """Whether openings are opposed to their commands."""
        if self.following is None:
            return False
        is_opposed = self.following.correlation <= -MIN_CORRELATION
        return self.has_exchanged_levels or (is_opposed and not self.is_command_scaled)

    @property
    def has_exchanged_levels(self) -> bool:
        """Whether the gripper is open while it is commanded to be closed, and the reverse.

        This shows an inverted gripper also if it misses or delays some of its commands.
        """
        is_open = self.closed_level >= MAX_SCALE * self.training_open_level  # False for NaN
        return bool(is_open and self.open_ratio_to_training <= MAX_CLOSED_SCALE)

    @property
    def follows_commands(self) -> bool:
        """Whether openings follow their commands."""
        return self.following is not None and self.following.correlation >= MIN_CORRELATION

    @property
    def ignores_commands(self) -> bool:
        """Whether the gripper never moves, although it had the time to follow a changed command.

        A late gripper moves in the end. In training, the gripper must follow its commands.
        """
        usual = self.training_following
        if usual is None or abs(usual.correlation) < MIN_CORRELATION:
            return False
        num_unmoved = 0
        for episode in self.rollout:
            if np.ptp(episode.opening) > MIN_MOTION:
                return False
            is_open = episode.command > OPEN_COMMAND
            first_change = int(np.argmax(is_open != is_open[0]))
            remaining_s = (len(is_open) - first_change) / episode.rate_hz
            num_unmoved += remaining_s > MAX_DELAY_S
        return num_unmoved >= MIN_UNMOVED_EPISODES

    @property
    def starts_opposite_to_training(self) -> bool:
        """Whether the episodes begin with the opposite opening of those of training."""
        if not len(self.training_first_openings) or not len(self.first_openings):
            return False
        usual = float(np.median(self.training_first_openings))
        return bool(are_opposite(float(np.median(self.first_openings)), usual))

    @property
    def is_state_inverted(self) -> bool:
        """Whether the measured openings are inverted, and not the commands."""
        return self.opposes_commands and self.starts_opposite_to_training

    @property
    def open_ratio_to_training(self) -> float:
        """Opening of the open gripper, as a share of training; NaN if it is never open."""
        is_measure = self.training_open_level >= MIN_USUAL_OPENING  # False for NaN
        if not is_measure:
            return float("nan")
        return self.open_level / self.training_open_level

    @property
    def closes_when_commanded_open(self) -> bool:
        """Whether the gripper begins open, and closes although it is always commanded to be open.

        Then its commands are inverted. If they change, `opposes_commands` tells it better: commands
        in meters, of which even the largest one nearly closes the gripper, look the same here.
        """
        is_closed = self.open_ratio_to_training <= MAX_CLOSED_SCALE  # False for NaN
        if self.following is not None or not is_closed:
            return False
        usual_start = float(np.median(self.training_first_openings))
        starts_open = float(np.median(self.first_openings)) >= MAX_SCALE * usual_start
        return usual_start >= MIN_USUAL_OPENING and starts_open

    @property
    def is_state_scaled(self) -> bool:
        """Whether the measured openings are scaled, and not the commands.

        Then the gripper measures less than in training also before its first command.
        """
        is_scaled = MAX_CLOSED_SCALE < self.open_ratio_to_training <= MAX_SCALE  # False for NaN
        if not is_scaled or self.opposes_commands:
            return False
        usual_start = float(np.median(self.training_first_openings))
        start = float(np.median(self.first_openings))
        if self.following is None:
            # A gripper that never moves is scaled if it begins as it goes on, and not closed.
            return abs(start - self.open_level) <= MAX_CLOSED_SCALE and usual_start > MAX_SCALE
        return start <= MAX_SCALE * usual_start

    @property
    def is_command_scaled(self) -> bool:
        """Whether the gripper opens, but not as far as in training, and never opens otherwise.

        An inverted gripper closes wholly when it is commanded to open, and opens wholly when it is
        commanded to close.
        """
        is_partly_open = MAX_CLOSED_SCALE < self.open_ratio_to_training <= MAX_SCALE
        opens_to_close = self.closed_level >= MAX_SCALE * self.training_open_level  # False for NaN
        return bool(is_partly_open and not opens_to_close)

    @staticmethod
    def from_episodes(
        rollout: Sequence[RecordedEpisode], demonstrations: Sequence[RecordedEpisode]
    ) -> "GripperUse":
        """Summarize the grippers of a rollout and of demonstrations."""
        changing = _select_grippers_with_changing_commands(rollout)
        return GripperUse(
            rollout=changing,
            following=_find_delay(changing),
            training_following=_find_delay(_select_grippers_with_changing_commands(demonstrations)),
            first_openings=np.array([episode.opening[0] for episode in rollout]),
            training_first_openings=np.array([episode.opening[0] for episode in demonstrations]),
            open_level=_measure_median_settled_opening(rollout, is_command_open=True),
            training_open_level=_measure_median_settled_opening(
                demonstrations, is_command_open=True
            ),
            closed_level=_measure_median_settled_opening(rollout, is_command_open=False),
            reactions=[collect_reactions(episode) for episode in rollout],
            training_reactions=[collect_reactions(episode) for episode in demonstrations],
        )


def _select_grippers_with_changing_commands(
    episodes: Sequence[RecordedEpisode],
) -> list[CommandedGripper]:
    """Select the gripper of the episodes whose command changes."""
    changing = []
    for episode in episodes:
        command = np.asarray(episode.action[:, 7], np.float64)
        if np.ptp(command) > MIN_COMMAND_CHANGE:
            opening = np.asarray(episode.opening, np.float64)
            changing.append(CommandedGripper(opening, command, episode.rate_hz))
    return changing


def _find_delay(episodes: Sequence[CommandedGripper]) -> Following | None:
    """Find the delay with the largest correlation, positive or negative.

    Long delays are tried only if no usual one explains the openings, because a gripper that opens
    and closes regularly is opposite to its commands of long ago.
    """
    if not episodes:
        return None
    if np.ptp(np.concatenate([episode.opening for episode in episodes])) <= MAX_REST_CHANGE:
        return Following(delay_steps=0, correlation=0.0)  # a gripper at rest follows nothing
    usual = max(correlate_commands_by_delay(episodes), key=lambda result: abs(result.correlation))
    if abs(usual.correlation) >= MIN_CORRELATION:
        return usual
    longest = max(
        correlate_commands_by_delay(episodes, MAX_DELAY_S), key=lambda result: result.correlation
    )
    return longest if longest.correlation >= MIN_CORRELATION else usual


def _measure_median_settled_opening(
    episodes: Sequence[RecordedEpisode], is_command_open: bool
) -> float:
    """Return the median opening after some steps of a command to open, or of one to close.

    NaN with too few steps.
    """
    levels = []
    for episode in episodes:
        is_commanded = (np.asarray(episode.action[:, 7]) > OPEN_COMMAND) == is_command_open
        for step in range(SETTLING_STEPS, len(episode)):
            if is_commanded[step - SETTLING_STEPS : step].all():
                levels.append(episode.opening[step])
    return float(np.median(levels)) if len(levels) >= MIN_OPENINGS else float("nan")
