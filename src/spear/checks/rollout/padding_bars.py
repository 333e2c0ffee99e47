"""Pictures have black bars that those of training do not have."""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from spear.checks.rollout.camera_checks import CAMERA_FILE, show_pictures
from spear.checks.rollout.case import Case, Doubt, Finding, Material, Result, RolloutCheck
from spear.checks.rollout.episode import RecordedEpisode
from spear.types import Array

MAX_BAR_LEVEL = 12  # gray levels of 255; a border that is nowhere brighter, in any step, is a bar
MIN_EXTRA_SHARE = 0.06  # share of a side that bars take, beyond those of training


class PaddingBarsCheck(RolloutCheck):
    """Finds black bars at the borders of a camera's pictures."""

    fault = "padding-bars"
    title = "pictures have black bars"
    needs: ClassVar[frozenset[Material]] = frozenset({"rollout", "demonstrations"})
    causes: ClassVar[frozenset[str]] = frozenset(
        {"camera-exposure", "camera-stretched", "camera-cropped"}
    )

    def examine(self, case: Case) -> Result:
        num_compared = 0
        for camera in case.cameras:
            if not _collect_pictures(case.rollout, camera):
                continue
            if not _collect_pictures(case.demonstrations, camera):
                continue
            num_compared += 1
            extra_shares = find_extra_bars(case, camera)
            if extra_shares is None:
                continue
            are_at_sides = extra_shares.of_width > extra_shares.of_height
            sides = "left and right" if are_at_sides else "top and bottom"
            extra_share = max(extra_shares)
            return Finding(
                confidence=0.96,
                evidence=(
                    f"camera {camera} has black bars at {sides}, {extra_share:.0%} of the "
                    "picture; training has none there"
                ),
                cure="send pictures without bars, in the aspect of training",
                file=CAMERA_FILE,
                figure=show_pictures(case, camera),
            )
        return None if num_compared else Doubt("no training pictures to compare with")


def _collect_pictures(episodes: Sequence[RecordedEpisode], camera: str) -> list[Array]:
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
    rollout_pictures = _collect_pictures(case.rollout, camera)
    training_pictures = _collect_pictures(case.demonstrations, camera)
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
