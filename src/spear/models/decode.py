"""Batched greedy decoding of answers, token by token, with a KV cache and an optional grammar.

The grammar says which tokens an answer may have at each step. A step *has a choice* if the grammar
allows more than one token there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from spear.errors import SpearError, format_count
from spear.models.fast.cuda_graphs import Inputs
from spear.models.fast.kv_cache import TokenBlock
from spear.models.fast.small import SmallLayerStack, get_small_stack
from spear.models.fast.stack import (
    LayerStack,
    PrefilledCache,
    can_compile,
    get_layer_stack,
    prefill,
    select_image_inputs,
)

TokenRange = tuple[int, int]
"""(first, end): the token ids from `first` to `end` - 1."""

STEPS_BETWEEN_END_CHECKS = 8
"""On a GPU, free text checks in every eighth step whether all answers have ended, because the check
waits for the GPU."""


@dataclass(frozen=True)
class FreeTextGrammar:
    """Answers in free words with a given number of 3D tokens between them.

    The first and the last token of an answer are words.

    num_numbers   Number of 3D tokens in an answer.
    word_ranges   Ids of words, to which the end token does not belong.
    number_range  Ids of the 3D tokens.
    """

    num_numbers: int
    word_ranges: tuple[TokenRange, ...]
    number_range: TokenRange

    @property
    def min_tokens(self) -> int:
        """The length of the shortest answer: a word, the numbers, a word and the end token."""
        return self.num_numbers + 3


Grammar = Sequence[TokenRange] | FreeTextGrammar
"""The form that an answer must have.

In a sequence of ranges, range i has the ids that token i of the answer may have. After the last
range the answer ends.
"""


@dataclass(frozen=True)
class LogitRecorder:
    """Collects the logits of some ids at every step, without the grammar's restrictions.

    The last logits are those of the last step that has a choice, because later steps compute
    nothing.

    ids     The range of the ids whose logits are collected.
    logits  [N, number of ids] float32 per step, for N answers.
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

    For a grammar that is a sequence of ranges, only the logits of allowed ids are computed, and
    nothing after the last step that has a choice. On a GPU the whole decoding, including that of
    the images, is then one CUDA graph.

    Args:
        vlm: A `SpearVLMForConditionalGeneration`.
        pixel_values: View -> [N, 3, h, w] uint8.
        input_ids: [N, L] prompts, padded on either side.
        attention_mask: [N, L], 0 on padding. None if there is no padding.
        max_new_tokens: Number of tokens of the longest answer, including its end token.
        grammar: The form of all answers. None allows any text.
        recorder: If given, it collects logits.

    Returns:
        [N, T] token ids. Each row has an answer, its end token, then padding.

    Raises:
        SpearError: The shortest answer of the grammar is longer than `max_new_tokens`.
    """
    config = vlm.config.text_config
    device = input_ids.device

    # The ids that each step may choose from. For free text these are all ids, and `free_text`
    # restricts the choice further.
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

    # The language model's layers in the form that is fastest for inference.
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
            tuple(ranges),  # for other ranges another graph is recorded
        )
    else:
        answer = _decode(vlm, layers, inputs, ranges, free_text, recorder)
    # A tensor that was made in inference mode could not be used in training.
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
    """Decode answers [N, T].

    Args:
        vlm: A `SpearVLMForConditionalGeneration`.
        layers: The layers of its language model.
        inputs: The named tensors that `decode_greedily` makes.
        ranges: The ids that are allowed at each step.
        free_text: Restricts the choice further. None if the ranges are the whole grammar.
        recorder: If given, it collects logits.
    """
    num_steps = len(ranges)
    # The last token of an answer is chosen, but does not run through the layers.
    prefix = _prefill_prompts(vlm, layers, inputs, room=num_steps - 1)
    cache = prefix.cache
    hidden = prefix.hidden
    assert hidden is not None

    # Values that all steps share. The answer's tokens have the places after the prefix in the
    # cache.
    prefix_length = prefix.valid.shape[1]
    dtype = cache.buffer.dtype
    bias = prefix.make_bias(num_steps, layers.num_kv_heads, dtype)
    positions = prefix.next_positions[:, None] + torch.arange(num_steps, device=hidden.device)
    rotations = layers.compute_rotary_factors(positions, dtype)  # rotary embeddings of the answer
    steps_with_choice = [step for step, (first, end) in enumerate(ranges) if end - first > 1]
    last_choice = steps_with_choice[-1] if steps_with_choice else -1

    tokens: list[Tensor] = []
    for step, (first, end) in enumerate(ranges):
        if recorder is not None and step <= last_choice:
            first_id, end_id = recorder.ids
            recorder.logits.append(vlm.compute_logits(hidden, first_id, end_id).float())

        has_choice = end - first > 1
        if not has_choice:
            token = torch.full_like(prefix.next_positions, first)
        else:
            logits = vlm.compute_logits(hidden, first, end).float()
            choice = logits.argmax(-1) if free_text is None else free_text.choose_and_track(logits)
            token = first + choice
        tokens.append(token)

        if step >= last_choice:
            continue  # the grammar determines the remaining tokens, so nothing is computed
        if free_text is not None and free_text.should_stop():
            break

        # Run the chosen token through the layers, to predict the next one.
        embedded = vlm.embed_text(token[:, None])
        step_rotations = tuple(rotation[:, step : step + 1] for rotation in rotations)
        place = (
            prefix_length + step
        )  # of the token, which sees the prefix and the answer up to itself
        window = cache.make_window(place, [TokenBlock(num_tokens=1, visible_end=place + 1)])
        output = layers(embedded.to(dtype), step_rotations, window, bias)  # [N, 1, D]
        hidden = output[:, 0].to(embedded.dtype)

    answer = torch.stack(tokens, dim=1)
    return answer if free_text is None else free_text.cut_to_longest_answer(answer)


def _prefill_prompts(vlm: Any, layers: LayerStack, inputs: Inputs, room: int) -> PrefilledCache:
    """Run images and prompts through the language model.

    Args:
        vlm: A `SpearVLMForConditionalGeneration`.
        layers: The layers of its language model.
        inputs: The named tensors that `decode_greedily` makes.
        room: Number of free places in the cache, for tokens of the answers.

    Returns:
        The prefix, with a cache that `layers` can read and write.
    """
    pixels, present = select_image_inputs(inputs)
    # No image is missing, so the mask of missing images is not needed.
    features, _ = vlm.encode_images(pixels, present)
    text = vlm.embed_text(inputs["input_ids"])

    # A small stack has float32 weights. It is made for single tokens. If the network has another
    # precision, prompts with their many tokens run through the network's own layers.
    prompt_layers = layers
    is_prompt_separate = isinstance(layers, SmallLayerStack) and text.dtype != layers.dtype
    if is_prompt_separate:
        prompt_layers = get_layer_stack(vlm.language_model, False, False)  # not packed or compiled
    prefix = prefill(
        prompt_layers,
        features,
        text,
        image_valid=None,
        text_valid=inputs.get("attention_mask"),
        room=room,
    )
    if is_prompt_separate:
        prefix = replace(prefix, cache=layers.convert_cache_if_needed(prefix.cache))
    return prefix


class _FreeTextState:
    """Chooses the next token of each of N answers in free text, and tracks the tokens so far.

    The tensors are on the device of the prompts, so that a step does not wait for a GPU.

    is_done        [N] bool, True if the answer has its end token.

    Only with a grammar:

    is_word        [vocabulary] bool, True for words.
    is_number      [vocabulary] bool, True for 3D tokens.
    num_owed       [N], the number of 3D tokens that the answer still must have.
    is_after_word  [N] bool, True if the answer's last token is a word.
    """

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
            for first, end in grammar.word_ranges:
                self.is_word[first:end] = True
            self.is_number = self.is_done.new_zeros(config.vocab_size)
            first, end = grammar.number_range
            self.is_number[first:end] = True
            self.num_owed = torch.full_like(self.is_done, grammar.num_numbers, dtype=torch.long)
            self.is_after_word = torch.zeros_like(self.is_done)

    def choose_and_track(self, logits: Tensor) -> Tensor:
        """Choose the likeliest allowed tokens [N] from logits [N, vocabulary], and track them.

        An answer that has ended gets padding.
        """
        if self.grammar is not None:
            logits = logits.masked_fill(self._compute_forbidden_mask(), float("-inf"))
        token = logits.argmax(-1).masked_fill(self.is_done, self.pad_token)
        self.is_done = self.is_done | (token == self.end_token)
        if self.grammar is not None:
            has_chosen_number = self.is_number[token]  # [N]
            self.num_owed = self.num_owed - has_chosen_number.long()
            self.is_after_word = ~has_chosen_number
        self.step += 1
        return token

    def _compute_forbidden_mask(self) -> Tensor:
        """The ids that the grammar forbids as the next token, [N, vocabulary] bool."""
        num_left = self.max_tokens - self.step  # tokens that fit, including this one
        can_end = (self.num_owed == 0) & self.is_after_word  # [N], like all conditions here
        can_be_number = (self.num_owed > 0) & (self.step > 0)  # an answer begins with a word
        must_end = can_end & (num_left == 1)
        # The tokens that are left must suffice for the numbers, a word and the end token.
        must_be_number = can_be_number & (num_left <= self.num_owed + 2)
        can_be_word = ~(must_end | must_be_number)

        allowed_words = self.is_word & can_be_word[:, None]  # [N, vocabulary]
        allowed_numbers = self.is_number & can_be_number[:, None]
        allowed = allowed_words | allowed_numbers
        allowed[:, self.end_token] |= can_end
        return ~allowed

    def should_stop(self) -> bool:
        """Whether all answers have ended. On a GPU only every eighth step may say so."""
        is_on_cpu = self.is_done.device.type == "cpu"
        if not is_on_cpu and self.step % STEPS_BETWEEN_END_CHECKS:
            return False
        return bool(self.is_done.all())

    def cut_to_longest_answer(self, answer: Tensor) -> Tensor:
        """Remove the columns of answers [N, T] after the end of the longest answer."""
        is_end = answer == self.end_token
        length_to_end = is_end.long().argmax(1) + 1  # `argmax` returns the first end token
        lengths = torch.where(is_end.any(1), length_to_end, answer.shape[1])
        return answer[:, : int(lengths.max())]
