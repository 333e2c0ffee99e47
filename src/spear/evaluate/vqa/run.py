"""SPEAR-VLM asked in 3D about labelled images that it has not seen; `measures` says what is scored.

Every question is asked twice: held to the grammar of its family, which is what is scored, and freely, which
shows how often the grammar would have been right by itself. Each number is read off the probabilities of its
bins in three ways (`models.readout`): those of one way are scored, the others are compared with it.
"""

from collections.abc import Sequence

import numpy as np

from spear.errors import SpearError, check_known, format_count, notice
from spear.evaluate.options import QuestionOptions
from spear.evaluate.vqa.ask import find_absent_objects
from spear.evaluate.vqa.calibration import Certainty, Trust, compute_spread_factor
from spear.evaluate.vqa.measures import compute_error_scales, extract_numbers, is_grammatical
from spear.evaluate.vqa.scores import AnsweredQuestion, Scores, summarize
from spear.labels.questions.generate import find_askable_objects, generate_questions
from spear.labels.questions.templates import is_a
from spear.models.readout import DECODE_METHODS, Decode, replace_numbers
from spear.policy import Answer, VlmBundle
from spear.question_types import QUESTION_TYPES
from spear.types import LabeledImage, Question
from spear.util.images import decode_image
from spear.util.progress import ProgressBar, track_progress


def evaluate_vqa(
    model: VlmBundle,
    labels: Sequence[LabeledImage],
    options: QuestionOptions,
    trust: Trust | None = None,
) -> Scores:
    """Ask questions of each family about each image, all in the model's unit, and score the answers, and the
    intervals that `trust` gives them, unless it was measured on some of these images: there they hold by
    making. Raises SpearError for an unknown family, and where no image allows a question."""
    families = tuple(dict.fromkeys(options.families)) or QUESTION_TYPES
    check_known("family of 3D questions", QUESTION_TYPES, *families)
    questions = generate_questions_by_family(labels, families, options.per_image, options.seed)
    free: dict[str, list[bool]] = {family: [] for family, some in questions.items() if some}
    if not free:
        raise SpearError(
            "no questions: no object in these labels can be asked about: see spear label show"
        )
    if absent := ", ".join(family for family in families if family not in free):
        notice(f"left out, since no object in these labels can be asked so: {absent}")
    if trust and (known := {*trust.sources} & {label.source for label in labels}):
        notice(
            f"calibrated on {len(known)} of these images: its intervals are not judged: take other ones"
        )
        trust = None
    pictures = [decode_image(label.image, label.source) for label in labels]

    asked: list[AnsweredQuestion] = []
    with ProgressBar("asking", sum(map(len, questions.values())), "questions") as bar:
        for family, some in questions.items():
            for start in range(0, len(some), options.batch):
                part = some[start : start + options.batch]
                images, prompts = [pictures[i] for i, _ in part], [q.prompt for _, q in part]
                held = model.answer(images, prompts, family, options.view, distributions=True)
                freely = model.answer(images, prompts, None, options.view)
                for (i, question), answer, other in zip(part, held, freely, strict=True):
                    asked.append(_asked(i, labels[i], question, answer, options.decode))
                    free[family].append(is_grammatical(question, other.segments))
                bar.update(bar.done + len(part), family)
    return summarize(asked, free, labels, options.decode, trust)


def measure_trust(
    model: VlmBundle, labels: Sequence[LabeledImage], scores: Scores, where: str
) -> Trust:
    """How far the model can be trusted: from `scores` of questions about these images, and from two objects
    that are in each and two that are not. where: the images, in words."""
    rng, names = (
        np.random.default_rng(0),
        sorted({o.name for label in labels for o in label.objects}),
    )
    found: dict[bool, list[bool]] = {True: [], False: []}
    for label in track_progress(labels, ProgressBar("naming", len(labels), "images")):
        image, here = decode_image(label.image, label.source), [o.name for o in label.objects]
        others = [n for n in names if not any(is_a(n, o) or is_a(o, n) for o in here)]
        for there, some in ((True, [o.name for o in find_askable_objects(label)]), (False, others)):
            asked = rng.permutation(some)[:2].tolist() if some else []
            lacking = find_absent_objects(model, image, asked) if asked else {}
            found[there] += [name not in lacking for name in asked]
    sure = {
        f: [a.certainty for a in scores.asked if a.question.family == f] for f in scores.calibration
    }
    factors = {
        f: compute_spread_factor([c for c in some if c is not None]) for f, some in sure.items()
    }
    present, absent = (
        float(np.mean(named)) if named else 1.0 - there for there, named in found.items()
    )
    sources = [label.source for label in labels]
    return Trust(
        f"{format_count(len(labels), 'images')} of {where}",
        factors,
        present,
        absent,
        sources=sources,
    )


def generate_questions_by_family(
    labels: Sequence[LabeledImage], families: Sequence[str], per_image: int, seed: int
) -> dict[str, list[tuple[int, Question]]]:
    """(number of the image, question) per family; an image's do not depend on how many images follow."""
    rng = np.random.default_rng(seed)
    questions: dict[str, list[tuple[int, Question]]] = {f: [] for f in families}
    for index, label in enumerate(labels):
        for family in families:
            asked = generate_questions(label, rng, (per_image, per_image), families=(family,))
            questions[family] += [(index, q) for q in asked]
    return questions


def _asked(
    image: int, label: LabeledImage, question: Question, answer: Answer, decode: Decode
) -> AnsweredQuestion:
    """An answer with all its readings; of its distribution only what is scored is kept, which is small."""
    if (said := answer.distribution) is None:
        return AnsweredQuestion(image, label, question, answer.segments)
    readings = {d: replace_numbers(answer.segments, said.read(d)) for d in DECODE_METHODS}
    certainty = None
    if len(said) and is_grammatical(question, answer.segments):
        certainty = Certainty.of(
            said, extract_numbers(question.segments), compute_error_scales(question, label)
        )
    return AnsweredQuestion(image, label, question, readings[decode], readings, certainty)
