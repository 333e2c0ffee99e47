"""The robot executes translations along the axes of its tool instead of its base."""

from typing import ClassVar

import numpy as np

from spear.checks.rollout.case import Finding, Result
from spear.checks.rollout.motion import PLAIN, RolloutMotion
from spear.checks.rollout.motion_check import MotionCheck
from spear.checks.rollout.motion_figures import (
    describe_reading,
    draw_reading_errors,
    draw_turn_reading_errors,
)

ROBOT_FILE = "the convert function of your robot's file (see examples/my_robot.py)"


class ActionFrameCheck(MotionCheck):
    """Finds translations that are executed in the tool's frame."""

    fault = "action-frame"
    title = "the robot moves along other axes than those of the base"
    causes: ClassVar[frozenset[str]] = frozenset({"controller-short"})

    def examine_motion(self, motion: RolloutMotion) -> Result:
        motion = motion.with_likely_actions
        better = motion.better_reading
        if better is None or better.reading.frame == "base":
            return self._examine_rotations(motion)
        plain = motion.fit_of(PLAIN)
        return Finding(
            confidence=0.95,
            evidence=(
                f"in the {describe_reading(better.reading)}, the actions explain all but "
                f"{better.error:.0%} of the motion; in the base frame, all but "
                f"{plain.error:.0%}"
            ),
            cure="rotate each translation from the base frame into the one that the robot expects",
            file=ROBOT_FILE,
            figure=draw_reading_errors(motion),
        )

    def _examine_rotations(self, motion: RolloutMotion) -> Result:
        """Look for rotations about the axes of the base."""
        if motion.better_turn_reading != "about the base":
            return None
        errors = motion.turn_errors_rad
        return Finding(
            confidence=0.9,
            evidence=(
                "the arm rotates about the axes of its base: that is off by "
                f"{np.degrees(errors['about the base'].mean()):.1f}° per move, the axes of the "
                f"tool by {np.degrees(errors['plain'].mean()):.1f}°"
            ),
            cure="apply each rotation in the tool's frame: R_next = R_now · R(action)",
            file=ROBOT_FILE,
            figure=draw_turn_reading_errors(motion),
        )
