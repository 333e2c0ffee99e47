"""Who may attend to whom: prefix-LM masks for SPEAR-VLM, block-wise causal masks for the action expert.

All masks are boolean, True where attention is allowed, shaped [B, 1, queries, keys] for
`torch.nn.functional.scaled_dot_product_attention`. Rows of padding may attend to the valid keys (their output
is never read), so that no row is empty as long as a sequence has one valid token.
"""

from __future__ import annotations

import torch


def positions(valid: torch.Tensor) -> torch.Tensor:
    """[B, S] bool -> [B, S] position ids: how many valid tokens come before (padding takes no place)."""
    return (valid.long().cumsum(-1) - 1).clamp_min(0)


def prefix_lm_mask(valid: torch.Tensor, causal: torch.Tensor) -> torch.Tensor:
    """PaliGemma's mask: the prefix (images and prompt) sees all of itself, the answer sees what came before.

    valid [B, S] bool: not padding. causal [B, S] bool: the token belongs to the answer. -> [B, 1, S, S].
    """
    length = valid.shape[1]
    order = torch.arange(length, device=valid.device)
    earlier = order[None, :] <= order[:, None]  # [S, S]
    allowed = (earlier | ~causal[:, None, :]) & valid[:, None, :]
    return allowed[:, None]


def suffix_mask(valid: torch.Tensor, horizon: int, samples: int) -> torch.Tensor:
    """The paper's block-wise mask for [proprioception, `samples` independent chunks of `horizon` actions].

    The state sees the prefix and itself; the actions of a chunk see the prefix, the state and each other,
    never another chunk: several flow samples of one observation share its prefix and state in one sequence.

    valid [B, S] bool of the prefix. -> [B, 1, 1 + samples·horizon, S + 1 + samples·horizon].
    """
    device = valid.device
    chunk = torch.arange(samples * horizon, device=device) // horizon
    chunk = torch.cat([chunk.new_full((1,), -1), chunk])  # [T], -1 is the state
    own = (chunk[None, :] == -1) | (chunk[None, :] == chunk[:, None])  # [T, T]
    batch, tokens = valid.shape[0], own.shape[0]
    own = own.expand(batch, tokens, tokens)
    return torch.cat([valid[:, None, :].expand(-1, tokens, -1), own], dim=-1)[:, None]
