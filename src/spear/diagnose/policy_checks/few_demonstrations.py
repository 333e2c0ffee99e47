"""There are too few demonstrations."""

from typing import ClassVar

from spear.checks.rollout.case import (
    Figure,
    Finding,
    Material,
    Result,
    compute_confidence_of_margin,
)
from spear.diagnose.policy_case import PolicyCase
from spear.diagnose.policy_check import PolicyCheck

# Our choice: also a single task at a fixed place takes some tens of demonstrations.
MAX_FEW_EPISODES = 10
CERTAIN_FEW_EPISODES = 4


class FewDemonstrationsCheck(PolicyCheck):
    """Counts the training episodes."""

    fault = "few-demonstrations"
    title = "there are too few demonstrations"
    needs: ClassVar[frozenset[Material]] = frozenset({"demonstrations"})

    def examine_policy(self, case: PolicyCase) -> Result:
        training = case.get_training()
        num_episodes = len(training)
        if num_episodes > MAX_FEW_EPISODES:
            return None
        num_steps = int(training.num_known_actions.sum())
        counts: dict[str, int] = {}
        for episode in case.demonstrations:
            counts[episode.instruction] = counts.get(episode.instruction, 0) + 1
        return Finding(
            confidence=compute_confidence_of_margin(
                -num_episodes, -MAX_FEW_EPISODES, -CERTAIN_FEW_EPISODES
            ),
            evidence=f"training has {num_episodes} episodes with {num_steps:,} steps",
            cure="record some tens of demonstrations of each task, from different starts",
            file="the training data",
            figure=Figure(
                "training episodes per instruction",
                bars=[(text, float(count), str(count)) for text, count in counts.items()],
            ),
        )
