"""A camera's pictures are late."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from spear.checks.rollout.camera_checks import (
    CAMERA_FILE,
    MIN_CONFIDENCE_LOG_ODDS,
    TOO_FEW_PICTURES,
    draw_rollout_and_training_pictures,
)
from spear.checks.rollout.case import Case, Doubt, Finding, Material, Result, RolloutCheck
from spear.checks.rollout.episode import RecordedEpisode
from spear.checks.rollout.odds import compute_fault_log_ratio, compute_probability
from spear.types import Array

# A late camera may have no older picture than the first one of an episode, and then repeats it.
MIN_FIRST_MOTION_M = 0.0005  # the noise of a camera changes the picture if the arm hardly moves
REPEATING_SHARE = 0.9  # of the episodes of such a camera
# A repeated picture alone does not show that the later ones are late: it cannot outweigh motions
# that surely say otherwise.
MAX_REPETITION_LOG_RATIO = 5.0
MAX_CONFIDENCE = 0.95


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
            best = odds[0]  # the likeliest delay
            repetition_log_ratio = _compute_late_camera_log_ratio(case, camera)
            if best.log_odds + repetition_log_ratio <= 0:
                continue
            # The question is whether there is a delay, not which one: the evidence for any delay
            # counts, also if another delay is likelier.
            log_odds = max(entry.log_odds for entry in odds) + repetition_log_ratio
            if log_odds < MIN_CONFIDENCE_LOG_ODDS:
                return Doubt(f"camera {camera} may be {best.version}", is_suspicion=True)
            repetition_evidence = ""
            if repetition_log_ratio > 0:
                repetition_evidence = ". Unlike in training, the first picture comes twice"
            return Finding(
                confidence=compute_probability(log_odds, MAX_CONFIDENCE),
                evidence=(
                    f"the pictures of camera {camera} change {best.version}: the correlation of "
                    f"their changes with the motion of the arm is then {best.margin:+.2f} higher "
                    f"(training pictures so delayed {best.expected:+.2f}, in time "
                    f"{best.plain:+.2f}){repetition_evidence}"
                ),
                cure="read the newest picture: empty the camera's buffer before each observation",
                file=CAMERA_FILE,
                figure=draw_rollout_and_training_pictures(case, camera),
                camera=camera,
            )
        return None if num_compared else Doubt(TOO_FEW_PICTURES)


def _compute_late_camera_log_ratio(case: Case, camera: str) -> float:
    """Return how much likelier a late camera makes the repeated first pictures; 0 without any.

    A late camera that has older pictures repeats none. So new pictures do not speak against it.
    """
    log_ratio = compute_fault_log_ratio(
        _mark_episodes_repeating_first_picture(case.rollout, camera),
        _mark_episodes_repeating_first_picture(case.demonstrations, camera),
        REPEATING_SHARE,
    )
    return float(np.clip(log_ratio, 0, MAX_REPETITION_LOG_RATIO))


def _mark_episodes_repeating_first_picture(
    episodes: Sequence[RecordedEpisode], camera: str
) -> Array:
    """Return whether each episode that begins with a motion repeats its first picture."""
    is_repeated = []
    for episode in episodes:
        if camera not in episode.pictures or len(episode) < 2:
            continue
        first_motion_m = np.linalg.norm(episode.position[1] - episode.position[0])
        fingerprint = episode.pictures[camera].fingerprint
        if first_motion_m > MIN_FIRST_MOTION_M:
            is_repeated.append(bool(fingerprint[1] == fingerprint[0]))
    return np.array(is_repeated, bool)
