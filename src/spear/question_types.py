"""The types of questions about an image that SPEAR-VLM learns, and the form of their answers.

`spear.labels.questions` writes questions of these types, and their answers, from 3D labels. A model
that answers a question may decode only an answer of the form that belongs to the question's type.
"""

from collections.abc import Mapping
from dataclasses import dataclass

QUESTION_TYPES = (
    "box_vertices",
    "keypoint",
    "offset",
    "distance",
    "back_projection",
    "chain_of_thought",
)
"""The types of 3D questions about objects, as in the paper."""

QUESTION_TYPES_2D = (
    "what_at",
    "where_2d",
    "centre_2d",
    "exists",
    "count",
    "which_side",
    "left_or_right",
    "list",
)
"""The types of questions about which objects an image shows, and where in the image they are."""

QUESTION_TYPES_PIXEL = ("pixel_point",)
"""The type of 3D question about a pixel, whatever object it shows. The paper has it in an
ablation."""


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

ANSWER_FORMS: Mapping[str, AnswerForm] = {
    "box_vertices": AnswerForm(num_numbers=24),  # x, y, z of eight vertices
    "keypoint": AnswerForm(num_numbers=3),
    "offset": AnswerForm(num_numbers=3),
    "distance": AnswerForm(num_numbers=1),
    "back_projection": AnswerForm(num_pixels=8),  # one per vertex of the box
    "chain_of_thought": AnswerForm(num_numbers=2, has_words=True),  # a sentence with two distances
    "what_at": AnswerForm(has_words=True),
    "where_2d": AnswerForm(num_pixels=2),  # two opposite corners of the 2D box
    "centre_2d": AnswerForm(num_pixels=1),
    "exists": _FREE_WORDS,
    "count": _FREE_WORDS,
    "which_side": _FREE_WORDS,
    "left_or_right": _FREE_WORDS,
    "list": _FREE_WORDS,
    "pixel_point": AnswerForm(num_numbers=3),
}
"""Question type → the form of its answers. Every type has one."""
