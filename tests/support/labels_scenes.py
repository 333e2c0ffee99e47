"""Scenes of boxes on a table, seen by a camera that looks down: depth and masks by ray casting."""

import numpy as np

from spear.labels.fit.box3d import VERTEX_SIGNS
from spear.labels.fit.image import unproject
from spear.labels.models.ground_truth import GroundTruth
from spear.types import Array, Box3D, Frame

TRUTH = (GroundTruth(),) * 3
NAMES = ("carrot", "spoon", "bowl", "plate", "cube", "eggplant")
Block = tuple[Array, Array, float]
"""Center [3], size [3], yaw of a box; base frame, m."""


def make_camera(width: int = 192, height: int = 128, pitch: float = 40.0) -> tuple[Array, Array]:
    """Intrinsics [3, 3], extrinsics [4, 4] (camera -> base); it looks at the base's origin, 0.8 m
    away."""
    focal = 0.9 * width
    p = np.radians(pitch)
    forward = np.array([np.cos(p), 0, -np.sin(p)])
    right = np.array([0.0, -1.0, 0.0])
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    pose[:3, 3] = -0.8 * forward
    return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]]), pose


def render_blocks(boxes: list[Block], names: list[str], pitch: float = 40.0, **size: int) -> Frame:
    """Boxes on the table z = 0."""
    k, pose = make_camera(pitch=pitch, **size)
    width = size.get("width", 192)
    height = size.get("height", 128)
    rays = unproject(np.ones((height, width)), k).astype(float) @ pose[:3, :3].T
    origin = pose[:3, 3]
    true_vertices = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        depth = np.where(rays[..., 2] < 0, -origin[2] / rays[..., 2], np.inf)
        instances = np.zeros((height, width), np.int32)
        for number, (center, extent, yaw) in enumerate(boxes, start=1):
            turn = make_yaw_rotation(yaw)
            half = np.asarray(extent) / 2
            # A ray hits a box where it is inside all three of the box's slabs, each between two
            # parallel sides. In the box's frame it enters the slab of an axis at the smaller of two
            # distances and leaves it at the larger. It enters the box (`near`) with the last of the
            # three entries, and leaves it (`far`) with the first of the three exits. The rays have
            # a component of 1 along the optical axis, so distances on them are depths.
            start = (origin - center) @ turn
            direction = rays @ turn
            sides = np.stack([(-half - start) / direction, (half - start) / direction])
            near = sides.min(axis=0).max(axis=-1)
            far = sides.max(axis=0).min(axis=-1)
            hit = (near <= far) & (near > 0) & (near < depth)
            depth = np.where(hit, near, depth)
            instances[hit] = number
            vertices = np.asarray(center) + VERTEX_SIGNS * half @ turn.T
            true_vertices[number] = (vertices - origin) @ pose[:3, :3]
    # Each object has a color of its own, by its number; the background is gray.
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
        intrinsics=k,
        extrinsics=pose,
        boxes=true_vertices,
        source="synthetic",
    )


def make_yaw_rotation(yaw: float) -> Array:
    """[3, 3] about the base's z axis."""
    c = np.cos(yaw)
    s = np.sin(yaw)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])


def make_random_frame(
    rng: np.random.Generator, objects: int = 5, names: tuple[str, ...] = NAMES, **size: int
) -> Frame:
    """Boxes of random size, place and yaw on the table, apart from each other."""
    boxes: list[Block] = []
    while len(boxes) < objects:
        extent = rng.uniform(0.03, 0.12, 3)
        center = np.array([rng.uniform(-0.2, 0.2), rng.uniform(-0.25, 0.25), extent[2] / 2])
        reach = np.hypot(*extent[:2])
        if all(
            np.linalg.norm((center - c)[:2]) > (np.hypot(*e[:2]) + reach) / 2 for c, e, _ in boxes
        ):
            boxes.append((center, extent, rng.uniform(0, np.pi)))
    chosen = [names[i % len(names)] for i in rng.permutation(max(objects, len(names)))[:objects]]
    return render_blocks(boxes, chosen, pitch=float(rng.uniform(25, 60)), **size)


def sample_visible_sides(box: Box3D, rng: np.random.Generator, noise: float) -> Array:
    """Points on the sides of a box that the camera sees, as densely as it sees them; noise along
    rays."""
    sides = []
    for axis in range(3):
        middle = float(box.center @ box.rotation[:, axis])
        if abs(middle) > box.size[axis] / 2:
            local = rng.uniform(-0.5, 0.5, (4000, 3))
            local[:, axis] = -np.sign(middle) / 2
            points = box.center + (local * box.size) @ box.rotation.T
            slope = abs(
                box.rotation[:, axis] @ (points / np.linalg.norm(points, axis=1)[:, None]).T
            )
            area = np.prod(np.delete(box.size, axis)) / 0.01
            sides.append(points[rng.uniform(size=4000) < 0.15 * slope * area])
    points = np.concatenate(sides)
    return points * (1 + noise * rng.normal(size=(len(points), 1)))
