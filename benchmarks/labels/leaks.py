"""How true boxes stay where masks leak, depth is noisy and things stand in front: by ray casting, not by our
simulator.

    python benchmarks/labels/leaks.py                # beside Open3D's boxes, where it is installed
    python benchmarks/labels/leaks.py --rows rows.csv

Every image shows one box or cylinder, whose depth, mask and true box are exact:

    standing  on a table that fills the image
    tilted    on that table, leaning by 15 to 60 degrees, its lowest corner on it
    floating  in the air, turned at random, a floor and a wall far behind it
    wall      on a table that ends behind it, a wall 1 to 3 m further

times masks of which a quarter of the outline leaks by so many pixels, noise of the depth at every pixel, and
the fraction of the object behind something nearer. Gravity is unknown. The others get the same points: the
principal axes, and Open3D's oriented and minimal oriented boxes, after Open3D's removal of outliers. Of a
cylinder the turn about its axis that fits best counts, for all.
"""

from __future__ import annotations

import csv
import itertools
import sys
from collections.abc import Iterator
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
from spear.labels.fit.points import subsample
from spear.labels.fit.quality import find_failed_scores
from spear.labels.models.ground_truth import GroundTruth
from spear.labels.pipeline import label_images
from spear.types import Array, Box3D, Frame
from spear.util import processes

WIDTH, HEIGHT, FOCAL = 320, 240, 300.0
INTRINSICS = np.array([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1.0]])
SCENES = ("standing", "tilted", "floating", "wall")
LEAKS, NOISE, HIDDEN = (0, 1, 3, 5), (0, 2, 5, 10), (0, 25, 50)
"""Pixels; millimetres; percent."""
FAR = 100
"""Millimetres by which the centre of an object that is asked about may be off."""


@lru_cache(maxsize=128)
def cast(scene: str, seed: int) -> tuple[Array, Array, list[Box3D]]:
    """Depth [h, w] and mask [h, w] of an image of a kind of scene, and the object's true box, for a cylinder
    at several turns."""
    rng = np.random.default_rng((0, SCENES.index(scene), seed))
    pitch = np.radians(rng.uniform(8, 22) if scene in ("wall", "floating") else rng.uniform(25, 55))
    up = np.array([0, -np.cos(pitch), -np.sin(pitch)])
    level = Rotation.align_vectors([up], [[0, 0, 1]])[0]  # the base, z up, in the camera frame
    size = rng.uniform(0.05, 0.16, 3)
    round_ = rng.random() < 0.3 and scene != "tilted"
    if round_:
        size[1] = size[0]
    turn = Rotation.from_rotvec([0, 0, rng.uniform(0, 2 * np.pi)])
    if scene == "tilted":
        axis = rng.uniform(0, 2 * np.pi)
        lean = np.radians(rng.uniform(15, 60)) * np.array([np.cos(axis), np.sin(axis), 0])
        turn = Rotation.from_rotvec(lean) * turn
    elif scene == "floating":
        turn = Rotation.random(random_state=rng)
    axes = (level * turn).as_matrix()
    center = rng.uniform(0.6, 1.0) * np.array([*rng.uniform(-0.15, 0.15, 2), 1.0])
    bottom = float(up @ center - np.abs(up @ axes) @ size / 2)
    forward = np.array([0, 0, 1.0]) - up[2] * up
    rays = unproject(np.ones((HEIGHT, WIDTH)), INTRINSICS).astype(float)
    table = _plane(rays, up, bottom - (0.5 if scene == "floating" else 0.0))
    if scene in ("wall", "floating"):
        behind = float(forward @ center)
        ends = behind + rng.uniform(0.1, 0.25) if scene == "wall" else np.inf
        table[table * (rays @ forward) > ends] = np.inf
        far = _plane(rays, forward, behind + rng.uniform(1, 3))
        table = np.minimum(table, np.where(far > 0, far, np.inf))
    near, leave = _box(rays @ axes, center @ axes, size / 2)
    if round_:
        disc, disc_leave = _cylinder(rays @ axes, center @ axes, size[0] / 2)
        near, leave = np.maximum(near, disc), np.minimum(leave, disc_leave)
    mask = (near <= leave) & (near > 0) & (near < table)
    turns = np.radians(np.arange(0, 90, 15)) if round_ else [0.0]
    boxes = [
        make_box(center, size, axes @ Rotation.from_rotvec([0, 0, t]).as_matrix()) for t in turns
    ]
    return np.where(mask, near, table), mask, boxes


def _plane(rays: Array, normal: Array, height: float) -> Array:
    """Where rays [h, w, 3] of z = 1 meet the plane normal · p = height; infinite where they do not."""
    with np.errstate(divide="ignore"):
        depth = height / (rays @ normal)
    return np.where(depth > 0, depth, np.inf)


def _box(rays: Array, center: Array, half: Array) -> tuple[Array, Array]:
    """Where rays enter and leave a box, all along its axes."""
    with np.errstate(divide="ignore", invalid="ignore"):
        a, b = (center - half) / rays, (center + half) / rays
    return np.minimum(a, b).max(axis=-1), np.maximum(a, b).min(axis=-1)


def _cylinder(rays: Array, center: Array, radius: float) -> tuple[Array, Array]:
    """The same for an endless cylinder along the third axis; where they miss it, they leave before they
    enter."""
    across, middle = rays[..., :2], center[:2]
    a, b = (across**2).sum(axis=-1), across @ middle
    root = np.sqrt(np.maximum(b * b - a * (middle @ middle - radius**2), 0))
    miss = b * b < a * (middle @ middle - radius**2)
    return np.where(miss, np.inf, (b - root) / a), np.where(miss, -np.inf, (b + root) / a)


def leaked(mask: Array, pixels: int, rng: np.random.Generator) -> Array:
    """A mask of which a quarter of the outline goes too far by so many pixels."""
    if not pixels:
        return mask
    y, x = np.nonzero(mask)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    towards = np.arctan2(rows - y.mean(), columns - x.mean()) - rng.uniform(0, 2 * np.pi)
    quarter = np.abs((towards + np.pi) % (2 * np.pi) - np.pi) < np.pi / 4
    grown = ndimage.binary_dilation(mask, ndimage.generate_binary_structure(2, 2), pixels)
    return np.asarray(mask | (quarter & grown))


def images(
    scene: str, leak: int, noise: int, hidden: int, count: int
) -> Iterator[tuple[Frame, list[Box3D]]]:
    """The images of a row, with the true boxes of each; the same objects in all rows of a scene."""
    number = made = 0
    while made < count:
        depth, mask, boxes = cast(scene, number)
        rng = np.random.default_rng((1, SCENES.index(scene), number))
        number += 1
        if mask.sum() < 400 or mask[[0, -1]].any() or mask[:, [0, -1]].any():
            continue
        made += 1
        rows, columns = np.nonzero(mask)
        sideways = rng.random() < 0.5
        if hidden:  # a post from the left, or a board from below
            along = columns if sideways else -rows
            cover = np.zeros_like(mask)
            limit = int(np.quantile(along, hidden / 100))
            cover[(slice(None), slice(None, limit)) if sideways else (slice(1 - limit, None),)] = (
                True
            )
            front = 0.85 * float(depth[mask].min())
            depth, mask = np.where(cover, front, depth), mask & ~cover
        mask = leaked(mask, leak, rng)
        known = np.where(np.isfinite(depth), depth, 0)
        seen = np.where(known > 0, known + noise / 1000 * rng.normal(size=depth.shape), 0)
        yield (
            Frame(
                image=np.zeros((HEIGHT, WIDTH, 3), np.uint8),
                depth=np.maximum(seen, 0).astype(np.float32),
                instances=mask.astype(np.int32),
                names={1: "thing"},
                intrinsics=INTRINSICS,
                source=f"{scene}/{number}",
            ),
            boxes,
        )


def principal(points: Array) -> Box3D:
    """The tight box along the principal axes of points [n, 3]."""
    axes = np.linalg.eigh(np.cov(points.T))[1]
    along = points @ axes
    low, high = along.min(axis=0), along.max(axis=0)
    return make_box(axes @ ((low + high) / 2), high - low, axes)


RIVALS = ("principal axes", "Open3D oriented", "Open3D minimal")
MOST = 1500
"""Points that they get."""


def rivals(points: Array) -> list[Box3D]:
    """Their boxes around points [n, 3]; only the first where Open3D is not installed."""
    points = subsample(points, MOST).astype(np.float64)
    if find_spec("open3d") is None:
        return [principal(points)]
    import open3d

    open3d.utility.set_verbosity_level(open3d.utility.VerbosityLevel.Error)
    cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points))
    cloud = cloud.remove_statistical_outlier(nb_neighbors=20, std_ratio=2.0)[0]
    boxes = cloud.get_oriented_bounding_box(), cloud.get_minimal_oriented_bounding_box()
    corners = (make_box_from_vertices(np.asarray(box.get_box_points())) for box in boxes)
    return [principal(np.asarray(cloud.points)), *corners]


def measure(row: tuple[str, int, int, int], count: int) -> dict[str, Any]:
    """The numbers of a row: medians of all objects with a box, in mm where they are lengths."""
    frames, truths = zip(*images(*row, count), strict=True)
    truth = (GroundTruth(),) * 3
    found: list[list[tuple[float, float]]] = []
    asked = far = 0
    for image, frame, boxes in zip(
        label_images(frames, *truth, exact=False), frames, truths, strict=True
    ):
        (thing,) = image.objects
        if thing.box3d is None:
            continue
        (geometry,) = truth[2].predict([frame])
        fitted = [thing.box3d, *rivals(geometry.points[(frame.instances > 0) & geometry.mask])]
        off = [1000 * float(np.linalg.norm(box.center - boxes[0].center)) for box in fitted]
        found.append(
            [
                (o, max(compute_iou_3d(box, true) for true in boxes))
                for o, box in zip(off, fitted, strict=True)
            ]
        )
        if not find_failed_scores(thing.scores):
            asked += 1
            far += off[0] > FAR
    numbers: dict[str, Any] = dict(zip(("scene", "leak", "noise", "hidden"), row, strict=True))
    numbers |= {"boxes": len(found), "asked": asked, "far": far}
    for name, (center, overlap) in zip(("ours", *RIVALS), np.median(found, axis=0), strict=False):
        numbers |= {f"{name} mm": round(float(center), 1), f"{name} IoU": round(float(overlap), 3)}
    return numbers


def flips(scene: str, count: int) -> int:
    """Of how many objects the vertices come in another order with 2 mm of noise than without: in order they
    are more than three times as far apart as they would be, relabelled."""
    truth = (GroundTruth(),) * 3
    pair = [
        label_images((f for f, _ in images(scene, 0, noise, 0, count)), *truth, exact=False)
        for noise in (0, 2)
    ]
    found = 0
    for a, b in zip(*pair, strict=True):
        one, two = (image.objects[0].box3d for image in (a, b))
        if one is not None and two is not None:
            ordered = float(np.linalg.norm(one.vertices - two.vertices, axis=1).mean())
            found += ordered > max(3 * compute_vertex_error(one.vertices, two.vertices), 0.01)
    return found


def main(
    count: int = 40,
    scenes: tuple[str, ...] = SCENES,
    leaks: tuple[int, ...] = LEAKS,
    noise: tuple[int, ...] = NOISE,
    hidden: tuple[int, ...] = HIDDEN,
    workers: int = 2,
    rows: Path | None = None,
) -> None:
    """Measure all rows; print the means over noise and hidden fractions of their medians, and the goals.

    Args:
        count: objects in each row.
        scenes, leaks, noise, hidden: which rows.
        workers: processes.
        rows: also write every row to this CSV file.
    """
    if find_spec("open3d") is None:
        print('Open3D is not installed, so its columns are missing: pip install -e ".[bench]"\n')
    grid = list(itertools.product(scenes, leaks, noise, hidden))
    with processes.open_worker_pool(workers, __name__, "use fewer --workers") as pool:
        found = list(processes.map_in_order(pool, partial(measure, count=count), grid, workers))
    names = [name for name in ("ours", *RIVALS) if f"{name} mm" in found[0]]
    print(
        f"| scene, leak | asked, of them far off | {' | '.join(f'{name}: mm, IoU' for name in names)} |"
    )
    print(f"|---|---|{'---|' * len(names)}")
    for (scene, leak), group in itertools.groupby(found, key=lambda r: (r["scene"], r["leak"])):
        some = list(group)
        cells = [
            f"{np.mean([r[f'{name} mm'] for r in some]):.1f}, {np.mean([r[f'{name} IoU'] for r in some]):.2f}"
            for name in names
        ]
        asked, far = (sum(r[key] for r in some) for key in ("asked", "far"))
        print(
            f"| {scene}, {leak} px | {asked} of {count * len(some)}, {far} | {' | '.join(cells)} |"
        )
    asked, far = (sum(r[key] for r in found) for key in ("asked", "far"))
    worse = [r for r in found if r["ours IoU"] < max(r[f"{name} IoU"] for name in names)]
    print(
        f"\nasked about: {asked}, of these {far} off by more than {FAR:.0f} mm ({far / asked:.2%})"
    )
    print(f"rows in which another box has a better IoU: {len(worse)} of {len(found)}")
    for r in worse:
        print("   ", ", ".join(f"{key} {r[key]}" for key in r if not key.endswith("mm")))
    for scene in SCENES[:2]:
        print(
            f"vertex order, {scene}: {flips(scene, 5 * count)} of {5 * count} change at 2 mm of noise"
        )
    if rows is not None:
        with rows.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(found[0]))
            writer.writeheader()
            writer.writerows(found)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
