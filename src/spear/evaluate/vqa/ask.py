"""Images to ask about, from files or held-out scenes of the simulator; and one question about one image."""

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
from spear.models.readout import Decode, replace_numbers
from spear.policy import Answer, VlmBundle
from spear.question_types import QUESTION_TYPES
from spear.types import Array, Frame, LabeledImage
from spear.util.images import load_image


def load_picture(where: str, size: tuple[int, int], camera: str = "external") -> Frame:
    """An image file (see `util.images.load_image`, also for what it raises), or "sim:SEED": that held-out
    scene at `size` (width, height), whose camera is known (see `held_out_frames`)."""
    if where.startswith("sim:"):
        return next(render_held_out_frames(1, parse_sim_seed(where), size, camera))
    return Frame(load_image(where))


def ask_question(
    model: VlmBundle,
    image: Array,
    question: str,
    family: str | None = None,
    decode: Decode = "median",
    trust: Trust | None = None,
    view: str = "external",
) -> tuple[Answer | None, str]:
    """The model's answer about an image [h, w, 3] uint8 of a camera, read as `decode` says, and its words.

    family  of the question; without it that of its wording (`understand`), or a free answer.
    trust   the words then say how sure the numbers are, or that this is not known; or what is not in the
            picture: no answer (None).

    Raises SpearError for an unknown question family or an empty question.
    """
    if family is not None:
        check_known("question family", QUESTION_TYPES, family)
    if not question.strip():
        raise SpearError("empty question: ask something about the image, in words")
    meant, names = parse_question(question) or (None, [])
    family = family or meant
    if (
        trust
        and trust.tells_absent
        and names
        and (lacking := find_absent_objects(model, image, names, view))
    ):
        seen = (
            f"{name} (where the model points for it, it sees: {it})" for name, it in lacking.items()
        )
        return None, f"not in the picture: {'; '.join(seen)}"
    answer = model.answer([image], [question], family, view, distributions=True)[0]
    if held := answer.distribution:
        answer = replace(answer, segments=replace_numbers(answer.segments, held.read(decode)))
    said = format_reply(answer, image)
    if not trust or not held:
        return answer, said
    if meant is None or family != meant:  # intervals were measured with known wordings
        form = PROMPT_TEMPLATES[family or "distance"][0].format(
            x="the mug", y="the bowl", p=KEYPOINT_NAMES["closest"][0]
        )
        said += f'\n  how sure this is, is not known: ask in a wording that was taught, such as "{form}"'
    elif family not in trust.factors:
        said += "\n  how sure this is, was not measured for this kind of question"
    else:
        low, high = trust.interval(family, held)
        ends = [f"{a:.3f} … {b:.3f}" for a, b in zip(low, high, strict=True)]
        if len(ends) > 3:
            ends = [f"each number ± {float((high - low).mean()) / 2:.3f}"]
        said += (
            f"\n  {TRUSTED_COVERAGE:.0%} interval: {'; '.join(ends)} {abbreviate_unit(answer.unit)}"
        )
    return answer, said


def parse_question(question: str) -> tuple[str, list[str]] | None:
    """The family of a 3D question in one of its known wordings, and the objects that it names."""
    text = " ".join(question.split())
    for before, after in (
        wording.split("{}") for some in UNIT_TEMPLATES.values() for wording in some
    ):
        text = text.removeprefix(before).removesuffix(after)
    text = text.rstrip(" ?.")
    point = "|".join(re.escape(word) for words in KEYPOINT_NAMES.values() for word in words)
    for family in QUESTION_TYPES:
        for prompt in PROMPT_TEMPLATES[family]:
            form = re.escape(prompt.rstrip("?")).replace(r"\{p\}", f"(?:{point})")
            form = re.sub(
                r"\\{([xy])\\}",
                r"(?:(?:the|an?) )?(?P<\1>(?:(?! (?:from|and|to) (?:the|an?) )[^?,])+)",
                form,
            )
            if found := re.fullmatch(form, text, re.IGNORECASE):
                return family, [name for _, name in sorted(found.groupdict().items())]
    return None


def find_absent_objects(
    model: VlmBundle, image: Array, names: Sequence[str], view: str = "external"
) -> dict[str, str]:
    """Those of these objects that the model does not find in an image, and what it sees instead: it points at
    each and names what is there. Only a model that was taught both can be asked (`Trust.tells_absent`)."""
    points = [PROMPT_TEMPLATES["centre_2d"][0].format(x=with_article(name, True)) for name in names]
    places = model.answer([image] * len(names), points, "centre_2d", view)
    what = [PROMPT_TEMPLATES["what_at"][0].format(p=answer.segments[0]) for answer in places]
    answers = model.answer([image] * len(names), what, "what_at", view, max_new_tokens=8)
    seen = [format_reply(answer, image) for answer in answers]
    return {n: s for n, s in zip(names, seen, strict=True) if not (is_a(s, n) or is_a(n, s))}


def format_reply(answer: Answer, image: Array) -> str:
    """An answer to read, image points in pixels of `image`; a box by its centre and vertices."""
    values = answer.values
    if len(values) == len(answer.segments) == 24:
        vertices = np.reshape(values, (8, 3))
        centre, *ends = (
            format_answer(place, answer.unit) for place in (vertices.mean(0), *vertices)
        )
        return "\n  ".join([f"centre {centre}; vertices:", *ends])
    return format_answer(answer.segments, answer.unit, image.shape[1::-1]) or "(no answer)"


def load_labeled_images(
    where: str, images: int, view: str, processor: Processor
) -> list[LabeledImage]:
    """At most `images` labelled images, as the camera `view` of the model with this processor sees them.

    where: a folder of label shards, or with a sub-folder of them per view, taken evenly spread. Or "sim" or
    "sim:SEED": held-out scenes from SEED on.

    Raises SpearError for an unknown view, no labels there, labels in another unit than the model's numbers,
    and seeds that are not held out.
    """
    check_known("view", processor.image_sizes, view)
    if (where == "sim" or where.startswith("sim:")) and not Path(where).exists():
        frames = render_held_out_frames(
            images, parse_sim_seed(where), processor.image_sizes[view], view
        )
        labels = list(label_with_ground_truth(frames))
    else:
        folder = Path(where)
        labels = select_labels(folder / view if (folder / view).is_dir() else folder, images)
    unit = processor.coordinates.unit
    if other := next((label for label in labels if label.unit != unit), None):
        units = f"{other.source} is labelled in unit {other.unit!r}, the model answers in {unit!r}"
        raise SpearError(
            f"{where}: {units}: label with a point map of that unit, or ask another model"
        )
    return labels


def parse_sim_seed(where: str) -> int:
    """The seed in "sim:SEED"; 0 of "sim". Raises SpearError where it is no number."""
    seed = where.partition(":")[2] or "0"
    if not seed.isdecimal():
        raise SpearError(f"{where!r}: write sim:SEED with a number, for example sim:7")
    return int(seed)


def render_held_out_frames(
    scenes: int, first_seed: int, size: tuple[int, int], camera: str = "external"
) -> Iterator[Frame]:
    """Scenes first_seed, first_seed + 1, … as a camera of `size` (width, height) sees them, with their truth.
    Raises SpearError for seeds that training uses (10,000 and above)."""
    from spear.sim.render import render_clutter_frame
    from spear.sim.scene import held_out_seeds

    for seed in held_out_seeds(first_seed, scenes):
        yield render_clutter_frame(seed, camera, size)
