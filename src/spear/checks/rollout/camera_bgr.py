"""A camera sends blue, green, red."""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from spear.checks.rollout.camera_checks import (
    CAMERA_FILE,
    draw_rollout_and_training_pictures,
    find_camera_with_faulty_pictures,
)
from spear.checks.rollout.case import Case, Finding, Material, Result, RolloutCheck
from spear.checks.rollout.color_relations import ColorRelation, compare_colors_of_camera_pairs
from spear.checks.rollout.odds import PRIOR, VersionOdds
from spear.types import Array

VERSION = "with red and blue exchanged"
CURE = "send RGB: convert what OpenCV reads with image[..., ::-1]"
MAX_LISTED_EPISODES = 4
MIN_COMBINED_LOG_ODDS = 1.2  # of all cameras; their scenes, too, may be of unusual colors
INDEPENDENT_SHARE = 0.8  # of the evidence of each camera, as two cameras see the same scene


class CameraBgrCheck(RolloutCheck):
    """Finds cameras whose red and blue are exchanged: one of them, or all of them together."""

    fault = "camera-bgr"
    title = "a camera whose red and blue are exchanged"
    needs: ClassVar[frozenset[Material]] = frozenset({"rollout", "demonstrations"})
    # Names of objects may have colors.

    def examine(self, case: Case) -> Result:
        single_result = find_camera_with_faulty_pictures(
            case, (VERSION,), "sends BGR", CURE, is_color=True
        )
        if isinstance(single_result, Finding):
            return single_result
        for camera in case.rollout_cameras:
            best = case.comparison.find_best_color_version(camera)
            if best is not None and best.version != VERSION:
                return single_result  # another exposure changes colors, too, where it clips them
        return (
            self._compare_cameras(case)
            or self._examine_all_cameras_together(case)
            or self._examine_objects(case)
            or single_result
        )

    def _compare_cameras(self, case: Case) -> Finding | None:
        """Look for a camera whose colors are not those that another camera sees."""
        relations = compare_colors_of_camera_pairs(
            case.rollout, case.demonstrations, case.rollout_cameras
        )
        if not relations:
            return None
        relation = max(relations, key=lambda entry: entry.log_ratio)
        log_odds = relation.log_ratio + float(np.log(PRIOR))
        if log_odds < MIN_COMBINED_LOG_ODDS:
            return None
        camera = self._choose_less_training_like_camera(case, relation)
        first, second = relation.cameras
        return Finding(
            confidence=_make_confidence(log_odds),
            evidence=(
                f"cameras {first} and {second} see different colors of the same scene: red minus "
                f"blue is {_format_warmth(relation.warmth[:, 0])} and "
                f"{_format_warmth(relation.warmth[:, 1])} gray levels in the first episodes. In "
                f"training the two agree. Probably {camera} sends BGR"
            ),
            cure=CURE,
            file=CAMERA_FILE,
            figure=draw_rollout_and_training_pictures(case, camera),
        )

    def _choose_less_training_like_camera(self, case: Case, relation: ColorRelation) -> str:
        """Return that one of two cameras whose own colors are less like those of training."""
        odds_by_camera = self._collect_bgr_odds(case)
        ratios = {}
        for camera in relation.cameras:
            odds = odds_by_camera.get(camera)
            ratios[camera] = 0.0 if odds is None else odds.log_ratio
        return max(ratios, key=lambda camera: ratios[camera])

    def _examine_all_cameras_together(self, case: Case) -> Finding | None:
        """Add up the evidence of all cameras, in case red and blue are exchanged in all of them."""
        odds_by_camera = self._collect_bgr_odds(case)
        # One program reads all cameras, so mostly all of them are wrong, and add to the evidence.
        log_odds = _add_up_discounted_log_ratios(odds_by_camera) + float(np.log(PRIOR))
        if len(odds_by_camera) < 2 or log_odds < MIN_COMBINED_LOG_ODDS:
            return None
        words = []
        for camera, odds in odds_by_camera.items():
            words.append(
                f"{camera} {odds.margin:+.1f} (training so changed {odds.expected:+.1f}, unchanged "
                f"{odds.plain:+.1f})"
            )
        return Finding(
            confidence=_make_confidence(log_odds),
            evidence=(
                "with red and blue exchanged, all cameras fit training better, by a log likelihood "
                f"per picture of {', '.join(words)}"
            ),
            cure=CURE,
            file=CAMERA_FILE,
            figure=draw_rollout_and_training_pictures(case, next(iter(odds_by_camera))),
        )

    def _examine_objects(self, case: Case) -> Finding | None:
        """Ask a model whether it recognizes objects better with red and blue exchanged."""
        recognition_log_ratio = case.bgr_log_ratio_of_objects
        if recognition_log_ratio <= 0:
            return None
        log_ratio = recognition_log_ratio + _add_up_discounted_log_ratios(
            self._collect_bgr_odds(case)
        )
        log_odds = log_ratio + float(np.log(PRIOR))
        if log_odds < MIN_COMBINED_LOG_ODDS:
            return None
        return Finding(
            confidence=_make_confidence(log_odds),
            evidence=(
                "the policy's SPEAR-VLM misses objects of the instructions, and recognizes them "
                "with red and blue exchanged (log likelihood of objects in view "
                f"{recognition_log_ratio:+.1f})"
            ),
            cure=CURE,
            file=CAMERA_FILE,
            figure=draw_rollout_and_training_pictures(case, "external"),
        )

    @staticmethod
    def _collect_bgr_odds(case: Case) -> dict[str, VersionOdds]:
        """Return the odds of exchanged colors of each camera that can be compared."""
        odds_by_camera = {}
        for camera in case.rollout_cameras:
            for odds in case.comparison.get_color_odds(camera) or ():
                if odds.version == VERSION:
                    odds_by_camera[camera] = odds
        return odds_by_camera


def _add_up_discounted_log_ratios(odds_by_camera: Mapping[str, VersionOdds]) -> float:
    """Add up `INDEPENDENT_SHARE` of the evidence of the colors of each camera."""
    return sum(INDEPENDENT_SHARE * odds.log_ratio for odds in odds_by_camera.values())


def _make_confidence(log_odds: float) -> float:
    """Turn log odds into a confidence."""
    return round(float(min(1 / (1 + np.exp(-log_odds)), 0.97)), 3)


def _format_warmth(warmth: Array) -> str:
    """List the warmth of the first episodes."""
    return ", ".join(f"{level:+.0f}" for level in warmth[:MAX_LISTED_EPISODES])
