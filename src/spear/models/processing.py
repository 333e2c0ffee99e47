"""Between people and tensors: images to pixels, words to tokens, answers back to words and numbers."""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from spear.errors import SpearError, check_known, notice
from spear.models import vlm
from spear.models.decode import FreeTextGrammar
from spear.models.presets import SPECIAL_TOKEN_IDS, Preset
from spear.models.weights.load import load_tokenizer
from spear.tokens import CoordinateTokenizer, extend_tokenizer
from spear.types import Array, Pixel, Question, Segments
from spear.util.files import read_json_as
from spear.util.images import compute_placement, fit_image

NUM_LOCATIONS = 1024
LOCATION_FORMAT = "<loc{:04d}>"
"""PaliGemma's 2D location tokens: 1,024 steps over the image's height or width; a point is y, then x."""
_STEP = r"<loc(0\d{3}|10[01]\d|102[0-3])>"
_PLACE = re.compile(_STEP * 2)
_PIECES = re.compile(rf"(?:[^<[]+|{_PLACE.pattern}|[<[](?!\S))+|[<[]")
"""Of a text, what is tokenized by itself: what opens the name of a token stands alone, but for places."""
Size = tuple[int, int]
MAX_NOTIFIED_SIZES, MAX_CACHED_TEXTS = 32, 2**14
"""Image sizes that a processor warns about, texts whose tokens it keeps: ever new ones take no memory."""


def visible_window(source: Size, target: Size) -> tuple[float, float, float, float]:
    """What of an image (left, top, width, height, in its pixels) its fitted version shows, padding included:
    `fit_image` puts it at whole pixels. Sizes are (width, height).
    """
    _, left, top, across, down = compute_placement(source, target)
    x, y = source[0] / across, source[1] / down
    return -left * x, -top * y, target[0] * x, target[1] * y


def map_pixel(place: Pixel, source: Size, target: Size, back: bool = False) -> Pixel:
    """A place in an image as one in its fitted version, or, back, the reverse, where padding has none."""
    left, top, width, height = visible_window(source, target)
    if max(abs(left), abs(top)) < 1e-6:
        return place
    (w, h), most = source, 1 - 1e-6
    x, y = (place.x * width + left) / w, (place.y * height + top) / h
    if not back:
        x, y = (place.x * w - left) / width, (place.y * h - top) / height
    return Pixel(min(max(x, 0.0), most), min(max(y, 0.0), most))


def describe_fit(source: Size, target: Size) -> str | None:
    """What an image loses in the target's size, in words: by padding, where the aspects differ by a hundredth
    or more, and by being enlarged by a quarter or more (our choice); else None. Sizes are (width, height)."""
    (w, h), (tw, th) = source, target
    _, _, width, height = visible_window(source, target)
    across, down = 1 - w / width, 1 - h / height
    bars, scale = max(across, down), tw / width
    where = "left and right" if across > down else "above and below"
    said = [f"with black bars {where}, {bars:.0%} of it, nothing stretched"] if bars >= 0.01 else []
    said += [f"enlarged {scale:.1f} times: small ones show less"] if scale >= 1.25 else []
    return f"{w}×{h} shown in {tw}×{th} {', '.join(said)}" if said else None


Count = Annotated[int, Field(strict=True, gt=0, le=4096)]


@dataclass(frozen=True)
class _Saved:
    """What is in processor.json: (view, width, height) for each view, and as in `Processor`."""

    image_sizes: list[tuple[str, Count, Count]]
    prompt_tokens: Count


@dataclass
class Processor:
    """What SPEAR-VLM and SPEAR-1 read and write.

    tokenizer      a Hugging Face tokenizer that has location and 3D tokens.
    coordinates    what the 3D tokens mean.
    image_sizes    view -> (width, height) in pixels.
    prompt_tokens  the longest prompt accepted.
    coordinate_ids, location_start  the ids of the 3D tokens, and of the first location token.
    """

    tokenizer: Any
    coordinates: CoordinateTokenizer
    image_sizes: Mapping[str, tuple[int, int]]
    prompt_tokens: int = 64
    coordinate_ids: range = field(init=False)
    location_start: int = field(init=False)

    def __post_init__(self) -> None:
        first = extend_tokenizer(self.tokenizer, self.coordinates.num_bins)
        self.coordinate_ids = range(first, first + self.coordinates.num_bins)
        self.location_start = check_tokenizer(self.tokenizer)
        self._cache: dict[str, list[int]] = {}
        self._told: set[tuple[str, tuple[int, int]]] = set()

    @staticmethod
    def build(size: Preset, texts: Iterable[str], coordinates: CoordinateTokenizer) -> "Processor":
        """A preset's processor, with a tokenizer trained on `texts`."""
        tokenizer = train_tokenizer(texts, size.vocabulary)
        return Processor(tokenizer, coordinates, dict(size.image_sizes), size.prompt_tokens)

    def prepare_image(self, image: Array, view: str) -> Tensor:
        """[h, w, 3] uint8 of any size -> [3, height, width] uint8 of the view's, aspect kept by padding.

        Gives a `Notice`, once per view and size, of what `describe_fit` says (`MAX_NOTIFIED_SIZES` at most).
        """
        check_known("view", self.image_sizes, view)
        width, height = self.image_sizes[view]
        fitted = torch.from_numpy(
            np.require(fit_image(image, height, width), requirements=["C", "W"])
        )
        size = (image.shape[1], image.shape[0])
        if (view, size) not in self._told and len(self._told) < MAX_NOTIFIED_SIZES:
            loss = describe_fit(size, (width, height))
            advice = "give images of that aspect and size to use all of it"
            if loss is None or notice(f"images of view {view!r}: {loss}: {advice}"):
                self._told.add((view, size))
        return fitted.permute(2, 0, 1).clone(memory_format=torch.contiguous_format)

    def map_text_pixels(self, text: str, size: Size, view: str) -> str:
        """A text about an image of this (width, height), its location tokens as in what the model sees."""

        def there(found: re.Match[str]) -> str:
            y, x = ((int(step) + 0.5) / NUM_LOCATIONS for step in found.groups())
            return str(map_pixel(Pixel(x, y), size, self.image_sizes[view]))

        return _PLACE.sub(there, text)

    def map_question_pixels(self, question: Question, size: Size, view: str) -> Question:
        """A question with its answer, likewise."""
        target = self.image_sizes[view]
        answer = [
            map_pixel(s, size, target) if isinstance(s, Pixel) else s for s in question.segments
        ]
        return replace(
            question, prompt=self.map_text_pixels(question.prompt, size, view), segments=answer
        )

    def encode_prompts(self, texts: Sequence[str], cut: bool = False) -> dict[str, Tensor]:
        """input_ids and attention_mask [N, L] of texts, padded on the right.

        As PaliGemma's: `<bos>`, the text, a newline. Of the names of tokens in a text only places (`Pixel`)
        become tokens. Raises SpearError for an empty or too long text, unless that is to be cut, with a
        notice, as in training, which one instruction does not end. Lengths: `vlm.PAD_LENGTH_TO_MULTIPLE`.
        """
        return self._pad(
            [self._prompt(text, cut) for text in texts], vlm.PAD_LENGTH_TO_MULTIPLE if cut else 1
        )

    def encode_instructions(self, texts: Sequence[str], cut: bool = False) -> dict[str, Tensor]:
        """`prompts` of instructions, in small letters and without a full stop at the end, in training as in
        acting: how somebody types shall not change what the robot does (our choice)."""
        return self.encode_prompts(
            [" ".join(text.lower().split()).rstrip(" .!") for text in texts], cut
        )

    def encode_questions(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        """Prompts, cut where they are too long, with their answers: also token_type_ids (1 on the answer) and
        labels. Raises `SpearError` for numbers in another unit than the 3D tokens'."""
        for question in questions:
            if question.unit != self.coordinates.unit and question.values:
                what = f"question {question.prompt!r}: its numbers are in unit {question.unit!r}"
                cure = f"the 3D tokens in {self.coordinates.unit!r}: use tokens fitted on labels of one unit"
                raise SpearError(f"{what}, {cure}")
        prompts = [self._prompt(question.prompt, cut=True) for question in questions]
        answers = [
            [*self.encode_answer(q.segments), self.tokenizer.eos_token_id] for q in questions
        ]
        batch = self._pad(
            [p + a for p, a in zip(prompts, answers, strict=True)], vlm.PAD_LENGTH_TO_MULTIPLE
        )
        place = torch.arange(batch["input_ids"].shape[1])
        start = torch.tensor([len(p) for p in prompts])[:, None]
        answered = (place >= start) & batch["attention_mask"].bool()
        labels = batch["input_ids"].masked_fill(~answered, vlm.IGNORE_LABEL)
        return {**batch, "token_type_ids": answered.long(), "labels": labels}

    def encode_answer(self, segments: Segments) -> list[int]:
        """An answer as token ids: numbers as 3D tokens, pixels as two location tokens (y, then x)."""
        ids: list[int] = []
        for segment in segments:
            if isinstance(segment, Pixel):
                for fraction in (segment.y, segment.x):
                    ids.append(
                        self.location_start
                        + min(max(int(fraction * NUM_LOCATIONS), 0), NUM_LOCATIONS - 1)
                    )
            elif isinstance(segment, str):
                ids += self._text(segment)
            else:
                ids.append(self.coordinate_ids[int(self.coordinates.encode(np.float64(segment)))])
        return ids

    def coordinate_grammar(self, numbers: int, pixels: int) -> list[tuple[int, int]]:
        """The grammar of answers of so many numbers, then so many pixels, and nothing else."""
        of_numbers = self.coordinate_ids.start, self.coordinate_ids.stop
        of_pixels = self.location_start, self.location_start + NUM_LOCATIONS
        return [of_numbers] * numbers + [of_pixels] * (2 * pixels)

    def free_text_grammar(self, count: int) -> FreeTextGrammar:
        """The grammar of answers in words with exactly `count` numbers."""
        special = sorted(i for i in self.tokenizer.all_special_ids if i < self.location_start)
        between = itertools.pairwise([-1, *special, self.location_start])
        words = tuple((a + 1, b) for a, b in between if a + 1 < b)
        return FreeTextGrammar(count, words, (self.coordinate_ids.start, self.coordinate_ids.stop))

    def decode_answer(self, ids: Sequence[int]) -> list[str | float | Pixel]:
        """Token ids of an answer -> text, numbers (representatives of bins) and pixels, up to its end; the
        inverse of `encode_answer`. A location token without a partner stays text."""
        locations = range(self.location_start, self.location_start + NUM_LOCATIONS)
        pieces: list[int | float | Pixel] = []  # whole numbers are tokens of text
        for token in itertools.takewhile(lambda i: i != self.tokenizer.eos_token_id, map(int, ids)):
            before = pieces[-1] if pieces else None
            if token in self.coordinate_ids:
                pieces.append(float(self.coordinates.decode(token - self.coordinate_ids.start)))
            elif token in locations and isinstance(before, int) and before in locations:
                y, x = ((step - locations.start + 0.5) / NUM_LOCATIONS for step in (before, token))
                pieces[-1] = Pixel(x, y)
            else:
                pieces.append(token)
        segments: list[str | float | Pixel] = []
        for text, group in itertools.groupby(pieces, lambda piece: isinstance(piece, int)):
            own = list(group)
            segments += [self.tokenizer.decode(own)] if text else own
        return segments

    def save(self, folder: Path) -> None:
        """Write tokenizer, `coordinates.json` and `processor.json` into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        self.coordinates.save(folder / "coordinates.json")
        sizes = [[name, *wh] for name, wh in self.image_sizes.items()]
        content = {"image_sizes": sizes, "prompt_tokens": self.prompt_tokens}
        (folder / "processor.json").write_text(json.dumps(content, indent=1), encoding="utf-8")

    @staticmethod
    def load(folder: Path, config: vlm.SpearVLMConfig | None = None) -> "Processor":
        """Read what `save` wrote. config: of the model that it shall fit. Raises SpearError when something is
        missing or broken, or belongs to another model."""
        coordinates = CoordinateTokenizer.load(folder / "coordinates.json")
        tokenizer = load_tokenizer(folder)
        saved = read_json_as(_Saved, folder / "processor.json", "save it again", "broken processor")
        sizes = {view: (width, height) for view, width, height in saved.image_sizes}
        processor = Processor(tokenizer, coordinates, sizes, saved.prompt_tokens)
        if config is not None:
            processor._check_fits(config, folder)
        return processor

    def _check_fits(self, config: vlm.SpearVLMConfig, folder: Path) -> None:
        ours, wanted = self.coordinate_ids, config.coordinate_ids
        both = "take both from the same checkpoint"
        if ours != wanted or ours.stop > config.text_config.vocab_size:
            here = f"its tokenizer's 3D tokens are the ids {ours.start} … {ours.stop - 1}"
            there = (
                f"its model's {wanted.start} … {wanted.stop - 1} of {config.text_config.vocab_size}"
            )
            raise SpearError(f"vocabulary mismatch: {folder}: {here}, {there}: {both}")
        for view in self.image_sizes:
            if view not in config.views:
                apart = f"its processor has {view!r}, its model {', '.join(config.views)}"
                raise SpearError(f"views do not match: {folder}: {apart}: {both}")

    def _prompt(self, text: str, cut: bool) -> list[int]:
        words = " ".join(text.split())
        if not words:
            raise SpearError("empty instruction: say what to do or ask, in words")
        ids, end = [self.tokenizer.bos_token_id, *self._text(words)], self._text("\n")
        room = self.prompt_tokens - len(end)
        if len(ids) > room:
            too_long = (
                f"{words[:40]!r}…: {len(ids) + len(end)} tokens, at most {self.prompt_tokens}"
            )
            if not cut:
                raise SpearError(f"prompt too long: {too_long}: say it shorter")
            notice(f"instruction cut off: {too_long}")
        return [*ids[:room], *end]

    def _text(self, text: str) -> list[int]:
        if (ids := self._cache.get(text)) is None:
            pieces = (piece[0] for piece in _PIECES.finditer(text))
            ids = [
                i
                for piece in pieces
                for i in self.tokenizer.encode(piece, add_special_tokens=False)
            ]
            if len(self._cache) >= MAX_CACHED_TEXTS:
                self._cache.clear()
            if len(ids) < self.prompt_tokens:  # clients of a server choose them
                self._cache[text] = ids
        return ids

    def _pad(self, rows: Sequence[Sequence[int]], multiple: int) -> dict[str, Tensor]:
        length = -(-max(map(len, rows), default=0) // multiple) * multiple
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        mask = torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]
        ids[mask] = torch.tensor([*itertools.chain(*rows)], dtype=torch.long)
        return {"input_ids": ids, "attention_mask": mask.long()}


def check_tokenizer(tokenizer: Any) -> int:
    """The id of the first location token. Raises SpearError without those, or with other special tokens."""
    ids = tokenizer.convert_tokens_to_ids(
        [LOCATION_FORMAT.format(i) for i in (0, NUM_LOCATIONS - 1)]
    )
    if None in ids or ids[1] - ids[0] != NUM_LOCATIONS - 1:
        first = LOCATION_FORMAT.format(0)
        raise SpearError(f"tokenizer without location tokens {first} …: start from PaliGemma's")
    for name, wanted in SPECIAL_TOKEN_IDS.items():
        if (found := getattr(tokenizer, name)) != wanted:
            raise SpearError(
                f"tokenizer: {name} is {found}, not {wanted}: copy tokenizer_config.json too"
            )
    return int(ids[0])


def train_tokenizer(texts: Iterable[str], vocabulary: int = 2048) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocabulary` tokens for small models; the same texts give the same one.

    Ids: `<pad>` 0, `<eos>` 1, `<bos>` 2 (as Gemma's), bytes and merges learned from `texts`, location tokens.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos")}
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - NUM_LOCATIONS,
        special_tokens=list(special.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    how: Any = {"tokenizer_object": backend, "clean_up_tokenization_spaces": False}
    tokenizer = PreTrainedTokenizerFast(**how, **special)
    tokenizer.add_tokens([LOCATION_FORMAT.format(i) for i in range(NUM_LOCATIONS)])
    return tokenizer
