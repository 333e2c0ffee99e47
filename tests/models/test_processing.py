"""Images are fitted without being stretched, and text, numbers and pixels survive a round trip
through tokens."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_tiny import edit_json
from refusals import refuses
from spear.errors import Notice
from spear.models import processing
from spear.models.presets import get_preset
from spear.models.processing import (
    Processor,
    compute_visible_window,
    describe_fit_losses,
    map_pixel,
)
from spear.models.vlm import IGNORE_LABEL
from spear.tokens import CoordinateTokenizer
from spear.types import Pixel, Question
from spear.util.images import compute_placement, fit_image

# The tokenizer is trained on these. The spaces in the third are the places of numbers.
TEXTS = [
    "put the carrot on the plate",
    "where is the bowl",
    "the mug is  and the cup is  so the mug is closer",
]
VIEW = "external"
SPEAR1_SIZE = (280, 210)  # width and height of the external view of the preset spear1


@pytest.fixture(scope="module")
def processor() -> Processor:
    """A processor of the preset nano, whose external view is 192 × 128 pixels."""
    values = np.random.default_rng(0).normal(size=4000)
    return Processor.build(get_preset("nano"), TEXTS, CoordinateTokenizer.fit(values))


class TestFitImage:
    @pytest.mark.parametrize(("width", "height"), [(60, 40), (60, 97), (400, 250)])
    def test_scales_as_pillow_does(self, width: int, height: int) -> None:
        """Both scale with antialiasing. They may round to different integers."""
        image = np.random.default_rng(0).integers(0, 256, (97, 151, 3), np.uint8)
        placement = compute_placement(source_size=(151, 97), target_size=(width, height))
        _, left, top, inner_width, inner_height = placement  # the first is the scale

        fitted = fit_image(image, height=height, width=width)
        without_padding = fitted[top : top + inner_height, left : left + inner_width]

        by_pillow = Image.fromarray(image).resize(
            (inner_width, inner_height), Image.Resampling.BILINEAR
        )
        difference = without_padding.astype(int) - np.asarray(by_pillow)
        assert np.abs(difference).max() <= 1

    def test_pads_a_wide_image_above_and_below(self) -> None:
        white = np.full((100, 200, 3), 255, np.uint8)
        fitted = fit_image(white, height=100, width=100)
        is_row_lit = fitted.any(axis=(1, 2)).tolist()
        # The image is scaled to 100 × 50, and 25 of the 100 rows are left on either side.
        assert is_row_lit == [False] * 25 + [True] * 50 + [False] * 25

    def test_returns_an_image_of_the_right_size_unchanged(self) -> None:
        white = np.full((100, 200, 3), 255, np.uint8)
        assert fit_image(white, height=100, width=200) is white


def test_the_visible_window_includes_the_padding() -> None:
    """An image of 200 × 100 in a square gets padding above and below, each half of its height."""
    window = compute_visible_window(source=(200, 100), target=(100, 100))

    assert window == (0, -50, 200, 200)  # left, top, width and height in pixels of the source


# Twice the size, nearly the same aspect, and an enlargement of less than 1.25.
@pytest.mark.parametrize("size", [(560, 420), (561, 420), (240, 180)])
def test_images_that_lose_next_to_nothing_are_not_described(size: tuple[int, int]) -> None:
    assert describe_fit_losses(source=size, target=SPEAR1_SIZE) is None


def test_bars_that_training_had_are_not_described(processor: Processor, tmp_path: Path) -> None:
    """A robot that sends what its policy was trained with gets no advice to change it.

    The images of training were 85 × 64 pixels, which is 4:3 up to rounding. The robot sends 4:3,
    then 16:9.
    """
    processor.save(tmp_path)
    edit_json(tmp_path / "processor.json", lambda it: it.update(training_aspects={VIEW: [85 / 64]}))
    loaded = Processor.load(tmp_path)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.prepare_image(np.zeros((480, 640, 3), np.uint8), VIEW)
    with pytest.warns(Notice, match=r"black bars .* images of training had width / height 1\.33"):
        loaded.prepare_image(np.zeros((360, 640, 3), np.uint8), VIEW)


# A square fills 210 of the 280 columns. An image of 16:9 fills 157.5 of the 210 rows.
@pytest.mark.parametrize(
    ("size", "description"),
    [
        (
            (256, 256),
            "of 256×256 are fitted into 280×210 with black bars left and right (25% of the area)",
        ),
        (
            (1280, 720),
            "of 1280×720 are fitted into 280×210 with black bars above and below (25% of the area)",
        ),
    ],
)
def test_black_bars_are_described(size: tuple[int, int], description: str) -> None:
    assert describe_fit_losses(source=size, target=SPEAR1_SIZE) == description


def test_enlargement_is_described() -> None:
    """From 192 to 280 pixels is 1.46 times."""
    assert "enlarged 1.5 times" in str(describe_fit_losses((192, 128), SPEAR1_SIZE))


def test_images_may_be_mirrored_views(processor: Processor) -> None:
    bgr = np.random.default_rng(0).integers(0, 256, (128, 192, 3), np.uint8)
    rgb_view = bgr[:, :, ::-1]  # how users of OpenCV reorder the colors

    prepared = processor.prepare_image(rgb_view, "external")

    assert torch.equal(prepared, processor.prepare_image(bgr, "external").flip(0))


def test_empty_images_are_refused(processor: Processor) -> None:
    empty = np.zeros((0, 192, 3), np.uint8)
    refuses("is no image", processor.prepare_image, empty, "external")


class TestAnswers:
    def test_go_through_tokens_and_back(self, processor: Processor) -> None:
        """Text stays the same, a pixel is as near as its 1,024 steps allow, and a number is in the
        same bin."""
        segments = ["at ", Pixel(0.1, 0.7), " and ", 0.3, -1.2, " ¿ok? ", Pixel(0.0, 0.999)]
        end_token_and_more = [1, 5, 5]  # what follows the end token does not belong to the answer
        half_step = 0.5 / 1024 + 1e-9  # with a tolerance for rounding

        decoded = processor.decode_answer([*processor.encode_answer(segments), *end_token_and_more])

        assert len(decoded) == len(segments)
        for segment, decoded_segment in zip(segments, decoded, strict=True):
            assert type(segment) is type(decoded_segment)
            if isinstance(segment, Pixel):
                assert decoded_segment.x == pytest.approx(segment.x, abs=half_step)
                assert decoded_segment.y == pytest.approx(segment.y, abs=half_step)
            elif isinstance(segment, float):
                encode = processor.coordinates.encode
                assert encode(np.array(segment)) == encode(np.array(decoded_segment))
            else:
                assert segment == decoded_segment

    def test_a_location_token_without_a_partner_stays_text(self, processor: Processor) -> None:
        y_token = processor.encode_answer([Pixel(0.5, 0.5)])[:1]
        assert processor.decode_answer(y_token) == ["<loc0512>"]  # step 512 of 1,024

    def test_no_tokens_are_no_segments(self, processor: Processor) -> None:
        assert processor.decode_answer([]) == []

    @pytest.mark.parametrize(
        ("segments", "is_allowed"),
        [([0.5, -3.0, Pixel(0.9, 0.8)], True), ([0.5, Pixel(0.9, 0.8), -3.0], False)],
    )
    def test_the_grammar_allows_numbers_then_pixels(
        self, processor: Processor, segments: list[float | Pixel], is_allowed: bool
    ) -> None:
        ids = processor.encode_answer(segments)
        ranges = processor.make_coordinate_grammar(num_numbers=2, num_pixels=1)
        is_in_range = [first <= i < end for i, (first, end) in zip(ids, ranges, strict=True)]
        assert all(is_in_range) is is_allowed


class TestQuestions:
    """A batch of two questions: the answer of the first is 24 numbers, of the second a word."""

    prompt = "where is the bowl"

    @pytest.fixture
    def batch(self, processor: Processor) -> dict[str, torch.Tensor]:
        vertices = [float(v) for v in np.random.default_rng(1).normal(size=24)]
        box_question = Question("box_vertices", self.prompt, vertices, ["bowl"])
        yes_no_question = Question("exists", "is it?", ["yes"], ["it"])
        return processor.encode_questions([box_question, yes_no_question])

    def test_labels_are_the_tokens_of_the_answer(self, batch: dict[str, torch.Tensor]) -> None:
        labels = batch["labels"]
        is_learned = labels != IGNORE_LABEL
        assert torch.equal(labels[is_learned], batch["input_ids"][is_learned])
        assert torch.equal(is_learned, batch["token_type_ids"].bool())

    def test_an_answer_is_its_numbers_and_the_end_token(
        self, processor: Processor, batch: dict[str, torch.Tensor]
    ) -> None:
        answer = batch["labels"][0][batch["token_type_ids"][0].bool()]
        assert len(answer) == 24 + 1
        assert answer[-1] == processor.tokenizer.eos_token_id

    def test_the_prompt_is_that_of_encode_prompts(
        self, processor: Processor, batch: dict[str, torch.Tensor]
    ) -> None:
        is_prompt = batch["attention_mask"][0].bool() & ~batch["token_type_ids"][0].bool()
        ids = batch["input_ids"][0][is_prompt].tolist()
        assert ids[0] == processor.tokenizer.bos_token_id
        assert processor.tokenizer.decode(ids[1:]) == f"{self.prompt}\n"
        assert ids == processor.encode_prompts([self.prompt])["input_ids"][0].tolist()

    def test_padding_is_masked(self, processor: Processor, batch: dict[str, torch.Tensor]) -> None:
        is_padding = batch["input_ids"] == processor.tokenizer.pad_token_id
        assert torch.equal(is_padding, batch["attention_mask"] == 0)
        assert batch["labels"].shape == batch["input_ids"].shape

    def test_with_numbers_of_another_unit_are_refused(self, processor: Processor) -> None:
        relative = Question("distance", "how far is it", [0.5], ["it"], unit="relative")
        refuses("'how far is it' .*'relative'.*'metre'", processor.encode_questions, [relative])

    def test_without_numbers_may_have_any_unit(self, processor: Processor) -> None:
        processor.encode_questions([Question("exists", "is it?", ["yes"], ["it"], unit="relative")])


class TestPrompts:
    def test_empty_ones_are_refused(self, processor: Processor) -> None:
        refuses("empty instruction", processor.encode_prompts, ["put it there", " \n"])
        refuses("empty instruction", processor.encode_instructions, ["..."])

    def test_too_long_ones_are_refused(self, processor: Processor) -> None:
        """Each of the 400 letters is a token, to which "<bos>" and a newline are added."""
        refuses("the prompt 'xyzw.*has 402 tokens", processor.encode_prompts, ["xyzw" * 100])

    def test_too_long_ones_are_cut_in_training(self, processor: Processor) -> None:
        with pytest.warns(Notice, match="xyzw"):
            ids = processor.encode_prompts(["go", "xyzw" * 100], cut=True)["input_ids"]
        newline_id = processor.encode_prompts(["go"])["input_ids"][0, -1]
        assert ids.shape == (2, processor.prompt_tokens)
        assert ids[1, -1] == newline_id

    @pytest.mark.parametrize(
        "method", ["encode_prompts", "encode_instructions", "encode_questions"]
    )
    def test_none_at_all_are_no_rows(self, processor: Processor, method: str) -> None:
        encode = getattr(processor, method)

        batch = encode([])

        for tensor in batch.values():
            assert tensor.shape == (0, 0)

    def test_how_an_instruction_is_typed_does_not_matter(self, processor: Processor) -> None:
        variants = ["put it there", "Put it there.", "put it there.\r\n", " PUT it  there !"]
        ids = processor.encode_instructions(variants)["input_ids"]
        expected = processor.encode_prompts(["put it there"] * 4)["input_ids"]
        assert torch.equal(ids, expected)


@pytest.mark.parametrize(
    "typed", ["<bos>", "<eos>x", "<loc0001>", "<loc0001><loc1024>", "a<3d0007> [x] < y"]
)
class TestTypedTokenNames:
    """The name of a token that a user types is text, not the token.

    Only the two location tokens of a pixel are recognized as tokens.
    """

    @pytest.fixture
    def named_ids(self, processor: Processor) -> set[int]:
        """The ids of all special, location and 3D tokens."""
        return set(processor.tokenizer.get_added_vocab().values())

    def test_stay_text_in_an_instruction(
        self, processor: Processor, named_ids: set[int], typed: str
    ) -> None:
        ids = processor.encode_instructions([f"put it {typed} there"])["input_ids"][0].tolist()
        after_bos = ids[1:]
        assert not named_ids.intersection(after_bos)
        assert processor.tokenizer.decode(after_bos) == f"put it {typed} there\n"

    def test_stay_text_in_an_answer(
        self, processor: Processor, named_ids: set[int], typed: str
    ) -> None:
        ids = processor.encode_answer([typed, Pixel(0.1, 0.2)])
        before_pixel = ids[:-2]
        assert not named_ids.intersection(before_pixel)
        assert processor.decode_answer(ids)[0] == typed

    def test_stay_text_beside_a_pixel(
        self, processor: Processor, named_ids: set[int], typed: str
    ) -> None:
        prompt = f"what is at {Pixel(0.1, 0.2)} {typed}?"
        ids = processor.encode_prompts([prompt])["input_ids"][0, 1:].tolist()
        num_named = sum(i in named_ids for i in ids)
        assert num_named == 2  # y and x of the pixel


@pytest.mark.parametrize("text", ["put the carrot", "naïve 漢字 \t tabs", "<3d0007> is a token"])
def test_any_text_survives_the_tokenizer(processor: Processor, text: str) -> None:
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    assert processor.tokenizer.decode(ids) == text


def test_a_trained_tokenizer_has_gemmas_special_tokens_and_the_3d_tokens_last(
    processor: Processor,
) -> None:
    special_tokens = ["<pad>", "<eos>", "<bos>"]
    assert processor.tokenizer.convert_tokens_to_ids(special_tokens) == [0, 1, 2]
    assert len(processor.tokenizer) == processor.coordinate_ids.start + 1024


def test_ever_new_texts_take_no_memory(
    processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of tokens has a limited number of texts, and no long ones."""
    monkeypatch.setattr(processing, "MAX_CACHED_TEXTS", 8)

    for number in range(20):
        processor.encode_prompts([f"put {number}"])
        refuses("more than 64", processor.encode_prompts, [f"{number} " * 100])

    assert len(processor._token_cache) <= 8
    assert max(len(text) for text in processor._token_cache) < 20


class TestSavedProcessor:
    def test_has_the_same_ids_and_sizes(self, processor: Processor, tmp_path: Path) -> None:
        segments = ["the mug is ", 0.25, Pixel(0.3, 0.4)]

        processor.save(tmp_path)
        loaded = Processor.load(tmp_path)

        assert loaded.encode_answer(segments) == processor.encode_answer(segments)
        assert loaded.image_sizes == processor.image_sizes
        assert list(loaded.image_sizes) == ["external", "wrist"]
        prompts = loaded.encode_prompts(TEXTS)["input_ids"]
        assert torch.equal(prompts, processor.encode_prompts(TEXTS)["input_ids"])

    @pytest.mark.parametrize(
        ("content", "key"),
        [
            ("{", ""),
            (
                '{"image_sizes": [["external", 192, 0.5]], "prompt_tokens": 64}',
                r"image_sizes\.0\.2 ",
            ),
        ],
    )
    def test_that_is_broken_is_refused(
        self, processor: Processor, tmp_path: Path, content: str, key: str
    ) -> None:
        """The message has the key of the bad value, such as the height 0.5 of the first view."""
        processor.save(tmp_path)
        (tmp_path / "processor.json").write_text(content)
        refuses(rf"processor\.json contains no processor .*{key}", Processor.load, tmp_path)

    def test_without_the_tokenizers_config_is_refused(
        self, processor: Processor, tmp_path: Path
    ) -> None:
        processor.save(tmp_path)
        (tmp_path / "tokenizer_config.json").unlink()
        refuses("pad_token_id", Processor.load, tmp_path)

    def test_with_a_broken_tokenizer_is_refused(self, processor: Processor, tmp_path: Path) -> None:
        processor.save(tmp_path)
        (tmp_path / "tokenizer.json").write_text('{"added_tokens": [], "model": {"type": "BPE"}}')
        refuses("the tokenizer in .* is broken", Processor.load, tmp_path)


@pytest.mark.parametrize(
    "size", [(96, 96), (60, 120), (160, 90), (848, 480), (192, 128), (384, 256)]
)
class TestPixels:
    """A pixel in images of several sizes, marked by a white square of 8×8 pixels on black.

    `size` is the (width, height) of the image.
    """

    square_px = 8

    def corner(self, size: tuple[int, int]) -> tuple[int, int]:
        """The left and top edges of the square, in pixels: about 5/8 and 2/8 of the image."""
        width, height = size
        return width // 8 * 5, height // 8 * 2

    def pixel(self, size: tuple[int, int]) -> Pixel:
        """The center of the square, as fractions of the image."""
        width, height = size
        left, top = self.corner(size)
        return Pixel((left + self.square_px / 2) / width, (top + self.square_px / 2) / height)

    def prepared(self, processor: Processor, size: tuple[int, int]) -> torch.Tensor:
        """One channel [h, w] of the prepared image."""
        width, height = size
        left, top = self.corner(size)
        image = np.zeros((height, width, 3), np.uint8)
        image[top : top + self.square_px, left : left + self.square_px] = 255
        return processor.prepare_image(image, "external")[0].double()

    def test_are_where_the_prepared_image_shows_them(
        self, processor: Processor, size: tuple[int, int]
    ) -> None:
        pixels = self.prepared(processor, size)
        height, width = pixels.shape
        # The center of mass of the white square.
        x_px = (torch.arange(width) + 0.5).double()
        y_px = (torch.arange(height) + 0.5).double()
        center_x = float(x_px @ pixels.sum(0) / pixels.sum())
        center_y = float(y_px @ pixels.sum(1) / pixels.sum())

        mapped = map_pixel(self.pixel(size), size, (width, height))

        np.testing.assert_allclose(mapped.x * width, center_x, atol=0.1)
        np.testing.assert_allclose(mapped.y * height, center_y, atol=0.1)

    def test_are_scaled_alike_across_and_down(
        self, processor: Processor, size: tuple[int, int]
    ) -> None:
        pixels = self.prepared(processor, size)
        height, width = pixels.shape
        source_width, source_height = size
        scale = min(width / source_width, height / source_height)
        expected_area = (self.square_px * scale) ** 2
        assert float(pixels.sum()) / 255 == pytest.approx(expected_area, rel=0.05)

    def test_map_back(self, processor: Processor, size: tuple[int, int]) -> None:
        pixel = self.pixel(size)
        target = processor.image_sizes["external"]

        mapped = map_pixel(pixel, size, target)
        back = map_pixel(mapped, size, target, inverse=True)

        np.testing.assert_allclose((back.x, back.y), (pixel.x, pixel.y), atol=1e-9)

    def test_in_a_question_are_mapped_in_prompt_and_answer(
        self, processor: Processor, size: tuple[int, int]
    ) -> None:
        pixel = self.pixel(size)
        width, height = processor.image_sizes["external"]
        question = Question("what_at", f"what is at {pixel}?", ["it at ", pixel], ["it"])

        mapped = processor.map_question_pixels(question, size, "external")

        source_width, source_height = size
        has_same_aspect = source_width / source_height == width / height
        if has_same_aspect:
            assert mapped == question
        else:
            mapped_pixel = map_pixel(pixel, size, (width, height))
            assert mapped != question
            assert mapped.prompt == f"what is at {mapped_pixel}?"
            assert mapped.segments == ["it at ", mapped_pixel]
