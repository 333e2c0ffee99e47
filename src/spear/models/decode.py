"""Answers, token by token: batched greedy decoding with cached keys and values, and a grammar if wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from spear.errors import SpearError
from spear.models.mask import positions

if TYPE_CHECKING:
    from spear.models.vlm import SpearVLMForConditionalGeneration

Range = tuple[int, int]
"""Token ids [first, last)."""


@dataclass(frozen=True)
class Worded:
    """Answers in free words with exactly `count` 3D tokens between them, the first after a word, and a word last.

    words, numbers  the ids of either; the end token is not a word.
    """

    count: int
    words: tuple[Range, ...]
    numbers: Range

    @property
    def shortest(self) -> int:
        """Tokens of the shortest answer, its end included."""
        return self.count + 3

    def allowed(self, said: Sequence[int], left: int, end: int) -> tuple[Range, ...]:
        """What may come after the tokens `said`, when `left` tokens are left, this one included."""
        given = sum(self.numbers[0] <= token < self.numbers[1] for token in said)
        worded = bool(said) and not self.numbers[0] <= said[-1] < self.numbers[1]
        owed = self.count - given
        if owed == 0:
            closing = ((end, end + 1),) if worded else ()
            return closing if worded and left == 1 else (*self.words, *closing)
        numbers = (self.numbers,) if said else ()
        if said and left <= owed + 2:
            return numbers
        return (*self.words, *numbers)


Grammar = Sequence[Range] | Worded
"""What an answer must look like. A list of ranges: for each token in order, the ids it may come from; after the
last range the answer ends. A forced token is a range of one."""


@torch.no_grad()
def greedy(
    vlm: SpearVLMForConditionalGeneration,
    pixel_values: Mapping[str, torch.Tensor],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    image_index: torch.Tensor | None = None,
    max_new_tokens: int = 64,
    grammars: Sequence[Grammar | None] | None = None,
    watch: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """The likeliest token at each step, until the end token or `max_new_tokens`.

    Arguments as in `SpearVLMForConditionalGeneration.forward`; prompts are padded on the right. grammars: one
    per prompt, or None for free answers (a single None in the list frees that prompt). watch: is given the logits
    [N, vocabulary] float32 of each step, before the grammar forbids any.
    Returns [N, T] ids: the answer, its end token, then padding.
    Raises SpearError when a grammar needs more than `max_new_tokens`.
    """
    config = vlm.config.text_config
    end, pad = config.eos_token_id, config.pad_token_id
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    longest = max((_shortest(g) for g in grammars or [] if g is not None), default=0)
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
        if watch is not None:
            watch(logits)
        if grammars is not None:
            said = torch.stack(answer, dim=1).tolist() if answer else [[]] * len(last)
            allowed = [
                _allowed(g, row, max_new_tokens - step, end) for g, row in zip(grammars, said, strict=True)
            ]
            logits = _restrict(logits, allowed)
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


def _shortest(grammar: Grammar) -> int:
    return grammar.shortest if isinstance(grammar, Worded) else len(grammar) + 1


def _allowed(grammar: Grammar | None, said: Sequence[int], left: int, end: int) -> tuple[Range, ...] | None:
    """The ids that may come next, None for any."""
    if grammar is None:
        return None
    if isinstance(grammar, Worded):
        return grammar.allowed(said, left, end)
    return (grammar[len(said)] if len(said) < len(grammar) else (end, end + 1),)


def _restrict(logits: torch.Tensor, allowed: Sequence[tuple[Range, ...] | None]) -> torch.Tensor:
    """Forbid every token that is not in one of its row's ranges. [N, vocabulary]."""
    forbidden = torch.ones_like(logits, dtype=torch.bool)
    for row, ranges in enumerate(allowed):
        for first, last in ((0, logits.shape[-1]),) if ranges is None else ranges:
            forbidden[row, first:last] = False
    return logits.masked_fill(forbidden, float("-inf"))
