"""What a diagnosis looks at if it has the policy, too."""

from dataclasses import dataclass
from functools import cached_property

from spear.checks.rollout.case import Case
from spear.data.normalize import Normalizer
from spear.data.store.episode_store import EpisodeStore
from spear.policy import Spear1Policy


@dataclass(frozen=True)
class PolicyCase(Case):
    """A case with the policy that failed.

    policy         the policy; None without one.
    training       the store of all training episodes; None without one.
    rollout_store  the store of the rollout; None without one.
    robot          the embodiment's name, or the path of the robot's file; None if unknown.
    """

    policy: Spear1Policy | None = None
    training: EpisodeStore | None = None
    rollout_store: EpisodeStore | None = None
    robot: str | None = None

    @cached_property
    def fitted_normalizer(self) -> Normalizer:
        """The statistics of the training episodes, fitted as those of the policy were."""
        assert self.policy is not None
        assert self.training is not None
        mode = self.policy.normalizer.mode
        # Bounds of translations are no statistics, and positions are then fitted to quantiles.
        return Normalizer.fit([(self.training, 1.0)], "quantile" if mode == "bounds" else mode)
