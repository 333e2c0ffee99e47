"""The policy acts alike whatever it is asked to do."""

from typing import ClassVar

import numpy as np

from spear.checks.rollout.case import (
    Case,
    Doubt,
    Figure,
    Finding,
    Material,
    Result,
    RolloutCheck,
    confidence_of_margin,
)
from spear.diagnose.answers import (
    exchange_instructions,
    mean_distance_m,
    predict_path_ends,
    sample_observations,
)
from spear.diagnose.policy_case import PolicyCase

# How far another instruction of training moves the end of a chunk, as a share of how far a wholly
# different observation moves it. It is 0.35 for nano on demonstrations, 0.6 on its rollouts.
MAX_WORDS_SHARE = 0.05
CERTAIN_WORDS_SHARE = 0.01


class IgnoresWordsCheck(RolloutCheck):
    """Exchanges the instructions, and measures how much that changes the answers."""

    fault = "ignores-words"
    title = "the policy hardly uses its instruction"
    needs: ClassVar[frozenset[Material]] = frozenset({"policy", "demonstrations"})

    def examine(self, case: Case) -> Result:
        assert isinstance(case, PolicyCase)
        assert case.policy is not None
        assert case.training is not None
        instructions = case.training_instructions
        if len(instructions) < 2:
            return Doubt("training has one instruction, so words cannot matter")
        observations = sample_observations(case.training, case.policy)
        answers = predict_path_ends(case.policy, observations)
        other_words = exchange_instructions(observations, instructions)
        by_words_m = mean_distance_m(answers, predict_path_ends(case.policy, other_words))
        by_all_m = mean_distance_m(answers, np.roll(answers, 1, axis=0))
        share = by_words_m / max(by_all_m, 1e-9)
        if share > MAX_WORDS_SHARE:
            return None
        return Finding(
            confidence=confidence_of_margin(-share, -MAX_WORDS_SHARE, -CERTAIN_WORDS_SHARE),
            evidence=(
                f"another instruction moves the end of a chunk by {1000 * by_words_m:.1f} mm, a "
                f"wholly different observation by {1000 * by_all_m:.1f} mm"
            ),
            cure="train on scenes in which several instructions are possible",
            file="the training data: record different tasks with the same objects in view",
            figure=Figure(
                "mean change of the end of a chunk, mm",
                bars=[
                    ("other words", 1000 * by_words_m, f"{1000 * by_words_m:.1f} mm"),
                    ("another observation", 1000 * by_all_m, f"{1000 * by_all_m:.1f} mm"),
                ],
            ),
        )
