"""Black bars at the borders of pictures, which those of training do not have."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spear.checks.rollout.case import Case
from spear.checks.rollout.episode import RecordedEpisode
from spear.types import Array

MAX_BAR_LEVEL = 12  # gray levels of 255; a border that is nowhere brighter, in any step, is a bar
MIN_EXTRA_SHARE = 0.06  # share of a side that bars take, beyond those of training


def collect_small_pictures(episodes: Sequence[RecordedEpisode], camera: str) -> list[Array]:
    """Return the small pictures [T, h, w, 3] of each episode that has the camera."""
    return [episode.pictures[camera].small for episode in episodes if camera in episode.pictures]


class BarShares(NamedTuple):
    """Which share of a picture black bars take.

    of_height  share of the height that bars take at top and bottom.
    of_width   share of the width that bars take at the left and right.
    """

    of_height: float
    of_width: float


def find_extra_bars(case: Case, camera: str) -> BarShares | None:
    """Find the bars that a camera's pictures of the rollout have and those of training have not.

    Returns:
        By how much the shares of the bars exceed those of training; None if there are no such bars,
        or no pictures to compare.
    """
    rollout_pictures = collect_small_pictures(case.rollout, camera)
    training_pictures = collect_small_pictures(case.demonstrations, camera)
    if not rollout_pictures or not training_pictures:
        return None
    pictures = np.concatenate(rollout_pictures)
    shares = measure_bar_shares(pictures)
    training_shares = measure_bar_shares(np.concatenate(training_pictures))
    extra_shares = BarShares(
        of_height=shares.of_height - training_shares.of_height,
        of_width=shares.of_width - training_shares.of_width,
    )
    is_all_black = pictures.max() < MAX_BAR_LEVEL
    if is_all_black or max(extra_shares) < MIN_EXTRA_SHARE:
        return None
    return extra_shares


def is_camera_exchange_refuted(case: Case, camera: str, other_camera: str) -> bool:
    """Return whether bars show that two cameras are not exchanged.

    Exchanged pictures of different shapes are each fitted into the other one's shape. So both have
    bars, or neither has.
    """
    cameras = (camera, other_camera)
    if not all(collect_small_pictures(case.rollout, name) for name in cameras):
        return False
    num_with_bars = sum(find_extra_bars(case, name) is not None for name in cameras)
    return num_with_bars == 1


def measure_bar_shares(pictures: Array) -> BarShares:
    """Measure which share of the height, and which of the width, black bars take.

    A row or column belongs to a bar if it is black in every picture.

    Args:
        pictures: [N, h, w, 3], 0 … 255.
    """
    brightest = pictures.max(axis=(0, 3))  # [h, w]
    brightest_of_rows = brightest.max(axis=1)
    brightest_of_columns = brightest.max(axis=0)
    shares = []
    for levels in (brightest_of_rows, brightest_of_columns):
        is_lit = levels > MAX_BAR_LEVEL
        if not is_lit.any():
            shares.append(1.0)
            continue
        num_black_before = int(is_lit.argmax())  # before the first lit row or column
        num_black_after = int(is_lit[::-1].argmax())
        shares.append((num_black_before + num_black_after) / len(levels))
    of_height, of_width = shares
    return BarShares(of_height, of_width)
