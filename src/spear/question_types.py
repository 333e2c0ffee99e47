"""The types of questions about an image that SPEAR-VLM learns, and the form of their answers.

Here is the list of all question types. What else belongs to a type is in one file with the type's
name, in `spear.labels.questions.types`: the wording of its questions, how a question and its answer
are made from labels, and how the answer of a model is scored.

A model that answers a question may decode only an answer of the form that belongs to the question's
type.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class AnswerForm:
    """What an answer consists of: words, numbers and image locations.

    An answer without words consists of its numbers, followed by its image locations. The length of
    such an answer is therefore fixed.

    Attributes:
        num_numbers: How many numbers (coordinates or distances) the answer has.
        num_pixels: How many image locations the answer has; 0 if it has words.
        has_words: Whether the answer is a sentence, with its numbers between the words.
        is_restricted: Whether decoding is restricted to this form. If not, the model answers with
            whatever it finds most likely.
    """

    num_numbers: int = 0
    num_pixels: int = 0
    has_words: bool = False
    is_restricted: bool = True


_FREE_WORDS = AnswerForm(has_words=True, is_restricted=False)

_FORMS_3D = {
    "box_vertices": AnswerForm(num_numbers=24),  # x, y, z of eight vertices
    "keypoint": AnswerForm(num_numbers=3),
    "offset": AnswerForm(num_numbers=3),
    "distance": AnswerForm(num_numbers=1),
    "back_projection": AnswerForm(num_pixels=8),  # one per vertex of the box
    "chain_of_thought": AnswerForm(num_numbers=2, has_words=True),  # a sentence with two distances
}
_FORMS_PIXEL = {"pixel_point": AnswerForm(num_numbers=3)}
_FORMS_2D = {
    "what_at": AnswerForm(has_words=True),
    "where_2d": AnswerForm(num_pixels=2),  # two opposite corners of the 2D box
    "centre_2d": AnswerForm(num_pixels=1),
    "exists": _FREE_WORDS,
    "count": _FREE_WORDS,
    "which_side": _FREE_WORDS,
    "left_or_right": _FREE_WORDS,
    "list": _FREE_WORDS,
}

QUESTION_TYPES = tuple(_FORMS_3D)
"""The types of 3D questions about objects, as in the paper."""
QUESTION_TYPES_PIXEL = tuple(_FORMS_PIXEL)
"""The type of 3D question about a pixel, whatever object it shows. The paper has it in an
ablation."""
QUESTION_TYPES_2D = tuple(_FORMS_2D)
"""The types of questions about which objects an image shows, and where in the image they are."""

ANSWER_FORMS: Mapping[str, AnswerForm] = {**_FORMS_3D, **_FORMS_PIXEL, **_FORMS_2D}
"""Question type → the form of its answers. Every type has one."""
