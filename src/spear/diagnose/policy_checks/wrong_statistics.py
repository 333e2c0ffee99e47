"""The policy has the normalization statistics of another dataset."""

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
from spear.diagnose.policy_case import PolicyCase
from spear.diagnose.policy_check import PolicyCheck

# The largest ratio between the policy's scale of an axis and that of the training episodes. nano's
# statistics and 120 demonstrations that it did not learn from differ by at most a factor of 1.3.
MAX_SCALE_RATIO = 1.8
CERTAIN_SCALE_RATIO = 3.0  # from this ratio on, the finding has the highest confidence
MAX_OFFSET_SHIFT = 1.0  # distance of two offsets, as a share of the larger scale
CERTAIN_OFFSET_SHIFT = 2.0  # the same for the shift
AXIS_NAMES = (
    "translation x",
    "translation y",
    "translation z",
    "position x",
    "position y",
    "position z",
)


class WrongStatisticsCheck(PolicyCheck):
    """Compares the policy's normalization statistics with those of the training episodes."""

    fault = "wrong-statistics"
    title = "the policy has the statistics of another dataset"
    needs: ClassVar[frozenset[Material]] = frozenset({"demonstrations", "policy"})

    def examine_policy(self, case: PolicyCase) -> Result:
        if not case.get_training().num_known_actions.sum():
            return Doubt("the training episodes have no actions")
        # Statistics of x, y and z of the translations, then of the positions
        used = case.get_policy().normalizer
        fitted = case.fitted_normalizer
        policy_scales = np.array([*used.translation_scale, *used.position_scale])
        scales = np.array([*fitted.translation_scale, *fitted.position_scale])
        policy_offsets = np.array([*used.translation_offset, *used.position_offset])
        offsets = np.array([*fitted.translation_offset, *fitted.position_offset])
        ratios = np.maximum(policy_scales / scales, scales / policy_scales)
        shifts = np.abs(policy_offsets - offsets) / np.maximum(policy_scales, scales)
        if used.mode == "bounds":  # the user has chosen the bounds of translations
            ratios[:3] = 1.0
            shifts[:3] = 0.0
        if ratios.max() < MAX_SCALE_RATIO and shifts.max() < MAX_OFFSET_SHIFT:
            return None
        by_scale = compute_confidence_of_margin(ratios.max(), MAX_SCALE_RATIO, CERTAIN_SCALE_RATIO)
        by_offset = compute_confidence_of_margin(
            shifts.max(), MAX_OFFSET_SHIFT, CERTAIN_OFFSET_SHIFT
        )
        worst = int(ratios.argmax() if by_scale >= by_offset else shifts.argmax())
        bars = []
        for name, policy_scale, scale in zip(AXIS_NAMES, policy_scales, scales, strict=True):
            bars.append((f"{name}, policy", float(policy_scale), f"{policy_scale:.3g} m"))
            bars.append((f"{name}, episodes", float(scale), f"{scale:.3g} m"))
        return Finding(
            confidence=max(by_scale, by_offset),
            evidence=(
                f"the policy's {AXIS_NAMES[worst]} has the offset {policy_offsets[worst]:.3g} m "
                f"and the scale {policy_scales[worst]:.3g} m, the training episodes "
                f"{offsets[worst]:.3g} m and {scales[worst]:.3g} m"
            ),
            cure="take the normalizer.json of this training, or name its dataset by --norm-stats",
            file=f"{case.get_policy().folder}/normalizer.json",
            figure=Figure("scale of each axis, m", bars=bars),
        )
