"""Draws on images: labels as masks, 3D boxes and names; answers as boxes and points."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from spear.errors import SpearError
from spear.labels.fit.box3d import BOX_EDGES
from spear.labels.fit.image import project
from spear.labels.fit.masks import decode_mask, erode_keeping_image_edge
from spear.labels.questions.measures import extract_image_points, extract_numbers
from spear.labels.questions.types import QUESTION_TYPE_BY_NAME
from spear.types import Array, LabeledImage, Segments, WidthAndHeight
from spear.util.images import decode_image

Color = tuple[int, int, int]
TRUTH_COLOR = (74, 222, 128)  # green
PREDICTION_COLOR = (255, 176, 32)  # orange
RIM_COLOR = (16, 18, 22)  # dark; around lines and behind names, so that both are visible on light
NEAR_FACE = {0, 1, 4, 5}  # vertices of a box's near face, whose edges are drawn thicker
MIN_DEPTH_M = 1e-3  # a point of a smaller depth counts as behind the camera
NUM_BOX_VERTICES = 8
NUMBERS_OF_3D_ANSWERS = (3, 3 * NUM_BOX_VERTICES)  # how many numbers a point or a box has
ANSWER_SCALE = 3  # how many times as large as its image the drawing of a single answer is
MASK_OPACITY = 0.35  # of an object's color on its mask
MIN_FONT_PX = 10
FONT_PX_PER_SCALE = 5
MAX_WIDTH_PER_FONT = 44  # width of a drawing, in font sizes (both are pixels, so it has no unit)
"""The font size of names is at least `MIN_FONT_PX`, in enlarged drawings at least
`FONT_PX_PER_SCALE` times the enlargement, and at least the drawing's width divided by
`MAX_WIDTH_PER_FONT`, so that names are readable when a page scales the drawing down."""
MIN_LINE_PX = 2
MAX_WIDTH_PER_LINE = 190  # lines are at least the drawing's width divided by this
ANCHOR_GAP_PX = 3  # distance between a box's top and the point to which its tag is connected
TAG_STEP_PX = 3  # distance between the positions that are tried for a tag; a tag shows a name


class _NamedBox(NamedTuple):
    """A box that is drawn, with its name and color."""

    name: str
    color: Color
    corners: Array  # [8, 2] pixels


def make_palette(count: int) -> list[Color]:
    """Return `count` bright colors whose hues differ as much as possible."""
    # Steps of the golden ratio spread any number of hues evenly over the circle of 360°.
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
            mask = decode_mask(labeled_object.mask_runs, label.height, label.width)  # [h, w] bool
            tinted = (1 - MASK_OPACITY) * image[mask] + MASK_OPACITY * np.array(color)
            image[mask] = tinted.astype(np.uint8)
            outline = mask & ~erode_keeping_image_edge(mask, 1)  # the mask's pixels at its border
            image[outline] = color

    canvas = _enlarge(image, scale)
    boxes = []
    for labeled_object, color in zip(label.objects, palette, strict=True):
        box = labeled_object.box3d
        if box is None:
            continue
        reaches_behind_camera = (box.vertices[:, 2] <= MIN_DEPTH_M).any()
        if reaches_behind_camera:
            continue
        corners = project(box.vertices, label.intrinsics) * scale  # [8, 2] pixels of the canvas
        _draw_box_or_points(canvas, corners, color)
        boxes.append(_NamedBox(labeled_object.name, color, corners))
    font_size = max(MIN_FONT_PX, FONT_PX_PER_SCALE * scale, canvas.width // MAX_WIDTH_PER_FONT)
    _draw_names(canvas, boxes, font_size)
    return np.asarray(canvas)


def draw_answers(
    image: Array, intrinsics: Array | None, answers: Sequence[tuple[Segments, Color]], scale: int
) -> Array:
    """Draw the boxes and points of answers on an image.

    An answer for which `project_answer_to_pixels` finds no pixels is not drawn.

    Args:
        image: [h, w, 3] uint8.
        intrinsics: [3, 3] in pixels; None if the camera is unknown.
        answers: pairs of an answer and its color.
        scale: how many times as large the drawing is.

    Returns:
        [scale * h, scale * w, 3] uint8.
    """
    canvas = _enlarge(image, scale)
    height, width = image.shape[:2]
    for segments, color in answers:
        points = project_answer_to_pixels(segments, width, height, intrinsics)
        if points is not None:
            _draw_box_or_points(canvas, points * scale, color)
    return np.asarray(canvas)


def draw_answer_enlarged(
    answer: Segments, image: Array, intrinsics: Array | None, question_type: str | None
) -> Array:
    """Draw a single answer on its image, enlarged three times.

    Args:
        answer: the answer.
        image: [h, w, 3] uint8.
        intrinsics: [3, 3] in pixels; None if the camera is unknown.
        question_type: the type of the question; None if it is unknown.

    Raises:
        SpearError: the answer has nothing to draw, or is in 3D and the image's camera is unknown.
    """
    height, width = image.shape[:2]
    # The three numbers of a displacement lead from one object to another, and are no point.
    is_displacement = (
        question_type is not None and QUESTION_TYPE_BY_NAME[question_type].is_displacement
    )
    has_place = project_answer_to_pixels(answer, width, height, intrinsics) is not None
    if has_place and not is_displacement:
        return draw_answers(image, intrinsics, [(answer, PREDICTION_COLOR)], ANSWER_SCALE)

    is_3d = len(extract_numbers(answer)) in NUMBERS_OF_3D_ANSWERS and not is_displacement
    if not is_3d:
        raise SpearError(
            "the answer cannot be drawn, because it has no box, point or image location. Ask "
            "where an object is."
        )
    if intrinsics is None:
        raise SpearError(
            "the answer cannot be drawn, because it is in 3D and the camera of this image is "
            "unknown. Ask with --question-type back_projection."
        )
    raise SpearError(
        "the answer cannot be drawn, because it lies behind the camera. Ask another question."
    )


def project_answer_to_pixels(
    answer: Segments, width: int, height: int, intrinsics: Array | None
) -> Array | None:
    """Find the pixels [n, 2] of an answer's box vertices or points in its image.

    Args:
        answer: the answer.
        width: width of the image in pixels.
        height: height of the image in pixels.
        intrinsics: [3, 3] in pixels; None if the camera is unknown.

    Returns:
        The pixels; None if the answer has no vertices or points, lies behind the camera, or is in
        3D and the camera is unknown.
    """
    values = extract_numbers(answer)
    if len(values) in NUMBERS_OF_3D_ANSWERS and intrinsics is not None:
        vertices = values.reshape(-1, 3)
        is_behind_camera = (vertices[:, 2] <= MIN_DEPTH_M).any()
        return None if is_behind_camera else project(vertices, intrinsics)
    points = extract_image_points(answer) * (width, height)  # from fractions of the image's size
    return points if len(points) else None


def _enlarge(image: Array, scale: int) -> Image.Image:
    """Return an image [h, w, 3] as Pillow image, enlarged by `scale`."""
    height, width = image.shape[:2]
    return Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.BICUBIC)


def _draw_box_or_points(canvas: Image.Image, points: Array, color: Color) -> None:
    """Draw eight points as a box, and any other number of points as rings.

    Args:
        canvas: the image on which to draw.
        points: [n, 2] in pixels of the canvas.
        color: color of the lines.
    """
    pen = ImageDraw.Draw(canvas)
    line_width = max(MIN_LINE_PX, canvas.width // MAX_WIDTH_PER_LINE)
    pixels = [(float(x), float(y)) for x, y in points]
    # First the dark rims, which are 2 pixels wider, then the lines on top of the rims.
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
    """Draw the edges of a box; all lines are `rim_width` pixels wider than without a rim."""
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
    """Draw a ring around each center; all lines are `rim_width` wider than without a rim."""
    radius = 3 * line_width + rim_width // 2
    for x, y in centers:
        bounds = (x - radius, y - radius, x + radius, y + radius)
        pen.ellipse(bounds, outline=ink, width=line_width + rim_width)


def _draw_names(canvas: Image.Image, boxes: Sequence[_NamedBox], font_size: int) -> None:
    """Draw each box's name on a dark tag, as near to the top of the box as there is room.

    Tags lie inside the image and do not overlap. If a tag is far from its box, a line connects
    them. Narrow boxes choose their place first, because they have less room of their own.
    """
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(font_size)
    padding = font_size // 4
    centers = [box.corners.mean(0) for box in boxes]
    tags: list[tuple[int, int, int, int]] = []  # left, top, right, bottom
    boxes_by_width = sorted(boxes, key=lambda box: float(np.ptp(box.corners[:, 0])))
    for box in boxes_by_width:
        width = round(font.getlength(box.name)) + 2 * padding
        height = font_size + 2 * padding
        # The anchor is a point above the middle of the box's top, but inside the image.
        middle_x = box.corners[:, 0].mean()
        top_y = box.corners[:, 1].min()
        anchor = np.clip([middle_x, top_y - ANCHOR_GAP_PX], 0, canvas.size)
        tag_position = _find_tag_position(canvas.size, (width, height), anchor, centers, tags)
        if tag_position is None:
            continue

        left, top = tag_position
        right = left + width
        bottom = top + height
        tags.append((left, top, right, bottom))

        # Connect the anchor with the nearest point on the tag's upper or lower edge.
        line_end_x = min(max(anchor[0], left), right)
        line_end_y = bottom if anchor[1] > bottom else top
        if np.hypot(line_end_x - anchor[0], line_end_y - anchor[1]) > height:
            line_start = (float(anchor[0]), float(anchor[1]))
            line_end = (line_end_x, line_end_y)
            pen.line([line_start, line_end], fill=box.color, width=max(1, font_size // 10))

        pen.rounded_rectangle((left, top, right - 1, bottom - 1), padding, fill=RIM_COLOR)
        text_place = (left + padding, top + height / 2)
        pen.text(text_place, box.name, fill=box.color, font=font, anchor="lm")


def _find_tag_position(
    canvas_size: WidthAndHeight,
    tag_size: WidthAndHeight,
    anchor: Array,
    box_centers: Sequence[Array],
    tags: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int] | None:
    """Find a place for a tag near its anchor, where it covers no other tag.

    All numbers are pixels of the canvas.

    Args:
        canvas_size: width and height of the canvas.
        tag_size: width and height of the tag.
        anchor: [2] the point to which the middle of the tag's lower edge should be near.
        box_centers: [2] the centers of all boxes, which the tag should not cover.
        tags: left, top, right and bottom of the tags that have their places.

    Returns:
        The tag's left and top; None if there is no room.
    """
    # All places that are tried, a grid of [rows, columns].
    width, height = tag_size
    left, top = np.meshgrid(
        np.arange(0, canvas_size[0] - width + 1, TAG_STEP_PX),
        np.arange(0, canvas_size[1] - height + 1, TAG_STEP_PX),
    )
    right = left + width
    bottom = top + height

    # The best place has the smallest distance from the anchor. A place on the center of an object
    # costs as much as a distance of twice the tag's height.
    cost = np.hypot(left + width / 2 - anchor[0], bottom - anchor[1])
    for x, y in box_centers:
        covers_center = (left < x) & (x < right) & (top < y) & (y < bottom)
        cost += 2 * height * covers_center
    for tag_left, tag_top, tag_right, tag_bottom in tags:
        overlaps = (left < tag_right) & (right > tag_left) & (top < tag_bottom) & (bottom > tag_top)
        cost[overlaps] = np.inf
    if not np.isfinite(cost).any():
        return None
    best = np.unravel_index(cost.argmin(), cost.shape)
    return int(left[best]), int(top[best])
