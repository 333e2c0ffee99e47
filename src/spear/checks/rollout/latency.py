"""Answers come late, or at very different times."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from spear.checks.rollout.case import (
    Case,
    Curve,
    Doubt,
    Figure,
    Finding,
    Result,
    RolloutCheck,
    compute_confidence_of_margin,
)
from spear.checks.rollout.episode import ServedTimes
from spear.checks.rollout.motion import RolloutMotion
from spear.checks.rollout.motion_figures import draw_unexplained_shares
from spear.types import CONTROL_RATE_HZ

MIN_ANSWERS = 10
STEP_S = 1 / CONTROL_RATE_HZ
# Latency in control steps: above one, the robot stands still or acts on an old observation. An arm
# that goes on with its last answer acts on an old observation from nearly one step on.
MIN_LATENCY_STEPS = 1.0
MIN_MOVING_LATENCY_STEPS = 0.8
CERTAIN_LATENCY_STEPS = 2.0
MIN_SPREAD_STEPS = 1.0  # between the median and the slowest 10 % of the answers
CERTAIN_SPREAD_STEPS = 2.5
# An arm that waits for its answers stands still meanwhile: slow answers make it slow, but it goes
# where it would go with fast ones. So any other finding of a rollout is likelier to be the reason
# of the failure, and latency gets the least confidence that a diagnosis still reports.
MAX_WAITING_CONFIDENCE = 0.5
# The arm waits if it observes again this long after an answer, or later: time for half an action.
MIN_WAITING_PAUSE_STEPS = 0.5


class LatencyCheck(RolloutCheck):
    """Finds answers that take longer than a control step."""

    fault = "latency"
    title = "answers come late"
    causes: ClassVar[frozenset[str]] = frozenset({"gripper-late", "controller-short"})

    def examine(self, case: Case) -> Result:
        served = [episode.served for episode in case.rollout if episode.served is not None]
        if not served:
            return Doubt("the rollout has no times")
        # The first answer of an episode may include warming up.
        seconds = np.concatenate([(times.answer_s - times.arrival_s)[1:] for times in served])
        if len(seconds) < MIN_ANSWERS:
            return Doubt("the rollout has too few answers")
        median_s, slow_s = np.quantile(seconds, [0.5, 0.9])
        spread_s = slow_s - median_s
        acts_before_observing_again = _acts_before_observing_again(served)
        min_steps = MIN_LATENCY_STEPS if acts_before_observing_again else MIN_MOVING_LATENCY_STEPS
        confidence = max(
            compute_confidence_of_margin(median_s / STEP_S, min_steps, CERTAIN_LATENCY_STEPS),
            compute_confidence_of_margin(spread_s / STEP_S, MIN_SPREAD_STEPS, CERTAIN_SPREAD_STEPS),
        )
        if median_s < min_steps * STEP_S and spread_s < MIN_SPREAD_STEPS * STEP_S:
            return self._examine_moves(case.motion)
        evidence = (
            f"answers take {1000 * median_s:.0f} ms (median), one in ten longer than "
            f"{1000 * slow_s:.0f} ms; an action lasts {1000 * STEP_S:.0f} ms"
        )
        if acts_before_observing_again:
            confidence = min(confidence, MAX_WAITING_CONFIDENCE)
            evidence += (
                ". The arm waits for each answer, so this makes it slow; it hardly explains why it "
                "goes to a wrong place"
            )
        return Finding(
            confidence=confidence,
            evidence=evidence,
            cure=(
                "use a faster machine or a nearer one, or execute in the mode async, as "
                "spear.chunks.Pilot does"
            ),
            file="--device of spear serve, and the execution mode of your robot's client",
            figure=Figure(
                "time from observation to answer, s",
                "answer",
                [
                    Curve("latency", np.arange(len(seconds)), seconds),
                    Curve("one action", np.arange(len(seconds)), np.full(len(seconds), STEP_S)),
                ],
            ),
        )

    @staticmethod
    def _examine_moves(motion: RolloutMotion) -> Finding | None:
        """Look for an arm that executes fast answers late: the network or its program is slow."""
        late_fit = motion.late_fit
        if late_fit is None:
            return None
        return Finding(
            confidence=0.85,
            evidence=(
                "the server answers in time, but the arm follows the answer before the last one: "
                f"that explains all but {late_fit.error:.0%} of the motion, the last answer all "
                f"but {late_fit.plain_error:.0%}"
            ),
            cure="use a faster network, or execute in the mode async, as spear.chunks.Pilot does",
            file="the network between robot and server, and your robot's client",
            figure=draw_unexplained_shares(
                {"last answer": late_fit.plain_error, "answer before": late_fit.error}
            ),
        )


def _acts_before_observing_again(served: Sequence[ServedTimes]) -> bool:
    """Return whether the arm executes actions after an answer, before it observes again.

    An arm that moves while it waits observes again as soon as it has an answer.
    """
    pauses_s = [times.arrival_s[1:] - times.answer_s[:-1] for times in served]
    return bool(np.median(np.concatenate(pauses_s)) >= MIN_WAITING_PAUSE_STEPS * STEP_S)
