"""The robot takes translations in another unit."""

from typing import ClassVar

from spear.checks.rollout.action_frame import ROBOT_FILE
from spear.checks.rollout.case import Case, Doubt, Finding, Result, RolloutCheck
from spear.checks.rollout.motion import MAX_READING_ERROR, MIN_MOVES
from spear.checks.rollout.motion_figures import draw_step_gains

MIN_UNIT_GAIN = 4.0  # an arm that moves farther by this factor has other units (nano: 0.98 … 1.03)
MAX_UNIT_GAIN = 0.05  # the same for an arm that moves less; a controller that is short does more


class TranslationUnitCheck(RolloutCheck):
    """Finds translations that are executed many times too far, or hardly at all."""

    fault = "translation-unit"
    title = "the robot takes translations in another unit"
    causes: ClassVar[frozenset[str]] = frozenset(
        {"controller-short", "actions-repeated", "actions-dropped", "control-rate", "start-outside"}
    )

    def examine(self, case: Case) -> Result:
        motion = case.motion
        if motion.num_moving < MIN_MOVES:
            return Doubt(f"only {motion.num_moving} moves are long enough")
        fit = motion.better_reading or motion.fits[0]
        gain = fit.gain
        if MAX_UNIT_GAIN < gain < MIN_UNIT_GAIN:
            return None
        is_too_far = gain >= MIN_UNIT_GAIN
        if is_too_far and fit.error > MAX_READING_ERROR:
            return Doubt(
                f"the arm moves {gain:.1f} times as far as commanded, but not along the commands",
                is_suspicion=True,
            )
        return Finding(
            confidence=0.95 if is_too_far else 0.85,
            evidence=(
                f"the arm moves {gain:.3g} times as far as commanded (median of "
                f"{motion.num_moving} moves)"
            ),
            cure="convert meters to the unit of the robot's controller, and nothing else",
            file=ROBOT_FILE,
            figure=draw_step_gains(motion),
        )
