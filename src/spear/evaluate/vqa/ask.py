"""Load images to ask a SPEAR-VLM about, from files or held-out scenes, and ask one question."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from spear.errors import SpearError, check_known
from spear.evaluate.noise import NOISE_LEVELS, degrade_scene_image
from spear.evaluate.vqa.calibration import TRUSTED_COVERAGE, Trust
from spear.evaluate.vqa.wording import (
    ParsedQuestion,
    explain_question_is_untaught,
    understand_question,
)
from spear.labels.pipeline import label_with_ground_truth
from spear.labels.questions.generate import abbreviate_unit, format_answer
from spear.labels.questions.templates import KEYPOINT_NAMES, can_be_called, with_article
from spear.labels.questions.types import PROMPT_TEMPLATES
from spear.labels.store import read_evenly_spread_labels
from spear.models.processing import Processor
from spear.models.readout import DecodeMethod, Distribution, replace_numbers
from spear.policy import Answer, VlmBundle
from spear.question_types import QUESTION_TYPES
from spear.sim.shifts import Shift
from spear.types import Array, Frame, LabeledImage, WidthAndHeight
from spear.util.images import load_image

NUM_BOX_NUMBERS = 24  # x, y, z of eight vertices
MAX_NAME_TOKENS = 8  # longest answer to the question what is at a point, in tokens


def load_or_render_picture(source: str, size: WidthAndHeight, camera: str = "external") -> Frame:
    """Load the image to ask about.

    Args:
        source: An image file, or "sim:SEED" for a held-out scene.
        size: (width, height) of the image of a scene, px.
        camera: The camera of a scene: "external" or "wrist".

    Returns:
        The image. A frame of a scene also has the camera's parameters and the ground truth.

    Raises:
        SpearError: The image cannot be read, or the seed is not held out.
    """
    if source.startswith("sim:"):
        seed = parse_sim_seed(source)
        return next(render_held_out_frames(num_scenes=1, first_seed=seed, size=size, camera=camera))
    return Frame(load_image(source))


@dataclass(frozen=True)
class AskSettings:
    """How a model is asked.

    Attributes:
        decode: How numbers are read off the model's probabilities.
        trust: How far the model can be trusted. If it is given, the text also says how sure the
            numbers are, or that this is not known.
        view: The camera that took the image.
        taught_types: The types of questions that the model was taught; None if this is not known.
        is_free: Whether the model also answers questions of no type that it was taught, with
            whatever it finds most likely.
    """

    decode: DecodeMethod = "median"
    trust: Trust | None = None
    view: str = "external"
    taught_types: Collection[str] | None = None
    is_free: bool = False


def ask_question(
    model: VlmBundle,
    image: Array,
    question: str,
    question_type: str | None = None,
    settings: AskSettings = AskSettings(),
) -> tuple[Answer | None, str]:
    """Ask a model one question about an image.

    Args:
        model: SPEAR-VLM with its processor.
        image: [h, w, 3] uint8.
        question: The question, in words.
        question_type: One of `QUESTION_TYPES`. If it is None, the type is found from the wording
            (`understand_question`), and the model is asked in a wording that it was taught.
        settings: How the model is asked.

    Returns:
        The answer and its text. The answer is None if the model was not taught such questions, or
        does not see the object.

    Raises:
        SpearError: The question type is unknown, the question is empty, or it is about a pixel
            outside the image.
    """
    if question_type is not None:
        check_known("question type", QUESTION_TYPES, question_type)
    if not question.strip():
        raise SpearError("empty question. Ask something about the image, in words.")
    trust = settings.trust
    height, width = image.shape[:2]
    parsed = understand_question(question, settings.taught_types, (width, height))
    keeps_wording = settings.is_free or question_type is not None
    if parsed is None and not keeps_wording:
        return None, explain_question_is_untaught(settings.taught_types)

    # `prompt_type` is the type of which the prompt is a taught wording. It can differ from a
    # `question_type` that the caller wants.
    prompt, prompt_type = _choose_prompt_and_its_type(question, parsed, keeps_wording)
    question_type = question_type or prompt_type

    # Do not ask where an object is that the model does not see.
    names = [] if parsed is None else parsed.names
    if trust and trust.can_tell_absent and names:
        absent = find_absent_objects_and_what_is_seen(model, image, names, settings.view)
        if absent:
            return None, _describe_absent(absent)

    # Ask, and read the numbers off the distributions in the way that is wanted.
    (answer,) = model.answer([image], [prompt], question_type, settings.view, distributions=True)
    distribution = answer.distribution
    if distribution:
        segments = replace_numbers(answer.segments, distribution.read_numbers(settings.decode))
        answer = replace(answer, segments=segments)
    text = format_reply(answer, image)
    if trust and distribution:
        is_known_wording = prompt_type is not None and question_type == prompt_type
        certainty = _describe_certainty(
            answer, distribution, question_type, is_known_wording, trust
        )
        text += f"\n  {certainty}"
    if prompt != question:
        text += f'\n  asked as: "{prompt}"'
    return answer, text


def _choose_prompt_and_its_type(
    question: str, parsed: ParsedQuestion | None, keeps_wording: bool
) -> tuple[str, str | None]:
    """Choose the words in which the model is asked.

    Args:
        question: The question.
        parsed: What the question asks; None if it is of no type that the model was taught.
        keeps_wording: Whether the question is asked in its own words, even if they were not taught.

    Returns:
        The prompt, and the question type of which the prompt is a taught wording; None if the
        model was not taught this wording.
    """
    if parsed is None:
        return question, None
    if not keeps_wording:
        return parsed.prompt, parsed.question_type
    if parsed.is_taught_wording:
        return question, parsed.question_type
    return question, None


def _describe_absent(absent: dict[str, str]) -> str:
    """Say which objects are not in the image, and what the model sees instead of each."""
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
    """Say how sure the numbers of an answer are, if this was measured.

    Args:
        answer: The answer.
        distribution: The probabilities of the answer's numbers.
        question_type: The type of the question; None if it belongs to none.
        is_known_wording: Whether the question has a wording of this type. The intervals in `trust`
            were only measured with such wordings.
        trust: How far the model can be trusted.
    """
    if not is_known_wording or question_type is None:
        example_type = question_type or "distance"  # a question of no type gets a common example
        template = PROMPT_TEMPLATES[example_type][0]
        example = template.format(x="the mug", y="the bowl", p=KEYPOINT_NAMES["closest"][0])
        return (
            f'how sure this is, is not known: ask in a wording that was taught, such as "{example}"'
        )
    if question_type not in trust.factors:
        return "how sure this is, was not measured for this kind of question"
    low, high = trust.compute_intervals(question_type, distribution)
    if len(low) > 3:  # a box: too many numbers to list
        mean_half_width = float((high - low).mean()) / 2
        intervals = f"each number ± {mean_half_width:.3f}"
    else:
        intervals = "; ".join(f"{a:.3f} … {b:.3f}" for a, b in zip(low, high, strict=True))
    return f"{TRUSTED_COVERAGE:.0%} interval: {intervals} {abbreviate_unit(answer.unit)}"


def find_absent_objects_and_what_is_seen(
    model: VlmBundle, image: Array, names: Sequence[str], view: str = "external"
) -> dict[str, str]:
    """Find the objects that the model does not see in an image.

    If the model gives another name to what is at the point of an object, the object is absent; see
    `point_at_objects_and_name_them`. This works only with a model that learned to point and to name
    well enough (`Trust.can_tell_absent`).

    Args:
        model: SPEAR-VLM with its processor.
        image: [h, w, 3] uint8.
        names: The names of the objects.
        view: The camera that took the image.

    Returns:
        Name of each absent object → what the model sees instead.
    """
    absent = {}
    seen_names = point_at_objects_and_name_them(model, [image] * len(names), names, view)
    for name, seen_name in zip(names, seen_names, strict=True):
        if not can_be_called(seen_name, name) and not can_be_called(name, seen_name):
            absent[name] = seen_name
    return absent


def point_at_objects_and_name_them(
    model: VlmBundle, images: Sequence[Array], names: Sequence[str], view: str = "external"
) -> list[str]:
    """Let the model point at an object in each image, and then name what is at that point.

    Args:
        model: SPEAR-VLM with its processor.
        images: Images, each [h, w, 3] uint8.
        names: The name of an object for each image.
        view: The camera that took the images.

    Returns:
        What the model sees at each point.
    """
    location_template = PROMPT_TEMPLATES["centre_2d"][0]
    location_prompts = [location_template.format(x=with_article(name)) for name in names]
    points = model.answer(images, location_prompts, "centre_2d", view)

    name_template = PROMPT_TEMPLATES["what_at"][0]
    name_prompts = [name_template.format(p=answer.segments[0]) for answer in points]
    answers = model.answer(images, name_prompts, "what_at", view, max_new_tokens=MAX_NAME_TOKENS)
    return [format_reply(answer, image) for answer, image in zip(answers, images, strict=True)]


def format_reply(answer: Answer, image: Array) -> str:
    """Format an answer as text.

    A box is written as its center and its vertices, and image points in pixels of `image`.
    """
    values = answer.values
    has_only_numbers = len(values) == len(answer.segments)
    if has_only_numbers and len(values) == NUM_BOX_NUMBERS:
        vertices = np.reshape(values, (8, 3))
        lines = [f"centre {format_answer(vertices.mean(0).tolist(), answer.unit)}; vertices:"]
        lines += [format_answer(vertex, answer.unit) for vertex in vertices.tolist()]
        return "\n  ".join(lines)
    height, width = image.shape[:2]
    return format_answer(answer.segments, answer.unit, (width, height)) or "(no answer)"


def load_or_render_labeled_images(
    source: str, num_images: int, view: str, processor: Processor, shift: Shift | None = None
) -> list[LabeledImage]:
    """Load at most `num_images` labeled images, as one camera of a model sees them.

    Args:
        source: A folder of label shards, or a folder with one such folder per view. Its images are
            selected at equal intervals. Or "sim" or "sim:SEED" for held-out scenes from SEED (by
            default 0) on.
        num_images: Maximum number of images.
        view: The camera that took the images.
        processor: The model's processor.
        shift: What differs from the scenes of training, see `render_held_out_frames`. Only the
            simulator's scenes can be shifted, not images of a folder.

    Raises:
        SpearError: The view is unknown; the folder has no labels; the labels have another unit than
            the model's numbers; or the seeds are not held out.
    """
    check_known("view", processor.image_sizes, view)
    if is_simulator(source):
        size = processor.image_sizes[view]
        frames = render_held_out_frames(num_images, parse_sim_seed(source), size, view, shift)
        labels = list(label_with_ground_truth(frames))
    else:
        folder = Path(source)
        if (folder / view).is_dir():
            folder = folder / view
        labels = read_evenly_spread_labels(folder, num_images)

    unit = processor.coordinates.unit
    for label in labels:
        if label.unit != unit:
            raise SpearError(
                f"{label.source} in {source} is labeled in the unit {label.unit!r}, the model "
                f"answers in {unit!r}. Label with a point map of that unit, or ask another "
                "model."
            )
    return labels


def is_simulator(source: str) -> bool:
    """Return whether "sim" or "sim:SEED" stands for scenes, and is not the name of a folder."""
    return (source == "sim" or source.startswith("sim:")) and not Path(source).exists()


def parse_sim_seed(source: str) -> int:
    """Return the seed in "sim:SEED", or 0 for "sim". Raises `SpearError` if it is no number."""
    seed = source.partition(":")[2] or "0"
    if not seed.isdecimal():
        raise SpearError(
            f"{source!r} is no scene. Write sim:SEED with a number, for example sim:7."
        )
    return int(seed)


def render_held_out_frames(
    num_scenes: int,
    first_seed: int,
    size: WidthAndHeight,
    camera: str = "external",
    shift: Shift | None = None,
) -> Iterator[Frame]:
    """Render scenes first_seed, first_seed + 1, … with their ground truth.

    Args:
        num_scenes: How many scenes.
        first_seed: The seed of the first scene.
        size: (width, height), px.
        camera: "external" or "wrist".
        shift: What differs from the scenes of training: one axis, such as the camera or noise in
            the images, and how much. None is no difference.

    Raises:
        SpearError: Training uses these seeds (10,000 and above).
    """
    from spear.sim.render import render_frame
    from spear.sim.scene import list_held_out_seeds, sample_clutter_scene
    from spear.sim.shifts import shift_scene
    from spear.sim.world import World

    for seed in list_held_out_seeds(first_seed, num_scenes):
        scene = sample_clutter_scene(seed)
        if shift is not None:
            scene = shift_scene(scene, shift)
        frame = render_frame(World(scene), camera, size)
        if shift is not None and shift.axis == "noise":
            image = degrade_scene_image(frame.image, NOISE_LEVELS[shift.level], seed)
            frame = replace(frame, image=image)
        yield frame
