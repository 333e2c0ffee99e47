"""The policy acts alike whatever it is asked to do."""

from collections.abc import Sequence
from typing import ClassVar

from spear.checks.rollout.case import Doubt, Material
from spear.diagnose.answers import Observation, exchange_instructions
from spear.diagnose.policy_case import PolicyCase
from spear.diagnose.policy_check import ExchangeCheck

MAX_INSTRUCTIONS = 300  # different ones of training, of which each observation gets one


class IgnoresWordsCheck(ExchangeCheck):
    """Exchanges the instructions of observations."""

    fault = "ignores-words"
    title = "the policy hardly uses its instruction"
    needs: ClassVar[frozenset[Material]] = frozenset({"policy", "demonstrations"})
    quantity = "instructions"
    max_share = 0.05  # it is 0.35 for nano on demonstrations, 0.6 on its rollouts
    certain_share = 0.01
    cure = "train on scenes in which several instructions are possible"
    file = "the training data: record different tasks with the same objects in view"

    def exchange(
        self, case: PolicyCase, observations: Sequence[Observation]
    ) -> list[Observation] | Doubt:
        instructions = case.training_instructions[:MAX_INSTRUCTIONS]
        if len(instructions) < 2:
            return Doubt("training has one instruction, so words cannot matter")
        return exchange_instructions(observations, instructions, case.get_policy())
