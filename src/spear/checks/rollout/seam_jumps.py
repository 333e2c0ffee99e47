"""The motion jumps from one chunk to the next."""

import numpy as np

from spear.checks.rollout.case import (
    Case,
    Curve,
    Doubt,
    Figure,
    Finding,
    Result,
    RolloutCheck,
    confidence_of_margin,
)
from spear.checks.rollout.motion import MIN_MOVES
from spear.types import Array

# Mean difference of a chunk's first action from what the chunk before it planned for that time,
# divided by the mean difference of neighboring actions within chunks. In rollouts of nano it is
# 0.6, 0.8 and 1.6 for the replan intervals 1, 2 and 4.
MIN_JUMP_RATIO = 3.0
CERTAIN_JUMP_RATIO = 5.0


class SeamJumpsCheck(RolloutCheck):
    """Finds chunks that do not continue the ones before them."""

    fault = "seam-jumps"
    title = "the motion jumps from chunk to chunk"

    def examine(self, case: Case) -> Result:
        num_executed = case.motion.executed_count or case.motion.typical_executed
        jumps_m: list[Array] = []
        changes_m: list[Array] = []
        for episode in case.rollout:
            if episode.served is None or episode.served.chunks.shape[1] < 2:
                continue
            translation = episode.served.chunks[:, :, :3].astype(np.float64)
            planned_step = min(num_executed, translation.shape[1] - 1)
            jump = translation[1:, 0] - translation[:-1, planned_step]
            jumps_m.append(np.linalg.norm(jump, axis=1))
            change = np.diff(translation, axis=1)
            changes_m.append(np.linalg.norm(change, axis=2).ravel())
        if sum(map(len, jumps_m)) < MIN_MOVES:
            return Doubt("the rollout has too few chunks of several actions")
        jump_m = float(np.concatenate(jumps_m).mean())
        change_m = float(np.concatenate(changes_m).mean())
        ratio = jump_m / max(change_m, 1e-6)
        if ratio < MIN_JUMP_RATIO:
            return None
        all_jumps_mm = 1000 * np.concatenate(jumps_m)[:150]
        seams = np.arange(len(all_jumps_mm))
        return Finding(
            confidence=confidence_of_margin(ratio, MIN_JUMP_RATIO, CERTAIN_JUMP_RATIO),
            evidence=(
                f"a chunk begins {1000 * jump_m:.1f} mm per action away from what the chunk before "
                f"planned; within chunks, neighboring actions differ by {1000 * change_m:.1f} mm"
            ),
            cure="execute in the mode rtc or async, replan earlier, or send no seed that changes",
            file="the execution mode and the replan interval of your robot's client",
            figure=Figure(
                "jump at each seam, mm per action",
                "seam",
                [
                    Curve("jump", seams, all_jumps_mm),
                    Curve("within chunks", seams, np.full(len(seams), 1000 * change_m)),
                ],
            ),
        )
