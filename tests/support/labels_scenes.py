"""Renders boxes on a table as seen by a camera above: image, depth and masks, by ray casting."""

import numpy as np

from spear.labels.fit.box3d import VERTEX_SIGNS
from spear.labels.fit.image import unproject
from spear.labels.models.ground_truth import GroundTruth
from spear.types import Array, Box3D, Frame

TRUTH = (GroundTruth(),) * 3
"""Detector, segmenter and point-map model that return the ground truth of a frame."""
NAMES = ("carrot", "spoon", "bowl", "plate", "cube", "eggplant")
MAX_KEPT_PER_DM2 = 0.15
"""Fraction of its candidates that `sample_visible_sides` keeps of a side of 1 dm² which the camera
sees at a right angle."""
Block = tuple[Array, Array, float]
"""Center [3], size [3] and yaw (radians) of a box, in meters in the base frame."""


def make_camera(width: int = 192, height: int = 128, pitch: float = 40.0) -> tuple[Array, Array]:
    """Make a camera that looks at the base's origin from a distance of 0.8 m.

    Args:
        width: width of the image in pixels.
        height: height of the image in pixels.
        pitch: angle in degrees by which the camera looks down.

    Returns:
        The intrinsics [3, 3] in pixels, and the camera's pose [4, 4] in the base frame.
    """
    focal_px = 0.9 * width  # a horizontal field of view of 58°
    intrinsics = np.array([[focal_px, 0, width / 2], [0, focal_px, height / 2], [0, 0, 1.0]])
    pitch_rad = np.radians(pitch)
    forward = np.array([np.cos(pitch_rad), 0, -np.sin(pitch_rad)])
    right = np.array([0.0, -1.0, 0.0])
    down = np.cross(forward, right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, down, forward], axis=1)  # the camera's axes are columns
    pose[:3, 3] = -0.8 * forward  # position in meters
    return intrinsics, pose


def render_blocks(boxes: list[Block], names: list[str], pitch: float = 40.0, **size: int) -> Frame:
    """Render boxes on the table, which is the plane z = 0 of the base frame.

    Args:
        boxes: the boxes.
        names: the boxes' names.
        pitch: angle in degrees by which the camera looks down.
        size: "width" and "height" of the image; by default those of `make_camera`.

    Returns:
        The frame, with its ground truth.
    """
    intrinsics, pose = make_camera(pitch=pitch, **size)
    width = size.get("width", 192)
    height = size.get("height", 128)
    camera_rotation = pose[:3, :3]
    origin = pose[:3, 3]
    # Rays have a component of 1 along the optical axis, so multiples of a ray are depths.
    rays_in_camera_frame = unproject(np.ones((height, width)), intrinsics).astype(float)
    rays = rays_in_camera_frame @ camera_rotation.T  # [height, width, 3] in the base frame

    true_vertices = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        depth = np.where(rays[..., 2] < 0, -origin[2] / rays[..., 2], np.inf)  # of the table
        instances = np.zeros((height, width), np.int32)
        for number, (center, extent, yaw) in enumerate(boxes, start=1):
            box_rotation = make_yaw_rotation(yaw)
            half = np.asarray(extent) / 2
            # A box is the intersection of three slabs, each between two parallel sides. In the
            # box's frame a ray enters the slab of an axis at the smaller of two depths and leaves
            # it at the larger. The ray is inside the box from the last of the three entries
            # (`near`) until the first of the three exits (`far`).
            start = (origin - center) @ box_rotation  # [3] in the box's frame
            direction = rays @ box_rotation  # [height, width, 3] in the box's frame
            side_depths = np.stack([(-half - start) / direction, (half - start) / direction])
            near = side_depths.min(axis=0).max(axis=-1)  # [height, width]
            far = side_depths.max(axis=0).min(axis=-1)
            is_visible = (near <= far) & (near > 0) & (near < depth)
            depth = np.where(is_visible, near, depth)
            instances[is_visible] = number
            vertices = np.asarray(center) + VERTEX_SIGNS * half @ box_rotation.T  # [8, 3]
            true_vertices[number] = (vertices - origin) @ camera_rotation  # in the camera frame

    # Each object has a color that depends on its number; the background is gray.
    image = np.full((height, width, 3), 90, np.uint8)
    for number in true_vertices:
        red = 40 * number % 256
        green = 200 - 20 * number % 200
        blue = 70 * number % 256
        image[instances == number] = (red, green, blue)
    return Frame(
        image=image,
        depth=np.where(np.isfinite(depth), depth, 0).astype(np.float32),
        instances=instances,
        names=dict(enumerate(names, start=1)),
        intrinsics=intrinsics,
        extrinsics=pose,
        boxes=true_vertices,
        source="synthetic",
    )


def make_yaw_rotation(yaw: float) -> Array:
    """Return the rotation matrix [3, 3] of a rotation by `yaw` radians about the base's z axis."""
    c = np.cos(yaw)
    s = np.sin(yaw)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])


def make_random_frame(
    rng: np.random.Generator, objects: int = 5, names: tuple[str, ...] = NAMES, **size: int
) -> Frame:
    """Render boxes of random size, place and yaw on the table, which do not overlap.

    Args:
        rng: the random generator.
        objects: number of boxes.
        names: names to choose from.
        size: "width" and "height" of the image.
    """
    boxes: list[Block] = []
    while len(boxes) < objects:
        extent = rng.uniform(0.03, 0.12, 3)
        center = np.array([rng.uniform(-0.2, 0.2), rng.uniform(-0.25, 0.25), extent[2] / 2])
        diagonal = np.hypot(*extent[:2])  # of the box's base, as seen from above
        # Two boxes count as overlapping if the circles around their bases overlap.
        overlaps = False
        for other_center, other_extent, _ in boxes:
            distance = np.linalg.norm((center - other_center)[:2])
            other_diagonal = np.hypot(*other_extent[:2])
            if distance <= (diagonal + other_diagonal) / 2:
                overlaps = True
        if not overlaps:
            boxes.append((center, extent, rng.uniform(0, np.pi)))
    # Names are used a second time only if there are more objects than names.
    name_order = rng.permutation(max(objects, len(names)))
    chosen_names = [names[index % len(names)] for index in name_order[:objects]]
    return render_blocks(boxes, chosen_names, pitch=float(rng.uniform(25, 60)), **size)


def sample_visible_sides(box: Box3D, rng: np.random.Generator, noise: float) -> Array:
    """Sample points [n, 3] on the sides of a box that face the camera at the origin.

    The points are denser on sides that the camera sees less obliquely, as in a depth image.

    Args:
        box: the box, in the camera frame.
        rng: the random generator.
        noise: standard deviation of the distance from the camera, relative to the distance.
    """
    num_candidates = 4000
    points_of_sides = []
    for axis in range(3):
        normal = box.rotation[:, axis]
        center_along_axis = float(box.center @ normal)
        # If the camera is between the planes of the two opposite sides, it sees neither of them.
        if abs(center_along_axis) > box.size[axis] / 2:
            fractions = rng.uniform(-0.5, 0.5, (num_candidates, 3))  # of the box's size
            fractions[:, axis] = -np.sign(center_along_axis) / 2  # the side towards the camera
            points = box.center + (fractions * box.size) @ box.rotation.T
            rays = points / np.linalg.norm(points, axis=1)[:, None]
            slope = abs(normal @ rays.T)  # [num_candidates]: 1 where a ray hits at a right angle
            area_m2 = np.prod(np.delete(box.size, axis))  # of the other two sizes
            area_dm2 = area_m2 / 0.01
            keep_probability = MAX_KEPT_PER_DM2 * slope * area_dm2
            is_kept = rng.uniform(size=num_candidates) < keep_probability
            points_of_sides.append(points[is_kept])
    points = np.concatenate(points_of_sides)
    return points * (1 + noise * rng.normal(size=(len(points), 1)))
