"""Images to ask about, from files or held-out scenes; and one question about one image."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from spear.errors import SpearError, check_known
from spear.evaluate.vqa.calibration import TRUSTED_COVERAGE, Trust
from spear.labels.pipeline import label_with_ground_truth
from spear.labels.questions.generate import abbreviate_unit, format_answer
from spear.labels.questions.templates import (
    KEYPOINT_NAMES,
    PROMPT_TEMPLATES,
    UNIT_TEMPLATES,
    is_a,
    with_article,
)
from spear.labels.store import select_labels
from spear.models.processing import Processor
from spear.models.readout import Decode, Distribution, replace_numbers
from spear.policy import Answer, VlmBundle
from spear.question_types import QUESTION_TYPES
from spear.types import Array, Frame, LabeledImage
from spear.util.images import load_image

NUM_BOX_NUMBERS = 24
MAX_NAME_TOKENS = 8  # of an answer to "what is there?"


def load_picture(source: str, size: tuple[int, int], camera: str = "external") -> Frame:
    """Load the image to ask about.

    Args:
        source: An image file (raises as `util.images.load_image`), or "sim:SEED" for a held-out
            scene, whose camera is known.
        size: (width, height) of the rendered scene, px.
        camera: The name of a camera of the scene.
    """
    if source.startswith("sim:"):
        return next(render_held_out_frames(1, parse_sim_seed(source), size, camera))
    return Frame(load_image(source))


def ask_question(
    model: VlmBundle,
    image: Array,
    question: str,
    question_type: str | None = None,
    decode: Decode = "median",
    trust: Trust | None = None,
    view: str = "external",
) -> tuple[Answer | None, str]:
    """Ask a model one question about an image.

    Args:
        model: SPEAR-VLM with its processor.
        image: [h, w, 3] uint8.
        question: In words.
        question_type: One of `QUESTION_TYPES`. If it is None, the type that the wording belongs to
            (`parse_question`) is used; if it belongs to none, the answer is free.
        decode: How numbers are read off the model's probabilities.
        trust: With it, the text also says how sure the numbers are, or that this is not known.
        view: The camera that took the image.

    Returns:
        The answer and its text. The answer is None if the model does not see the object.

    Raises:
        SpearError: The question type is unknown, or the question is empty.
    """
    if question_type is not None:
        check_known("question type", QUESTION_TYPES, question_type)
    if not question.strip():
        raise SpearError("empty question: ask something about the image, in words")
    parsed_type, names = parse_question(question) or (None, [])
    question_type = question_type or parsed_type

    if trust and trust.tells_absent and names:
        absent = find_absent_objects(model, image, names, view)
        if absent:
            return None, _describe_absent(absent)

    (answer,) = model.answer([image], [question], question_type, view, distributions=True)
    distribution = answer.distribution
    if distribution:
        segments = replace_numbers(answer.segments, distribution.read(decode))
        answer = replace(answer, segments=segments)
    text = format_reply(answer, image)
    if trust and distribution:
        is_known_wording = parsed_type is not None and question_type == parsed_type
        certainty = _describe_certainty(
            answer, distribution, question_type, is_known_wording, trust
        )
        text += f"\n  {certainty}"
    return answer, text


def _describe_absent(absent: dict[str, str]) -> str:
    descriptions = []
    for name, seen_name in absent.items():
        descriptions.append(f"{name} (where the model points for it, it sees: {seen_name})")
    return f"not in the picture: {'; '.join(descriptions)}"


def _describe_certainty(
    answer: Answer,
    distribution: Distribution,
    question_type: str | None,
    is_known_wording: bool,
    trust: Trust,
) -> str:
    """How sure the numbers of an answer are, as far as it was measured."""
    if not is_known_wording or question_type is None:  # intervals were measured with known wordings
        template = PROMPT_TEMPLATES[question_type or "distance"][0]
        example = template.format(x="the mug", y="the bowl", p=KEYPOINT_NAMES["closest"][0])
        return (
            f'how sure this is, is not known: ask in a wording that was taught, such as "{example}"'
        )
    if question_type not in trust.factors:
        return "how sure this is, was not measured for this kind of question"
    low, high = trust.interval(question_type, distribution)
    if len(low) > 3:
        intervals = f"each number ± {float((high - low).mean()) / 2:.3f}"
    else:
        intervals = "; ".join(f"{a:.3f} … {b:.3f}" for a, b in zip(low, high, strict=True))
    return f"{TRUSTED_COVERAGE:.0%} interval: {intervals} {abbreviate_unit(answer.unit)}"


def parse_question(question: str) -> tuple[str, list[str]] | None:
    """Parse a 3D question in one of its known wordings.

    Returns:
        The question type and the objects that it names; None for any other question.
    """
    text = " ".join(question.split())
    for templates in UNIT_TEMPLATES.values():
        for template in templates:
            prefix, suffix = template.split("{}")
            text = text.removeprefix(prefix).removesuffix(suffix)
    text = text.rstrip(" ?.")

    for question_type in QUESTION_TYPES:
        for prompt in PROMPT_TEMPLATES[question_type]:
            match = re.fullmatch(_to_pattern(prompt), text, re.IGNORECASE)
            if match:
                names = match.groupdict()
                return question_type, [names[gap] for gap in sorted(names)]
    return None


def _to_pattern(prompt: str) -> str:
    """A prompt template as a regular expression whose groups x and y are the objects' names."""
    keypoints: list[str] = []
    for words in KEYPOINT_NAMES.values():
        keypoints += [re.escape(word) for word in words]
    pattern = re.escape(prompt.rstrip("?"))
    pattern = pattern.replace(r"\{p\}", f"(?:{'|'.join(keypoints)})")
    # A name goes on until a comma, or until a word that begins the second object.
    name = r"(?:(?:the|an?) )?(?P<\1>(?:(?! (?:from|and|to) (?:the|an?) )[^?,])+)"
    return re.sub(r"\\{([xy])\\}", name, pattern)


def find_absent_objects(
    model: VlmBundle, image: Array, names: Sequence[str], view: str = "external"
) -> dict[str, str]:
    """Find the objects that the model does not see in an image.

    The model points at each object and then names what is at that point. Only a model that was
    taught both can be asked (`Trust.tells_absent`).

    Returns:
        Name of each absent object → what the model sees instead.
    """
    images = [image] * len(names)
    location_template = PROMPT_TEMPLATES["centre_2d"][0]
    locations = [location_template.format(x=with_article(name, True)) for name in names]
    points = model.answer(images, locations, "centre_2d", view)

    name_template = PROMPT_TEMPLATES["what_at"][0]
    naming = [name_template.format(p=answer.segments[0]) for answer in points]
    answers = model.answer(images, naming, "what_at", view, max_new_tokens=MAX_NAME_TOKENS)

    absent = {}
    for name, answer in zip(names, answers, strict=True):
        seen_name = format_reply(answer, image)
        if not is_a(seen_name, name) and not is_a(name, seen_name):
            absent[name] = seen_name
    return absent


def format_reply(answer: Answer, image: Array) -> str:
    """An answer as text, with image points in pixels of `image`; a box by its center and
    vertices.
    """
    values = answer.values
    if len(values) == len(answer.segments) == NUM_BOX_NUMBERS:
        vertices = np.reshape(values, (8, 3))
        lines = [f"centre {format_answer(vertices.mean(0).tolist(), answer.unit)}; vertices:"]
        lines += [format_answer(vertex, answer.unit) for vertex in vertices.tolist()]
        return "\n  ".join(lines)
    return format_answer(answer.segments, answer.unit, image.shape[1::-1]) or "(no answer)"


def load_labeled_images(
    source: str, num_images: int, view: str, processor: Processor
) -> list[LabeledImage]:
    """Load at most `num_images` labeled images, as one camera of a model sees them.

    Args:
        source: A folder of label shards, or with a sub-folder of them per view; images are taken
            evenly spread. Or "sim" or "sim:SEED": held-out scenes from SEED on.
        num_images: Maximum number of images.
        view: The camera.
        processor: The model's processor.

    Raises:
        SpearError: The view is unknown; the folder has no labels; the labels have another unit than
            the model's numbers; or the seeds are not held out.
    """
    check_known("view", processor.image_sizes, view)
    if (source == "sim" or source.startswith("sim:")) and not Path(source).exists():
        size = processor.image_sizes[view]
        frames = render_held_out_frames(num_images, parse_sim_seed(source), size, view)
        labels = list(label_with_ground_truth(frames))
    else:
        folder = Path(source)
        if (folder / view).is_dir():
            folder = folder / view
        labels = select_labels(folder, num_images)

    unit = processor.coordinates.unit
    for label in labels:
        if label.unit != unit:
            raise SpearError(
                f"{source}: {label.source} is labelled in unit {label.unit!r}, "
                f"the model answers in {unit!r}: "
                "label with a point map of that unit, or ask another model"
            )
    return labels


def parse_sim_seed(source: str) -> int:
    """The seed in "sim:SEED"; 0 of "sim". Raises `SpearError` where it is no number."""
    seed = source.partition(":")[2] or "0"
    if not seed.isdecimal():
        raise SpearError(f"{source!r}: write sim:SEED with a number, for example sim:7")
    return int(seed)


def render_held_out_frames(
    num_scenes: int, first_seed: int, size: tuple[int, int], camera: str = "external"
) -> Iterator[Frame]:
    """Render scenes first_seed, first_seed + 1, … with their ground truth.

    Args:
        num_scenes: How many scenes.
        first_seed: The seed of the first scene.
        size: (width, height), px.
        camera: "external" or "wrist".

    Raises:
        SpearError: Training uses these seeds (10,000 and above).
    """
    from spear.sim.render import render_clutter_frame
    from spear.sim.scene import held_out_seeds

    for seed in held_out_seeds(first_seed, num_scenes):
        yield render_clutter_frame(seed, camera, size)
