"""How likely it is that something happened to a camera's pictures, by scores of whole episodes."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from spear.types import Array

# Two versions are tied if their margins differ by less than this share of (margin of training
# pictures that were changed - margin of those that were not).
TIE_SHARE = 0.1
PRIOR = 0.02  # probability of each version before the pictures are seen
# All margins of a rollout may differ from those of training, because the scene is another one: by
# this standard deviation, as a share of the same difference.
SHIFT_SHARE = 0.2
MAX_LOG_RATIO = 30.0  # so that odds stay finite


class VersionOdds(NamedTuple):
    """How likely a version of a camera's pictures is, compared with the plain one.

    version    the version.
    log_odds   logarithm of its probability over that of the plain version.
    log_ratio  the same, before the small prior probability of any version is counted.
    margin     mean difference of the scores, over the episodes of the rollout.
    expected   the same for training pictures that were changed to this version.
    plain      the same for training pictures that were not changed (negative).
    """

    version: str
    log_odds: float
    log_ratio: float
    margin: float
    expected: float
    plain: float


def find_likely_version(ranked_odds: list[VersionOdds] | None) -> VersionOdds | None:
    """Return the version with the highest score, if its log odds are positive.

    ranked_odds: the odds of several versions, the best one first; None if nothing is known.
    """
    if not ranked_odds or ranked_odds[0].log_odds <= 0:
        return None
    best = ranked_odds[0]
    # A view that is nearly symmetric does not tell a turn from a mirror image. A turned camera is
    # the more frequent mistake.
    for version_odds in ranked_odds[1:]:
        is_tied = best.margin - version_odds.margin < TIE_SHARE * (best.expected - best.plain)
        if is_tied and version_odds.version == "turned by 180°":
            return version_odds
    return best


def combine_odds_of_cameras(odds: Sequence[VersionOdds]) -> VersionOdds:
    """Return the odds of one version for several cameras together; margins are means."""
    log_ratio = sum(entry.log_ratio for entry in odds)
    return VersionOdds(
        version=odds[0].version,
        log_odds=log_ratio + float(np.log(PRIOR)),
        log_ratio=log_ratio,
        margin=float(np.mean([entry.margin for entry in odds])),
        expected=float(np.mean([entry.expected for entry in odds])),
        plain=float(np.mean([entry.plain for entry in odds])),
    )


def compute_odds(
    rollout_scores: Sequence[Mapping[str, float]],
    plain_scores: Sequence[Mapping[str, float]],
    changed_scores: Mapping[str, Sequence[Mapping[str, float]]],
) -> list[VersionOdds]:
    """Return the odds of each version, the one with the largest margin first.

    Args:
        rollout_scores: for each episode of the rollout, version → score.
        plain_scores: the same for training episodes.
        changed_scores: version → the same for training episodes whose pictures were changed to it.
    """
    odds = []
    for version, scores in changed_scores.items():
        odds.append(_compute_version_odds(version, rollout_scores, plain_scores, scores))
    return sorted(odds, key=lambda entry: -entry.margin)


def compute_fault_log_ratio(rollout: Array, training: Array, faulty_share: float) -> float:
    """Return how much likelier a fault makes what happened in a rollout: a log likelihood ratio.

    Something happens in most cases if there is a fault, for example in most episodes. Training says
    in which share of the cases it happens without one.

    Args:
        rollout: [N] whether it happened in each case of the rollout.
        training: [M] the same in training.
        faulty_share: in which share of the cases it happens with a fault.

    Returns:
        The ratio; 0 if one of both has no cases.
    """
    if not len(rollout) or not len(training):
        return 0.0
    # If it never happened in training, it may happen still. So one case of each kind is added.
    usual_share = (training.sum() + 1) / (len(training) + 2)
    num_happened = int(rollout.sum())
    num_others = len(rollout) - num_happened
    log_ratio = num_happened * np.log(faulty_share / usual_share)
    log_ratio += num_others * np.log((1 - faulty_share) / (1 - usual_share))
    return float(np.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def compute_probability(log_odds: float, highest: float) -> float:
    """Turn log odds into a probability of at most `highest`, rounded to three digits."""
    return round(float(min(1 / (1 + np.exp(-log_odds)), highest)), 3)


def _compute_version_odds(
    version: str,
    rollout_scores: Sequence[Mapping[str, float]],
    plain_scores: Sequence[Mapping[str, float]],
    changed_scores: Sequence[Mapping[str, float]],
) -> VersionOdds:
    """Compare the scores of the rollout with those of plain and of changed training pictures.

    The mean margin of a rollout's episodes is taken to be normally distributed around that of
    the training episodes. Its variance has two parts: the variance between episodes, which more
    episodes make smaller, and a shift of the whole rollout (`SHIFT_SHARE`).
    """
    margins = np.array([scores[version] - scores["plain"] for scores in rollout_scores])
    plain_margins = np.array([scores[version] - scores["plain"] for scores in plain_scores])
    changed_margins = np.array([scores[version] - scores["plain"] for scores in changed_scores])
    plain_mean = float(plain_margins.mean())
    changed_mean = float(changed_margins.mean())
    shift = SHIFT_SHARE * abs(changed_mean - plain_mean)
    spread = max(float(plain_margins.std()), float(changed_margins.std()), 1e-6)
    variance = spread**2 / len(margins) + shift**2
    # Beyond the two means, a margin speaks for the nearer version, and not more and more.
    margin = float(margins.mean())
    low, high = sorted((plain_mean, changed_mean))
    bounded = float(np.clip(margin, low, high))
    log_ratio = ((bounded - plain_mean) ** 2 - (bounded - changed_mean) ** 2) / (2 * variance)
    log_ratio = float(np.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    log_odds = log_ratio + float(np.log(PRIOR))
    return VersionOdds(version, log_odds, log_ratio, margin, changed_mean, plain_mean)
