"""What a diagnosis looks at if it has the policy, too."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from spear.checks.rollout.case import Case, Result
from spear.data.normalize import Normalizer
from spear.data.store.episode_store import EpisodeStore
from spear.diagnose.answers import (
    Observation,
    compute_mean_distance_m,
    predict_chunk_displacements,
    sample_observations,
)
from spear.diagnose.object_sight import ObjectSight, look_for_objects
from spear.diagnose.picture_repair import CAMERA, PictureRepair, choose_repair_of_external_pictures
from spear.diagnose.sight import TrainingSight, list_object_names
from spear.errors import suppress_notices
from spear.evaluate.vqa.calibration import Trust
from spear.policy import Spear1Policy, VlmBundle
from spear.types import Array

# By how much exchanged colors must lower the log odds of an object out of view. A single episode
# whose objects are then recognized lowers them by 4 to 6, and may be chance; two, by more.
MIN_BETTER_RECOGNITION = 7.0


@dataclass(frozen=True)
class SampledAnswers:
    """Observations of different episodes, and where the policy's answers lead.

    observations   B observations.
    displacements  [B, 3] displacement that each answered chunk commands in all, m.
    """

    observations: list[Observation]
    displacements: Array

    @property
    def mean_difference_m(self) -> float:
        """How far apart the answers to different observations are, in the mean."""
        return compute_mean_distance_m(self.displacements, np.roll(self.displacements, 1, axis=0))


@dataclass(frozen=True)
class PolicyCase(Case):
    """A case with the policy that failed.

    policy         the policy; None without one.
    training       the store of all training episodes; None without one.
    rollout_store  the store of the rollout; None without one.
    robot          the embodiment's name, or the path of the robot's file; None if unknown.
    takes_joints   whether a server sent the robot joint angles, which it then reports, too.
    results        fault → result of a check that looks at the policy and its training only.
                   Cases of several rollouts share it.
    sight          what the policy's SPEAR-VLM sees in training episodes. Cases of several rollouts
                   share it.
    """

    policy: Spear1Policy | None = None
    training: EpisodeStore | None = None
    rollout_store: EpisodeStore | None = None
    robot: str | None = None
    takes_joints: bool = False
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
    def answers_to_sampled_observations(self) -> SampledAnswers | None:
        """The policy's answers in training, or else in the rollout; None with one episode."""
        store = self.training or self.rollout_store
        if store is None or len(store) < 2:
            return None
        observations = sample_observations(store, self.get_policy())
        return SampledAnswers(
            observations, predict_chunk_displacements(self.get_policy(), observations)
        )

    @cached_property
    def can_tell_absent_objects(self) -> bool:
        """Whether the policy's SPEAR-VLM was shown to tell absent objects from present ones."""
        if self.policy is None or self.policy.folder is None:
            return False
        trust = Trust.load(self.policy.folder)
        return trust is not None and trust.can_tell_absent

    @cached_property
    def judged_names(self) -> dict[int, list[str]]:
        """Each episode's objects that the SPEAR-VLM sees in training, by the episode's index."""
        assert self.rollout_store is not None
        # The newest episodes are looked at.
        first_index = len(self.rollout_store) - len(self.rollout)
        names_by_episode = {}
        all_names = []
        for number, episode in enumerate(self.rollout):
            if CAMERA in episode.pictures:
                names = list_object_names(episode.instruction)
                names_by_episode[first_index + number] = names
                all_names += names
        with suppress_notices():
            self.sight.record_misses(self._vlm, self.get_training(), all_names)
        judged = {}
        for index, names in names_by_episode.items():
            judged_names = [name for name in names if self.sight.is_mostly_seen(name)]
            if judged_names:
                judged[index] = judged_names
        return judged

    @cached_property
    def object_sight(self) -> ObjectSight:
        """What the SPEAR-VLM sees of the objects of the rollout, once its pictures are repaired."""
        plain, exchanged = self._object_sights
        return exchanged if exchanged is not None and self.bgr_log_ratio_of_objects > 0 else plain

    @property
    def bgr_log_ratio_of_objects(self) -> float:
        """How much better the SPEAR-VLM recognizes objects with red and blue exchanged; or 0."""
        if not self.can_tell_absent_objects or self.training is None or self.rollout_store is None:
            return 0.0
        plain, exchanged = self._object_sights
        if exchanged is None:
            return 0.0
        log_ratio = plain.out_of_view_log_odds - exchanged.out_of_view_log_odds
        return log_ratio if log_ratio >= MIN_BETTER_RECOGNITION else 0.0

    @cached_property
    def _object_sights(self) -> tuple[ObjectSight, ObjectSight | None]:
        """What the SPEAR-VLM sees, and what it sees with red and blue exchanged.

        The second one is None if the first leaves too little to recognize better.
        """
        # A fault of the camera is named by its own check. It must not hide what is in view.
        repair = choose_repair_of_external_pictures(self)
        plain = self._look_for_objects(repair)
        all_seen = replace(plain, missed={index: [] for index in plain.missed})
        if plain.out_of_view_log_odds - all_seen.out_of_view_log_odds < MIN_BETTER_RECOGNITION:
            return plain, None
        return plain, self._look_for_objects(repair.with_red_and_blue_exchanged())

    def _look_for_objects(self, repair: PictureRepair) -> ObjectSight:
        assert self.rollout_store is not None
        names = self.judged_names  # measures in training which objects the model misses
        missed_share = self.sight.missed_share
        return look_for_objects(self._vlm, self.rollout_store, names, missed_share, repair)

    @property
    def _vlm(self) -> VlmBundle:
        """The SPEAR-VLM inside the policy."""
        policy = self.get_policy()
        return VlmBundle(policy.model.vlm, policy.processor)
