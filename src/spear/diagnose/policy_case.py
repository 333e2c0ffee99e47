"""What a diagnosis looks at if it has the policy, too."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from spear.checks.rollout.case import Case, Result
from spear.data.normalize import Normalizer
from spear.data.store.episode_store import EpisodeStore
from spear.diagnose.answers import (
    Observation,
    compute_mean_distance_m,
    predict_path_ends,
    sample_observations,
)
from spear.diagnose.sight import TrainingSight
from spear.policy import Spear1Policy
from spear.types import Array


@dataclass(frozen=True)
class SampledAnswers:
    """Observations of different episodes, and where the policy's answers lead.

    observations  B observations.
    path_ends     [B, 3] the ends of their chunks, m.
    """

    observations: list[Observation]
    path_ends: Array

    @property
    def mean_difference_m(self) -> float:
        """How far apart the answers to different observations are, in the mean."""
        return compute_mean_distance_m(self.path_ends, np.roll(self.path_ends, 1, axis=0))


@dataclass(frozen=True)
class PolicyCase(Case):
    """A case with the policy that failed.

    policy         the policy; None without one.
    training       the store of all training episodes; None without one.
    rollout_store  the store of the rollout; None without one.
    robot          the embodiment's name, or the path of the robot's file; None if unknown.
    results        fault → result of a check that looks at the policy and its training only.
                   Cases of several rollouts share it.
    sight          what the policy's SPEAR-VLM sees in training episodes. Cases of several rollouts
                   share it.
    """

    policy: Spear1Policy | None = None
    training: EpisodeStore | None = None
    rollout_store: EpisodeStore | None = None
    robot: str | None = None
    results: dict[str, Result] = field(default_factory=dict)
    sight: TrainingSight = field(default_factory=TrainingSight)

    def get_policy(self) -> Spear1Policy:
        """Return the policy of a case that has one."""
        assert self.policy is not None
        return self.policy

    def get_training(self) -> EpisodeStore:
        """Return the training episodes of a case that has some."""
        assert self.training is not None
        return self.training

    @cached_property
    def fitted_normalizer(self) -> Normalizer:
        """The statistics of the training episodes, fitted as those of the policy were."""
        mode = self.get_policy().normalizer.mode
        # Bounds of translations are no statistics, and positions are then fitted to quantiles.
        fitted_mode = "quantile" if mode == "bounds" else mode
        return Normalizer.fit([(self.get_training(), 1.0)], fitted_mode)

    @cached_property
    def sampled(self) -> SampledAnswers | None:
        """The policy's answers in training, or else in the rollout; None with one episode."""
        store = self.training or self.rollout_store
        if store is None or len(store) < 2:
            return None
        observations = sample_observations(store, self.get_policy())
        return SampledAnswers(observations, predict_path_ends(self.get_policy(), observations))
