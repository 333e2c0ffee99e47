"""π0's embedding of the flow time."""

from __future__ import annotations

import math

import torch


def sinusoids(time: torch.Tensor, width: int, min_period: float, max_period: float) -> torch.Tensor:
    """[...] -> [..., width] float32: sines, then cosines, of geometrically spaced periods (as π0's)."""
    fraction = torch.linspace(0, 1, width // 2, dtype=torch.float32, device=time.device)
    # Angles reach 1,600 rad: rounded in another order than π0's, they would differ from those of its weights.
    frequency = 1.0 / (min_period * (max_period / min_period) ** fraction) * 2 * math.pi
    angle = frequency * time.float()[..., None]
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
