"""A camera sends the same picture while the arm moves."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from spear.checks.frozen import mark_frozen_steps
from spear.checks.rollout.camera_checks import CAMERA_FILE, draw_rollout_and_training_pictures
from spear.checks.rollout.case import (
    Case,
    Finding,
    Result,
    RolloutCheck,
    compute_confidence_of_margin,
)
from spear.checks.rollout.delays import DELAYS_STEPS
from spear.checks.rollout.episode import RecordedEpisode
from spear.checks.rollout.odds import PRIOR, compute_fault_log_ratio, compute_probability
from spear.types import Array

MIN_MOTION_M = 0.01  # a picture that stays the same over a longer motion is repeated
# Share of the moving steps whose picture is the very same as before. A camera's noise makes it 0,
# and pictures of the simulator without noise, too.
MIN_FROZEN_SHARE = 0.25
CERTAIN_FROZEN_SHARE = 0.6
MIN_MOVING_STEPS = 8
# Episodes that end with a repeated picture are compared with those of training. This needs fewer
# repetitions, and so a shorter motion counts.
MIN_LAST_MOTION_M = 0.003
STOPPED_SHARE = 0.9  # of the episodes of a camera that stops; it may also stop after an episode
MAX_STOPPED_CONFIDENCE = 0.9


class CameraFrozenCheck(RolloutCheck):
    """Finds a camera whose pictures stay the very same."""

    fault = "camera-frozen"
    title = "a camera sends the same picture again and again"
    causes: ClassVar[frozenset[str]] = frozenset({"camera-late"})

    def examine(self, case: Case) -> Result:
        for camera in case.rollout_cameras:
            finding = self._examine_repetitions(case, camera) or self._examine_ends(case, camera)
            if finding is not None:
                return finding
        return None

    @staticmethod
    def _examine_repetitions(case: Case, camera: str) -> Finding | None:
        """Look for a camera that repeats its picture in a large share of the moving steps."""
        num_moving = 0
        num_same = 0
        for episode in case.rollout:
            if camera not in episode.pictures:
                continue
            distance_m = np.linalg.norm(np.diff(episode.position, axis=0), axis=1)
            is_moving = distance_m > MIN_MOTION_M
            fingerprint = episode.pictures[camera].fingerprint
            is_frozen = mark_frozen_steps(fingerprint.tolist(), episode.position, MIN_MOTION_M)
            # A late camera repeats its first picture until there is a newer one.
            num_late = _count_repetitions_by_late_camera(fingerprint)
            num_moving += int(is_moving[num_late:].sum())
            num_same += int((is_moving & is_frozen[1:])[num_late:].sum())
        if num_moving < MIN_MOVING_STEPS or num_same < MIN_FROZEN_SHARE * num_moving:
            return None
        evidence = (
            f"camera {camera} sends the very same picture in {num_same} of {num_moving} steps in "
            "which the arm moves"
        )
        confidence = compute_confidence_of_margin(
            num_same / num_moving, MIN_FROZEN_SHARE, CERTAIN_FROZEN_SHARE
        )
        return _make_finding(case, camera, confidence, evidence)

    @staticmethod
    def _examine_ends(case: Case, camera: str) -> Finding | None:
        """Look for a camera that stops: episodes end with a repeated picture, unlike training."""
        ends = _mark_episodes_repeating_last_picture(case.rollout, camera)
        training_ends = _mark_episodes_repeating_last_picture(case.demonstrations, camera)
        log_ratio = compute_fault_log_ratio(ends, training_ends, STOPPED_SHARE)
        log_odds = log_ratio + float(np.log(PRIOR))
        if log_odds <= 0:
            return None
        evidence = (
            f"camera {camera} sends the very same picture at the end of {ends.sum()} of "
            f"{len(ends)} episodes, while the arm still moves; in training in "
            f"{training_ends.sum()} of {len(training_ends)}"
        )
        confidence = compute_probability(log_odds, MAX_STOPPED_CONFIDENCE)
        return _make_finding(case, camera, confidence, evidence)


def _count_repetitions_by_late_camera(fingerprint: Array) -> int:
    """Count how often the first picture is repeated at the beginning, as by a late camera.

    Returns:
        0 if it is repeated longer than by any late camera, or to the end.
    """
    is_other = fingerprint != fingerprint[0]
    num_repetitions = int(is_other.argmax()) - 1  # -1 if all pictures are the same
    return num_repetitions if 0 < num_repetitions <= max(DELAYS_STEPS) else 0


def _mark_episodes_repeating_last_picture(
    episodes: Sequence[RecordedEpisode], camera: str
) -> Array:
    """Return whether each episode that ends with a motion repeats its picture there."""
    is_repeated = []
    for episode in episodes:
        if camera not in episode.pictures or len(episode) < 2:
            continue
        last_motion_m = np.linalg.norm(episode.position[-1] - episode.position[-2])
        fingerprint = episode.pictures[camera].fingerprint
        if last_motion_m > MIN_LAST_MOTION_M:
            is_repeated.append(bool(fingerprint[-1] == fingerprint[-2]))
    return np.array(is_repeated, bool)


def _make_finding(case: Case, camera: str, confidence: float, evidence: str) -> Finding:
    """Make the finding of a camera that repeats its pictures."""
    return Finding(
        confidence=confidence,
        evidence=evidence,
        cure="restart the camera, and read a new picture for every observation",
        file=CAMERA_FILE,
        figure=draw_rollout_and_training_pictures(case, camera),
        camera=camera,
    )
