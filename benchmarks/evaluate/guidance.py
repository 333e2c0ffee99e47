"""Real-time chunking at inference (arXiv 2506.07339) in the tangent space of R³ × S³: for any policy, with a
pass backward per flow step, on the plain network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from spear import flow
from spear.geometry import sphere_exp, sphere_log
from spear.policy import Spear1Policy
from spear.types import Action

STRONGEST = 5.0
"""β, the most that the guidance counts (the paper's)."""


@dataclass
class Guided(Spear1Policy):
    """Pulls each chunk towards its `committed` actions, what is left of the last one: fully at the first
    `delay`, executed in any case, less and less after them. On the sphere the pull is a logarithm."""

    delay: int = 0

    @property
    def committed(self) -> int:
        """All but one action of a chunk."""
        return int(self.model.config.horizon) - 1

    def predict(self, inputs: Mapping[str, Any]) -> Action:
        """As `Spear1Policy.predict`, guided where there are committed actions."""
        given = dict(inputs)
        committed, state, noise = (given.pop(key) for key in ("committed", "state", "noise"))
        if committed is None:
            return super().predict(inputs)
        with torch.no_grad():
            prefix = self.model.encode_prefix(**given)
        config, wanted, held = self.model.flow, committed.actions, committed.is_committed
        place, count = torch.arange(held.shape[1], device=held.device), held.sum(-1, keepdim=True)
        c = ((count - place) / (count - self.delay + 1).clamp_min(1)).clamp(0, 1)
        fading = torch.where(place < self.delay, 1.0, c * c.expm1() / (torch.e - 1)) * held

        def velocity(noisy: Action, time: torch.Tensor) -> Action:
            x, tau = noisy.to_vector().requires_grad_(), float(time.flatten()[0])
            with torch.enable_grad():
                at = Action.from_vector(x)
                said = self.model.predict(prefix, state, at, time)
                v = flow.prediction_to_velocity(said, at, time, config)
                rotation = sphere_exp(at.rotation, (1 - tau) * v.rotation)
                end = replace(Action.from_vector(x + (1 - tau) * v.to_vector()), rotation=rotation)
                to_go = Action.from_vector((wanted.to_vector() - end.to_vector()).detach())
                to_go = replace(to_go, rotation=sphere_log(rotation.detach(), wanted.rotation))
                pull = torch.autograd.grad(
                    end.to_vector(), x, to_go.to_vector() * fading[..., None]
                )[0]
            strength = min(STRONGEST, (tau**2 + (1 - tau) ** 2) / max(tau * (1 - tau), 1e-6))
            return Action.from_vector((v.to_vector() + strength * pull).detach())

        return flow.integrate(velocity, noise, self.steps, replace(config, prediction="velocity"))
