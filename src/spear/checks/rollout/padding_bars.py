"""Pictures have black bars that those of training do not have."""

from collections.abc import Sequence
from typing import ClassVar

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
            pictures = _collect_pictures(case.rollout, camera)
            training = _collect_pictures(case.demonstrations, camera)
            if not pictures or not training:
                continue
            num_compared += 1
            extra_shares = measure_extra_bars(np.concatenate(pictures), np.concatenate(training))
            if extra_shares is None:
                continue
            extra_height, extra_width = extra_shares
            sides = "left and right" if extra_width > extra_height else "top and bottom"
            return Finding(
                confidence=0.96,
                evidence=(
                    f"camera {camera} has black bars at {sides}, {extra_shares.max():.0%} of the "
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


def measure_extra_bars(pictures: Array, training_pictures: Array) -> Array | None:
    """Measure the bars that pictures [N, h, w, 3] have and those of training have not.

    Returns:
        [2] share of the height and of the width, as `measure_bars`; None if there are no such bars.
    """
    extra_shares = measure_bars(pictures) - measure_bars(training_pictures)
    is_all_black = pictures.max() < MAX_BAR_LEVEL
    if is_all_black or extra_shares.max() < MIN_EXTRA_SHARE:
        return None
    return extra_shares


def measure_bars(pictures: Array) -> Array:
    """Measure which share of the height, and which of the width, black bars take.

    A row or column belongs to a bar if it is black in every picture.

    Args:
        pictures: [N, h, w, 3], 0 … 255.

    Returns:
        [2] share of the height that bars take at top and bottom, and share of the width that they
        take at the left and right.
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
    return np.array(shares)
