"""Questions for the distances of two objects, and which of them is closer.

The answer is a sentence: "the X is d and the Y is e so the X is closer".
"""

import re
from collections.abc import Sequence

import numpy as np

from spear.labels.questions.interface import (
    MIN_RELATIVE_GAP,
    Measure,
    MeasureValues,
    QuestionType,
    make_drafter_about_two_objects,
)
from spear.labels.questions.measures import (
    compute_error_scales_of_distances,
    extract_numbers,
    measure_distance_errors,
)
from spear.labels.questions.positions import compute_distance_from_camera
from spear.types import LabeledImage, LabeledObject, Question, Segments

NUM_PAIR_TRIES = 4
"""Up to this many pairs of objects are drawn for a question, because many pairs are at nearly the
same distance."""

PROMPTS = (
    "What is the distance to {x}? And to {y}? Which is closer?",
    "How far are {x} and {y} from the camera, and which is closer?",
    "Estimate the distances to {x} and to {y}, then say which is closer",
    "Is {x} or {y} closer to the camera? Think about each distance first",
    "Compare the distance to {x} with the distance to {y}: which is closer?",
    "Give the distance to {x}, the distance to {y} and the closer of the two",
)

MEASURES = {
    "closer": Measure("names the closer of two", "", "rate"),
    "consistent": Measure("says what its own distances say", "", "rate"),
}


def _make_true_answer(a: LabeledObject, b: LabeledObject, label: LabeledImage) -> Segments | None:
    """Which of two objects is closer, in words; None if their distances are nearly equal."""
    distance_a = compute_distance_from_camera(a)
    distance_b = compute_distance_from_camera(b)
    if abs(distance_a - distance_b) < MIN_RELATIVE_GAP * max(distance_a, distance_b):
        return None
    closer = a.name if distance_a < distance_b else b.name
    return [
        f"the {a.name} is ",
        distance_a,
        f" and the {b.name} is ",
        distance_b,
        f" so the {closer} is closer",
    ]


def _measure(question: Question, answer: Segments, label: LabeledImage) -> MeasureValues:
    """Measure the two distances, and the words that name the closer object.

    closer      whether the words name the right object as the closer one.
    consistent  whether the words follow from the two distances in the same answer, even if these
                are wrong.
    """
    measures = measure_distance_errors(question, answer, label)
    named_object = find_name_called_closer(answer, question.objects)
    # "closer" compares with the true distances, "consistent" with the answered ones.
    for measure, segments in (("closer", question.segments), ("consistent", answer)):
        first_distance, second_distance = extract_numbers(segments)
        closer_index = 0 if first_distance < second_distance else 1
        measures[measure] = float(named_object == question.objects[closer_index])
    return measures


def find_name_called_closer(answer: Segments, names: Sequence[str]) -> str | None:
    """Find which of two objects a chain of thought calls the closer one.

    This is the object that it names first after its last number.

    Args:
        answer: The chain of thought.
        names: The names of the two objects.

    Returns:
        One of the names; None if the conclusion contains neither.
    """
    conclusion_start = 0  # index of the first segment after the last number
    for index, segment in enumerate(answer):
        if isinstance(segment, float):
            conclusion_start = index + 1
    conclusion = "".join(str(segment) for segment in answer[conclusion_start:])
    text = " ".join(conclusion.casefold().split())

    ranks = {}
    for name in names:
        # The name as whole words.
        match = re.search(rf"(?<!\w){re.escape(name.casefold())}(?!\w)", text)
        if match:
            # Earlier names come first. If two begin at the same place, as "cup" and "cup holder",
            # the longer one is meant.
            ranks[name] = (match.start(), -len(name))
    if not ranks:
        return None
    return min(ranks, key=lambda name: ranks[name])


def _replace_conclusion_by_majority(
    question: Question, guess: Segments, questions: Sequence[Question]
) -> Segments:
    """Replace the conclusion of a baseline's guess by what is true of most questions.

    It names the question's first object as the closer one if the first object is the closer one in
    at least half of the `questions`, and the second object otherwise.
    """
    is_first_closer = []
    for example in questions:
        first_distance, second_distance = extract_numbers(example.segments)
        is_first_closer.append(first_distance < second_distance)
    closer_index = 0 if np.mean(is_first_closer) >= 0.5 else 1
    closer = question.objects[closer_index]
    # The last segment of a chain of thought is its conclusion.
    return [*guess[:-1], f" so the {closer} is closer"]


QUESTION_TYPE = QuestionType(
    prompts=PROMPTS,
    draft=make_drafter_about_two_objects("objects_3d", _make_true_answer, NUM_PAIR_TRIES),
    measure=_measure,
    compute_error_scales=compute_error_scales_of_distances,
    measures=MEASURES,
    conclude=_replace_conclusion_by_majority,
    facts=(("closer", "of the time it names the closer of two"),),
    answer_texts=("the {x} is  and the {y} is  so the {x} is closer",),  # without the distances
)
