"""Conversion of images and text to the inputs of a model, and of its output to answers."""

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from spear.errors import SpearError, check_known, format_alternatives, notice
from spear.models import vlm
from spear.models.decode import FreeTextGrammar
from spear.models.presets import SPECIAL_TOKEN_IDS, Preset
from spear.models.weights.load import load_tokenizer
from spear.tokens import CoordinateTokenizer, extend_tokenizer
from spear.types import Array, Pixel, Question, Segments, WidthAndHeight
from spear.util.files import read_json_as
from spear.util.images import compute_placement, fit_image

NUM_LOCATIONS = 1024
LOCATION_FORMAT = "<loc{:04d}>"
"""The text of one of PaliGemma's 1,024 location tokens. Each stands for a step of the image's
height or width. A pixel is two of them, first y, then x."""

_LOCATION_TOKEN = r"<loc(0\d{3}|10[01]\d|102[0-3])>"  # <loc0000> … <loc1023>
_PIXEL_TOKENS = re.compile(_LOCATION_TOKEN * 2)
_NO_BRACKETS = r"[^<[]+"  # characters other than "<" and "["
_BRACKET_BEFORE_SPACE = r"[<[](?!\S)"  # a "<" or "[" before a space, or at the end of the text
_TEXT_PIECES = re.compile(
    rf"(?:{_NO_BRACKETS}|{_PIXEL_TOKENS.pattern}|{_BRACKET_BEFORE_SPACE})+|[<[]"
)
"""Pieces of a text that are tokenized one by one.

A piece is as long as possible, except that any remaining "<" or "[" (the last alternative) is a
piece of its own. So a user cannot type the name of a token such as "<eos>". Only the two location
tokens of a pixel are recognized as tokens."""


# These limit the memory of a processor, because the clients of a server choose images and texts.
MAX_NOTIFIED_SIZES = 32  # image sizes about which a processor gives a notice
MAX_CACHED_TEXTS = 2**14  # texts whose tokens a processor keeps

# `describe_fit_losses` does not mention smaller bars and enlargements.
MIN_BAR_FRACTION = 0.01  # of the fitted image's width or height
MIN_ENLARGEMENT = 1.25  # pixels of the fitted image per pixel of the source

# Two aspects (width / height) count as the same up to this relative difference. It is not 0,
# because small images have rounded sides: 85×64 pixels for an aspect of 4:3.
MAX_ASPECT_DIFFERENCE = 0.02


class VisibleWindow(NamedTuple):
    """A rectangle in a source image, in pixels of the source, which may be fractions."""

    left: float
    top: float
    width: float
    height: float


def compute_visible_window(source: WidthAndHeight, target: WidthAndHeight) -> VisibleWindow:
    """The rectangle, in the source image, that the fitted image of the target size shows.

    Where the fitted image has padding, the rectangle extends beyond the source image. Its sides are
    no whole pixels of the source, because `fit_image` puts the image at whole pixels of the target.
    """
    # The place of the source image in the target, in pixels of the target.
    _, left, top, width, height = compute_placement(source, target)
    source_width, source_height = source
    target_width, target_height = target
    x_scale = source_width / width  # pixels of the source per pixel of the target
    y_scale = source_height / height
    return VisibleWindow(
        left=-left * x_scale,
        top=-top * y_scale,
        width=target_width * x_scale,
        height=target_height * y_scale,
    )


def map_pixel(
    pixel: Pixel, source: WidthAndHeight, target: WidthAndHeight, inverse: bool = False
) -> Pixel:
    """Map a pixel of a source image to the same place in the image fitted into the target size.

    With `inverse` the function maps from the fitted image to the source. A place in the padding is
    then mapped to the edge of the source. The coordinates of a pixel are fractions of an image's
    width and height.
    """
    left, top, window_width, window_height = compute_visible_window(source, target)
    has_no_padding = max(abs(left), abs(top)) < 1e-6  # pixels; not exactly 0 because of rounding
    if has_no_padding:
        return pixel
    width, height = source
    if inverse:
        x = (pixel.x * window_width + left) / width
        y = (pixel.y * window_height + top) / height
    else:
        x = (pixel.x * width - left) / window_width
        y = (pixel.y * height - top) / window_height
    # Limit the fractions to 0 ≤ x < 1 and 0 ≤ y < 1.
    below_one = 1 - 1e-6
    return Pixel(min(max(x, 0.0), below_one), min(max(y, 0.0), below_one))


def describe_fit_losses(
    source: WidthAndHeight, target: WidthAndHeight, are_bars_expected: bool = False
) -> str | None:
    """Describe what an image loses when it is fitted into the target size; None if almost nothing.

    If the aspects differ, black bars take some of the target. If the image is enlarged, the model
    sees less detail than in an image recorded at the target size. With `are_bars_expected` the bars
    are not mentioned.

    Returns:
        The rest of a sentence that begins with "images": "of 640×480 are fitted into …".
    """
    width, height = source
    target_width, target_height = target
    _, _, window_width, window_height = compute_visible_window(source, target)
    side_bars = 1 - width / window_width  # fraction of the target's width
    top_bars = 1 - height / window_height  # fraction of the target's height
    enlargement = target_width / window_width

    losses = []
    if max(side_bars, top_bars) >= MIN_BAR_FRACTION and not are_bars_expected:
        position = "left and right" if side_bars > top_bars else "above and below"
        fraction = max(side_bars, top_bars)
        losses.append(f"with black bars {position} ({fraction:.0%} of the area)")
    if enlargement >= MIN_ENLARGEMENT:
        losses.append(f"enlarged {enlargement:.1f} times, so they show less detail")
    if not losses:
        return None
    return f"of {width}×{height} are fitted into {target_width}×{target_height} {', '.join(losses)}"


Count = Annotated[int, Field(strict=True, gt=0, le=4096)]
"""A number of pixels or tokens in processor.json; a larger one must be a mistake (our choice)."""

Aspect = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""Width / height of an image in processor.json."""


@dataclass(frozen=True)
class _SavedProcessor:
    """The content of processor.json.

    image_sizes    (view, width, height) of each view, in pixels.
    prompt_tokens  The longest prompt accepted, in tokens.
    training_aspects  View -> width / height of the images of training; {} if unknown.
    """

    image_sizes: list[tuple[str, Count, Count]]
    prompt_tokens: Count
    training_aspects: dict[str, list[Aspect]] = field(default_factory=dict)


@dataclass
class Processor:
    """Turns images and text into the inputs of SPEAR-VLM and SPEAR-1, and answers back into text.

    tokenizer       A Hugging Face tokenizer that has location tokens. The processor adds 3D tokens.
    coordinates     The bins and the unit of the 3D tokens.
    image_sizes     View -> (width, height) in pixels.
    prompt_tokens   The longest prompt accepted, in tokens.
    coordinate_ids  The ids of the 3D tokens.
    location_start  The id of the first location token.
    training_aspects  View -> width / height of the images of training; {} if unknown.
    """

    tokenizer: Any
    coordinates: CoordinateTokenizer
    image_sizes: Mapping[str, WidthAndHeight]
    prompt_tokens: int = 64
    coordinate_ids: range = field(init=False)
    location_start: int = field(init=False)
    training_aspects: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.coordinate_ids = extend_tokenizer(self.tokenizer, self.coordinates.num_bins)
        check_paligemma_tokens(self.tokenizer)
        self.location_start = int(self.tokenizer.convert_tokens_to_ids(LOCATION_FORMAT.format(0)))
        self._token_cache: dict[str, list[int]] = {}  # text -> token ids
        self._notified: set[tuple[str, WidthAndHeight]] = set()  # (view, size of images)

    @staticmethod
    def build(
        preset: Preset, texts: Iterable[str], coordinates: CoordinateTokenizer
    ) -> "Processor":
        """Build the processor of a preset, with a tokenizer trained on `texts`."""
        tokenizer = train_tokenizer(texts, preset.vocabulary_size)
        return Processor(tokenizer, coordinates, dict(preset.image_sizes), preset.prompt_tokens)

    # Images

    def prepare_image(self, image: Array, view: str) -> Tensor:
        """Fit an image [h, w, 3] uint8 of any size into a view: [3, height, width] uint8.

        The image is padded if its aspect differs from the view's. Once per view and image size, a
        `Notice` says what the image loses (`describe_fit_losses`). Bars that the images of training
        had, too, are no loss.
        """
        check_known("view", self.image_sizes, view)
        width, height = self.image_sizes[view]
        fitted = fit_image(image, height, width)
        # PyTorch takes no arrays with negative strides (mirrored), and no read-only ones.
        pixels = torch.from_numpy(np.require(fitted, requirements=["C", "W"]))

        size = (image.shape[1], image.shape[0])
        if (view, size) not in self._notified and len(self._notified) < MAX_NOTIFIED_SIZES:
            is_aspect_of_training = self._is_aspect_of_training(size, view)
            fit = describe_fit_losses(
                size, (width, height), are_bars_expected=is_aspect_of_training
            )
            message = f"images of view {view!r} {fit}. {self._advise_on_fit(size, view)}"
            # `notice` returns whether it warned. While notices are suppressed, the size stays open.
            if fit is None or notice(message):
                self._notified.add((view, size))
        return pixels.permute(2, 0, 1).clone(memory_format=torch.contiguous_format)

    def _is_aspect_of_training(self, size: WidthAndHeight, view: str) -> bool:
        """Whether images of training had the aspect of this size."""
        aspect = size[0] / size[1]
        for training_aspect in self.training_aspects.get(view, []):
            relative_difference = abs(aspect / training_aspect - 1)
            if relative_difference <= MAX_ASPECT_DIFFERENCE:
                return True
        return False

    def _advise_on_fit(self, size: WidthAndHeight, view: str) -> str:
        """Say which images lose nothing, or are like those of training."""
        known_aspects = self.training_aspects.get(view)
        if known_aspects is None:
            return "Images of that aspect and size would lose nothing."
        if self._is_aspect_of_training(size, view):
            return "The images of training had this aspect, too."
        aspects = format_alternatives([f"{aspect:.2f}" for aspect in known_aspects])
        return f"The images of training had width / height {aspects}; send such ones, unchanged."

    def map_text_pixels(self, text: str, size: WidthAndHeight, view: str) -> str:
        """Map the pixels in a text from an image of this size to the fitted image of the view.

        In the text, a pixel is two location tokens.
        """

        def map_tokens(match: re.Match[str]) -> str:
            y, x = match.groups()
            # The middle of the two steps.
            pixel = Pixel((int(x) + 0.5) / NUM_LOCATIONS, (int(y) + 0.5) / NUM_LOCATIONS)
            return str(map_pixel(pixel, size, self.image_sizes[view]))

        return _PIXEL_TOKENS.sub(map_tokens, text)

    def map_question_pixels(self, question: Question, size: WidthAndHeight, view: str) -> Question:
        """Map the pixels in a question and its answer to the fitted image of the view.

        `size` is that of the image that the question was asked about.
        """
        target = self.image_sizes[view]
        prompt = self.map_text_pixels(question.prompt, size, view)
        segments: list[str | float | Pixel] = []
        for segment in question.segments:
            if isinstance(segment, Pixel):
                segment = map_pixel(segment, size, target)
            segments.append(segment)
        return replace(question, prompt=prompt, segments=segments)

    # Text to tokens

    def encode_prompts(self, texts: Sequence[str], cut: bool = False) -> dict[str, Tensor]:
        """Tokenize texts as PaliGemma does: `<bos>`, the text, a newline, and padding on the right.

        Names of tokens in a text stay text, except for the two location tokens of a `Pixel`.

        Args:
            texts: N texts.
            cut: Whether a text with more than `prompt_tokens` tokens is cut, with a notice, instead
                of refused. Training sets it, because one long instruction must not end a run. The
                number of tokens L is then a multiple of `vlm.PAD_LENGTH_TO_MULTIPLE`.

        Returns:
            "input_ids" and "attention_mask" (0 on padding), [N, L] each.

        Raises:
            SpearError: A text is empty, or it is too long and `cut` is False.
        """
        multiple = vlm.PAD_LENGTH_TO_MULTIPLE if cut else 1
        return self._pad([self._encode_prompt(text, cut) for text in texts], multiple)

    def encode_instructions(self, texts: Sequence[str], cut: bool = False) -> dict[str, Tensor]:
        """`encode_prompts` of instructions in lower case, without a full stop at the end.

        Both training and acting normalize instructions in this way, so that upper case and
        punctuation do not change what the robot does.
        """
        normalized = [" ".join(text.lower().split()).rstrip(" .!") for text in texts]
        return self.encode_prompts(normalized, cut)

    def encode_questions(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        """Tokenize questions with their answers; too long prompts are cut with a notice.

        Returns:
            [N, L] each: "input_ids" and "attention_mask" (0 on padding); "token_type_ids", 1 on the
            answer; and "labels", the ids of the answer and `vlm.IGNORE_LABEL` elsewhere.

        Raises:
            SpearError: The numbers of a question are in another unit than the 3D tokens.
        """
        for question in questions:
            if question.values and question.unit != self.coordinates.unit:
                raise SpearError(
                    f"the numbers of question {question.prompt!r} are in the unit "
                    f"{question.unit!r}, the 3D tokens in {self.coordinates.unit!r}. Use 3D "
                    "tokens that were fitted on labels of one unit."
                )

        prompts = [self._encode_prompt(question.prompt, cut=True) for question in questions]
        sequences = []
        for question, prompt in zip(questions, prompts, strict=True):
            answer = self.encode_answer(question.segments)
            sequences.append([*prompt, *answer, self.tokenizer.eos_token_id])
        batch = self._pad(sequences, vlm.PAD_LENGTH_TO_MULTIPLE)

        position = torch.arange(batch["input_ids"].shape[1], device="cpu")
        prompt_lengths = [len(prompt) for prompt in prompts]
        answer_start = torch.tensor(prompt_lengths, device="cpu")[:, None]  # [N, 1]
        is_answer = (position >= answer_start) & batch["attention_mask"].bool()
        batch["token_type_ids"] = is_answer.long()
        batch["labels"] = batch["input_ids"].masked_fill(~is_answer, vlm.IGNORE_LABEL)
        return batch

    def encode_answer(self, segments: Segments) -> list[int]:
        """Tokenize an answer. A number is one 3D token, a pixel two location tokens, y before x."""
        ids: list[int] = []
        for segment in segments:
            if isinstance(segment, Pixel):
                ids.append(self._encode_location(segment.y))
                ids.append(self._encode_location(segment.x))
            elif isinstance(segment, str):
                ids += self._encode_text(segment)
            else:
                bin_index = int(self.coordinates.encode(np.float64(segment)))
                ids.append(self.coordinate_ids[bin_index])
        return ids

    def _encode_location(self, fraction: float) -> int:
        """The id of the location token for a fraction of the image's width or height."""
        location = min(max(int(fraction * NUM_LOCATIONS), 0), NUM_LOCATIONS - 1)
        return self.location_start + location

    def _encode_prompt(self, text: str, cut: bool) -> list[int]:
        """The ids of `<bos>`, the text and a newline, at most `prompt_tokens`."""
        words = " ".join(text.split())
        if not words:
            raise SpearError(
                "empty instruction. Say in words what to do, or what you want to know."
            )
        ids = [self.tokenizer.bos_token_id, *self._encode_text(words)]
        newline = self._encode_text("\n")
        num_tokens = len(ids) + len(newline)
        if num_tokens > self.prompt_tokens:
            excess = f"{words[:40]!r}… has {num_tokens} tokens, more than {self.prompt_tokens}"
            if not cut:
                raise SpearError(f"the prompt {excess}. Use fewer words.")
            notice(f"the instruction is cut off, because {excess}.")
        return [*ids[: self.prompt_tokens - len(newline)], *newline]

    def _encode_text(self, text: str) -> list[int]:
        """The ids of a text in which names of tokens are text, see `_TEXT_PIECES`."""
        cached = self._token_cache.get(text)
        if cached is not None:
            return cached
        ids: list[int] = []
        for match in _TEXT_PIECES.finditer(text):
            ids += self.tokenizer.encode(match[0], add_special_tokens=False)
        if len(self._token_cache) >= MAX_CACHED_TEXTS:
            self._token_cache.clear()
        if len(ids) < self.prompt_tokens:  # long texts would take too much memory
            self._token_cache[text] = ids
        return ids

    def _pad(self, sequences: Sequence[Sequence[int]], multiple: int) -> dict[str, Tensor]:
        """Pad sequences on the right to the length of the longest, rounded up to a multiple."""
        longest = max(map(len, sequences), default=0)
        length = math.ceil(longest / multiple) * multiple
        sequence_lengths = [len(sequence) for sequence in sequences]
        lengths = torch.tensor(sequence_lengths, device="cpu")
        is_token = torch.arange(length, device="cpu") < lengths[:, None]  # [N, length]
        ids = torch.full((len(sequences), length), self.tokenizer.pad_token_id, device="cpu")
        # The mask selects places sequence by sequence, which is the order of the chained ids.
        all_ids = list(itertools.chain(*sequences))
        ids[is_token] = torch.tensor(all_ids, dtype=torch.long, device="cpu")
        return {"input_ids": ids, "attention_mask": is_token.long()}

    # Tokens to answers

    def make_coordinate_grammar(self, num_numbers: int, num_pixels: int) -> list[tuple[int, int]]:
        """The grammar of answers that consist of numbers, then pixels.

        It has a range of ids (first, end) for each token of the answer.
        """
        number_range = (self.coordinate_ids.start, self.coordinate_ids.stop)
        location_range = (self.location_start, self.location_start + NUM_LOCATIONS)
        return [number_range] * num_numbers + [location_range] * (2 * num_pixels)

    def make_free_text_grammar(self, num_numbers: int) -> FreeTextGrammar:
        """The grammar of answers in free words, with `num_numbers` numbers between the words."""
        # Words are the ids before the location tokens, except special tokens: the ranges between
        # each special token and the next. -1 stands before the first id.
        text_ids = range(self.location_start)
        special_ids = sorted(i for i in self.tokenizer.all_special_ids if i in text_ids)
        word_ranges = []
        for previous_id, next_id in itertools.pairwise([-1, *special_ids, self.location_start]):
            if previous_id + 1 < next_id:
                word_ranges.append((previous_id + 1, next_id))
        number_range = (self.coordinate_ids.start, self.coordinate_ids.stop)
        return FreeTextGrammar(num_numbers, tuple(word_ranges), number_range)

    def decode_answer(self, ids: Sequence[int]) -> list[str | float | Pixel]:
        """Turn an answer's tokens, up to the end token, into text, numbers and pixels.

        This is the inverse of `encode_answer`. A number is the center of its bin. A location token
        without a second one after it stays text.
        """
        location_ids = range(self.location_start, self.location_start + NUM_LOCATIONS)

        # First replace the tokens of numbers by floats, and those of pixels by `Pixel`s. The tokens
        # of text stay int.
        items: list[int | float | Pixel] = []
        for token in map(int, ids):
            if token == self.tokenizer.eos_token_id:
                break
            previous_item = items[-1] if items else None
            if token in self.coordinate_ids:
                bin_index = token - self.coordinate_ids.start
                items.append(float(self.coordinates.decode(bin_index)))
            elif (
                token in location_ids
                and isinstance(previous_item, int)
                and previous_item in location_ids
            ):
                y = (previous_item - location_ids.start + 0.5) / NUM_LOCATIONS
                x = (token - location_ids.start + 0.5) / NUM_LOCATIONS
                items[-1] = Pixel(x, y)
            else:
                items.append(token)

        # Then decode consecutive tokens of text together.
        segments: list[str | float | Pixel] = []
        for is_text, group in itertools.groupby(items, lambda item: isinstance(item, int)):
            consecutive_items = list(group)
            if is_text:
                segments.append(self.tokenizer.decode(consecutive_items))
            else:
                segments += consecutive_items
        return segments

    # Files

    def save(self, folder: Path) -> None:
        """Write tokenizer, `coordinates.json` and `processor.json` into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        self.coordinates.save(folder / "coordinates.json")
        sizes = [[view, width, height] for view, (width, height) in self.image_sizes.items()]
        content: dict[str, Any] = {"image_sizes": sizes, "prompt_tokens": self.prompt_tokens}
        if self.training_aspects:  # a SPEAR-VLM has none
            content["training_aspects"] = self.training_aspects
        (folder / "processor.json").write_text(json.dumps(content, indent=1), encoding="utf-8")

    @staticmethod
    def load(folder: Path, config: vlm.SpearVLMConfig | None = None) -> "Processor":
        """Read the processor that `save` wrote.

        Args:
            folder: The folder of a model.
            config: The config of the model that the processor must fit. None skips this check.

        Raises:
            SpearError: A file is missing or broken, or belongs to another model.
        """
        coordinates = CoordinateTokenizer.load(folder / "coordinates.json")
        tokenizer = load_tokenizer(folder)
        saved = read_json_as(
            _SavedProcessor, folder / "processor.json", "save it again", "contains no processor"
        )
        sizes = {view: (width, height) for view, width, height in saved.image_sizes}
        processor = Processor(
            tokenizer,
            coordinates,
            sizes,
            saved.prompt_tokens,
            training_aspects=saved.training_aspects,
        )
        if config is not None:
            processor._check_fits(config, folder)
        return processor

    def _check_fits(self, config: vlm.SpearVLMConfig, folder: Path) -> None:
        """Raise SpearError if the model has other ids of 3D tokens, or lacks a view."""
        ids = self.coordinate_ids
        model_ids = config.coordinate_ids
        vocabulary_size = config.text_config.vocab_size
        if ids != model_ids or ids.stop > vocabulary_size:
            raise SpearError(
                f"the 3D tokens of the tokenizer in {folder} are the ids {ids.start} … "
                f"{ids.stop - 1}, those of its model {model_ids.start} … {model_ids.stop - 1} "
                f"of {vocabulary_size}. Take both from the same checkpoint."
            )
        for view in self.image_sizes:
            if view not in config.views:
                model_views = ", ".join(config.views)
                raise SpearError(
                    f"the processor in {folder} has the view {view!r}, its model {model_views}. "
                    "Take both from the same checkpoint."
                )


def check_paligemma_tokens(tokenizer: Any) -> None:
    """Check that a tokenizer has PaliGemma's location tokens and special tokens.

    Raises:
        SpearError: The tokenizer has no location tokens, or its special tokens do not have the ids
            `SPECIAL_TOKEN_IDS`.
    """
    first_name = LOCATION_FORMAT.format(0)
    last_name = LOCATION_FORMAT.format(NUM_LOCATIONS - 1)
    first_id, last_id = tokenizer.convert_tokens_to_ids([first_name, last_name])
    if first_id is None or last_id is None or last_id - first_id != NUM_LOCATIONS - 1:
        raise SpearError(
            f"the tokenizer has no location tokens {first_name} … {last_name}. Start from"
            " PaliGemma's."
        )
    for name, expected in SPECIAL_TOKEN_IDS.items():
        actual = getattr(tokenizer, name)
        if actual != expected:
            raise SpearError(
                f"the tokenizer's {name} is {actual}, not {expected}. Copy tokenizer_config.json,"
                " too."
            )


def train_tokenizer(texts: Iterable[str], vocabulary_size: int = 2048) -> PreTrainedTokenizerFast:
    """Train a tokenizer for small models. The same texts give the same tokenizer.

    Its tokens are `<pad>` 0, `<eos>` 1 and `<bos>` 2 (the ids of Gemma), then bytes and merges
    learned from `texts`, then location tokens. They are at most `vocabulary_size` in total.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special_tokens = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - NUM_LOCATIONS,
        special_tokens=list(special_tokens.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **special_tokens
    )
    tokenizer.add_tokens([LOCATION_FORMAT.format(i) for i in range(NUM_LOCATIONS)])
    return tokenizer
