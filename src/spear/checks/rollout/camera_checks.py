"""What the checks of cameras share: which camera's pictures fit best in which version."""

from collections.abc import Collection

import numpy as np

from spear.checks.rollout.bars import is_camera_exchange_refuted
from spear.checks.rollout.case import Case, Doubt, Figure, Finding, Result
from spear.checks.rollout.odds import VersionOdds
from spear.checks.rollout.picture_versions import EXCHANGED
from spear.types import Array

CAMERA_FILE = "observe in your robot's file, where it reads the cameras"
MIN_CONFIDENCE_LOG_ODDS = 0.5  # below it, a version is only a suspicion
TOO_FEW_PICTURES = "too few training pictures to compare with"
MAX_SHOWN_PICTURES = 4  # of the rollout, and as many of the training


def find_camera_with_faulty_pictures(
    case: Case,
    faulty_versions: Collection[str],
    fault_in_words: str,
    cure: str,
    is_color: bool = False,
) -> Result:
    """Look for a camera whose pictures fit the training best if they are a faulty version.

    Args:
        case: the case.
        faulty_versions: the versions that are a fault, or beginnings of their names.
        fault_in_words: what happened, after the name of the camera.
        cure: what to change.
        is_color: whether the versions are of the colors instead of the shape.
    """
    comparison = case.comparison
    num_compared = 0
    suspicion = ""
    for camera in case.rollout_cameras:
        odds = comparison.get_color_odds(camera) if is_color else comparison.get_shape_odds(camera)
        if odds is None:
            continue
        num_compared += 1
        if is_color:
            best = comparison.find_best_color_version(camera)
        else:
            best = find_unrefuted_shape_version(case, camera)
        if best is None or not best.version.startswith(tuple(faulty_versions)):
            continue
        if best.log_odds < MIN_CONFIDENCE_LOG_ODDS:
            suspicion = f"camera {camera} may be {best.version}"
            continue
        is_by_flow = best in (comparison.get_mirror_and_turn_odds_by_flow(camera) or ())
        return Finding(
            confidence=round(float(min(1 / (1 + np.exp(-best.log_odds)), 0.97)), 3),
            evidence=f"camera {camera} {fault_in_words}: {_describe_odds(best, is_by_flow)}",
            cure=cure,
            file=CAMERA_FILE,
            figure=draw_rollout_and_training_pictures(case, camera),
            camera=None if best.version.startswith(EXCHANGED) else camera,
        )
    if suspicion:
        return Doubt(suspicion, is_suspicion=True)
    if not num_compared:
        return Doubt(TOO_FEW_PICTURES)
    return None


def find_unrefuted_shape_version(case: Case, camera: str) -> VersionOdds | None:
    """Return the version of a camera's pictures that fits best, if one is likely.

    An exchange of cameras that the bars of their pictures refute is none.
    """
    best = case.comparison.find_best_shape_version(camera)
    if best is None or not best.version.startswith(EXCHANGED):
        return best
    other_camera = best.version.removeprefix(EXCHANGED)
    return None if is_camera_exchange_refuted(case, camera, other_camera) else best


def _describe_odds(best: VersionOdds, is_by_flow: bool) -> str:
    """Say how much better a version fits than the plain pictures."""
    subject = "its pictures fit those of training as"
    if is_by_flow:
        subject = "its pictures move with the arm as in training if they are taken for"
    return (
        f"{subject} {best.version} "
        f"(log likelihood {best.margin:+.1f} per picture; training pictures so changed "
        f"{best.expected:+.1f}, unchanged {best.plain:+.1f})"
    )


def draw_rollout_and_training_pictures(case: Case, camera: str) -> Figure:
    """Draw pictures of the rollout, and the training pictures of the nearest arm positions."""
    pictures: list[tuple[str, Array]] = []
    training = [episode for episode in case.demonstrations if camera in episode.pictures]
    training_positions = None
    training_pictures = None
    if training:
        training_positions = np.concatenate([episode.position for episode in training])
        training_pictures = np.concatenate([e.pictures[camera].small for e in training])
    for episode in case.rollout[:MAX_SHOWN_PICTURES]:
        if camera not in episode.pictures:
            continue
        pictures.append(("rollout", episode.pictures[camera].small[0]))
        if training_positions is not None and training_pictures is not None:
            distances = np.linalg.norm(training_positions - episode.position[0], axis=1)
            pictures.append(("nearest in training", training_pictures[distances.argmin()]))
    return Figure(f"camera {camera}", pictures=pictures)
