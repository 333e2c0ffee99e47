"""Do two cameras agree about the colors? Both mostly see the same table.

The *warmth* of a camera in an episode is the median of red minus blue over all its pixels. Training
says how the warmth of one camera follows that of another one. If red and blue of one of the two are
exchanged, its warmth has the opposite sign, whatever the color of the table is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from spear.checks.rollout.episode import MIN_PICTURE_EPISODES, RecordedEpisode
from spear.types import Array

MIN_DEVIATION = 3.0  # gray levels; rounding, and compression of pictures, cause as much
OUTLIER_PROBABILITY = 0.05  # of an episode whose two cameras see different things
OUTLIER_DENSITY = 1 / 256  # probability density of an outlier's warmth, per gray level


@dataclass(frozen=True)
class ColorRelation:
    """What the warmth of two cameras says about exchanged colors.

    cameras    the two cameras.
    warmth     [N, 2] their warmth in each episode of the rollout, gray levels.
    log_ratio  logarithm of the likelihood that one of the two is exchanged, over that of none.
    """

    cameras: tuple[str, str]
    warmth: Array
    log_ratio: float


def compare_colors_of_camera_pairs(
    rollout: Sequence[RecordedEpisode],
    demonstrations: Sequence[RecordedEpisode],
    cameras: Sequence[str],
) -> list[ColorRelation]:
    """Compare the colors of all pairs of cameras that both groups of episodes have."""
    relations = []
    for pair in combinations(cameras, 2):
        warmth = _measure_warmth_of_both(rollout, pair)
        training_warmth = _measure_warmth_of_both(demonstrations, pair)
        if len(warmth) and len(training_warmth) >= MIN_PICTURE_EPISODES:
            log_ratio = _compute_color_exchange_log_ratio(warmth, training_warmth)
            relations.append(ColorRelation(pair, warmth, log_ratio))
    return relations


def _measure_warmth_of_both(episodes: Sequence[RecordedEpisode], cameras: tuple[str, str]) -> Array:
    """Return the warmth [N, 2] of two cameras in each episode that has both."""
    rows = []
    for episode in episodes:
        if set(cameras) <= set(episode.pictures):
            pictures = [episode.pictures[camera].small.astype(np.float32) for camera in cameras]
            rows.append([np.median(p[..., 0] - p[..., 2]) for p in pictures])
    return np.array(rows).reshape(-1, 2)


def _compute_color_exchange_log_ratio(warmth: Array, training_warmth: Array) -> float:
    """Compute `ColorRelation.log_ratio`, over all episodes of a rollout.

    Args:
        warmth: [N, 2] warmth of both cameras in each episode of the rollout.
        training_warmth: [M, 2] the same in the demonstrations.
    """
    training_first = training_warmth[:, 0]
    training_second = training_warmth[:, 1]
    slope, offset = np.polyfit(training_first, training_second, 1)
    errors = training_second - slope * training_first - offset
    # Some demonstrations may be outliers, too, so the deviation is that of the nearer two thirds.
    deviation = max(float(np.quantile(np.abs(errors), 0.68)), MIN_DEVIATION)
    # Exchanging red and blue of a camera changes the sign of its warmth.
    first = warmth[:, 0]
    second = warmth[:, 1]
    plain = _compute_log_likelihood(second - slope * first - offset, deviation)
    with_second_exchanged = _compute_log_likelihood(-second - slope * first - offset, deviation)
    with_first_exchanged = _compute_log_likelihood(second + slope * first - offset, deviation)
    return float(max(with_first_exchanged, with_second_exchanged) - plain)


def _compute_log_likelihood(errors: Array, deviation: float) -> float:
    """Return the log likelihood of errors that are normal, or those of outliers."""
    normal = np.exp(-0.5 * (errors / deviation) ** 2) / (np.sqrt(2 * np.pi) * deviation)
    mixed = (1 - OUTLIER_PROBABILITY) * normal + OUTLIER_PROBABILITY * OUTLIER_DENSITY
    return float(np.log(mixed).sum())
