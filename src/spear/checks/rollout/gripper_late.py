"""The gripper acts later than in training."""

from spear.checks.gripper import MIN_CORRELATION
from spear.checks.rollout.action_frame import ROBOT_FILE
from spear.checks.rollout.case import Case, Doubt, Finding, Result, RolloutCheck
from spear.checks.rollout.gripper_figures import draw_gripper

# The delay of training that is assumed if there are no demonstrations: one step, because states
# precede their commands.
USUAL_DELAY_S = 0.2
MIN_EXTRA_DELAY_S = 0.35  # beyond the delay of training (nano: 0)
# Late, repeated or dropped actions delay the gripper, too, but by at most four observations.
MIN_INDEPENDENT_STEPS = 5
MIN_INDEPENDENT_CORRELATION = 0.8


class GripperLateCheck(RolloutCheck):
    """Finds a gripper whose opening follows its command late."""

    fault = "gripper-late"
    title = "the gripper acts later than in training"

    def examine(self, case: Case) -> Result:
        gripper = case.gripper
        following = gripper.following
        if following is None:
            return Doubt("the gripper's command never changes")
        if following.correlation < MIN_CORRELATION:
            return None
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
            confidence=0.8,  # a robot that is late as a whole is seen better by other checks
            evidence=(
                f"the opening follows its command {delay_s:.1f} s later (correlation "
                f"{following.correlation:.2f}), in training {usual_s:.1f} s"
            ),
            cure="send the gripper's command at once, without waiting for the arm or a queue",
            file=ROBOT_FILE,
            figure=draw_gripper(case),
            is_independent=(
                following.delay_steps >= MIN_INDEPENDENT_STEPS
                and following.correlation >= MIN_INDEPENDENT_CORRELATION
            ),
        )
