"""The policy acts alike whatever its cameras show."""

from collections.abc import Sequence
from typing import ClassVar

from spear.checks.rollout.case import Material
from spear.diagnose.answers import Observation, exchange_pictures
from spear.diagnose.policy_case import PolicyCase
from spear.diagnose.policy_check import ExchangeCheck


class IgnoresImagesCheck(ExchangeCheck):
    """Exchanges the pictures of observations."""

    fault = "ignores-images"
    title = "the policy hardly uses its pictures"
    needs: ClassVar[frozenset[Material]] = frozenset({"policy"})
    quantity = "pictures"
    max_share = 0.12  # it is 0.7 for nano, on demonstrations and on its rollouts
    certain_share = 0.03
    cure = (
        "train longer, from a VLM, on more varied scenes, without the state's noise-free numbers "
        "leading straight to the actions"
    )
    file = "the recipe of the training (stage, init, data)"

    def exchange(self, case: PolicyCase, observations: Sequence[Observation]) -> list[Observation]:
        return exchange_pictures(observations)
