"""The policy knows its training episodes by heart."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from spear.checks.rollout.case import (
    Doubt,
    Figure,
    Finding,
    Material,
    Result,
    compute_confidence_of_margin,
)
from spear.data.actions import get_or_derive_actions
from spear.data.store.episode_store import EpisodeStore
from spear.diagnose.answers import build_observation
from spear.diagnose.policy_case import PolicyCase
from spear.diagnose.policy_check import PolicyCheck
from spear.errors import suppress_notices
from spear.models.weights.folders import read_provenance
from spear.policy import Spear1Policy

MIN_EPISODES = 3  # that were learned, and that were not
MAX_EPISODES = 6
STEPS_PER_EPISODE = 5
# Mean error of the first action on episodes that the policy has not learned, divided by the error
# on episodes that it has learned. For a policy that generalizes it is near 1.
MIN_ERROR_RATIO = 2.0
CERTAIN_ERROR_RATIO = 4.0


class OverfittingCheck(PolicyCheck):
    """Compares open-loop errors on episodes that the policy has, and has not, learned."""

    fault = "overfitting"
    title = "the policy knows its training episodes by heart"
    needs: ClassVar[frozenset[Material]] = frozenset({"policy", "demonstrations"})

    def examine_policy(self, case: PolicyCase) -> Result:
        policy = case.get_policy()
        store = case.get_training()
        if policy.folder is None:
            return Doubt("the policy has no folder")
        learned_fingerprints = set(read_provenance(policy.folder).get("learned", "").split())
        fingerprints = store.list_episode_fingerprints()
        if len(fingerprints) != len(store):
            return Doubt("some training episodes are empty")
        is_learned = np.array([fingerprint in learned_fingerprints for fingerprint in fingerprints])
        if min(is_learned.sum(), (~is_learned).sum()) < MIN_EPISODES:
            return Doubt("--episodes needs episodes that the policy has learned, and others")
        learned_m = _measure_first_action_error_m(
            policy, store, np.flatnonzero(is_learned).tolist()
        )
        other_m = _measure_first_action_error_m(policy, store, np.flatnonzero(~is_learned).tolist())
        ratio = other_m / max(learned_m, 1e-6)
        if ratio < MIN_ERROR_RATIO:
            return None
        bars = [
            ("learned episodes", 1000 * learned_m, f"{1000 * learned_m:.1f} mm"),
            ("other episodes", 1000 * other_m, f"{1000 * other_m:.1f} mm"),
        ]
        return Finding(
            confidence=compute_confidence_of_margin(ratio, MIN_ERROR_RATIO, CERTAIN_ERROR_RATIO),
            evidence=(
                f"open loop, the first action is {1000 * learned_m:.1f} mm off on episodes that "
                f"the policy has learned, and {1000 * other_m:.1f} mm on others"
            ),
            cure="train for fewer steps, on more episodes, or with image augmentation",
            file="steps and data of the recipe",
            figure=Figure("open-loop error of the first action, mm", bars=bars),
        )


def _measure_first_action_error_m(
    policy: Spear1Policy, store: EpisodeStore, indices: Sequence[int]
) -> float:
    """Return the mean distance between predicted and recorded translations of some steps.

    Args:
        policy: the policy.
        store: the episodes.
        indices: the episodes of the store that count. Some of them are tried, spread over all.
    """
    spread = np.linspace(0, len(indices) - 1, min(len(indices), MAX_EPISODES)).astype(int)
    observations = []
    targets = []
    for episode_number in spread:
        index = indices[episode_number]
        episode = store.without_images(index)
        actions, is_known = get_or_derive_actions(episode)
        known_steps = np.flatnonzero(is_known)
        if not len(known_steps):
            continue
        count = min(len(known_steps), STEPS_PER_EPISODE)
        for step_number in np.linspace(0, len(known_steps) - 1, count).astype(int):
            step = int(known_steps[step_number])
            observations.append(build_observation(store, policy, index, step))
            targets.append(actions[step, :3])
    with suppress_notices():
        results = policy.infer_batch(observations)
    predicted = np.stack([result["actions"][0, :3] for result in results])
    return float(np.linalg.norm(predicted - np.stack(targets), axis=1).mean())
