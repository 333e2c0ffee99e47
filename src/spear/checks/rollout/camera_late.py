"""A camera's pictures are late."""

from typing import ClassVar

import numpy as np

from spear.checks.rollout.camera_checks import (
    CAMERA_FILE,
    MIN_CONFIDENCE_LOG_ODDS,
    TOO_FEW_PICTURES,
    draw_pictures,
)
from spear.checks.rollout.case import Case, Doubt, Finding, Material, Result, RolloutCheck


class CameraLateCheck(RolloutCheck):
    """Finds a camera whose pictures show where the arm was some steps ago."""

    fault = "camera-late"
    title = "a camera's pictures are late"
    needs: ClassVar[frozenset[Material]] = frozenset({"rollout", "demonstrations"})

    def examine(self, case: Case) -> Result:
        num_compared = 0
        for camera in case.rollout_cameras:
            odds = case.comparison.get_delay_odds(camera)
            if odds is None:
                continue
            num_compared += 1
            best = case.comparison.find_best_delay(camera)
            if best is None:
                continue
            # Any delay excludes that there is none; the best one is only the likeliest of them.
            log_odds = max(entry.log_odds for entry in odds)
            if log_odds < MIN_CONFIDENCE_LOG_ODDS:
                return Doubt(f"camera {camera} may be {best.version}", is_suspicion=True)
            return Finding(
                confidence=round(float(min(1 / (1 + np.exp(-log_odds)), 0.95)), 3),
                evidence=(
                    f"the pictures of camera {camera} change {best.version}: the correlation of "
                    f"their changes with the motion of the arm is then {best.margin:+.2f} higher "
                    f"(training pictures so delayed {best.expected:+.2f}, in time "
                    f"{best.plain:+.2f})"
                ),
                cure="read the newest picture: empty the camera's buffer before each observation",
                file=CAMERA_FILE,
                figure=draw_pictures(case, camera),
                camera=camera,
            )
        return None if num_compared else Doubt(TOO_FEW_PICTURES)
