"""Are a camera's pictures late? When they change is compared with when the arm moves.

Two pictures of one episode differ the more, the farther the arm moved between them. If pictures are
late by some steps, their differences belong to what the arm did as many steps earlier. So the
*score* of a delay is the correlation, over pairs of steps that are near each other, of the
logarithms of the two distances. It needs no knowledge of what the pictures show. The scores of
training pictures, and of the same pictures delayed on purpose, say what to expect.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spear.checks.rollout.episode import MIN_PICTURE_EPISODES, RecordedEpisode
from spear.checks.rollout.odds import VersionOdds, compute_odds
from spear.types import Array

DELAYS_STEPS = (1, 2, 3, 4, 5)  # that are compared
MAX_TRAINING_EPISODES = 40  # more of them change the expected scores little
MIN_STEPS = 8  # shorter episodes do not show a delay
# The steps of a pair are at most this far from each other. For pairs that are farther apart, one
# step of delay hardly changes how far the arm moved between them.
MAX_STEPS_APART = 3
# Added before logarithms are taken, so that distances and differences near 0 count alike.
ADDED_DISTANCE_M = 0.003  # pictures of 32 columns do not show a shorter motion
ADDED_LEVELS = 1.0  # gray levels of noise in pictures
# Pairs between which the opening changes by more are left out: how much pictures change with the
# gripper depends on what it holds.
MAX_OPENING_CHANGE = 0.1
MIN_PAIRS = 6  # with fewer, nothing correlates


@dataclass(frozen=True)
class DelayReference:
    """What training pictures of one camera say about delays.

    plain_scores  scores of each training episode.
    late_scores   name of a delay → scores of each training episode whose pictures are delayed.
    """

    plain_scores: Sequence[Mapping[str, float]]
    late_scores: Mapping[str, Sequence[Mapping[str, float]]]

    @staticmethod
    def fit(demonstrations: Sequence[RecordedEpisode], camera: str) -> "DelayReference | None":
        """Score training episodes; None with too few."""
        training = _select_long_changing_episodes(demonstrations, camera)[:MAX_TRAINING_EPISODES]
        if len(training) < MIN_PICTURE_EPISODES:
            return None
        plain_scores = [
            _correlate_pictures_by_delay(
                episode, camera, added_delay_steps=0, delays_steps=DELAYS_STEPS
            )
            for episode in training
        ]
        late_scores = {}
        for delay in DELAYS_STEPS:
            scores = [
                _correlate_pictures_by_delay(
                    episode, camera, added_delay_steps=delay, delays_steps=(delay,)
                )
                for episode in training
            ]
            late_scores[_name_delay(delay)] = scores
        return DelayReference(plain_scores, late_scores)


def compute_delay_odds(
    rollout: Sequence[RecordedEpisode], reference: DelayReference, camera: str
) -> list[VersionOdds] | None:
    """Return the odds of each delay of a camera, the best one first; None with too few steps."""
    long_rollout = _select_long_changing_episodes(rollout, camera)
    if not long_rollout:
        return None
    scores = [
        _correlate_pictures_by_delay(
            episode, camera, added_delay_steps=0, delays_steps=DELAYS_STEPS
        )
        for episode in long_rollout
    ]
    return compute_odds(scores, reference.plain_scores, reference.late_scores)


def _select_long_changing_episodes(
    episodes: Sequence[RecordedEpisode], camera: str
) -> list[RecordedEpisode]:
    """Select the episodes that are long enough, and whose pictures from the camera change."""
    long_episodes = []
    for episode in episodes:
        if len(episode) < MIN_STEPS or camera not in episode.pictures:
            continue
        if len(np.unique(episode.pictures[camera].fingerprint)) > 1:
            long_episodes.append(episode)
    return long_episodes


def _correlate_pictures_by_delay(
    episode: RecordedEpisode, camera: str, added_delay_steps: int, delays_steps: Sequence[int]
) -> dict[str, float]:
    """Return the score (the correlation) of each delay in an episode, by the delay's name.

    The score without a delay is named "plain".

    Args:
        episode: the episode.
        camera: the camera.
        added_delay_steps: by how many steps to delay the pictures first.
        delays_steps: the delays, in addition to none.
    """
    num_steps = len(episode)
    steps = np.arange(num_steps)
    # Every second row and column is enough.
    small = episode.pictures[camera].small[:, ::2, ::2].astype(np.float32)
    pictures = small.reshape(num_steps, -1)[np.maximum(steps - added_delay_steps, 0)]  # [T, values]
    position = np.asarray(episode.position)
    opening = np.asarray(episode.opening)
    earlier_steps, later_steps = _list_near_pairs(num_steps)
    differences = np.sqrt(((pictures[later_steps] - pictures[earlier_steps]) ** 2).mean(1))
    log_differences = np.log(differences + ADDED_LEVELS)
    scores = {}
    for delay in (0, *delays_steps):
        delayed = np.maximum(steps - delay, 0)
        earlier = delayed[earlier_steps]
        later = delayed[later_steps]
        distances_m = np.linalg.norm(position[later] - position[earlier], axis=1)
        log_distances = np.log(distances_m + ADDED_DISTANCE_M)
        is_compared = np.abs(opening[later] - opening[earlier]) <= MAX_OPENING_CHANGE
        name = "plain" if delay == 0 else _name_delay(delay)
        scores[name] = _correlate(log_differences[is_compared], log_distances[is_compared])
    return scores


def _list_near_pairs(num_steps: int) -> tuple[Array, Array]:
    """Return the earlier and the later step of all pairs that are near each other."""
    earlier_steps = []
    later_steps = []
    for distance in range(1, MAX_STEPS_APART + 1):
        earlier_steps.append(np.arange(num_steps - distance))
        later_steps.append(np.arange(distance, num_steps))
    return np.concatenate(earlier_steps), np.concatenate(later_steps)


def _correlate(first: Array, second: Array) -> float:
    """Return the correlation; 0 if one of the two is constant, or of few values."""
    if len(first) < MIN_PAIRS or min(first.std(), second.std()) < 1e-6:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def _name_delay(delay: int) -> str:
    """Name pictures that are some steps late."""
    return f"late by {delay} steps" if delay > 1 else "late by 1 step"
