"""The types of questions about an image that SPEAR-VLM learns, and the form of their answers.

Labels make questions of these types (`spear.labels.questions`), and a policy or a VLM that answers
them is restricted to the form of their answers.
"""

from collections.abc import Mapping

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

NUM_ANSWER_NUMBERS: Mapping[str, int] = {
    "box_vertices": 24,
    "keypoint": 3,
    "offset": 3,
    "distance": 1,
    "pixel_point": 3,
}
"""How many numbers an answer has, of the types whose answers are numbers alone."""

NUM_ANSWER_PIXELS: Mapping[str, int] = {"back_projection": 8, "where_2d": 2, "centre_2d": 1}
"""How many image locations an answer has, of the types whose answers are image locations alone."""

NUM_NUMBERS_BETWEEN_WORDS: Mapping[str, int] = {"chain_of_thought": 2, "what_at": 0}
"""How many numbers an answer has between its words, of the types whose answers are sentences."""
