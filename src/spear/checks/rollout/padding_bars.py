"""Pictures have black bars that those of training do not have."""

from typing import ClassVar

import numpy as np

from spear.checks.rollout.camera_checks import CAMERA_FILE, show_pictures
from spear.checks.rollout.case import Case, Doubt, Finding, Material, Result, RolloutCheck
from spear.types import Array

MAX_BAR_LEVEL = 12  # gray levels of 255; a border that is nowhere brighter, in any step, is a bar
MIN_EXTRA_SHARE = 0.06  # share of a side that bars take, beyond those of training


class PaddingBarsCheck(RolloutCheck):
    """Finds black bars at the borders of a camera's pictures."""

    fault = "padding-bars"
    title = "pictures have black bars"
    needs: ClassVar[frozenset[Material]] = frozenset({"rollout", "demonstrations"})
    causes: ClassVar[frozenset[str]] = frozenset(
        {"camera-exposure", "camera-stretched", "camera-cropped", "object-not-in-view"}
    )

    def examine(self, case: Case) -> Result:
        num_compared = 0
        for camera in case.cameras:
            pictures = [e.pictures[camera].small for e in case.rollout if camera in e.pictures]
            training = [
                e.pictures[camera].small for e in case.demonstrations if camera in e.pictures
            ]
            if not pictures or not training:
                continue
            num_compared += 1
            shares = measure_bars(np.concatenate(pictures))
            training_shares = measure_bars(np.concatenate(training))
            extra_shares = shares - training_shares
            is_all_black = np.concatenate(pictures).max() < MAX_BAR_LEVEL
            if extra_shares.max() < MIN_EXTRA_SHARE or is_all_black:
                continue
            sides = "left and right" if extra_shares[1] > extra_shares[0] else "top and bottom"
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


def measure_bars(pictures: Array) -> Array:
    """Return which share of the height, and of the width, black bars take in pictures [N, h, w, 3].

    A row or column belongs to a bar if it is black in every picture.
    """
    brightest = pictures.max(axis=(0, 3))  # [h, w]
    shares = []
    for lines in (brightest.max(axis=1), brightest.max(axis=0)):
        is_lit = lines > MAX_BAR_LEVEL
        if not is_lit.any():
            shares.append(1.0)
            continue
        first = int(is_lit.argmax())
        last = int(is_lit[::-1].argmax())
        shares.append((first + last) / len(lines))
    return np.array(shares)
