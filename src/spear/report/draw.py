"""Draw on images: labels as masks, 3D boxes and names; answers as boxes and points."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from spear.errors import SpearError
from spear.evaluate.vqa.measures import extract_image_points, extract_numbers
from spear.labels.fit.box3d import BOX_EDGES
from spear.labels.fit.image import project
from spear.labels.fit.masks import decode_mask, erode
from spear.types import Array, LabeledImage, Segments
from spear.util.images import decode_image

Color = tuple[int, int, int]
TRUTH_COLOR = (74, 222, 128)  # green
PREDICTION_COLOR = (255, 176, 32)  # orange
RIM_COLOR = (16, 18, 22)  # dark, around lines and behind names, so that both are seen everywhere
NEAR_FACE = {0, 1, 4, 5}  # vertices of a box, drawn thicker
MIN_DEPTH_M = 1e-3  # what is nearer lies behind the camera
NUM_BOX_VERTICES = 8
NUMBERS_OF_3D_ANSWERS = (3, 3 * NUM_BOX_VERTICES)  # a point, or a box's vertices
ANSWER_SCALE = 3
MASK_OPACITY = 0.35
TAG_STEP_PX = 3  # places for a name are tried at this distance from each other


class _NamedBox(NamedTuple):
    name: str
    color: Color
    corners: Array  # [8, 2] pixels


def make_palette(count: int) -> list[Color]:
    """Make bright colors whose hues differ as much as they can."""
    hues = [360 * ((0.02 + index * 0.618034) % 1.0) for index in range(count)]
    return [ImageColor.getrgb(f"hsv({hue:f},70%,100%)")[:3] for hue in hues]


def draw_label(label: LabeledImage, scale: int = 3, masks: bool = False) -> Array:
    """Draw a labeled image with its 3D boxes and names.

    Boxes that reach behind the camera, and names for which there is no room, are not drawn.

    Args:
        label: the labeled image.
        scale: how many times as large the drawing is.
        masks: whether masks are drawn, too.

    Returns:
        [scale * h, scale * w, 3] uint8.
    """
    image = decode_image(label.image, label.source)
    palette = make_palette(len(label.objects))
    if masks:
        for labeled_object, color in zip(label.objects, palette, strict=True):
            mask = decode_mask(labeled_object.mask_runs, label.height, label.width)
            tinted = (1 - MASK_OPACITY) * image[mask] + MASK_OPACITY * np.array(color)
            image[mask] = tinted.astype(np.uint8)
            image[mask & ~erode(mask, 1)] = color

    canvas = _enlarge(image, scale)
    boxes = []
    for labeled_object, color in zip(label.objects, palette, strict=True):
        box = labeled_object.box3d
        if box is None or (box.vertices[:, 2] <= MIN_DEPTH_M).any():
            continue
        corners = project(box.vertices, label.intrinsics) * scale
        _draw_points(canvas, corners, color)
        boxes.append(_NamedBox(labeled_object.name, color, corners))
    _draw_names(canvas, boxes, font_size=max(10, 5 * scale, canvas.width // 44))
    return np.asarray(canvas)


def draw_answers(
    image: Array, intrinsics: Array | None, answers: Sequence[tuple[Segments, Color]], scale: int
) -> Array:
    """Draw the boxes and points of answers on an image.

    An answer without a place in the image (see `find_pixels`) is not drawn.

    Args:
        image: [h, w, 3] uint8.
        intrinsics: [3, 3] in pixels; None if the camera is unknown.
        answers: each with its color.
        scale: how many times as large the drawing is.

    Returns:
        [scale * h, scale * w, 3] uint8.
    """
    canvas = _enlarge(image, scale)
    height, width = image.shape[:2]
    for segments, color in answers:
        points = find_pixels(segments, width, height, intrinsics)
        if points is not None:
            _draw_points(canvas, points * scale, color)
    return np.asarray(canvas)


def draw_answer(
    answer: Segments, image: Array, intrinsics: Array | None, question_type: str | None
) -> Array:
    """Draw a single answer, three times as large as the image.

    Args:
        answer: what to draw.
        image: [h, w, 3] uint8.
        intrinsics: [3, 3] in pixels; None if the camera is unknown.
        question_type: the type of the question, if it is known.

    Raises:
        SpearError: the answer has nothing to draw, or is in 3D and the image's camera is unknown.
    """
    height, width = image.shape[:2]
    is_displacement = question_type == "offset"  # its three numbers are no place
    has_place = find_pixels(answer, width, height, intrinsics) is not None
    if has_place and not is_displacement:
        return draw_answers(image, intrinsics, [(answer, PREDICTION_COLOR)], ANSWER_SCALE)

    is_3d = len(extract_numbers(answer)) in NUMBERS_OF_3D_ANSWERS and not is_displacement
    if not is_3d:
        raise SpearError("cannot draw: the answer has no box, point or image location")
    if intrinsics is None:
        raise SpearError(
            "cannot draw: the answer is in 3D, the camera of this image unknown: "
            "ask with --question-type back_projection"
        )
    raise SpearError("cannot draw: the answer lies behind the camera")


def find_pixels(
    answer: Segments, width: int, height: int, intrinsics: Array | None
) -> Array | None:
    """Find the pixels [n, 2] of an answer's vertices or points, in an image of that size.

    Returns None for an answer without any, for one in 3D without `intrinsics` [3, 3], and for one
    behind the camera.
    """
    values = extract_numbers(answer)
    if len(values) in NUMBERS_OF_3D_ANSWERS and intrinsics is not None:
        corners = values.reshape(-1, 3)
        is_behind_camera = (corners[:, 2] <= MIN_DEPTH_M).any()
        return None if is_behind_camera else project(corners, intrinsics)
    points = extract_image_points(answer) * (width, height)
    return points if len(points) else None


def _enlarge(image: Array, scale: int) -> Image.Image:
    height, width = image.shape[:2]
    return Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.BICUBIC)


def _draw_points(canvas: Image.Image, points: Array, color: Color) -> None:
    """Draw eight points [8, 2] as a box, other points as rings; in pixels of the canvas."""
    pen = ImageDraw.Draw(canvas)
    line_width = max(2, canvas.width // 190)
    pixels = [(float(x), float(y)) for x, y in points]
    for rim_width, ink in ((2, RIM_COLOR), (0, color)):
        if len(pixels) == NUM_BOX_VERTICES:
            _draw_box(pen, pixels, ink, line_width, rim_width)
        else:
            _draw_rings(pen, pixels, ink, line_width, rim_width)


def _draw_box(
    pen: ImageDraw.ImageDraw,
    vertices: Sequence[tuple[float, float]],
    ink: Color,
    line_width: int,
    rim_width: int,
) -> None:
    for start, end in BOX_EDGES:
        is_near = {start, end} <= NEAR_FACE
        edge_width = line_width if is_near else (line_width + 1) // 2
        pen.line([vertices[start], vertices[end]], fill=ink, width=edge_width + rim_width)


def _draw_rings(
    pen: ImageDraw.ImageDraw,
    centers: Sequence[tuple[float, float]],
    ink: Color,
    line_width: int,
    rim_width: int,
) -> None:
    radius = 3 * line_width + rim_width // 2
    for x, y in centers:
        bounds = (x - radius, y - radius, x + radius, y + radius)
        pen.ellipse(bounds, outline=ink, width=line_width + rim_width)


def _draw_names(canvas: Image.Image, boxes: Sequence[_NamedBox], font_size: int) -> None:
    """Draw names on dark tags, as near to the top of their boxes as there is room.

    Tags lie inside the image and do not overlap. A line leads from a tag that had to move away to
    its box. Narrow boxes choose first.
    """
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(font_size)
    padding = font_size // 4
    centers = [box.corners.mean(0) for box in boxes]
    tags: list[tuple[int, int, int, int]] = []  # left, top, right, bottom
    for box in sorted(boxes, key=lambda box: float(np.ptp(box.corners[:, 0]))):
        width = round(font.getlength(box.name)) + 2 * padding
        height = font_size + 2 * padding
        anchor = np.clip([box.corners[:, 0].mean(), box.corners[:, 1].min() - 3], 0, canvas.size)
        tag_position = _find_place(canvas.size, (width, height), anchor, centers, tags)
        if tag_position is None:
            continue

        left, top = tag_position
        right, bottom = left + width, top + height
        tags.append((left, top, right, bottom))
        line_end = (
            min(max(anchor[0], left), right),
            bottom if anchor[1] > bottom else top,
        )
        if np.hypot(line_end[0] - anchor[0], line_end[1] - anchor[1]) > height:
            line_start = (float(anchor[0]), float(anchor[1]))
            pen.line([line_start, line_end], fill=box.color, width=max(1, font_size // 10))
        pen.rounded_rectangle((left, top, right - 1, bottom - 1), padding, fill=RIM_COLOR)
        text_place = (left + padding, top + height / 2)
        pen.text(text_place, box.name, fill=box.color, font=font, anchor="lm")


def _find_place(
    canvas_size: tuple[int, int],
    size: tuple[int, int],
    anchor: Array,
    centers: Sequence[Array],
    tags: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int] | None:
    """Find the left and top of a tag that is near its anchor and covers no other tag; None without
    room.
    """
    width, height = size
    left, top = np.meshgrid(
        np.arange(0, canvas_size[0] - width + 1, TAG_STEP_PX),
        np.arange(0, canvas_size[1] - height + 1, TAG_STEP_PX),
    )
    right = left + width
    bottom = top + height
    cost = np.hypot(left + width / 2 - anchor[0], bottom - anchor[1])
    for x, y in centers:  # a little further away is better than on another object
        covers_center = (left < x) & (x < right) & (top < y) & (y < bottom)
        cost += 2 * height * covers_center
    for tag_left, tag_top, tag_right, tag_bottom in tags:
        overlaps = (left < tag_right) & (right > tag_left) & (top < tag_bottom) & (bottom > tag_top)
        cost[overlaps] = np.inf
    if not np.isfinite(cost).any():
        return None
    best = np.unravel_index(cost.argmin(), cost.shape)
    return int(left[best]), int(top[best])
