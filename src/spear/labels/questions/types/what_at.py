"""Questions for the object at a point of the image. The answer is its name."""

import numpy as np

from spear.labels.questions.interface import Draft, QuestionScene, QuestionType, Random, sample_one
from spear.labels.questions.positions import to_clipped_pixel
from spear.types import LabeledImage, LabeledObject, Pixel

NUM_POINT_TRIES = 4
"""Up to this many points are drawn for a question, because a point may be outside the object's
mask."""

PROMPTS = (
    "What is at {p}?",
    "Which object is at {p}?",
    "Name the object at {p}",
    "What do you see at {p}?",
    "Identify the thing at {p}",
)


def _draft(scene: QuestionScene, rng: Random) -> Draft | None:
    """Draw a point from the middle of an object's 2D box.

    The point's object is the one with the smallest mask that contains the point, because a smaller
    object (an apple) may be inside the mask of a larger one (a plate).
    """
    if not scene.objects_2d:
        return None
    o = sample_one(scene.objects_2d, rng)
    label = scene.label
    x0, y0, x1, y1 = o.box2d.tolist()
    for _ in range(NUM_POINT_TRIES):
        # From 0.3 to 0.7 of the box's sides
        u = 0.3 + 0.4 * rng.random()  # fraction of the box's width, from its left side
        v = 0.3 + 0.4 * rng.random()  # fraction of the box's height, from its top
        pixel = to_clipped_pixel(x0 + u * (x1 - x0), y0 + v * (y1 - y0), label)
        objects = _find_objects_at(pixel, label)
        if min(objects, key=_count_mask_pixels, default=None) is o:
            return Draft({"p": str(pixel)}, [o.name], (o.name,))
    return None


def _find_objects_at(pixel: Pixel, label: LabeledImage) -> list[LabeledObject]:
    """The objects whose masks contain a pixel."""
    column = int(pixel.x * label.width)
    row = int(pixel.y * label.height)
    index = column * label.height + row  # run lengths go column by column
    objects = []
    for o in label.objects:
        run_ends = np.cumsum(o.mask_runs)
        run = np.searchsorted(run_ends, index, side="right")  # the run that contains the pixel
        is_inside_mask = run % 2 == 1  # runs alternate and begin with zeros, so odd runs are ones
        if is_inside_mask:
            objects.append(o)
    return objects


def _count_mask_pixels(o: LabeledObject) -> int:
    return sum(o.mask_runs[1::2])  # the runs of ones


QUESTION_TYPE = QuestionType(prompts=PROMPTS, draft=_draft, needs_masks=True)
