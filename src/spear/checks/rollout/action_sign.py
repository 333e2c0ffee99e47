"""The robot moves along some axis in the opposite direction."""

from typing import ClassVar

import numpy as np

from spear.checks.rollout.action_frame import ROBOT_FILE
from spear.checks.rollout.case import Finding, Result
from spear.checks.rollout.motion import PLAIN, SIGNS, RolloutMotion
from spear.checks.rollout.motion_check import MotionCheck
from spear.checks.rollout.motion_figures import draw_reading_errors, draw_turn_reading_errors


class ActionSignCheck(MotionCheck):
    """Finds axes along which the arm moves against its commands."""

    fault = "action-sign"
    title = "the robot moves against the actions along some axis"
    causes: ClassVar[frozenset[str]] = frozenset({"controller-short"})

    def examine_motion(self, motion: RolloutMotion) -> Result:
        motion = motion.with_likely_actions
        better = motion.better_reading
        if better is None:
            return self._examine_rotations(motion)
        if better.reading.frame != "base":
            return None
        signs = zip("xyz", better.reading.signs, strict=True)
        axes = [axis for axis, sign in signs if sign == "-"]
        plain = motion.fit_of(PLAIN)
        return Finding(
            confidence=0.95,
            evidence=(
                f"with {' and '.join(axes)} reversed, the actions explain all but "
                f"{better.error:.0%} of the motion; as they are, all but {plain.error:.0%}"
            ),
            cure=f"reverse the sign of {' and '.join(axes)}, of the commands or of the state",
            file=ROBOT_FILE,
            figure=draw_reading_errors(motion),
        )

    def _examine_rotations(self, motion: RolloutMotion) -> Result:
        """Look for rotations that are reversed about some axis."""
        signs = motion.better_turn_reading
        if signs not in SIGNS:
            return None
        axes = [axis for axis, sign in zip("xyz", signs, strict=True) if sign == "-"]
        errors = motion.turn_errors_rad
        return Finding(
            confidence=0.9,
            evidence=(
                f"with the rotations about {' and '.join(axes)} reversed, the arm is off by "
                f"{np.degrees(errors[signs].mean()):.1f}° per move; as they are, by "
                f"{np.degrees(errors['plain'].mean()):.1f}°"
            ),
            cure=f"reverse the sign of the rotation about {' and '.join(axes)}",
            file=ROBOT_FILE,
            figure=draw_turn_reading_errors(motion),
        )
