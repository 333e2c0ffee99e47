"""Images are never stretched; words and numbers go through tokens and back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from refusals import refuses
from spear.errors import Notice
from spear.models import processing
from spear.models.presets import get_preset
from spear.models.processing import Processor, describe_fit, map_pixel, visible_window
from spear.models.vlm import IGNORE_LABEL
from spear.tokens import CoordinateTokenizer
from spear.types import Pixel, Question
from spear.util.images import compute_placement, fit_image

TEXTS = ["put the carrot on the plate", "where is the bowl"]
TEXTS += ["the mug is  and the cup is  so the mug is closer"]


@pytest.fixture(scope="module")
def processor() -> Processor:
    values = np.random.default_rng(0).normal(size=4000)
    return Processor.build(get_preset("nano"), TEXTS, CoordinateTokenizer.fit(values))


def test_images_are_scaled_as_pillow_does_it() -> None:
    """With antialiasing, by which networks learned to see; Pillow rounds some numbers the other way."""
    image = np.random.default_rng(0).integers(0, 256, (97, 151, 3), np.uint8)
    for height, width in ((40, 60), (97, 60), (250, 400)):
        _, left, top, across, down = compute_placement((151, 97), (width, height))
        theirs = np.asarray(
            Image.fromarray(image).resize((across, down), Image.Resampling.BILINEAR)
        )
        ours = fit_image(image, height, width)[top : top + down, left : left + across]
        assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_padding_keeps_the_whole_image_and_is_said() -> None:
    white = np.full((100, 200, 3), 255, np.uint8)
    assert (
        fit_image(white, 100, 100).any(axis=(1, 2)).tolist()
        == [False] * 25 + [True] * 50 + [False] * 25
    )
    assert fit_image(white, 100, 200) is white and visible_window((200, 100), (100, 100)) == (
        0,
        -50,
        200,
        200,
    )
    assert not any(describe_fit(size, (280, 210)) for size in ((560, 420), (561, 420), (240, 180)))
    said = "256×256 shown in 280×210 with black bars left and right, 25% of it, nothing stretched"
    assert describe_fit((256, 256), (280, 210)) == said
    assert "above and below, 25%" in str(describe_fit((1280, 720), (280, 210)))
    assert "enlarged 1.5 times" in str(describe_fit((192, 128), (280, 210)))


def test_images_may_be_mirrored_views_but_not_empty(processor: Processor) -> None:
    bgr = np.random.default_rng(0).integers(0, 256, (128, 192, 3), np.uint8)
    rgb = processor.prepare_image(
        bgr[:, :, ::-1], "external"
    )  # as OpenCV's users turn the colours around
    assert torch.equal(rgb, processor.prepare_image(bgr, "external").flip(0))
    refuses("wrong image type", processor.prepare_image, bgr[:0], "external")


def test_answers_go_through_tokens_and_back(processor: Processor) -> None:
    segments = ["at ", Pixel(0.1, 0.7), " and ", 0.3, -1.2, " ¿ok? ", Pixel(0.0, 0.999)]
    back = processor.decode_answer([*processor.encode_answer(segments), 1, 5, 5])
    assert [type(s) for s in back] == [type(s) for s in segments]
    for a, b in zip(segments, back, strict=True):
        if isinstance(a, Pixel) and isinstance(b, Pixel):
            assert (b.x, b.y) == pytest.approx((a.x, a.y), abs=0.5 / 1024 + 1e-9)
        elif isinstance(a, float):
            assert processor.coordinates.encode(np.array(a)) == processor.coordinates.encode(
                np.array(b)
            )
        else:
            assert a == b
    assert processor.decode_answer(processor.encode_answer([Pixel(0.5, 0.5)])[:1]) == ["<loc0512>"]
    assert processor.decode_answer([]) == []


def test_grammar_admits_the_answer_and_its_like_only(processor: Processor) -> None:
    for answer, like in (
        ([0.5, -3.0, Pixel(0.9, 0.8)], True),
        ([0.5, Pixel(0.9, 0.8), -3.0], False),
    ):
        pairs = zip(
            processor.encode_answer(answer), processor.coordinate_grammar(2, 1), strict=True
        )
        assert all(low <= i < high for i, (low, high) in pairs) is like


def test_questions_become_prompt_answer_and_labels(processor: Processor) -> None:
    box = [float(v) for v in np.random.default_rng(1).normal(size=24)]
    there = Question("exists", "is it?", ["yes"], ["it"])
    batch = processor.encode_questions(
        [Question("box_vertices", "where is the bowl", box, ["bowl"]), there]
    )
    ids, labels = batch["input_ids"], batch["labels"]
    tokens = processor.tokenizer
    assert ids.shape == labels.shape == batch["token_type_ids"].shape
    learned = labels != IGNORE_LABEL
    assert torch.equal(labels[learned], ids[learned]) and torch.equal(
        learned, batch["token_type_ids"].bool()
    )
    assert int(learned[0].sum()) == 25 and labels[0][learned[0]][-1] == tokens.eos_token_id
    prompt = ids[0][~learned[0] & batch["attention_mask"][0].bool()].tolist()
    assert prompt[0] == tokens.bos_token_id and tokens.decode(prompt[1:]) == "where is the bowl\n"
    assert torch.equal(ids == tokens.pad_token_id, batch["attention_mask"] == 0)
    assert processor.encode_prompts(["where is the bowl"])["input_ids"][0].tolist() == prompt


def test_what_cannot_be_said_is_refused(processor: Processor) -> None:
    relative = Question("distance", "how far is it", [0.5], ["it"], "relative")
    refuses("'how far is it': .*'relative'.*'metre'", processor.encode_questions, [relative])
    processor.encode_questions([Question("exists", "is it?", ["yes"], ["it"], "relative")])
    refuses("empty instruction", processor.encode_prompts, ["put it there", " \n"])
    refuses("prompt too long: 'xyzw", processor.encode_prompts, ["xyzw" * 100])
    with pytest.warns(Notice, match="xyzw"):  # in training, by contrast
        whole = processor.encode_prompts(["go", "xyzw" * 100], cut=True)["input_ids"]
    assert whole.shape == (2, processor.prompt_tokens)
    assert whole[1, -1] == processor.encode_prompts(["go"])["input_ids"][0, -1]


def test_no_texts_and_no_questions_are_no_rows(processor: Processor) -> None:
    for batch in (
        processor.encode_prompts([]),
        processor.encode_instructions([]),
        processor.encode_questions([]),
    ):
        assert {part.shape for part in batch.values()} == {(0, 0)}


def test_how_an_instruction_is_typed_does_not_matter(processor: Processor) -> None:
    typed = processor.encode_instructions(
        ["put it there", "Put it there.", "put it there.\r\n", " PUT it  there !"]
    )
    assert torch.equal(
        typed["input_ids"], processor.encode_prompts(["put it there"] * 4)["input_ids"]
    )
    refuses("empty instruction", processor.encode_instructions, ["..."])


@pytest.mark.parametrize(
    "typed", ["<bos>", "<eos>x", "<loc0001>", "<loc0001><loc1024>", "a<3d0007> [x] < y"]
)
def test_names_of_tokens_that_somebody_types_stay_text(processor: Processor, typed: str) -> None:
    """Location tokens are such only in pairs, as a place."""
    tokens, named = processor.tokenizer, set(processor.tokenizer.get_added_vocab().values())
    prompt = processor.encode_instructions([f"put it {typed} there"])["input_ids"][0].tolist()
    answer = processor.encode_answer([typed, Pixel(0.1, 0.2)])
    assert (
        not named & {*prompt[1:], *answer[:-2]}
        and tokens.decode(prompt[1:]) == f"put it {typed} there\n"
    )
    assert processor.decode_answer(answer)[0] == typed
    place = f"what is at {Pixel(0.1, 0.2)} {typed}?"
    assert (
        sum(i in named for i in processor.encode_prompts([place])["input_ids"][0, 1:].tolist()) == 2
    )


def test_any_text_survives_the_tokenizer(processor: Processor) -> None:
    for text in ("put the carrot", "naïve 漢字 \t tabs", "<3d0007> is a token"):
        assert (
            processor.tokenizer.decode(processor.tokenizer.encode(text, add_special_tokens=False))
            == text
        )
    assert processor.tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<bos>"]) == [0, 1, 2]
    assert len(processor.tokenizer) == processor.coordinate_ids.start + 1024


def test_ever_new_texts_take_no_memory(
    processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processing, "MAX_CACHED_TEXTS", 8)
    for k in range(20):
        processor.encode_prompts([f"put {k}"])
        refuses("too long", processor.encode_prompts, [f"{k} " * 100])
    assert len(processor._cache) <= 8 and all(len(text) < 20 for text in processor._cache)


def test_saving_and_loading_keeps_every_id(processor: Processor, tmp_path: Path) -> None:
    processor.save(tmp_path)
    again = Processor.load(tmp_path)
    segments = ["the mug is ", 0.25, Pixel(0.3, 0.4)]
    assert again.encode_answer(segments) == processor.encode_answer(segments)
    assert again.image_sizes == processor.image_sizes and list(again.image_sizes) == [
        "external",
        "wrist",
    ]
    assert torch.equal(
        again.encode_prompts(TEXTS)["input_ids"], processor.encode_prompts(TEXTS)["input_ids"]
    )
    half = '{"image_sizes": [["external", 192, 0.5]], "prompt_tokens": 64}'
    for text, key in (("{", ""), (half, r"image_sizes\.0\.2 ")):
        (tmp_path / "processor.json").write_text(text)
        refuses(rf"processor\.json: broken processor .*{key}", Processor.load, tmp_path)
    processor.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    refuses("pad_token_id", Processor.load, tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [], "model": {"type": "BPE"}}')
    refuses("broken tokenizer", Processor.load, tmp_path)


@pytest.mark.parametrize(
    "size", [(96, 96), (60, 120), (160, 90), (848, 480), (192, 128), (384, 256)]
)
def test_places_are_where_the_padded_image_shows_them(
    processor: Processor, size: tuple[int, int]
) -> None:
    w, h = size
    image = np.zeros((h, w, 3), np.uint8)
    image[h // 8 * 2 : h // 8 * 2 + 8, w // 8 * 5 : w // 8 * 5 + 8] = 255
    place = Pixel((w // 8 * 5 + 4) / w, (h // 8 * 2 + 4) / h)
    shown = processor.prepare_image(image, "external")[0].double()
    height, width = shown.shape
    places = [(torch.arange(n) + 0.5).double() for n in shown.shape]
    y, x = (
        float(at @ shown.sum(axis) / shown.sum()) for axis, at in zip((1, 0), places, strict=True)
    )
    area = (
        64 * min(width / w, height / h) ** 2
    )  # of a square of 8 pixels, scaled alike across and down
    assert float(shown.sum()) / 255 == pytest.approx(area, rel=0.05)
    found = map_pixel(place, size, (width, height))
    np.testing.assert_allclose((found.x * width, found.y * height), (x, y), atol=0.1)
    again = map_pixel(found, size, (width, height), back=True)
    np.testing.assert_allclose((again.x, again.y), (place.x, place.y), atol=1e-9)
    asked = Question("what_at", f"what is at {place}?", ["it at ", place], ["it"])
    framed = processor.map_question_pixels(asked, size, "external")
    assert (framed == asked) is (w / h == width / height)
    if framed != asked:
        assert framed.prompt == f"what is at {map_pixel(place, size, (width, height))}?"
        assert framed.segments == ["it at ", found]
