"""Evaluate SPEAR-VLM on 3D questions about labeled images that it has not been trained on.

Every question is asked twice. The first answer is *constrained*: only tokens that the answer
grammar of its question type permits can be chosen. This answer is scored (`measures`). The second
answer is *free*, and shows how often the model follows the grammar by itself.

A number is read off the probabilities of its bins in one of three ways (`models.readout`). The
options say which way is scored. The other ways are compared with it.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from spear.errors import SpearError, check_known, format_count, notice
from spear.evaluate.options import QuestionOptions
from spear.evaluate.vqa.ask import find_absent_objects_and_what_is_seen
from spear.evaluate.vqa.calibration import Certainty, Trust, compute_spread_factor
from spear.evaluate.vqa.measures import compute_error_scales, is_grammatical
from spear.evaluate.vqa.scores import AnsweredQuestion, Scores, summarize
from spear.labels.questions.generate import find_askable_objects, generate_questions
from spear.labels.questions.measures import extract_numbers
from spear.labels.questions.templates import can_be_called
from spear.models.readout import DECODE_METHODS, DecodeMethod, replace_numbers
from spear.policy import Answer, VlmBundle
from spear.question_types import QUESTION_TYPES
from spear.types import Array, LabeledImage, Question
from spear.util.images import decode_image
from spear.util.progress import ProgressBar, track_progress

NUM_NAMED_OBJECTS = 2  # to measure trust: objects per image that are present, and that are absent

QuestionsByType = Mapping[str, Sequence[tuple[int, Question]]]
"""Question type → (index of the image, question)."""


def evaluate_vqa(
    model: VlmBundle,
    labels: Sequence[LabeledImage],
    options: QuestionOptions,
    trust: Trust | None = None,
) -> Scores:
    """Ask questions of each type about each image, and score the answers.

    Args:
        model: SPEAR-VLM with its processor.
        labels: Labeled images, in the unit of the model's numbers.
        options: Which questions are asked, and how answers are read.
        trust: If given, its intervals are scored, too, unless it was measured on some of these
            images. For the images on which it was measured, its intervals are right by
            construction.

    Raises:
        SpearError: A question type is unknown, or no image allows a question.
    """
    question_types = tuple(dict.fromkeys(options.question_types)) or QUESTION_TYPES
    check_known("type of 3D questions", QUESTION_TYPES, *question_types)
    questions = _drop_empty_types(
        generate_questions_by_type(
            labels, question_types, options.questions_per_image, options.seed
        )
    )
    if trust is not None:
        trust = _drop_trust_measured_on(labels, trust)
    answered, free_grammar = _ask_constrained_and_free(model, labels, questions, options)
    return summarize(answered, free_grammar, labels, options.decode, trust)


def generate_questions_by_type(
    labels: Sequence[LabeledImage], question_types: Sequence[str], per_image: int, seed: int
) -> dict[str, list[tuple[int, Question]]]:
    """Generate questions of some types about images.

    Args:
        labels: The labeled images.
        question_types: The types of questions.
        per_image: Number of questions of each type about each image, if the image allows that many.
        seed: Seed of the random choices. The questions about an image do not depend on how many
            images follow.

    Returns:
        Question type → (index of the image, question).
    """
    rng = np.random.default_rng(seed)
    questions: dict[str, list[tuple[int, Question]]] = {
        question_type: [] for question_type in question_types
    }
    for index, label in enumerate(labels):
        for question_type in question_types:
            fewest_and_most = (per_image, per_image)
            new_questions = generate_questions(
                label, rng, fewest_and_most, question_types=(question_type,)
            )
            questions[question_type] += [(index, question) for question in new_questions]
    return questions


def _drop_empty_types(questions: QuestionsByType) -> QuestionsByType:
    """Drop the types without any question, and say so in a notice.

    Raises:
        SpearError: No type has a question.
    """
    questions_asked = {
        question_type: members for question_type, members in questions.items() if members
    }
    if not questions_asked:
        raise SpearError(
            "no object in these labels can be asked about. `spear label show` shows them."
        )
    empty_types = [
        question_type for question_type in questions if question_type not in questions_asked
    ]
    if empty_types:
        notice(
            "no object in these labels can be asked so, so these types are left out "
            f"({', '.join(empty_types)})."
        )
    return questions_asked


def _drop_trust_measured_on(labels: Sequence[LabeledImage], trust: Trust) -> Trust | None:
    """Return the trust; None, with a notice, if it was measured on some of these images."""
    shared_sources = set(trust.sources) & {label.source for label in labels}
    if not shared_sources:
        return trust
    num_shared = format_count(len(shared_sources), "images")
    notice(
        f"the model was calibrated on {num_shared} of these labels, so its intervals are not "
        "judged. Take other images to judge them."
    )
    return None


def _ask_constrained_and_free(
    model: VlmBundle,
    labels: Sequence[LabeledImage],
    questions: QuestionsByType,
    options: QuestionOptions,
) -> tuple[list[AnsweredQuestion], dict[str, list[bool]]]:
    """Ask every question twice: with constrained and with free answer.

    Returns:
        The constrained answers, and question type → whether each free answer was grammatical.
    """
    images = [decode_image(label.image, label.source) for label in labels]
    num_questions = sum(len(members) for members in questions.values())
    answered: list[AnsweredQuestion] = []
    free_grammar: dict[str, list[bool]] = {question_type: [] for question_type in questions}
    with ProgressBar("asking", num_questions, "questions") as bar:
        for question_type, members in questions.items():
            for start in range(0, len(members), options.batch_size):
                batch = members[start : start + options.batch_size]
                batch_images: list[Array] = [images[image_index] for image_index, _ in batch]
                prompts = [question.prompt for _, question in batch]
                constrained_answers = model.answer(
                    batch_images, prompts, question_type, options.view, distributions=True
                )
                free_answers = model.answer(
                    batch_images, prompts, question_type=None, view=options.view
                )
                for position, (image_index, question) in enumerate(batch):
                    label = labels[image_index]
                    answer = constrained_answers[position]
                    answered.append(
                        _read_answer(image_index, label, question, answer, options.decode)
                    )
                    free_segments = free_answers[position].segments
                    free_grammar[question_type].append(is_grammatical(question, free_segments))
                bar.set_num_done(bar.num_done + len(batch), question_type)
    return answered, free_grammar


def _read_answer(
    image_index: int, label: LabeledImage, question: Question, answer: Answer, decode: DecodeMethod
) -> AnsweredQuestion:
    """Read the numbers of an answer in every way, and compare its distribution with the truth.

    The distribution itself is large and is not kept.

    Args:
        image_index: Index of the image.
        label: The labeled image.
        question: The question.
        answer: The model's answer, which has a distribution if its numbers have one.
        decode: The way of reading numbers that is scored.
    """
    distribution = answer.distribution
    if distribution is None:
        return AnsweredQuestion(image_index, label, question, answer.segments)
    readings = {}
    for method in DECODE_METHODS:
        readings[method] = replace_numbers(answer.segments, distribution.read_numbers(method))
    certainty = None
    if len(distribution) and is_grammatical(question, answer.segments):
        truth = extract_numbers(question.segments)
        certainty = Certainty.measure(distribution, truth, compute_error_scales(question, label))
    return AnsweredQuestion(image_index, label, question, readings[decode], readings, certainty)


def measure_trust(
    model: VlmBundle, labels: Sequence[LabeledImage], scores: Scores, images_in_words: str
) -> Trust:
    """Measure how far a model can be trusted.

    Args:
        model: SPEAR-VLM with its processor.
        labels: Labeled images. For each image, the model is asked about two objects that are
            present and two that are absent, whether it sees them.
        scores: Scores of questions about these images.
        images_in_words: What the images are, in words.
    """
    factors = {}
    for question_type in scores.calibration:
        certainties = []
        for answered in scores.answers:
            if answered.question.question_type == question_type and answered.certainty is not None:
                certainties.append(answered.certainty)
        factors[question_type] = compute_spread_factor(certainties)

    rates = _measure_naming_rates(model, labels)
    return Trust(
        measured_on=f"{format_count(len(labels), 'images')} of {images_in_words}",
        factors=factors,
        names_present=rates.present,
        names_absent=rates.absent,
        sources=[label.source for label in labels],
    )


class _NamingRates(NamedTuple):
    """`Trust.names_present` and `Trust.names_absent`."""

    present: float
    absent: float


def _measure_naming_rates(model: VlmBundle, labels: Sequence[LabeledImage]) -> _NamingRates:
    """Measure how often the model names objects that are in an image, and objects that are not.

    Returns:
        The rates. Without any such object, these are the values with which the model is not
        trusted.
    """
    rng = np.random.default_rng(0)
    all_names = sorted({object_.name for label in labels for object_ in label.objects})
    present_results: list[bool] = []
    absent_results: list[bool] = []
    for label in track_progress(labels, ProgressBar("naming", len(labels), "images")):
        image = decode_image(label.image, label.source)
        names_in_image = [object_.name for object_ in label.objects]
        askable_names = [object_.name for object_ in find_askable_objects(label)]
        absent_names = [name for name in all_names if not _may_be_any_of(name, names_in_image)]
        present_results += _mark_objects_model_confirms(model, image, askable_names, rng)
        absent_results += _mark_objects_model_confirms(model, image, absent_names, rng)
    present = float(np.mean(present_results)) if present_results else 0.0
    absent = float(np.mean(absent_results)) if absent_results else 1.0
    return _NamingRates(present, absent)


def _may_be_any_of(name: str, object_names: Sequence[str]) -> bool:
    """Return whether a name and one of the others may name the same thing.

    This is so if either is a kind of the other, as a "red cup" is a "cup".
    """
    return any(
        can_be_called(name, object_name) or can_be_called(object_name, name)
        for object_name in object_names
    )


def _mark_objects_model_confirms(
    model: VlmBundle, image: Array, names: Sequence[str], rng: np.random.Generator
) -> list[bool]:
    """Choose a few of the objects, and return for each whether the model confirms the object.

    `Trust.names_present` says how a model confirms an object.
    """
    if not names:
        return []
    chosen_names: list[str] = rng.permutation(names)[:NUM_NAMED_OBJECTS].tolist()
    absent = find_absent_objects_and_what_is_seen(model, image, chosen_names)
    return [name not in absent for name in chosen_names]
