"""The robot executes translations along the axes of its tool instead of its base."""

from typing import ClassVar

import numpy as np

from spear.checks.rollout.case import Doubt, Finding, Result
from spear.checks.rollout.motion import PLAIN, RolloutMotion
from spear.checks.rollout.motion_check import MotionCheck
from spear.checks.rollout.motion_figures import (
    describe_reading,
    draw_reading_errors,
    draw_turn_reading_errors,
)
from spear.checks.rollout.targets import TURNED, find_changed_targets

# Share of the motion that the best reading may leave unexplained (nano without faults: 0.0 to 0.1).
MAX_UNEXPLAINED = 0.8

ROBOT_FILE = "the convert function of your robot's file (see examples/my_robot.py)"


class ActionFrameCheck(MotionCheck):
    """Finds translations that are executed in the tool's frame, and targets in another base."""

    fault = "action-frame"
    title = "the robot moves along other axes than those of the base"
    causes: ClassVar[frozenset[str]] = frozenset({"controller-short"})

    def examine_motion(self, motion: RolloutMotion) -> Result:
        targets = find_changed_targets(motion)
        if targets is not None and targets.change in TURNED:
            return Finding(
                confidence=0.95,
                evidence=(
                    f"in {targets.share:.0%} of {targets.num_moves} moves the arm goes to its "
                    f"target {targets.change}, and in {targets.plain_share:.0%} to the target"
                ),
                cure="convert the poses that you send from the base frame into the robot's frame",
                file=ROBOT_FILE,
                figure=draw_reading_errors(motion),
            )
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
            return self._examine_unexplained_motion(motion)
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

    @staticmethod
    def _examine_unexplained_motion(motion: RolloutMotion) -> Doubt | None:
        """Say so if the arm does not follow its commands along any axes."""
        error = motion.fits[0].error
        if error <= MAX_UNEXPLAINED:
            return None
        return Doubt(
            f"the actions leave {error:.0%} of the motion unexplained along all axes",
            is_suspicion=True,
        )
