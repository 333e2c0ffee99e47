"""One policy for one robot: the robot's observations in, its commands out, many at a time, errors one by
one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import spear
from spear.embodiments import Embodiment
from spear.errors import SpearError, suppress_notices
from spear.types import Policy
from spear.util.threads import release_workers


class Service:
    """A policy behind an embodiment.

    name, embodiment_name, control  what clients are told they talk to; control None is the embodiment's
                                    default.
    """

    def __init__(
        self,
        policy: Policy,
        embodiment: Embodiment,
        name: str = "policy",
        embodiment_name: str = "generic",
        control: str | None = None,
    ) -> None:
        self.policy, self.embodiment = policy, embodiment
        control, self.control = embodiment.control(control)
        self.metadata: dict[str, Any] = {
            "policy": name,
            "embodiment": embodiment_name,
            "control": control,
            "action": self.control.about,
            "rate_hz": self.control.rate_hz,
            "observation": dict(embodiment.required),
            "optional": dict(embodiment.optional),
            "server": f"spear {spear.__version__}",
        }

    def answer(self, observations: Sequence[Any]) -> list[dict[str, Any] | SpearError]:
        """One result {"actions", "policy_timing"} or `SpearError` per observation, in order.

        A bad observation spoils its own answer only. policy_timing: milliseconds, of the whole batch.
        """
        started = time.perf_counter()
        results: list[dict[str, Any] | SpearError] = []
        good: list[int] = []
        ours: list[dict[str, Any]] = []
        for index, observation in enumerate(observations):
            try:
                ours.append(self.embodiment.read(observation))
                good.append(index)
                results.append({})
            except SpearError as error:
                results.append(error)
        read = time.perf_counter()
        predicted = self._infer(ours) if ours else []
        inferred = time.perf_counter()
        for index, observation, result in zip(good, ours, predicted, strict=True):
            results[index] = (
                result
                if isinstance(result, SpearError)
                else self._command(result, observation, observations[index])
            )
        timing = {
            "infer_ms": 1000 * (inferred - read),
            "embodiment_ms": 1000 * (time.perf_counter() - inferred + read - started),
        }
        return [r if isinstance(r, SpearError) else {**r, "policy_timing": timing} for r in results]

    def warm_up(self) -> None:
        """Answers the embodiment's example once, so that the first client does not wait. Raises what it
        raises.

        The calling thread then gives its worker threads back: a server computes in another one.
        """
        with suppress_notices():  # what the example's images lack is not the robot's
            result = self.answer([self.embodiment.example()])[0]
        release_workers()
        if isinstance(result, SpearError):
            raise result

    def _command(
        self, result: Mapping[str, Any], ours: Mapping[str, Any], observation: Mapping[str, Any]
    ) -> dict[str, Any] | SpearError:
        """The policy's result as the robot takes it."""
        actions = np.asarray(result["actions"])
        if not np.isfinite(actions).all():
            return SpearError("the policy's actions are not finite: do not move; check its weights")
        try:
            return {"actions": self.control.convert(actions, ours["observation/state"], observation)}
        except SpearError as error:
            return error

    def _infer(self, observations: Sequence[Mapping[str, Any]]) -> Sequence[dict[str, Any] | SpearError]:
        """Together; when that fails for a reason in an observation, one by one, to find which."""
        try:
            return self.policy.infer_batch(observations)
        except SpearError as error:
            if len(observations) == 1:
                return [error]
        return [self._infer([one])[0] for one in observations]
