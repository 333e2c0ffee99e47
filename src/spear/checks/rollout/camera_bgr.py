"""A camera sends blue, green, red."""

from typing import ClassVar

import numpy as np

from spear.checks.rollout.camera_checks import (
    CAMERA_FILE,
    find_picture_version,
    show_pictures,
)
from spear.checks.rollout.case import Case, Finding, Material, Result, RolloutCheck
from spear.checks.rollout.pictures import PRIOR, VersionOdds

VERSION = "with red and blue exchanged"
CURE = "send RGB: convert what OpenCV reads with image[..., ::-1]"
MIN_COMBINED_LOG_ODDS = 1.2  # of all cameras; their scenes, too, may be of unusual colors
INDEPENDENT_SHARE = 0.8  # of the evidence of each camera, as two cameras see the same scene


class CameraBgrCheck(RolloutCheck):
    """Finds cameras whose red and blue are exchanged: one of them, or all of them together."""

    fault = "camera-bgr"
    title = "a camera whose red and blue are exchanged"
    needs: ClassVar[frozenset[Material]] = frozenset({"rollout", "demonstrations"})

    def examine(self, case: Case) -> Result:
        of_one = find_picture_version(case, (VERSION,), "sends BGR", CURE, is_color=True)
        if isinstance(of_one, Finding):
            return of_one
        odds_by_camera = self._collect_odds(case)
        # One program reads all cameras, so mostly all of them are wrong, and add to the evidence.
        log_ratio = sum(INDEPENDENT_SHARE * odds.log_ratio for odds in odds_by_camera.values())
        log_odds = log_ratio + float(np.log(PRIOR))
        if len(odds_by_camera) < 2 or log_odds < MIN_COMBINED_LOG_ODDS:
            return of_one
        words = []
        for camera, odds in odds_by_camera.items():
            words.append(
                f"{camera} {odds.margin:+.1f} (training so changed {odds.expected:+.1f}, unchanged "
                f"{odds.plain:+.1f})"
            )
        return Finding(
            confidence=round(float(min(1 / (1 + np.exp(-log_odds)), 0.97)), 3),
            evidence=(
                "with red and blue exchanged, all cameras fit training better, by a log likelihood "
                f"per picture of {', '.join(words)}"
            ),
            cure=CURE,
            file=CAMERA_FILE,
            figure=show_pictures(case, next(iter(odds_by_camera))),
        )

    @staticmethod
    def _collect_odds(case: Case) -> dict[str, VersionOdds]:
        """Return the odds of exchanged colors of each camera that can be compared."""
        odds_by_camera = {}
        for camera in case.cameras:
            for odds in case.comparison.color_odds(camera) or ():
                if odds.version == VERSION:
                    odds_by_camera[camera] = odds
        return odds_by_camera
