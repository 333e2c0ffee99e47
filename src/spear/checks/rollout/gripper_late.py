"""The gripper acts later than in training."""

from spear.checks.gripper import MIN_CORRELATION, Following
from spear.checks.rollout.action_frame import ROBOT_FILE
from spear.checks.rollout.case import Case, Doubt, Finding, Result, RolloutCheck
from spear.checks.rollout.gripper import MAX_SCALE
from spear.checks.rollout.gripper_figures import draw_gripper
from spear.checks.rollout.gripper_reactions import compare_reactions
from spear.checks.rollout.odds import compute_probability

# The delay of training that is assumed if there are no demonstrations: one step, because states
# precede their commands.
USUAL_DELAY_S = 0.2
MAX_CONFIDENCE = 0.8  # a robot that is late as a whole is seen better by other checks
MIN_EXTRA_DELAY_S = 0.35  # beyond the delay of training (nano: 0)
# Late, repeated or dropped actions delay the gripper, too, but by at most four observations.
MIN_INDEPENDENT_STEPS = 5
MIN_INDEPENDENT_CORRELATION = 0.8
CURE = "send the gripper's command at once, without waiting for the arm or a queue"


class GripperLateCheck(RolloutCheck):
    """Finds a gripper whose opening follows its command late."""

    fault = "gripper-late"
    title = "the gripper acts later than in training"

    def examine(self, case: Case) -> Result:
        gripper = case.gripper
        following = gripper.following
        if following is None:
            return Doubt("the gripper's command never changes")
        # Openings of another sense or scale are another fault, and show no reaction. A gripper that
        # never moves is not late.
        if gripper.ignores_commands:
            return None
        if gripper.opposes_commands or gripper.open_ratio_to_training <= MAX_SCALE:
            return None
        if following.correlation >= MIN_CORRELATION:
            finding = self._examine_correlation(case, following)
            if finding is not None:
                return finding
        return self._examine_reactions(case)

    @staticmethod
    def _examine_correlation(case: Case, following: Following) -> Finding | None:
        """Look for openings that follow their commands late."""
        gripper = case.gripper
        rate_hz = gripper.rollout[0].rate_hz
        delay_s = following.delay_steps / rate_hz
        usual_s = USUAL_DELAY_S
        usual = gripper.training_following
        if usual is not None and usual.correlation >= MIN_CORRELATION:
            usual_s = usual.delay_steps / case.demonstrations[0].rate_hz
        # A step of the rollout may be longer than one of training; one step is no delay.
        extra_s = delay_s - max(usual_s, 1 / rate_hz)
        if extra_s < MIN_EXTRA_DELAY_S:
            return None
        return Finding(
            confidence=MAX_CONFIDENCE,
            evidence=(
                f"the opening follows its command {delay_s:.1f} s later (correlation "
                f"{following.correlation:.2f}), in training {usual_s:.1f} s"
            ),
            cure=CURE,
            file=ROBOT_FILE,
            figure=draw_gripper(case),
            is_independent=(
                following.delay_steps >= MIN_INDEPENDENT_STEPS
                and following.correlation >= MIN_INDEPENDENT_CORRELATION
            ),
        )

    @staticmethod
    def _examine_reactions(case: Case) -> Finding | None:
        """Look for episodes in which the gripper does not move long after its command changes."""
        gripper = case.gripper
        step_s = 1 / gripper.rollout[0].rate_hz
        odds = compare_reactions(
            gripper.reactions, gripper.training_reactions, MIN_EXTRA_DELAY_S, step_s
        )
        if odds is None or odds.log_odds <= 0:
            return None
        return Finding(
            confidence=compute_probability(odds.log_odds, MAX_CONFIDENCE),
            evidence=(
                f"{odds.usual_s + MIN_EXTRA_DELAY_S:.1f} s after its command changes, the gripper "
                f"does not move yet in {odds.num_late} of {odds.num_compared} episodes; in "
                f"training it moves after {odds.usual_s:.1f} s"
            ),
            cure=CURE,
            file=ROBOT_FILE,
            figure=draw_gripper(case),
        )
