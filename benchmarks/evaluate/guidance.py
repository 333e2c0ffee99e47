"""Real-time chunking at inference (arXiv 2506.07339) in the tangent space of R³ × S³.

It works for any policy, with one backward pass per flow step, on the plain network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spear import flow
from spear.geometry import sphere_exp, sphere_log
from spear.policy import Spear1Policy
from spear.types import Action

MAX_GUIDANCE_STRENGTH = 5.0  # β, the paper's
MIN_TIME_PRODUCT = 1e-6  # of τ (1 - τ), by which the strength is divided


@dataclass
class GuidedPolicy(Spear1Policy):
    """Guides each chunk towards its `committed` actions, which are what is left of the last chunk.

    The first `delay` actions are executed in any case and guided fully, those after them less and
    less. On the sphere the guidance is a logarithm.
    """

    delay: int = 0

    @property
    def committed(self) -> int:
        """All but one action of a chunk."""
        return int(self.model.config.horizon) - 1

    def predict(self, inputs: Mapping[str, Any]) -> Action:
        """As `Spear1Policy.predict`, guided where there are committed actions."""
        prefix_inputs = dict(inputs)
        committed = prefix_inputs.pop("committed")
        state = prefix_inputs.pop("state")
        noise = prefix_inputs.pop("noise")
        if committed is None:
            return super().predict(inputs)

        with torch.no_grad():
            prefix = self.model.encode_prefix(**prefix_inputs)
        config = self.model.flow_config
        target = committed.actions
        weights = self._compute_weights(committed.is_committed)

        def guided_velocity(noisy: Action, time: Tensor) -> Action:
            x = noisy.to_vector().requires_grad_()
            tau = float(time.flatten()[0])
            with torch.enable_grad():
                # Where the network's velocity leads from here.
                state_at_time = Action.from_vector(x)
                prediction = self.model.predict(prefix, state, state_at_time, time)
                velocity = flow.prediction_to_velocity(prediction, state_at_time, time, config)
                rotation = sphere_exp(state_at_time.rotation, (1 - tau) * velocity.rotation)
                end = Action.from_vector(x + (1 - tau) * velocity.to_vector())
                end = replace(end, rotation=rotation)

                # How far that is from the committed actions, pulled back to x.
                gap = Action.from_vector((target.to_vector() - end.to_vector()).detach())
                gap = replace(gap, rotation=sphere_log(rotation.detach(), target.rotation))
                (guidance,) = torch.autograd.grad(
                    end.to_vector(), x, gap.to_vector() * weights[..., None]
                )
            time_product = max(tau * (1 - tau), MIN_TIME_PRODUCT)
            strength = min(MAX_GUIDANCE_STRENGTH, (tau**2 + (1 - tau) ** 2) / time_product)
            return Action.from_vector((velocity.to_vector() + strength * guidance).detach())

        velocity_config = replace(config, prediction="velocity")
        return flow.integrate(guided_velocity, noise, self.steps, velocity_config)

    def _compute_weights(self, is_committed: Tensor) -> Tensor:
        """How strongly each action of a chunk is guided, 0 to 1, [batch, horizon]."""
        position = torch.arange(is_committed.shape[1], device=is_committed.device)
        num_committed = is_committed.sum(-1, keepdim=True)
        num_fading = (num_committed - self.delay + 1).clamp_min(1)
        # The paper's soft mask: it falls along the fading actions, and is 0 after the last one.
        c = ((num_committed - position) / num_fading).clamp(0, 1)
        fading = c * c.expm1() / (torch.e - 1)
        return torch.where(position < self.delay, 1.0, fading) * is_committed
