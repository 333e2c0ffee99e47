"""How true the labeller's boxes are, against the simulator's, and against plain Open3D oriented boxes.

    pip install -e ".[bench]"    # Open3D, which also needs the system's libusb-1.0
    python benchmarks/labels/accuracy.py

The first table has exact masks and depth, and the direction of gravity. The second has neither gravity nor,
row by row, exact masks and depth, and compares the labeller with Open3D's two oriented boxes, given the same
points after Open3D's statistical outlier removal. The robot's gripper is left out. Errors are medians over
all objects that each of the three gave a box, with 95 % intervals that resample whole scenes; "vertex" is the
mean distance of the eight vertices, up to the box's symmetries.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tyro
from scipy import ndimage

from spear.cli import run_reporting_errors
from spear.labels.fit.box3d import make_box, make_box_from_vertices
from spear.labels.fit.masks import decode_mask
from spear.labels.fit.quality import (
    compare_labels,
    compute_box_errors,
    find_failed_scores,
    find_instance,
)
from spear.labels.models.ground_truth import GroundTruth
from spear.labels.models.protocols import Detection
from spear.labels.pipeline import label_images, label_with_ground_truth
from spear.sim.render import render_frame
from spear.sim.scene import clutter_scene
from spear.sim.world import GRIPPER_NAME, World
from spear.types import Array, Box3D, Frame

METHODS = ("ours", "Open3D oriented", "Open3D minimal")
OCCLUDED = 0.95
"""An object less of whose outline is visible counts as occluded."""
FLYING, NOISE, BEND, BEND_WIDTH, SCALE = 0.7, 0.003, 0.01, 12.0, 2.0
"""Wrong depth: blurred over this many pixels (flying pixels at every outline), with noise of this standard
deviation at every pixel, and smooth errors of this one (both fractions of the depth; the latter's Gaussian
filter in pixels), and an unknown scale of up to this factor either way."""


class WrongMasks:
    """True masks, grown by `pixels` (shrunk where negative)."""

    name = "wrong-masks"

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels

    def segment(
        self, frames: Sequence[Frame], detections: Sequence[Sequence[Detection]]
    ) -> list[Array]:
        """As `spear.labels.models.protocols.Segmenter`."""
        return [
            np.array([self._change(m) for m in masks], bool).reshape(masks.shape)
            for masks in GroundTruth().segment(frames, detections)
        ]

    def _change(self, mask: Array) -> Array:
        change = ndimage.binary_dilation if self.pixels > 0 else ndimage.binary_erosion
        return np.asarray(change(mask, iterations=abs(self.pixels), border_value=self.pixels < 0))


def wrong_depth(frame: Frame, seed: int, most_scale: float = SCALE) -> Frame:
    """The frame with depth as a network or a cheap sensor gives it, its scale off by `most_scale` at most."""
    rng = np.random.default_rng((7, seed))
    assert frame.depth is not None
    known = np.isfinite(frame.depth) & (frame.depth > 0)
    depth = ndimage.gaussian_filter(np.where(known, frame.depth, frame.depth[known].max()), FLYING)
    bend = ndimage.gaussian_filter(rng.normal(size=depth.shape), BEND_WIDTH)
    factor = 1 + BEND * bend / bend.std() + NOISE * rng.normal(size=depth.shape)
    scale = most_scale ** rng.uniform(-1, 1)
    return dataclasses.replace(frame, depth=(scale * factor * depth).astype(np.float32))


def open3d_boxes(points: Array) -> list[Box3D] | None:
    """Open3D's oriented and minimal oriented boxes around points [n, 3] without outliers; None if it
    fails."""
    import open3d

    open3d.utility.set_verbosity_level(
        open3d.utility.VerbosityLevel.Error
    )  # it calls its own boxes invalid
    cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points.astype(np.float64)))
    cloud, _ = cloud.remove_statistical_outlier(nb_neighbors=20, std_ratio=2.0)
    try:
        boxes = cloud.get_oriented_bounding_box(), cloud.get_minimal_oriented_bounding_box()
    except RuntimeError:
        return None
    return [make_box_from_vertices(np.asarray(box.get_box_points())) for box in boxes]


@dataclasses.dataclass
class Comparison:
    """Errors [k, 3 methods, 3 numbers] (m, m, IoU) of the objects of each image, and which were occluded, and
    good enough to be asked about, both [k]."""

    errors: list[Array]
    occluded: list[Array]
    asked: list[Array]


def measure(
    frames: Sequence[Frame], seen: Sequence[Frame], segmenter: Any, exact: bool
) -> Comparison:
    """Label what is `seen`, and compare with the truth of `frames`."""
    result = Comparison([], [], [])
    labels = label_images(seen, GroundTruth(), segmenter, GroundTruth(), exact)
    for image, frame, given in zip(labels, frames, seen, strict=True):
        assert frame.depth is not None and given.depth is not None and frame.boxes is not None
        (geometry,) = GroundTruth().predict([given])
        both = np.isfinite(frame.depth) & (frame.depth > 0) & geometry.mask
        scale = float(np.median(frame.depth[both] / given.depth[both]))
        rows, occluded, asked = [], [], []
        for o in image.objects:
            instance = find_instance(o, image, frame)
            points = geometry.points[decode_mask(o.mask, image.height, image.width) & geometry.mask]
            if (
                o.box3d is None
                or instance not in frame.boxes
                or (theirs := open3d_boxes(points)) is None
            ):
                continue
            true = make_box_from_vertices(frame.boxes[instance])
            boxes = [
                make_box(scale * b.center, scale * b.size, b.rotation) for b in (o.box3d, *theirs)
            ]
            rows.append([compute_box_errors(box, true) for box in boxes])
            occluded.append(o.scores["visible"] < OCCLUDED)
            asked.append(not find_failed_scores(o.scores))
        result.errors.append(np.array(rows).reshape(-1, len(METHODS), 3))
        result.occluded.append(np.array(occluded, bool))
        result.asked.append(np.array(asked, bool))
    return result


def table(name: str, comparison: Comparison) -> Iterator[str]:
    """Markdown rows: the three methods, ours for occluded objects only, and for those asked about."""
    median, replicas = _medians(comparison.errors)
    n = sum(map(len, comparison.errors))
    yield f"| {name} | ours | {n} | {_cells(median[0], replicas[:, 0])} |"
    for m in (1, 2):
        ratio, spread = median[0] / median[m], replicas[:, 0] / replicas[:, m]
        cells = [
            f"{cell} · ours ×{ratio[i]:.2f} [{low:.2f}, {high:.2f}]"
            for i, cell in enumerate(_cells(median[m], replicas[:, m]).split(" | "))
            for low, high in [np.percentile(spread[:, i], [2.5, 97.5])]
        ]
        yield f"| | {METHODS[m]} | {n} | {' | '.join(cells)} |"
    for part, which in (("occluded", comparison.occluded), ("asked about", comparison.asked)):
        some = [e[w] for e, w in zip(comparison.errors, which, strict=True)]
        median, replicas = _medians(some)
        yield f"| | ours, {part} | {sum(map(len, some))} | {_cells(median[0], replicas[:, 0])} |"


def _medians(errors: Sequence[Array], resamples: int = 500) -> tuple[Array, Array]:
    """Medians [3 methods, 3], and of images drawn with replacement [resamples, 3, 3]; images without any are
    left
    out."""
    groups = [group for group in errors if len(group)]

    def median(draw: Array) -> Array:
        return np.asarray(np.median(np.concatenate([groups[i] for i in draw]), axis=0))

    draws = np.random.default_rng(0).integers(len(groups), size=(resamples, len(groups)))
    return median(np.arange(len(groups))), np.stack([median(draw) for draw in draws])


def _cells(median: Array, replicas: Array) -> str:
    low, high = np.percentile(replicas, [2.5, 97.5], axis=0)
    lengths = [
        f"{1000 * median[i]:.1f} [{1000 * low[i]:.1f}, {1000 * high[i]:.1f}] mm" for i in (0, 1)
    ]
    return " | ".join([*lengths, f"{median[2]:.2f} [{low[2]:.2f}, {high[2]:.2f}]"])


def main(
    scenes: int = 140, first_seed: int = 3000, views: bool = True, open3d: bool = True
) -> None:
    """Label scenes and compare.

    Args:
        scenes: how many clutter scenes.
        first_seed: of the first.
        views: print the first table.
        open3d: print the second.
    """
    worlds = [World(clutter_scene(seed)) for seed in range(first_seed, first_seed + scenes)]

    def frames_of(camera: str, size: tuple[int, int]) -> list[Frame]:
        frames = [render_frame(world, camera, size) for world in worlds]
        return [
            dataclasses.replace(
                f, names={i: name for i, name in f.names.items() if name != GRIPPER_NAME}
            )
            for f in frames
        ]

    if views:
        print("| view | objects | centre | vertex | IoU |\n|---|---|---|---|---|")
        for camera, size in (
            ("external", (192, 128)),
            ("external", (280, 210)),
            ("wrist", (112, 112)),
        ):
            frames = frames_of(camera, size)
            a = compare_labels(list(label_with_ground_truth(iter(frames))), frames)
            print(
                f"| {camera} {size[0]}×{size[1]} | {a.n} | {1000 * a.center:.1f} mm | "
                f"{1000 * a.vertex:.1f} mm "
                f"| {a.iou:.2f} |"
            )
    if open3d:
        frames = frames_of("external", (192, 128))
        unaided = [dataclasses.replace(f, extrinsics=None) for f in frames]
        noisy = [wrong_depth(f, i) for i, f in enumerate(unaided)]
        true = GroundTruth()
        print(
            "| mask, depth | boxes | objects | centre | vertex | IoU |\n|---|---|---|---|---|---|",
            flush=True,
        )
        for name, seen, segmenter, exact in (
            ("true, true, known to be", unaided, true, True),
            ("true, true", unaided, true, False),
            ("eroded by 1 px, true", unaided, WrongMasks(-1), False),
            ("dilated by 1 px, true", unaided, WrongMasks(1), False),
            ("true, wrong", noisy, true, False),
        ):
            print(*table(name, measure(frames, seen, segmenter, exact)), sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
