"""The policy acts alike whatever its cameras show."""

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
    exchange_pictures,
    mean_distance_m,
    predict_path_ends,
    sample_observations,
)
from spear.diagnose.policy_case import PolicyCase

# How far exchanged pictures move the end of a chunk, as a share of how far a wholly different
# observation moves it. It is 0.7 for nano, on demonstrations and on its rollouts.
MAX_PICTURE_SHARE = 0.12
CERTAIN_PICTURE_SHARE = 0.03
MIN_DIFFERENCE_M = 0.002  # if all answers are nearer than this, the policy always does the same


class IgnoresImagesCheck(RolloutCheck):
    """Exchanges the pictures of observations, and measures how much that changes the answers."""

    fault = "ignores-images"
    title = "the policy hardly uses its pictures"
    needs: ClassVar[frozenset[Material]] = frozenset({"policy"})

    def examine(self, case: Case) -> Result:
        assert isinstance(case, PolicyCase)
        assert case.policy is not None
        store = case.training or case.rollout_store
        if store is None or len(store) < 2:
            return Doubt("too few episodes to exchange pictures")
        observations = sample_observations(store, case.policy)
        answers = predict_path_ends(case.policy, observations)
        exchanged = predict_path_ends(case.policy, exchange_pictures(observations))
        by_pictures_m = mean_distance_m(answers, exchanged)
        by_all_m = mean_distance_m(answers, np.roll(answers, 1, axis=0))
        share = by_pictures_m / max(by_all_m, 1e-9)
        if by_all_m < MIN_DIFFERENCE_M:
            share = 0.0
        if share > MAX_PICTURE_SHARE:
            return None
        return Finding(
            confidence=confidence_of_margin(-share, -MAX_PICTURE_SHARE, -CERTAIN_PICTURE_SHARE),
            evidence=(
                f"other pictures move the end of a chunk by {1000 * by_pictures_m:.1f} mm, wholly "
                f"different observations by {1000 * by_all_m:.1f} mm"
            ),
            cure=(
                "train longer, from a VLM, on more varied scenes, without the state's noise-free "
                "numbers leading straight to the actions"
            ),
            file="the recipe of the training (stage, init, data)",
            figure=Figure(
                "mean change of the end of a chunk, mm",
                bars=[
                    ("other pictures", 1000 * by_pictures_m, f"{1000 * by_pictures_m:.1f} mm"),
                    ("another observation", 1000 * by_all_m, f"{1000 * by_all_m:.1f} mm"),
                ],
            ),
        )
