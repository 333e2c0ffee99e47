"""How true boxes stay where masks leak, depth is noisy and things stand in front, measured by ray
casting.

    python benchmarks/labels/leaks.py
    python benchmarks/labels/leaks.py --rows rows.csv

If Open3D is installed, its boxes are compared, too.

Every image shows one box or cylinder, whose depth, mask and true box are exact:

    standing  on a table that fills the image
    tilted    on that table, leaning by 15 to 60 degrees, its lowest corner on it
    floating  in the air, turned at random, a floor and a wall far behind it
    wall      on a table that ends behind it, a wall 1 to 3 m further

A row has one of these scenes, masks of which a quarter of the outline leaks by so many pixels, so
much noise of the depth at every pixel, and such a fraction of the object behind something nearer.
Gravity is unknown. The other methods get the same points: the principal axes, and Open3D's oriented
and minimal oriented boxes, after Open3D's removal of outliers. Of a cylinder, the turn about its
axis that fits best counts for all.
"""

from __future__ import annotations

import csv
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from scipy import ndimage
from scipy.spatial.transform import Rotation

from spear.cli import run_reporting_errors
from spear.labels.fit.box3d import (
    compute_iou_3d,
    compute_vertex_error,
    make_box,
    make_box_from_vertices,
)
from spear.labels.fit.image import unproject
from spear.labels.fit.points import select_evenly_spread_points
from spear.labels.models.ground_truth import GroundTruth
from spear.labels.pipeline import label_images
from spear.labels.questions.generate import find_failed_scores
from spear.types import Array, Box3D, Frame, LabeledImage
from spear.util import processes

WIDTH_PX = 320
HEIGHT_PX = 240
FOCAL_PX = 300.0
INTRINSICS = np.array([[FOCAL_PX, 0, WIDTH_PX / 2], [0, FOCAL_PX, HEIGHT_PX / 2], [0, 0, 1.0]])
SCENES = ("standing", "tilted", "floating", "wall")
LEAKS_PX = (0, 1, 3, 5)
NOISE_MM = (0, 2, 5, 10)
HIDDEN_PERCENT = (0, 25, 50)
MAX_CENTER_ERROR_MM = 100  # an object that is asked about is far off beyond this
MIN_MASK_PX = 400  # smaller objects are left out
ORDER_NOISE_MM = 2  # at which the order of vertices must not change
OTHER_METHODS = ("principal axes", "Open3D oriented", "Open3D minimal")
MAX_POINTS = 1500  # that the other methods get


class Row(NamedTuple):
    """The conditions of a row of the results.

    scene   one of `SCENES`.
    leak    by how much masks leak, px.
    noise   standard deviation of the depth, mm.
    hidden  how much of the object is behind something nearer, percent.
    """

    scene: str
    leak: int
    noise: int
    hidden: int


class CastImage(NamedTuple):
    """An exact image: depth [h, w], mask [h, w], and the true box, for a cylinder at several
    turns."""

    depth: Array
    mask: Array
    boxes: list[Box3D]


@lru_cache(maxsize=128)
def cast_image(scene: str, seed: int) -> CastImage:
    """Draw a scene of one of the kinds `SCENES`, and cast the rays of its image.

    The ranges of all random numbers are our choice, m and degrees.
    """
    # Camera and object
    rng = np.random.default_rng((0, SCENES.index(scene), seed))
    pitch_range_deg = (8, 22) if scene in ("wall", "floating") else (25, 55)
    pitch = np.radians(rng.uniform(*pitch_range_deg))
    up = np.array([0, -np.cos(pitch), -np.sin(pitch)])
    level, _ = Rotation.align_vectors([up], [[0, 0, 1]])  # the base, z up, in the camera frame
    size = rng.uniform(0.05, 0.16, 3)
    is_round = rng.random() < 0.3 and scene != "tilted"
    if is_round:
        size[1] = size[0]
    turn = draw_turn(scene, rng)
    axes = (level * turn).as_matrix()
    center = rng.uniform(0.6, 1.0) * np.array([*rng.uniform(-0.15, 0.15, 2), 1.0])

    # Table and wall
    rays = unproject(np.ones((HEIGHT_PX, WIDTH_PX)), INTRINSICS).astype(float)
    bottom = float(up @ center - np.abs(up @ axes) @ size / 2)
    background = intersect_plane(rays, up, bottom - (0.5 if scene == "floating" else 0.0))
    if scene in ("wall", "floating"):
        forward = np.array([0, 0, 1.0]) - up[2] * up
        distance = float(forward @ center)
        table_end = distance + rng.uniform(0.1, 0.25) if scene == "wall" else np.inf
        background[background * (rays @ forward) > table_end] = np.inf
        wall = intersect_plane(rays, forward, distance + rng.uniform(1, 3))
        background = np.minimum(background, np.where(wall > 0, wall, np.inf))

    # The object
    enter, leave = intersect_box(rays @ axes, center @ axes, size / 2)
    if is_round:
        cylinder_enter, cylinder_leave = intersect_cylinder(rays @ axes, center @ axes, size[0] / 2)
        enter = np.maximum(enter, cylinder_enter)
        leave = np.minimum(leave, cylinder_leave)
    mask = (enter <= leave) & (enter > 0) & (enter < background)
    yaws = np.radians(np.arange(0, 90, 15)) if is_round else [0.0]
    boxes = []
    for yaw in yaws:
        boxes.append(make_box(center, size, axes @ Rotation.from_rotvec([0, 0, yaw]).as_matrix()))
    return CastImage(np.where(mask, enter, background), mask, boxes)


def draw_turn(scene: str, rng: np.random.Generator) -> Rotation:
    """How the object is turned, in the base frame."""
    turn = Rotation.from_rotvec([0, 0, rng.uniform(0, 2 * np.pi)])
    if scene == "tilted":
        direction = rng.uniform(0, 2 * np.pi)
        axis = np.array([np.cos(direction), np.sin(direction), 0])
        return Rotation.from_rotvec(np.radians(rng.uniform(15, 60)) * axis) * turn
    if scene == "floating":
        return Rotation.random(random_state=rng)
    return turn


def intersect_plane(rays: Array, normal: Array, height: float) -> Array:
    """Where rays [h, w, 3] of z = 1 meet the plane normal · p = height; infinite where they do
    not."""
    with np.errstate(divide="ignore"):
        depth = height / (rays @ normal)
    return np.where(depth > 0, depth, np.inf)


def intersect_box(rays: Array, center: Array, half: Array) -> tuple[Array, Array]:
    """Where rays enter and leave a box, all along its axes."""
    with np.errstate(divide="ignore", invalid="ignore"):
        low = (center - half) / rays
        high = (center + half) / rays
    return np.minimum(low, high).max(axis=-1), np.maximum(low, high).min(axis=-1)


def intersect_cylinder(rays: Array, center: Array, radius: float) -> tuple[Array, Array]:
    """Where rays enter and leave an endless cylinder along the third axis.

    Rays that miss it leave before they enter.
    """
    across = rays[..., :2]
    middle = center[:2]
    a = (across**2).sum(axis=-1)
    b = across @ middle
    c = middle @ middle - radius**2
    root = np.sqrt(np.maximum(b * b - a * c, 0))
    misses = b * b < a * c
    enter = np.where(misses, np.inf, (b - root) / a)
    leave = np.where(misses, -np.inf, (b + root) / a)
    return enter, leave


def add_leak(mask: Array, leak_px: int, rng: np.random.Generator) -> Array:
    """Grow a quarter of the outline of a mask."""
    if not leak_px:
        return mask
    y, x = np.nonzero(mask)
    rows, columns = np.mgrid[:HEIGHT_PX, :WIDTH_PX]
    angle = np.arctan2(rows - y.mean(), columns - x.mean()) - rng.uniform(0, 2 * np.pi)
    is_in_quarter = np.abs((angle + np.pi) % (2 * np.pi) - np.pi) < np.pi / 4
    neighborhood = ndimage.generate_binary_structure(2, 2)
    grown = ndimage.binary_dilation(mask, neighborhood, leak_px)
    return np.asarray(mask | (is_in_quarter & grown))


def cover(mask: Array, hidden_percent: int, is_sideways: bool) -> Array:
    """The pixels [h, w] of a post from the left, or a board from below, that hides a part of the
    mask."""
    rows, columns = np.nonzero(mask)
    along = columns if is_sideways else -rows  # grows from the left, or from below
    limit = int(np.quantile(along, hidden_percent / 100))
    covered = np.zeros_like(mask)
    if is_sideways:
        covered[:, :limit] = True
    else:
        covered[1 - limit :] = True  # the rows below row -limit
    return covered


def make_images(row: Row, count: int) -> Iterator[tuple[Frame, list[Box3D]]]:
    """The images of a row, with the true boxes of each; the same objects in all rows of a scene."""
    num_images = 0
    number = 0
    while num_images < count:
        depth, mask, boxes = cast_image(row.scene, number)
        rng = np.random.default_rng((1, SCENES.index(row.scene), number))
        number += 1
        is_at_edge = mask[[0, -1]].any() or mask[:, [0, -1]].any()
        if mask.sum() < MIN_MASK_PX or is_at_edge:
            continue
        num_images += 1
        is_sideways = rng.random() < 0.5
        if row.hidden:
            covered = cover(mask, row.hidden, is_sideways)
            # What hides the object is nearer than all of the object.
            depth = np.where(covered, 0.85 * float(depth[mask].min()), depth)
            mask = mask & ~covered
        mask = add_leak(mask, row.leak, rng)
        finite_depth = np.where(np.isfinite(depth), depth, 0)
        noisy_depth = finite_depth + row.noise / 1000 * rng.normal(size=depth.shape)
        measured_depth = np.where(finite_depth > 0, noisy_depth, 0)
        frame = Frame(
            image=np.zeros((HEIGHT_PX, WIDTH_PX, 3), np.uint8),
            depth=np.maximum(measured_depth, 0).astype(np.float32),
            instances=mask.astype(np.int32),
            names={1: "thing"},
            intrinsics=INTRINSICS,
            source=f"{row.scene}/{number}",
        )
        yield frame, boxes


def fit_principal_box(points: Array) -> Box3D:
    """The tight box along the principal axes of points [n, 3]."""
    axes = np.linalg.eigh(np.cov(points.T))[1]
    along = points @ axes
    low = along.min(axis=0)
    high = along.max(axis=0)
    return make_box(axes @ ((low + high) / 2), high - low, axes)


def fit_other_boxes(points: Array) -> list[Box3D]:
    """The boxes of `OTHER_METHODS` around points [n, 3]; only the first where Open3D is not
    installed."""
    points = select_evenly_spread_points(points, MAX_POINTS).astype(np.float64)
    if find_spec("open3d") is None:
        return [fit_principal_box(points)]
    import open3d

    open3d.utility.set_verbosity_level(open3d.utility.VerbosityLevel.Error)
    cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points))
    cloud = cloud.remove_statistical_outlier(nb_neighbors=20, std_ratio=2.0)[0]
    boxes = [fit_principal_box(np.asarray(cloud.points))]
    for box in (cloud.get_oriented_bounding_box(), cloud.get_minimal_oriented_bounding_box()):
        boxes.append(make_box_from_vertices(np.asarray(box.get_box_points())))
    return boxes


def label_row(row: Row, count: int) -> Iterator[tuple[LabeledImage, Frame, list[Box3D]]]:
    """The label, frame and true boxes of each image of a row."""
    truth = GroundTruth()
    pairs = list(make_images(row, count))
    labels = label_images(
        [frame for frame, _ in pairs], truth, truth, truth, inputs_are_exact=False
    )
    for label, (frame, boxes) in zip(labels, pairs, strict=True):
        yield label, frame, boxes


def measure(row: Row, count: int) -> dict[str, Any]:
    """The numbers of a row: medians of all objects with a box, in mm where they are lengths."""
    errors: list[list[tuple[float, float]]] = []  # per object and method: center error, IoU
    num_asked = 0
    num_far = 0
    for label, frame, true_boxes in label_row(row, count):
        (o,) = label.objects
        if o.box3d is None:
            continue
        (point_map,) = GroundTruth().predict([frame])
        assert frame.instances is not None
        points = point_map.points[(frame.instances > 0) & point_map.mask]
        boxes = [o.box3d, *fit_other_boxes(points)]
        errors_of_object = [compute_errors(box, true_boxes) for box in boxes]
        errors.append(errors_of_object)
        if not find_failed_scores(o.scores):
            num_asked += 1
            center_error_mm, _ = errors_of_object[0]
            num_far += center_error_mm > MAX_CENTER_ERROR_MM

    numbers: dict[str, Any] = {
        **row._asdict(),
        "boxes": len(errors),
        "asked": num_asked,
        "far": num_far,
    }
    medians = np.median(errors, axis=0)
    for name, (center_error_mm, overlap) in zip(("ours", *OTHER_METHODS), medians, strict=False):
        numbers[f"{name} mm"] = round(float(center_error_mm), 1)
        numbers[f"{name} IoU"] = round(float(overlap), 3)
    return numbers


def compute_errors(box: Box3D, true_boxes: Sequence[Box3D]) -> tuple[float, float]:
    """The error of the center in mm, and the IoU with the true box that fits best."""
    center_error_mm = 1000 * float(np.linalg.norm(box.center - true_boxes[0].center))
    return center_error_mm, max(compute_iou_3d(box, true_box) for true_box in true_boxes)


def count_flips(scene: str, count: int) -> int:
    """Count the objects whose vertices come in another order with a little noise than without.

    In order they are then more than three times as far from each other as they would be, relabeled.
    """
    num_flips = 0
    exact_row = label_row(Row(scene, 0, 0, 0), count)
    noisy_row = label_row(Row(scene, 0, ORDER_NOISE_MM, 0), count)
    for (label, _, _), (noisy_label, _, _) in zip(exact_row, noisy_row, strict=True):
        box = label.objects[0].box3d
        noisy_box = noisy_label.objects[0].box3d
        if box is not None and noisy_box is not None:
            distances = np.linalg.norm(box.vertices - noisy_box.vertices, axis=1)
            least_distance = compute_vertex_error(box.vertices, noisy_box.vertices)
            num_flips += float(distances.mean()) > max(3 * least_distance, 0.01)
    return num_flips


def main(
    count: int = 40,
    scenes: tuple[str, ...] = SCENES,
    leaks: tuple[int, ...] = LEAKS_PX,
    noise: tuple[int, ...] = NOISE_MM,
    hidden: tuple[int, ...] = HIDDEN_PERCENT,
    workers: int = 2,
    rows: Path | None = None,
) -> None:
    """Measure all rows; print the means over noise and hidden fractions of their medians, and the
    goals.

    Args:
        count: objects in each row.
        scenes: which rows.
        leaks: which rows, in pixels.
        noise: which rows, in mm.
        hidden: which rows, in percent.
        workers: processes.
        rows: also write every row to this CSV file.
    """
    if find_spec("open3d") is None:
        print('Open3D is not installed, so its columns are missing: pip install -e ".[bench]"\n')
    grid = [Row(*conditions) for conditions in itertools.product(scenes, leaks, noise, hidden)]
    with processes.open_worker_pool(workers, __name__, "use fewer --workers") as pool:
        measure_row = partial(measure, count=count)
        results = list(processes.map_in_order(pool, measure_row, grid, workers))

    names = [name for name in ("ours", *OTHER_METHODS) if f"{name} mm" in results[0]]
    print_table(results, names, count)
    print_goals(results, names)
    for scene in SCENES[:2]:
        num_objects = 5 * count
        num_flips = count_flips(scene, num_objects)
        print(
            f"vertex order, {scene}: {num_flips} of {num_objects} change at {ORDER_NOISE_MM} mm "
            "of noise"
        )
    if rows is not None:
        with rows.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(results[0]))
            writer.writeheader()
            writer.writerows(results)


def print_table(results: Sequence[Mapping[str, Any]], names: Sequence[str], count: int) -> None:
    """Print a Markdown row for each scene and leak."""
    headings = " | ".join(f"{name}: mm, IoU" for name in names)
    print(f"| scene, leak | asked, of them far off | {headings} |")
    print(f"|---|---|{'---|' * len(names)}")
    for (scene, leak), group in itertools.groupby(results, key=lambda r: (r["scene"], r["leak"])):
        group_results = list(group)
        cells = []
        for name in names:
            center_error_mm = np.mean([result[f"{name} mm"] for result in group_results])
            overlap = np.mean([result[f"{name} IoU"] for result in group_results])
            cells.append(f"{center_error_mm:.1f}, {overlap:.2f}")
        num_asked = sum(result["asked"] for result in group_results)
        num_far = sum(result["far"] for result in group_results)
        num_objects = count * len(group_results)
        print(
            f"| {scene}, {leak} px | {num_asked} of {num_objects}, {num_far} | "
            f"{' | '.join(cells)} |"
        )


def print_goals(results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Print how many objects are asked about although far off, and the rows in which another box is
    better."""
    num_asked = sum(result["asked"] for result in results)
    num_far = sum(result["far"] for result in results)
    worse_results = []
    for result in results:
        if result["ours IoU"] < max(result[f"{name} IoU"] for name in names):
            worse_results.append(result)
    print(
        f"\nasked about: {num_asked}, of these {num_far} off by more than "
        f"{MAX_CENTER_ERROR_MM:.0f} mm "
        f"({num_far / num_asked:.2%})"
    )
    print(f"rows in which another box has a better IoU: {len(worse_results)} of {len(results)}")
    for result in worse_results:
        numbers = [f"{key} {result[key]}" for key in result if not key.endswith("mm")]
        print("   ", ", ".join(numbers))


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
