"""SPEAR-VLM's loss: cross-entropy in which 3D tokens weigh λ (the paper, SPEAR-VLM training)."""

from __future__ import annotations

import torch

IGNORE = -100
"""The label of a place that is not to be learned."""


def token_loss(
    logits: torch.Tensor, labels: torch.Tensor, coordinates: range, weight: float, smoothing: float = 0.0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted mean cross-entropy, Σ wᵢ·lossᵢ / Σ wᵢ, with w = λ on 3D tokens and 1 elsewhere.

    logits [M, vocabulary], labels [M]. coordinates: the ids of the 3D tokens; weight: λ; smoothing: the
    standard deviation, in bins, of the Gaussian that a 3D token's target is spread over.
    Returns the loss and the plain means over "text" and "coordinates".
    """
    log_p = logits.float().log_softmax(-1)
    is_coordinate = (labels >= coordinates.start) & (labels < coordinates.stop)
    score = log_p.gather(-1, labels[:, None])[:, 0]
    if smoothing > 0:
        of_coordinates = log_p[:, coordinates.start : coordinates.stop]
        smooth = _smoothed_score(of_coordinates, labels - coordinates.start, smoothing)
        score = torch.where(is_coordinate, smooth, score)
    losses = -score
    coordinate = is_coordinate.float()
    text = 1 - coordinate
    weights = text + weight * coordinate
    loss = (weights * losses).sum() / weights.sum().clamp_min(1e-6)
    parts = {
        "text": (losses.detach() * text).sum() / text.sum().clamp_min(1),
        "coordinates": (losses.detach() * coordinate).sum() / coordinate.sum().clamp_min(1),
    }
    return loss, parts


def _smoothed_score(log_p: torch.Tensor, bins: torch.Tensor, sigma: float) -> torch.Tensor:
    """Expected log probability under a Gaussian cut off at 3σ and at the ends. [M, bins], [M] -> [M]."""
    reach = max(1, round(3 * sigma))
    offsets = torch.arange(-reach, reach + 1, device=log_p.device)
    near = bins[:, None] + offsets
    inside = (near >= 0) & (near < log_p.shape[-1])
    weight = torch.exp(-0.5 * (offsets / sigma) ** 2) * inside
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-12)
    return (weight * log_p.gather(-1, near.clamp(0, log_p.shape[-1] - 1))).sum(-1)
