"""The gripper's opening is not 0 … 1."""

from typing import ClassVar

import numpy as np

from spear.checks.rollout.action_frame import ROBOT_FILE
from spear.checks.rollout.case import (
    Case,
    Doubt,
    Finding,
    Material,
    Result,
    RolloutCheck,
    compute_confidence_of_margin,
)
from spear.checks.rollout.gripper import MAX_SCALE, MIN_USUAL_OPENING
from spear.checks.rollout.gripper_figures import draw_gripper

CERTAIN_SCALE = 0.4  # from this scale on down, it is sure; the limit is `MAX_SCALE`
CONFIDENCE_IF_IGNORED = 0.85  # the range of the command is the usual cause, not the only one


class GripperScaleCheck(RolloutCheck):
    """Finds a gripper that never opens as far as in training, or never moves."""

    fault = "gripper-scale"
    title = "the gripper's opening has another scale than in training"
    needs: ClassVar[frozenset[Material]] = frozenset({"rollout", "demonstrations"})

    def examine(self, case: Case) -> Result:
        gripper = case.gripper
        if not np.isfinite([gripper.open_level, gripper.training_open_level]).all():
            return Doubt("the gripper is never commanded to stay open")
        if gripper.opposes_commands or gripper.closes_when_commanded_open:
            return None  # inverted
        if gripper.training_open_level < MIN_USUAL_OPENING:
            return Doubt("the gripper is hardly open in training")
        if gripper.ignores_commands:
            return self._make_ignored_commands_finding(case)
        scale = gripper.open_ratio_to_training
        if scale > MAX_SCALE:
            return None
        if gripper.following is None and not gripper.is_state_scaled:
            return Doubt(f"the open gripper measures {scale:.0%} of training, and never moves")
        return Finding(
            confidence=compute_confidence_of_margin(-scale, -MAX_SCALE, -CERTAIN_SCALE),
            evidence=(
                f"commanded to be open, the gripper measures {gripper.open_level:.2f}, in training "
                f"{gripper.training_open_level:.2f}"
            ),
            cure="divide the measured opening by that of the open gripper, so that open is 1",
            file=f"observe in your robot's file, and {ROBOT_FILE}",
            figure=draw_gripper(case),
        )

    @staticmethod
    def _make_ignored_commands_finding(case: Case) -> Finding:
        openings = np.concatenate([episode.opening for episode in case.gripper.rollout])
        return Finding(
            confidence=CONFIDENCE_IF_IGNORED,
            evidence=(
                f"in {len(case.gripper.rollout)} episodes the gripper's command changes, and its "
                f"opening stays between {openings.min():.2f} and {openings.max():.2f}; in training "
                "it follows its commands"
            ),
            cure=(
                "send the gripper's command in the range and unit of your gripper, and check that "
                "it arrives there"
            ),
            file=ROBOT_FILE,
            figure=draw_gripper(case),
        )
