"""Draw on images: labels as masks, 3D boxes and names; answers as boxes and points."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from spear.errors import SpearError
from spear.evaluate.vqa.measures import extract_image_points, extract_numbers
from spear.labels.fit.box3d import BOX_EDGES
from spear.labels.fit.image import project
from spear.labels.fit.masks import decode_mask, erode
from spear.types import Array, LabeledImage, Segments
from spear.util.images import decode_image

Colour = tuple[int, int, int]
TRUTH, PREDICTION = (74, 222, 128), (255, 176, 32)
"""Green is the truth, orange the answer."""
RIM = (16, 18, 22)
"""The dark rim of lines, so that they can be seen on any ground, and the ground of names."""


def colors(n: int) -> list[Colour]:
    """n bright colours that differ in hue as much as they can."""
    hues = (360 * ((0.02 + i * 0.618034) % 1.0) for i in range(n))
    return [ImageColor.getrgb(f"hsv({hue:f},70%,100%)")[:3] for hue in hues]


def draw_label(label: LabeledImage, scale: int = 3, masks: bool = False) -> Array:
    """A labelled image with its 3D boxes and names, and its masks if wanted: [scale·h, scale·w, 3] uint8.

    Boxes that reach behind the camera are left out, and names without room: no name covers another.
    """
    image, palette = decode_image(label.image, label.source), colors(len(label.objects))
    if masks:
        for o, colour in zip(label.objects, palette, strict=True):
            mask = decode_mask(o.mask, label.height, label.width)
            image[mask] = (0.65 * image[mask] + 0.35 * np.array(colour)).astype(np.uint8)
            image[mask & ~erode(mask, 1)] = colour
    canvas = _enlarge(image, scale)
    names = []
    for o, colour in zip(label.objects, palette, strict=True):
        if o.box3d is None or (o.box3d.vertices[:, 2] <= 1e-3).any():
            continue
        corners = project(o.box3d.vertices, label.intrinsics) * scale
        _mark(canvas, corners, colour)
        names.append((o.name, colour, corners))
    _write_names(canvas, names, max(10, 5 * scale, canvas.width // 44))
    return np.asarray(canvas)


def draw_answers(
    image: Array, intrinsics: Array | None, answers: Sequence[tuple[Segments, Colour]], scale: int
) -> Array:
    """The image [h, w, 3] uint8, `scale` times as large, with the boxes and points of answers on it.

    An answer that has no place in the image (see `places`) is left out.
    """
    canvas = _enlarge(image, scale)
    for segments, colour in answers:
        if (points := places(segments, image.shape[1], image.shape[0], intrinsics)) is not None:
            _mark(canvas, points * scale, colour)
    return np.asarray(canvas)


def draw_answer(
    answer: Segments, image: Array, intrinsics: Array | None, family: str | None
) -> Array:
    """`draw_answers` of a single answer, three times as large. family: of its question, where it is known.

    Raises SpearError for an answer that has nothing to draw, or one in 3D about an image of unknown camera.
    """
    away = family == "offset"  # the three numbers are no place
    if away or places(answer, image.shape[1], image.shape[0], intrinsics) is None:
        wrong = "has no box, point or image location"
        if len(extract_numbers(answer)) in (3, 24) and not away:
            wrong = "lies behind the camera"
            if intrinsics is None:
                wrong = (
                    "is in 3D, the camera of this image unknown: ask with --family back_projection"
                )
        raise SpearError(f"cannot draw: the answer {wrong}")
    return draw_answers(image, intrinsics, [(answer, PREDICTION)], 3)


def places(answer: Segments, width: int, height: int, intrinsics: Array | None) -> Array | None:
    """[n, 2] pixels at which an answer's vertices or points appear, in an image of that size.

    None for an answer without any, for one in 3D without `intrinsics` [3, 3], and for one behind the camera.
    """
    values = extract_numbers(answer)
    if len(values) in (3, 24) and intrinsics is not None:
        corners = values.reshape(-1, 3)
        return None if (corners[:, 2] <= 1e-3).any() else project(corners, intrinsics)
    points = extract_image_points(answer) * (width, height)
    return points if len(points) else None


def _enlarge(image: Array, scale: int) -> Image.Image:
    height, width = image.shape[:2]
    return Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.BICUBIC)


def _mark(canvas: Image.Image, points: Array, colour: Colour) -> None:
    """Eight points [8, 2] as a box with a thick near face, any others as rings. Pixels of the canvas."""
    pen, thick = ImageDraw.Draw(canvas), max(2, canvas.width // 190)
    at = [(float(x), float(y)) for x, y in points]
    for rim, ink in ((2, RIM), (0, colour)):
        for a, b in BOX_EDGES if len(at) == 8 else ():
            near = {a, b} <= {0, 1, 4, 5}
            pen.line([at[a], at[b]], fill=ink, width=(thick if near else (thick + 1) // 2) + rim)
        for x, y in at if len(at) != 8 else ():
            reach = 3 * thick + rim // 2
            pen.ellipse(
                (x - reach, y - reach, x + reach, y + reach), outline=ink, width=thick + rim
            )


def _write_names(
    canvas: Image.Image, names: Sequence[tuple[str, Colour, Array]], size: int
) -> None:
    """Names on dark tabs, as near as there is room to the top of their boxes (corners [8, 2]).

    Tabs lie inside the image and do not overlap. A line leads from a tab that had to move away to its box.
    """
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size)
    pad = size // 4
    taken: list[tuple[int, int, int, int]] = []
    centres = [corners.mean(0) for _, _, corners in names]
    for name, colour, corners in sorted(names, key=lambda n: float(np.ptp(n[2][:, 0]))):
        width, height = round(font.getlength(name)) + 2 * pad, size + 2 * pad
        across, down = canvas.width - width + 1, canvas.height - height + 1
        left, top = np.meshgrid(np.arange(0, across, 3), np.arange(0, down, 3))
        anchor = np.clip([corners[:, 0].mean(), corners[:, 1].min() - 3], 0, canvas.size)
        away = np.hypot(left + width / 2 - anchor[0], top + height - anchor[1])
        for x, y in centres:  # rather a little further away than on another object
            away += 2 * height * ((left < x) & (x < left + width) & (top < y) & (y < top + height))
        for x0, y0, x1, y1 in taken:
            away[(left < x1) & (left + width > x0) & (top < y1) & (top + height > y0)] = np.inf
        if not np.isfinite(away).any():
            continue
        best = np.unravel_index(away.argmin(), away.shape)
        x, y = int(left[best]), int(top[best])
        taken.append((x, y, x + width, y + height))
        end = (min(max(anchor[0], x), x + width), y + height if anchor[1] > y + height else y)
        if np.hypot(end[0] - anchor[0], end[1] - anchor[1]) > height:
            pen.line(
                [(float(anchor[0]), float(anchor[1])), end], fill=colour, width=max(1, size // 10)
            )
        pen.rounded_rectangle((x, y, x + width - 1, y + height - 1), pad, fill=RIM)
        pen.text((x + pad, y + height / 2), name, fill=colour, font=font, anchor="lm")
