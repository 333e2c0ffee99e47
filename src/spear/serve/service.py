"""One policy for one robot: observations in, commands out, many at a time, with errors one by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import spear
from spear.embodiments import Embodiment
from spear.errors import SpearError, suppress_notices
from spear.types import Policy
from spear.util.processes import release_workers

Result = dict[str, Any] | SpearError


class Service:
    """A policy behind an embodiment.

    name, robot  what clients are told that they talk to.
    control      the embodiment's control by name; None: its default.
    """

    def __init__(
        self,
        policy: Policy,
        embodiment: Embodiment,
        name: str = "policy",
        robot: str = "generic",
        control: str | None = None,
    ) -> None:
        self.policy, self.embodiment = policy, embodiment
        control, self.control = embodiment.control(control)
        self.metadata: dict[str, Any] = {
            "policy": name,
            "embodiment": robot,
            "control": control,
            "action": self.control.about,
            "rate_hz": self.control.rate_hz,
            "observation": dict(embodiment.required),
            "optional": dict(embodiment.optional),
            "server": f"spear {spear.__version__}",
        }

    def answer(self, observations: Sequence[Any]) -> list[Result]:
        """One result {"actions", "policy_timing"} or `SpearError` per observation, in order.

        A bad observation spoils its own answer only. policy_timing: milliseconds, of the whole batch.
        """
        started = time.perf_counter()
        results = [_attempt(self.embodiment.read, o) for o in observations]
        good = {i: r for i, r in enumerate(results) if not isinstance(r, SpearError)}
        read = time.perf_counter()
        predicted = self._infer(list(good.values())) if good else []
        inferred = time.perf_counter()
        for (i, ours), result in zip(good.items(), predicted, strict=True):
            failed = isinstance(result, SpearError)
            results[i] = result if failed else _attempt(self._command, result, ours, observations[i])
        timing = {
            "infer_ms": 1000 * (inferred - read),
            "embodiment_ms": 1000 * (time.perf_counter() - inferred + read - started),
        }
        return [r if isinstance(r, SpearError) else {**r, "policy_timing": timing} for r in results]

    def warm_up(self) -> None:
        """Answer the robot's example once, so that the first client does not wait. Raises what it raises."""
        with suppress_notices():  # what the example's images lack is not the robot's fault
            result = self.answer([self.embodiment.example()])[0]
        release_workers()  # the server computes in another thread
        if isinstance(result, SpearError):
            raise result

    def _command(
        self, result: Mapping[str, Any], ours: Mapping[str, Any], observation: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The policy's result as the robot takes it."""
        actions = np.asarray(result["actions"])
        if not np.isfinite(actions).all():
            raise SpearError("the policy's actions are not finite: do not move; check its weights")
        return {"actions": self.control.convert(actions, ours["observation/state"], observation)}

    def _infer(self, observations: Sequence[Mapping[str, Any]]) -> Sequence[Result]:
        """Together; when that fails for a reason in an observation, one by one, to find which."""
        try:
            return self.policy.infer_batch(observations)
        except SpearError as error:
            if len(observations) == 1:
                return [error]
        return [self._infer([one])[0] for one in observations]


def _attempt(call: Callable[..., dict[str, Any]], *args: Any) -> Result:
    """What a call returns, or the `SpearError` that it raises."""
    try:
        return call(*args)
    except SpearError as error:
        return error
