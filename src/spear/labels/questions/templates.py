"""The wording of the questions, as data.

{x} and {y} stand for objects with their article, {p} for which point of an object. Two sentences are as the
published model was asked: "Provide the 3D bounding box coordinates of the bowl" and "Estimate the x, y, z
distance between the mug and the spoon"; the others are ours.
"""

from __future__ import annotations

from collections.abc import Mapping

from spear.types import Unit

FAMILIES = ("box_vertices", "keypoint", "offset", "distance", "back_projection", "chain_of_thought")
"""The 3D questions about objects."""
FAMILIES_2D = ("what_at", "where_2d", "centre_2d", "exists", "count", "which_side", "left_or_right", "list")
FAMILIES_PIXEL = ("pixel_point",)
"""3D questions that know of no object: the paper's ablation."""

PROMPTS: Mapping[str, tuple[str, ...]] = {
    "box_vertices": (
        "Provide the 3D bounding box coordinates of {x}",
        "Give the eight corners of the 3D box around {x}",
        "What is the 3D bounding box of {x}?",
        "Estimate the 3D bounding box of {x}",
        "Locate {x} in 3D with an oriented bounding box",
        "List the 3D vertices of the box that encloses {x}",
        "Where are the corners of the 3D box of {x}?",
    ),
    "keypoint": (
        "Provide the 3D coordinates of the {p} point of {x}",
        "Where is the {p} point of {x} in 3D?",
        "Estimate the 3D position of the {p} point of {x}",
        "Give the x, y, z of the {p} point of {x}",
        "What are the 3D coordinates of the {p} point on {x}?",
        "Locate the {p} point of {x} in 3D",
    ),
    "offset": (
        "Estimate the x, y, z distance between {x} and {y}",
        "What is the x, y, z distance from {x} to {y}?",
        "How far is {y} from {x} along x, y and z?",
        "Give the 3D offset from {x} to {y}",
        "Starting at {x}, how far must one move in x, y, z to reach {y}?",
        "Provide the displacement from {x} to {y} in x, y, z",
    ),
    "distance": (
        "How far is {x} from the camera?",
        "Estimate the distance between the camera and {x}",
        "What is the distance to {x}?",
        "Provide the distance from the camera to {x}",
        "How far away is {x}?",
        "Give the camera to object distance of {x}",
    ),
    "back_projection": (
        "Project the 3D bounding box of {x} into the image",
        "Where do the eight vertices of the 3D box of {x} appear in the image?",
        "Give the image locations of the 3D box corners of {x}",
        "Provide the 2D projection of the 3D bounding box of {x}",
        "Mark the corners of the 3D box around {x} in the image",
        "At which pixels are the 3D box vertices of {x}?",
    ),
    "chain_of_thought": (
        "What is the distance to {x}? And to {y}? Which is closer?",
        "How far are {x} and {y} from the camera, and which is closer?",
        "Estimate the distances to {x} and to {y}, then say which is closer",
        "Is {x} or {y} closer to the camera? Think about each distance first",
        "Compare the distance to {x} with the distance to {y}: which is closer?",
        "Give the distance to {x}, the distance to {y} and the closer of the two",
    ),
    "pixel_point": (
        "Provide the 3D coordinates of the pixel {p}",
        "Where is {p} in 3D?",
        "Estimate the 3D position of what is at {p}",
        "Give the x, y, z of {p}",
        "Locate the pixel {p} in 3D",
    ),
    "what_at": (
        "What is at {p}?",
        "Which object is at {p}?",
        "Name the object at {p}",
        "What do you see at {p}?",
        "Identify the thing at {p}",
    ),
    "where_2d": (
        "Where is {x} in the image?",
        "Detect {x}",
        "Give the 2D bounding box of {x}",
        "Locate {x} in the image",
        "Draw a 2D box around {x}",
    ),
    "centre_2d": (
        "Point at {x}",
        "Where is the middle of {x} in the image?",
        "Give the pixel at the centre of {x}",
        "Click on {x}",
        "Which image location is the centre of {x}?",
    ),
    "exists": (
        "Is there {x} in the image?",
        "Can you see {x}?",
        "Does the picture show {x}?",
        "Does the image contain {x}?",
        "Do you find {x} here?",
    ),
    "count": (
        "How many objects called {x} are there?",
        "Count the objects named {x}",
        "What is the number of objects called {x}?",
        "How often does the image show an object called {x}?",
        "How many times do you see: {x}?",
    ),
    "which_side": (
        "Is {x} on the left or on the right side of the image?",
        "On which side of the image is {x}?",
        "Which half of the picture shows {x}: left or right?",
        "Is {x} left or right of the middle of the image?",
        "Left or right side: where is {x}?",
    ),
    "left_or_right": (
        "Is {x} to the left or to the right of {y}?",
        "Seen from {y}, is {x} left or right in the image?",
        "On which side of {y} is {x}: left or right?",
        "Relative to {y}, is {x} on the left or on the right?",
        "In the image, is {x} left or right of {y}?",
    ),
    "list": (
        "Which objects are in the image, from left to right?",
        "List the objects from left to right",
        "Name what you see, left to right",
        "What objects does the image show, from left to right?",
        "Describe the picture from left to right",
    ),
}

POINTS: Mapping[str, tuple[str, ...]] = {
    "closest": ("closest", "nearest"),
    "furthest": ("furthest", "farthest"),
    "centre": ("centre", "center"),
}

UNITS: Mapping[Unit, tuple[str, ...]] = {
    "metre": ("{}",),
    "relative": (
        "{} (in relative units)",
        "{} (relative scale)",
        "{} (answer in relative units)",
        "In relative units: {}",
        "The scale of the image is unknown: {}",
        "Up to scale: {}",
    ),
}
"""How a question whose answer has numbers says their unit: {} is the question. Metres go without saying, as
in the published wordings; numbers without a known scale never do."""

EVERYDAY: tuple[str, ...] = (
    "apple", "banana", "basket", "bottle", "bowl", "box", "brush", "can", "carrot", "cube", "cup", "eggplant",
    "fork", "hammer", "kettle", "knife", "lemon", "mug", "orange", "pan", "pen", "plate", "pot", "potato",
    "scissors", "screwdriver", "sponge", "spoon", "tomato", "towel", "wrench",
)  # fmt: skip
"""Names that "exists" asks about when they are absent, and that `questions.all_texts` shows by default."""


def with_article(name: str, definite: bool) -> str:
    """The name with its article: "the carrot", or "a carrot" and "an eggplant"."""
    if definite:
        return f"the {name}"
    return f"an {name}" if name[:1].lower() in "aeiou" else f"a {name}"
