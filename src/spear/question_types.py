"""The types of questions about an image that SPEAR-VLM learns, and the form of their answers.

Labels make questions of these types (`spear.labels.questions`), and a policy or a VLM that answers
them is restricted to the form of their answers.
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
"""The 3D questions about objects (the paper's)."""

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

QUESTION_TYPES_PIXEL = ("pixel_point",)
"""3D questions that know of no object: the paper's ablation."""


@dataclass(frozen=True)
class AnswerForm:
    """What an answer consists of: words, numbers and image locations.

    Without words the answer is its numbers and then its image locations, so its length is fixed.

    Attributes:
        num_numbers: How many numbers it has.
        num_pixels: How many image locations it has; 0 where it has words.
        has_words: Whether it is a sentence, with its numbers between the words.
        is_restricted: Whether the answering model is restricted to this form. Where it is not, it
            answers with whatever it finds most likely.
    """

    num_numbers: int = 0
    num_pixels: int = 0
    has_words: bool = False
    is_restricted: bool = True


_FREE_WORDS = AnswerForm(has_words=True, is_restricted=False)

ANSWER_FORMS: Mapping[str, AnswerForm] = {
    "box_vertices": AnswerForm(num_numbers=24),
    "keypoint": AnswerForm(num_numbers=3),
    "offset": AnswerForm(num_numbers=3),
    "distance": AnswerForm(num_numbers=1),
    "back_projection": AnswerForm(num_pixels=8),
    "chain_of_thought": AnswerForm(num_numbers=2, has_words=True),
    "what_at": AnswerForm(has_words=True),
    "where_2d": AnswerForm(num_pixels=2),
    "centre_2d": AnswerForm(num_pixels=1),
    "exists": _FREE_WORDS,
    "count": _FREE_WORDS,
    "which_side": _FREE_WORDS,
    "left_or_right": _FREE_WORDS,
    "list": _FREE_WORDS,
    "pixel_point": AnswerForm(num_numbers=3),
}
"""Question type → the form of its answers. Every type has one."""
