"""Answers, token by token: batched greedy decoding with cached keys and values, and a grammar if wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from spear.errors import SpearError
from spear.models.mask import positions

if TYPE_CHECKING:
    from spear.models.vlm import SpearVLMConfig, SpearVLMForConditionalGeneration

Grammar = Sequence[tuple[int, int]]
"""What an answer must look like: for each token in order, the range [first, last) of ids it may come from.
After the last range the answer ends. A forced token is a range of one."""


def coordinates(config: SpearVLMConfig, count: int) -> Grammar:
    """The grammar of exactly `count` 3D tokens (24 for the eight vertices of a box)."""
    return [(config.coordinate_start, config.coordinate_start + config.coordinate_bins)] * count


@torch.no_grad()
def greedy(
    vlm: SpearVLMForConditionalGeneration,
    pixel_values: Mapping[str, torch.Tensor],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    image_index: torch.Tensor | None = None,
    max_new_tokens: int = 64,
    grammars: Sequence[Grammar | None] | None = None,
) -> torch.Tensor:
    """The likeliest token at each step, until the end token or `max_new_tokens`.

    Arguments as in `SpearVLMForConditionalGeneration.forward`; prompts are padded on the right. grammars: one
    per prompt, or None for free answers (a single None in the list frees that prompt).
    Returns [N, T] ids: the answer, its end token, then padding.
    Raises SpearError when a grammar needs more than `max_new_tokens`.
    """
    config = vlm.config.text_config
    end, pad = config.eos_token_id, config.pad_token_id
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    longest = max((len(g) + 1 for g in grammars or [] if g is not None), default=0)
    if longest > max_new_tokens:
        raise SpearError(
            f"answer too long: its grammar has {longest} tokens, max_new_tokens is {max_new_tokens}"
        )
    state = vlm.prefix(pixel_values, input_ids, attention_mask, None, image_index)
    last = attention_mask.long().sum(-1) - 1
    hidden = state.hidden[torch.arange(len(last), device=last.device), last]
    valid, place = state.valid, positions(state.valid)[:, -1]
    done = torch.zeros_like(last, dtype=torch.bool)
    answer: list[torch.Tensor] = []
    for step in range(max_new_tokens):
        logits = vlm.head(hidden).float()
        if grammars is not None:
            logits = _restrict(logits, grammars, step, end)
        token = logits.argmax(-1).masked_fill(done, pad)
        answer.append(token)
        done = done | (token == end)
        if bool(done.all()) or step + 1 == max_new_tokens:
            break
        valid = torch.cat([valid, torch.ones_like(done)[:, None]], dim=1)
        place = place + 1
        output = vlm.language_model(
            inputs_embeds=vlm.language_model.embed_tokens(token[:, None]),
            attention_mask=valid[:, None, None, :],
            position_ids=place[:, None],
            past_key_values=state.cache,
            use_cache=False,
        )
        hidden = output.last_hidden_state[:, -1]
    return torch.stack(answer, dim=1)


def _restrict(logits: torch.Tensor, grammars: Sequence[Grammar | None], step: int, end: int) -> torch.Tensor:
    """Forbid every token that is outside each answer's range at this step. [N, vocabulary]."""
    free = (0, logits.shape[-1])
    ranges = [free if g is None else g[step] if step < len(g) else (end, end + 1) for g in grammars]
    bounds = torch.tensor(ranges, device=logits.device)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    allowed = (ids >= bounds[:, :1]) & (ids < bounds[:, 1:])
    return logits.masked_fill(~allowed, float("-inf"))
