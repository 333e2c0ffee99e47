"""Answers, token by token: batched greedy decoding with cached keys and values, and a grammar if wanted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spear.errors import SpearError
from spear.models.fast.small import SMALL, SmallStack
from spear.models.fast.stack import STACK, Inputs, Stack, can_compile, prefill

Range = tuple[int, int]
"""Token ids [first, last)."""


@dataclass(frozen=True)
class Worded:
    """The grammar of answers in free words with exactly `count` 3D tokens between them, the first and the
    last token a word. words, numbers: the ids of either; the end token is not a word."""

    count: int
    words: tuple[Range, ...]
    numbers: Range


Grammar = Sequence[Range] | Worded
"""What an answer must look like. A list of ranges: for each token in order, the ids it may come from; after
the last range the answer ends. A forced token is a range of one."""


@dataclass(frozen=True)
class Watched:
    """Collects the logits [N, last - first] float32 of some ids, step by step, before a grammar forbids any;
    none after the last choice, where nothing is computed."""

    ids: Range
    logits: list[Tensor] = field(default_factory=list)


@torch.inference_mode()
def greedy(
    vlm: Any,
    pixel_values: Mapping[str, Tensor],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 64,
    grammars: Sequence[Grammar | None] | None = None,
    watched: Watched | None = None,
) -> Tensor:
    """The likeliest token at each step, until the end token or `max_new_tokens`.

    vlm: a `SpearVLMForConditionalGeneration`; arguments as in its `forward`. grammars: one per prompt, None
    for free answers. watched: also collects the logits of these ids. Returns [N, T] ids: the answer, its end
    token, then padding. Raises SpearError when a grammar needs more than `max_new_tokens`.

    Only the logits that the grammar allows are computed, and nothing after the last choice. On a GPU an
    answer whose length the grammar gives is one CUDA graph, images included.
    """
    rows = list(grammars) if grammars is not None else [None] * len(input_ids)
    if not rows:
        return input_ids[:, :0]
    longest = max((_shortest(g) for g in rows if g is not None), default=0)
    if longest > max_new_tokens:
        has = f"its grammar has {longest} tokens"
        raise SpearError(f"answer too long: {has}, max_new_tokens is {max_new_tokens}")
    config, device = vlm.config.text_config, input_ids.device
    spans = _spans(rows, max_new_tokens, config)
    packed = not torch.is_autocast_enabled(device.type)
    small = SMALL(vlm.language_model) if packed else None
    layers = small or STACK(vlm.language_model, packed, can_compile(device))
    inputs = {f"pixels/{view}": pixels for view, pixels in pixel_values.items()}
    inputs |= {"input_ids": input_ids, "bounds": torch.tensor(spans, device=device)}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    free = any(g is None or isinstance(g, Worded) for g in rows)
    if device.type == "cuda" and watched is None and not free:
        key = tuple(tuple(step) for step in spans)
        answer = layers.replay(lambda given: _decode(vlm, layers, given, spans), inputs, key)
    else:
        words = _Words(rows, max_new_tokens, config, device) if free else None
        answer = _decode(vlm, layers, inputs, spans, words, watched)
    with torch.inference_mode(False):
        return answer.clone()


def _shortest(grammar: Grammar) -> int:
    """Tokens of the shortest answer, its end included."""
    return grammar.count + 3 if isinstance(grammar, Worded) else len(grammar) + 1


def _spans(rows: Sequence[Grammar | None], most: int, config: Any) -> list[list[Range]]:
    """The range of every row's token at every step; all ids where no list of ranges says it."""
    end, pad = config.eos_token_id, config.pad_token_id
    free = any(g is None or isinstance(g, Worded) for g in rows)
    steps = most if free else max(_shortest(g) for g in rows if g is not None)

    def at(grammar: Grammar | None, step: int) -> Range:
        if grammar is None or isinstance(grammar, Worded):
            return 0, config.vocab_size
        if step < len(grammar):
            return grammar[step]
        return (end, end + 1) if step == len(grammar) else (pad, pad + 1)

    return [[at(grammar, step) for grammar in rows] for step in range(steps)]


def _decode(
    vlm: Any,
    layers: Stack,
    inputs: Inputs,
    spans: list[list[Range]],
    words: "_Words | None" = None,
    watched: Watched | None = None,
) -> Tensor:
    """Answers [N, T]. inputs: as `greedy` makes them. words: None where the spans say all."""
    pixels = {name.removeprefix("pixels/"): t for name, t in inputs.items() if name.startswith("pixels/")}
    features, _ = vlm.encode_images(pixels)
    text = vlm.embed_text(inputs["input_ids"])
    other = isinstance(layers, SmallStack) and text.dtype != layers.dtype  # a prompt's rows are many
    first = STACK(vlm.language_model, False, False) if other else layers
    prefix = prefill(first, features, text, None, inputs.get("attention_mask"), room=len(spans) - 1)
    hidden, cache = prefix.hidden, layers.take(prefix.cache) if other else prefix.cache
    assert hidden is not None
    start, dtype = prefix.valid.shape[1], cache.whole.dtype
    bias = prefix.bias(len(spans), layers.groups, dtype)
    places = prefix.places[:, None] + torch.arange(len(spans), device=hidden.device)
    turns = layers.rotations(places, dtype)
    choices = [step for step, row in enumerate(spans) if any(b - a > 1 for a, b in row)]
    last_choice = choices[-1] if choices else -1
    answer: list[Tensor] = []
    for step, row in enumerate(spans):
        if watched is not None and step <= last_choice:
            watched.logits.append(vlm.head(hidden, *watched.ids).float())
        token = _choose(vlm, hidden, row, inputs["bounds"][step], words)
        if words is not None:
            token = words.say(token)
        answer.append(token)
        if step >= last_choice:
            continue  # the grammar gives the remaining tokens
        if words is not None and words.ended():
            break
        embedded, turn = vlm.embed_text(token[:, None]).to(dtype), [t[:, step : step + 1] for t in turns]
        here = cache.window(start + step, [(1, start + step + 1)])
        hidden = layers(embedded, tuple(turn), here, bias)[:, 0].to(text.dtype)
    whole = torch.stack(answer, dim=1)
    return whole if words is None else words.cut(whole)


def _choose(vlm: Any, hidden: Tensor, row: list[Range], bounds: Tensor, words: "_Words | None") -> Tensor:
    """The likeliest tokens [N] within their ranges, after `hidden` [N, D]. bounds [N, 2]: the same ranges."""
    if all(b - a == 1 for a, b in row):
        return bounds[:, 0]
    low, high = min(a for a, _ in row), max(b for _, b in row)
    logits = vlm.head(hidden, low, high).float()
    if any(span != (low, high) for span in row):
        ids = torch.arange(low, high, device=hidden.device)
        logits = logits.masked_fill((ids < bounds[:, :1]) | (ids >= bounds[:, 1:]), float("-inf"))
    if words is not None and words.some:
        logits = logits.masked_fill(words.forbidden()[:, low:high], float("-inf"))
    return logits.argmax(-1) + low


class _Words:
    """Rows whose answers end where they like, and what `Worded` ones may say next; kept on the device."""

    def __init__(self, rows: Sequence[Grammar | None], most: int, config: Any, device: torch.device) -> None:
        self.end, self.pad, self.most = config.eos_token_id, config.pad_token_id, most
        self.some = any(isinstance(g, Worded) for g in rows)
        self.step = 0
        self.done = torch.zeros(len(rows), dtype=torch.bool, device=device)
        if not self.some:
            return
        # Of each row: the ids of words, and of numbers. In rows without `Worded` every id is a word.
        words = torch.zeros(len(rows), config.vocab_size, dtype=torch.bool)
        numbers = torch.zeros_like(words)
        owed = torch.zeros(len(rows), dtype=torch.long)
        for index, grammar in enumerate(rows):
            if isinstance(grammar, Worded):
                owed[index] = grammar.count
                numbers[index, slice(*grammar.numbers)] = True
                for span in grammar.words:
                    words[index, slice(*span)] = True
            else:
                words[index] = True
        self.worded = torch.tensor([isinstance(g, Worded) for g in rows], device=device)
        self.owed, self.words, self.numbers = owed.to(device), words.to(device), numbers.to(device)
        self.after_word = torch.zeros_like(self.done)

    def forbidden(self) -> Tensor:
        """[N, vocabulary] the ids that may not come next."""
        left = self.most - self.step
        closing = (self.owed == 0) & self.after_word & self.worded
        number = (self.owed > 0) & (self.step > 0)
        word = ~((closing & (left == 1)) | (number & (left <= self.owed + 2)))
        allowed = (self.words & word[:, None]) | (self.numbers & number[:, None])
        allowed[:, self.end] |= closing
        return ~allowed

    def say(self, token: Tensor) -> Tensor:
        """Take note of the tokens [N], and return them; padding where the answer had ended."""
        token = token.masked_fill(self.done, self.pad)
        self.done = self.done | (token == self.end)
        if self.some:
            number = self.numbers.gather(1, token[:, None])[:, 0]
            self.owed = self.owed - number.long()
            self.after_word = ~number
        self.step += 1
        return token

    def ended(self) -> bool:
        """Whether all answers have ended. On a GPU, which must wait to tell, only every eighth token asks."""
        look = self.done.device.type == "cpu" or self.step % 8 == 0
        return look and bool(self.done.all())

    def cut(self, answer: Tensor) -> Tensor:
        """[N, T] without columns after the end of the longest answer."""
        ends = answer == self.end
        lengths = torch.where(ends.any(1), ends.long().argmax(1) + 1, answer.shape[1])
        return answer[:, : int(lengths.max())]
