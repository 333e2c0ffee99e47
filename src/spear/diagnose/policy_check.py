"""`PolicyCheck`: what the checks of the policy and its training episodes share."""

from collections.abc import Sequence
from typing import ClassVar

from spear.checks.rollout.case import (
    Case,
    Doubt,
    Figure,
    Finding,
    Result,
    RolloutCheck,
    compute_confidence_of_margin,
)
from spear.diagnose.answers import Observation, compute_mean_distance_m, predict_chunk_displacements
from spear.diagnose.policy_case import PolicyCase

MIN_DIFFERENCE_M = 0.002  # if all answers are nearer than this, the policy always does the same


class PolicyCheck(RolloutCheck):
    """A check that looks at the policy, or at all of its training episodes."""

    def examine(self, case: Case) -> Result:
        assert isinstance(case, PolicyCase)
        if case.training is None:  # then the rollout is looked at instead
            return self.examine_policy(case)
        if self.fault not in case.results:
            case.results[self.fault] = self.examine_policy(case)
        return case.results[self.fault]

    def examine_policy(self, case: PolicyCase) -> Result:
        """Look for the fault in a case that has what the check needs."""
        raise NotImplementedError


class ExchangeCheck(PolicyCheck):
    """Exchanges one quantity of the observations, and measures how much that changes the answers.

    The *share* is how far the exchange moves the end of a chunk, divided by how far a wholly
    different observation moves it.

    Attributes:
        quantity: what is exchanged, in words.
        max_share: the policy ignores it if the share is at most so large.
        certain_share: and surely if it is at most so large.
        cure: what to change.
        file: where to change it.
    """

    quantity: ClassVar[str]
    max_share: ClassVar[float]
    certain_share: ClassVar[float]
    cure: ClassVar[str]
    file: ClassVar[str]

    def exchange(
        self, case: PolicyCase, observations: Sequence[Observation]
    ) -> list[Observation] | Doubt:
        """Give each observation this quantity of another one."""
        raise NotImplementedError

    def examine_policy(self, case: PolicyCase) -> Result:
        if case.answers_to_sampled_observations is None:
            return Doubt("too few episodes to exchange something between them")
        exchanged = self.exchange(case, case.answers_to_sampled_observations.observations)
        if isinstance(exchanged, Doubt):
            return exchanged
        displacements = predict_chunk_displacements(case.get_policy(), exchanged)
        by_quantity_m = compute_mean_distance_m(
            case.answers_to_sampled_observations.displacements, displacements
        )
        by_all_m = case.answers_to_sampled_observations.mean_difference_m
        share = by_quantity_m / max(by_all_m, 1e-9)
        if by_all_m < MIN_DIFFERENCE_M:
            share = 0.0
        if share > self.max_share:
            return None
        bars = [
            (f"other {self.quantity}", 1000 * by_quantity_m, f"{1000 * by_quantity_m:.1f} mm"),
            ("another observation", 1000 * by_all_m, f"{1000 * by_all_m:.1f} mm"),
        ]
        return Finding(
            confidence=compute_confidence_of_margin(-share, -self.max_share, -self.certain_share),
            evidence=(
                f"other {self.quantity} move the end of a chunk by {1000 * by_quantity_m:.1f} mm, "
                f"wholly different observations by {1000 * by_all_m:.1f} mm"
            ),
            cure=self.cure,
            file=self.file,
            figure=Figure("mean change of the end of a chunk, mm", bars=bars),
        )
