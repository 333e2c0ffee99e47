"""Answers, token by token: batched greedy decoding with cached keys and values, and a grammar if wanted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spear.errors import SpearError, format_count
from spear.models.fast.small import SmallLayerStack, get_small_stack
from spear.models.fast.stack import (
    Inputs,
    LayerStack,
    can_compile,
    get_layer_stack,
    prefill,
    split_image_inputs,
)

TokenRange = tuple[int, int]
"""Token ids [first, last)."""


@dataclass(frozen=True)
class FreeTextGrammar:
    """The grammar of answers in free words with exactly `count` 3D tokens between them, the first and the
    last token a word. words, numbers: the ids of either; the end token is not a word."""

    count: int
    words: tuple[TokenRange, ...]
    numbers: TokenRange


Grammar = Sequence[TokenRange] | FreeTextGrammar
"""What an answer must look like. A list of ranges: for each token in order, the ids it may come from; after
the last range the answer ends."""


@dataclass(frozen=True)
class LogitRecorder:
    """Collects the logits [N, last - first] float32 of some ids, step by step, before a grammar forbids any;
    none after the last choice, where nothing is computed."""

    ids: TokenRange
    logits: list[Tensor] = field(default_factory=list)


@torch.inference_mode()
def decode_greedily(
    vlm: Any,
    pixel_values: Mapping[str, Tensor],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 64,
    grammar: Grammar | None = None,
    watched: LogitRecorder | None = None,
) -> Tensor:
    """The likeliest token at each step, until the end token or `max_new_tokens`.

    vlm: a `SpearVLMForConditionalGeneration`; arguments as in its `forward`. grammar: of all answers, None
    for free ones. watched: also collects the logits of these ids. Returns [N, T] ids: the answer, its end
    token, then padding. Raises SpearError when the grammar needs more than `max_new_tokens`.

    Only the logits that the grammar allows are computed, and nothing after the last choice. On a GPU an
    answer whose length the grammar gives is one CUDA graph, images included.
    """
    config, device = vlm.config.text_config, input_ids.device
    words: _Words | None = None
    if grammar is None or isinstance(grammar, FreeTextGrammar):
        words = _Words(grammar, input_ids, max_new_tokens, config)
        spans, least = (
            [(0, config.vocab_size)] * max_new_tokens,
            1 if grammar is None else grammar.count + 3,
        )
    else:
        spans = [*grammar, (config.eos_token_id, config.eos_token_id + 1)]
        least = len(spans)
    if least > max_new_tokens:
        has = f"it has at least {format_count(least, 'tokens')}"
        raise SpearError(f"answer too long: {has}, max_new_tokens is {max_new_tokens}: give more")
    packed = not torch.is_autocast_enabled(device.type)
    small = get_small_stack(vlm.language_model) if packed else None
    layers = small or get_layer_stack(vlm.language_model, packed, can_compile(device))
    inputs = {f"pixels/{view}": pixels for view, pixels in pixel_values.items()} | {
        "input_ids": input_ids
    }
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    if device.type == "cuda" and watched is None and words is None:
        answer = layers.replay(
            lambda given: _decode(vlm, layers, given, spans), inputs, tuple(spans)
        )
    else:
        answer = _decode(vlm, layers, inputs, spans, words, watched)
    with torch.inference_mode(False):
        return answer.clone()


def _decode(
    vlm: Any,
    layers: LayerStack,
    inputs: Inputs,
    spans: Sequence[TokenRange],
    words: "_Words | None" = None,
    watched: LogitRecorder | None = None,
) -> Tensor:
    """Answers [N, T]. inputs: as `decode_greedily` makes them. spans: of the token at every step. words: None
    where the spans say all."""
    features, _ = vlm.encode_images(*split_image_inputs(inputs))
    text = vlm.embed_text(inputs["input_ids"])
    other = (
        isinstance(layers, SmallLayerStack) and text.dtype != layers.dtype
    )  # a prompt's rows are many
    first = get_layer_stack(vlm.language_model, False, False) if other else layers
    prefix = prefill(first, features, text, None, inputs.get("attention_mask"), room=len(spans) - 1)
    hidden, cache = prefix.hidden, layers.adopt_cache(prefix.cache) if other else prefix.cache
    assert hidden is not None
    start, dtype = prefix.valid.shape[1], cache.whole.dtype
    bias = prefix.bias(len(spans), layers.groups, dtype)
    places = prefix.next_positions[:, None] + torch.arange(len(spans), device=hidden.device)
    turns = layers.rotations(places, dtype)
    last_choice = max(
        (step for step, (low, high) in enumerate(spans) if high - low > 1), default=-1
    )
    answer: list[Tensor] = []
    for step, (low, high) in enumerate(spans):
        if watched is not None and step <= last_choice:
            watched.logits.append(vlm.compute_logits(hidden, *watched.ids).float())
        if high - low == 1:
            token = torch.full_like(prefix.next_positions, low)
        else:
            logits = vlm.compute_logits(hidden, low, high).float()
            token = low + (logits.argmax(-1) if words is None else words.choose(logits))
        answer.append(token)
        if step >= last_choice:
            continue  # the grammar gives the remaining tokens
        if words is not None and words.ended():
            break
        embedded, turn = (
            vlm.embed_text(token[:, None]).to(dtype),
            [t[:, step : step + 1] for t in turns],
        )
        here = cache.window(start + step, [(1, start + step + 1)])
        hidden = layers(embedded, tuple(turn), here, bias)[:, 0].to(text.dtype)
    whole = torch.stack(answer, dim=1)
    return whole if words is None else words.cut(whole)


class _Words:
    """Answers that end where they like, free or `FreeTextGrammar` ones, as far as they are."""

    def __init__(
        self, grammar: FreeTextGrammar | None, prompts: Tensor, most: int, config: Any
    ) -> None:
        self.end, self.pad, self.most = config.eos_token_id, config.pad_token_id, most
        self.step, self.grammar = 0, grammar
        self.done = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)
        if grammar is not None:  # [vocabulary] each
            self.words, self.numbers = self.done.new_zeros(2, config.vocab_size)
            self.numbers[slice(*grammar.numbers)] = True
            for span in grammar.words:
                self.words[slice(*span)] = True
            self.owed = torch.full_like(self.done, grammar.count, dtype=torch.long)
            self.after_word = torch.zeros_like(self.done)

    def choose(self, logits: Tensor) -> Tensor:
        """The likeliest tokens [N] of [N, vocabulary] that may come next; padding behind an answer's end."""
        if self.grammar is not None:
            logits = logits.masked_fill(self._forbidden(), float("-inf"))
        token = logits.argmax(-1).masked_fill(self.done, self.pad)
        self.done = self.done | (token == self.end)
        if self.grammar is not None:
            number = self.numbers[token]
            self.owed = self.owed - number.long()
            self.after_word = ~number
        self.step += 1
        return token

    def _forbidden(self) -> Tensor:
        """[N, vocabulary] the ids that may not come next."""
        left = self.most - self.step
        closing = (self.owed == 0) & self.after_word
        number = (self.owed > 0) & (self.step > 0)
        word = ~((closing & (left == 1)) | (number & (left <= self.owed + 2)))
        allowed = (self.words & word[:, None]) | (self.numbers & number[:, None])
        allowed[:, self.end] |= closing
        return ~allowed

    def ended(self) -> bool:
        """Whether all answers have ended. On a GPU, which must wait to tell, only every eighth token asks."""
        return (self.done.device.type == "cpu" or self.step % 8 == 0) and bool(self.done.all())

    def cut(self, answer: Tensor) -> Tensor:
        """[N, T] without columns after the end of the longest answer."""
        ends = answer == self.end
        lengths = torch.where(ends.any(1), ends.long().argmax(1) + 1, answer.shape[1])
        return answer[:, : int(lengths.max())]
