"""Where a labeled object is, in space and in the image."""

from math import sqrt

from spear.labels.questions.interface import MIN_RELATIVE_GAP
from spear.types import Array, Box3D, LabeledImage, LabeledObject, Pixel, Segments


def get_box3d(o: LabeledObject) -> Box3D:
    """Return the object's 3D box. 3D questions are only asked about objects that have one."""
    assert o.box3d is not None
    return o.box3d


def compute_distance_from_camera(o: LabeledObject) -> float:
    """The distance from the camera to the center of the object's box, in the label's unit."""
    x, y, z = get_box3d(o).center.tolist()
    return sqrt(x * x + y * y + z * z)


def project_to_pixels(points: Array, label: LabeledImage) -> list[Pixel | None]:
    """Project points [n, 3] to the image; None for points outside it or behind the camera."""
    (fx, skew, cx), (_, fy, cy), _ = label.intrinsics.tolist()
    pixels: list[Pixel | None] = []
    for x, y, z in points.tolist():
        # As fractions of the image; -1, which is outside, for a point behind the camera
        u = (fx * x + skew * y + cx * z) / (z * label.width) if z > 0 else -1.0
        v = (fy * y + cy * z) / (z * label.height) if z > 0 else -1.0
        is_inside = 0 <= u < 1 and 0 <= v < 1
        pixels.append(Pixel(u, v) if is_inside else None)
    return pixels


def to_clipped_pixel(x: float, y: float, label: LabeledImage) -> Pixel:
    """Convert pixel coordinates to a `Pixel` (fractions of the image), clipped to the image."""
    return Pixel(_clip_to_unit(x / label.width), _clip_to_unit(y / label.height))


def _clip_to_unit(fraction: float) -> float:
    """Clip to 0 <= fraction < 1, since a location of 1 is outside the image."""
    return min(max(fraction, 0.0), 1.0 - 1e-6)


def compute_center_2d(o: LabeledObject, label: LabeledImage) -> Pixel:
    """The center of an object's 2D box."""
    x0, y0, x1, y1 = o.box2d.tolist()
    return to_clipped_pixel((x0 + x1) / 2, (y0 + y1) / 2, label)


def name_left_or_right(rightward_distance: float) -> Segments | None:
    """The word for a horizontal distance, in image widths, that is positive to the right.

    It is None if the distance is too small to name a side.
    """
    if abs(rightward_distance) < MIN_RELATIVE_GAP:
        return None
    return ["left" if rightward_distance < 0 else "right"]
