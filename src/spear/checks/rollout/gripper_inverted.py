"""The gripper opens when it is commanded to close."""

import numpy as np

from spear.checks.rollout.action_frame import ROBOT_FILE
from spear.checks.rollout.case import Case, Doubt, Finding, Result, RolloutCheck
from spear.checks.rollout.gripper_figures import draw_gripper

OBSERVE = "observe in your robot's file"


class GripperInvertedCheck(RolloutCheck):
    """Finds a gripper, or its measured opening, that runs against the commands."""

    fault = "gripper-inverted"
    title = "the gripper does the opposite of its commands"

    def examine(self, case: Case) -> Result:
        gripper = case.gripper
        following = gripper.following
        start_evidence = ""
        if gripper.starts_opposite_to_training:
            usual = float(np.median(gripper.training_first_openings))
            start = float(np.median(gripper.first_openings))
            start_evidence = f"it begins at {start:.2f}, in training at {usual:.2f}"
        if gripper.opposes_commands:
            assert following is not None
            return Finding(
                confidence=0.97,
                evidence=(
                    f"openings and commands have a correlation of {following.correlation:.2f}"
                    + (f"; {start_evidence}" if gripper.starts_opposite_to_training else "")
                ),
                cure=(
                    "send 1 for open and 0 for closed as the state"
                    if gripper.is_state_inverted
                    else "1 means open and 0 closed: invert the commands for your gripper"
                ),
                file=OBSERVE if gripper.is_state_inverted else ROBOT_FILE,
                figure=draw_gripper(case),
            )
        if gripper.starts_opposite_to_training and not gripper.is_state_scaled:
            # Openings that follow their commands make this less sure: either both are inverted, or
            # the gripper only begins with another opening than in training.
            return Finding(
                confidence=0.6 if gripper.follows_commands else 0.75,
                evidence=f"the gripper seems inverted: {start_evidence}",
                cure=(
                    "send 1 for open and 0 for closed, and read the commands in the same way; or "
                    "begin with the opening of training"
                ),
                file=f"{OBSERVE}, and {ROBOT_FILE}",
                figure=draw_gripper(case),
            )
        if gripper.closes_when_commanded_open:
            return Finding(
                confidence=0.9,
                evidence=(
                    f"the gripper begins at {np.median(gripper.first_openings):.2f}, and measures "
                    f"{gripper.open_level:.2f} while it is commanded to be open"
                ),
                cure="1 means open and 0 closed: invert the commands for your gripper",
                file=ROBOT_FILE,
                figure=draw_gripper(case),
            )
        if following is None:
            return Doubt("the gripper's command never changes")
        return None
