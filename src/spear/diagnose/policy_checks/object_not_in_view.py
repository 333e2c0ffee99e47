"""An object of the instruction is not in view."""

from typing import ClassVar

import numpy as np

from spear.checks.rollout.camera_checks import draw_rollout_and_training_pictures
from spear.checks.rollout.case import Case, Doubt, Finding, Material, Result, RolloutCheck
from spear.diagnose.picture_repair import CAMERA
from spear.diagnose.policy_case import PolicyCase

MAX_LISTED_EPISODES = 4  # in the evidence


class ObjectNotInViewCheck(RolloutCheck):
    """Asks the policy's SPEAR-VLM where the objects of the instructions are."""

    fault = "object-not-in-view"
    title = "an object of the instruction is not in view"
    needs: ClassVar[frozenset[Material]] = frozenset({"rollout", "demonstrations", "policy"})

    def examine(self, case: Case) -> Result:
        assert isinstance(case, PolicyCase)
        reason = _explain_unable(case)
        if reason is not None:
            return Doubt(reason)
        if not case.judged_names:
            return Doubt("the policy's SPEAR-VLM knows no object of the instructions")

        object_sight = case.object_sight
        log_odds = object_sight.out_of_view_log_odds
        if log_odds <= 0:
            return None
        num_missed = object_sight.num_episodes_with_missed_objects
        descriptions = []
        for index, missed_names in object_sight.missed.items():
            if missed_names:
                descriptions.append(f"{' and '.join(missed_names)} (episode {index})")
        return Finding(
            confidence=round(float(min(1 / (1 + np.exp(-log_odds)), 0.95)), 3),
            evidence=(
                f"in {num_missed} of {len(object_sight.missed)} episodes, the policy's SPEAR-VLM "
                f"sees no {', no '.join(descriptions[:MAX_LISTED_EPISODES])}; "
                f"in training it misses {case.sight.missed_share:.0%} of the objects"
            ),
            cure="put the objects of the instruction where the camera sees them",
            file="the scene in front of the robot, and the direction of its camera",
            figure=draw_rollout_and_training_pictures(case, CAMERA),
            camera=CAMERA,
        )


def _explain_unable(case: PolicyCase) -> str | None:
    """Return why the policy cannot say what is in view; None if it can."""
    if not case.can_tell_absent_objects:
        return (
            "nothing shows that the policy's SPEAR-VLM tells absent objects "
            "(spear evaluate vqa --calibrate)"
        )
    if all(CAMERA not in episode.pictures for episode in case.rollout):
        return f"the rollout has no camera {CAMERA}"
    return None
