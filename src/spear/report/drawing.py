"""Answers drawn on their image: boxes as frames, single points as rings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from spear.errors import SpearError
from spear.evaluate.vqa.measures import Segments, image_points, numbers
from spear.labels.fit.box3d import EDGES
from spear.labels.fit.camera import project
from spear.types import Array

TRUTH, PREDICTION = (74, 222, 128), (255, 176, 32)
"""Colours in drawings: green is the truth, orange the answer."""
RIM = (16, 18, 22)
Mark = tuple[Array, tuple[int, int, int]]
"""Image points [n, 2] in pixels and their colour: eight are the vertices of a box."""


def where(answer: Segments, width: int, height: int, intrinsics: Array | None) -> Array | None:
    """[n, 2] pixels at which an answer's vertices or points appear, in an image of that size.

    None for an answer without any, for one in 3D without `intrinsics` [3, 3], and for one behind the camera.
    """
    points = image_points(answer) * (width, height)
    values = numbers(answer)
    if len(values) in (3, 24) and intrinsics is not None:
        corners = values.reshape(-1, 3)
        return None if (corners[:, 2] <= 1e-3).any() else project(corners, intrinsics)
    return points if len(points) else None


def draw_answer(answer: Segments, image: Array, intrinsics: Array | None, scale: int = 3) -> Array:
    """The image, `scale` times as large, with the answer's box or points: [scale·h, scale·w, 3] uint8.

    Raises SpearError for an answer that has nothing to draw, or one in 3D about an image of unknown camera.
    """
    height, width = image.shape[:2]
    in_3d = len(numbers(answer)) in (3, 24)
    if in_3d and intrinsics is None:
        raise SpearError(
            "cannot draw 3D points: the camera of this image is not known: ask where the vertices of the "
            "object appear in the image (--family back_projection)"
        )
    points = where(answer, width, height, intrinsics)
    if points is None:
        wrong = "lies behind the camera" if in_3d else "has no box, point or image location"
        raise SpearError(f"cannot draw: the answer {wrong}")
    return mark(image, [(points, PREDICTION)], scale)


def mark(image: Array, marks: Sequence[Mark], scale: int = 3) -> Array:
    """The image [h, w, 3] uint8, `scale` times as large, with marks on it; a box's near face is drawn
    thicker.

    Lines have a dark rim, so that they can be seen on any ground.
    """
    height, width = image.shape[:2]
    canvas = Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(canvas)
    thick = max(2, width * scale // 150)
    for points, colour in marks:
        places = [(float(x), float(y)) for x, y in np.asarray(points) * scale]
        for rim, ink in ((2, RIM), (0, colour)):
            for a, b in EDGES if len(places) == 8 else ():
                near = {a, b} <= {0, 1, 4, 5}
                pen.line([places[a], places[b]], fill=ink, width=(thick if near else (thick + 1) // 2) + rim)
            for x, y in places if len(places) != 8 else ():
                reach = 3 * thick + rim // 2
                pen.ellipse((x - reach, y - reach, x + reach, y + reach), outline=ink, width=thick + rim)
    return np.asarray(canvas)
