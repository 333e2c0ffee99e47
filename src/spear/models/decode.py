"""Batched greedy decoding of answers, token by token, with a KV cache and an optional grammar."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spear.errors import SpearError, format_count
from spear.models.fast.cuda_graphs import Inputs
from spear.models.fast.small import SmallLayerStack, get_small_stack
from spear.models.fast.stack import (
    LayerStack,
    can_compile,
    get_layer_stack,
    prefill,
    split_image_inputs,
)

TokenRange = tuple[int, int]
"""Token ids from the first to the last, which is not included."""

STEPS_BETWEEN_END_CHECKS = 8  # on a GPU, where looking whether all answers ended means waiting


@dataclass(frozen=True)
class FreeTextGrammar:
    """Answers in free words with a given number of 3D tokens between them.

    The first and the last token of an answer are words.

    num_numbers   How many 3D tokens an answer has.
    word_ranges   Ids of words; the end token is none.
    number_range  Ids of the 3D tokens.
    """

    num_numbers: int
    word_ranges: tuple[TokenRange, ...]
    number_range: TokenRange

    @property
    def min_tokens(self) -> int:
        """A word, the numbers, a word and the end token."""
        return self.num_numbers + 3


Grammar = Sequence[TokenRange] | FreeTextGrammar
"""What an answer must look like.

A sequence of ranges says, for each token in order, which ids it may be; after the last range the
answer ends.
"""


@dataclass(frozen=True)
class LogitRecorder:
    """Collects the logits of some ids at every step, before a grammar forbids any.

    There are none after the last step that has a choice, because nothing is computed there.

    ids     The ids whose logits are collected.
    logits  [N, number of ids] float32 per step.
    """

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
    recorder: LogitRecorder | None = None,
) -> Tensor:
    """Decode answers: the likeliest token at each step, until the end token or `max_new_tokens`.

    Only the logits that the grammar allows are computed, and nothing after the last step that has a
    choice. On a GPU, decoding with a sequence of ranges is one CUDA graph, images included.

    Args:
        vlm: A `SpearVLMForConditionalGeneration`.
        pixel_values: View -> [N, 3, h, w] uint8.
        input_ids: [N, L] prompts, padded on either side.
        attention_mask: [N, L], 0 on padding; None where there is no padding.
        max_new_tokens: The longest answer, its end token included.
        grammar: What all answers must look like; None for free text.
        recorder: Also collects logits.

    Returns:
        [N, T] token ids: the answer, its end token, then padding.

    Raises:
        SpearError: If the grammar needs more than `max_new_tokens`.
    """
    config = vlm.config.text_config
    device = input_ids.device

    # The ids that each step may choose from.
    free_text: _FreeTextState | None = None
    if grammar is None or isinstance(grammar, FreeTextGrammar):
        free_text = _FreeTextState(grammar, input_ids, max_new_tokens, config)
        ranges = [(0, config.vocab_size)] * max_new_tokens
        min_tokens = 1 if grammar is None else grammar.min_tokens
    else:
        end_token = (config.eos_token_id, config.eos_token_id + 1)
        ranges = [*grammar, end_token]
        min_tokens = len(ranges)
    if min_tokens > max_new_tokens:
        raise SpearError(
            f"an answer has at least {format_count(min_tokens, 'tokens')}, but max_new_tokens is"
            f" {max_new_tokens}. Raise max_new_tokens to {min_tokens} or more."
        )

    # The layers as inference runs them.
    packed = not torch.is_autocast_enabled(device.type)  # autocast cannot cast packed weights
    small_layers = get_small_stack(vlm.language_model) if packed else None
    layers = small_layers or get_layer_stack(vlm.language_model, packed, can_compile(device))

    inputs = {f"pixels/{view}": pixels for view, pixels in pixel_values.items()}
    inputs["input_ids"] = input_ids
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask

    # A CUDA graph runs the same steps every time, so it cannot end early or collect logits.
    can_use_graph = device.type == "cuda" and recorder is None and free_text is None
    if can_use_graph:
        answer = layers.run_as_graph(
            lambda static_inputs: _decode(vlm, layers, static_inputs, ranges),
            inputs,
            tuple(ranges),
        )
    else:
        answer = _decode(vlm, layers, inputs, ranges, free_text, recorder)
    with torch.inference_mode(False):
        return answer.clone()


def _decode(
    vlm: Any,
    layers: LayerStack,
    inputs: Inputs,
    ranges: Sequence[TokenRange],
    free_text: "_FreeTextState | None" = None,
    recorder: LogitRecorder | None = None,
) -> Tensor:
    """Answers [N, T], for inputs as `decode_greedily` makes them.

    ranges: The ids allowed for the token at each step.
    free_text: None where the ranges say all.
    """
    num_steps = len(ranges)
    pixels, present = split_image_inputs(inputs)
    features, _ = vlm.encode_images(pixels, present)
    text = vlm.embed_text(inputs["input_ids"])

    # A prompt has many rows, so a small stack of another precision gains nothing there.
    prompt_layers = layers
    is_prompt_separate = isinstance(layers, SmallLayerStack) and text.dtype != layers.dtype
    if is_prompt_separate:
        prompt_layers = get_layer_stack(vlm.language_model, False, False)
    prefix = prefill(
        prompt_layers, features, text, None, inputs.get("attention_mask"), room=num_steps - 1
    )
    cache = layers.adopt_cache(prefix.cache) if is_prompt_separate else prefix.cache
    hidden = prefix.hidden
    assert hidden is not None

    # All that the steps share.
    start = prefix.valid.shape[1]
    dtype = cache.buffer.dtype
    bias = prefix.make_bias(num_steps, layers.num_kv_heads, dtype)
    positions = prefix.next_positions[:, None] + torch.arange(num_steps, device=hidden.device)
    rotations = layers.compute_rotations(positions, dtype)
    steps_with_choice = [step for step, (first, last) in enumerate(ranges) if last - first > 1]
    last_choice = steps_with_choice[-1] if steps_with_choice else -1

    tokens: list[Tensor] = []
    for step, (first, last) in enumerate(ranges):
        if recorder is not None and step <= last_choice:
            recorder.logits.append(vlm.compute_logits(hidden, *recorder.ids).float())

        if last - first == 1:
            token = torch.full_like(prefix.next_positions, first)
        else:
            logits = vlm.compute_logits(hidden, first, last).float()
            choice = logits.argmax(-1) if free_text is None else free_text.choose(logits)
            token = first + choice
        tokens.append(token)

        if step >= last_choice:
            continue  # the grammar determines the remaining tokens
        if free_text is not None and free_text.has_ended():
            break
        embedded = vlm.embed_text(token[:, None]).to(dtype)
        step_rotations = tuple(rotation[:, step : step + 1] for rotation in rotations)
        window = cache.make_window(start + step, [(1, start + step + 1)])
        hidden = layers(embedded, step_rotations, window, bias)[:, 0].to(text.dtype)

    answer = torch.stack(tokens, dim=1)
    return answer if free_text is None else free_text.cut(answer)


class _FreeTextState:
    """How far each of N answers in free text has come; all of it is on the device."""

    def __init__(
        self, grammar: FreeTextGrammar | None, prompts: Tensor, max_tokens: int, config: Any
    ) -> None:
        self.grammar = grammar
        self.max_tokens = max_tokens
        self.end_token = config.eos_token_id
        self.pad_token = config.pad_token_id
        self.step = 0
        self.is_done = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)
        if grammar is not None:
            self.is_word = self.is_done.new_zeros(config.vocab_size)
            for first, last in grammar.word_ranges:
                self.is_word[first:last] = True
            self.is_number = self.is_done.new_zeros(config.vocab_size)
            first, last = grammar.number_range
            self.is_number[first:last] = True
            self.num_owed = torch.full_like(self.is_done, grammar.num_numbers, dtype=torch.long)
            self.is_after_word = torch.zeros_like(self.is_done)

    def choose(self, logits: Tensor) -> Tensor:
        """The likeliest tokens [N] that may come next; padding after the end.

        logits: [N, vocabulary].
        """
        if self.grammar is not None:
            logits = logits.masked_fill(self._forbidden(), float("-inf"))
        token = logits.argmax(-1).masked_fill(self.is_done, self.pad_token)
        self.is_done = self.is_done | (token == self.end_token)
        if self.grammar is not None:
            is_number = self.is_number[token]
            self.num_owed = self.num_owed - is_number.long()
            self.is_after_word = ~is_number
        self.step += 1
        return token

    def _forbidden(self) -> Tensor:
        """[N, vocabulary] bool, the ids that may not come next."""
        num_left = self.max_tokens - self.step
        may_end = (self.num_owed == 0) & self.is_after_word
        may_be_number = (self.num_owed > 0) & (self.step > 0)
        must_end = may_end & (num_left == 1)
        # The numbers, a word and the end token must still find room.
        must_be_number = may_be_number & (num_left <= self.num_owed + 2)
        may_be_word = ~(must_end | must_be_number)

        words = self.is_word & may_be_word[:, None]
        numbers = self.is_number & may_be_number[:, None]
        allowed = words | numbers
        allowed[:, self.end_token] |= may_end
        return ~allowed

    def has_ended(self) -> bool:
        """Whether all answers have ended; on a GPU only every eighth step looks."""
        is_on_cpu = self.is_done.device.type == "cpu"
        if not is_on_cpu and self.step % STEPS_BETWEEN_END_CHECKS:
            return False
        return bool(self.is_done.all())

    def cut(self, answer: Tensor) -> Tensor:
        """[N, T] without columns after the end of the longest answer."""
        is_end = answer == self.end_token
        end = is_end.long().argmax(1) + 1
        lengths = torch.where(is_end.any(1), end, answer.shape[1])
        return answer[:, : int(lengths.max())]
