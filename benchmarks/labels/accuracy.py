"""How accurate the labeler's boxes are, compared with the simulator's, and with plain Open3D boxes.

    pip install -e ".[bench]"    # Open3D, which also needs the system's libusb-1.0
    python benchmarks/labels/accuracy.py

The first table has exact masks and depth, and the direction of gravity. The second has neither
gravity nor, row by row, exact masks and depth, and compares the labeler with Open3D's two oriented
boxes, given the same points after Open3D's statistical outlier removal. The robot's gripper is left
out. Errors are medians over all objects that each of the three gave a box, with 95 % intervals that
resample whole scenes; "vertex" is the mean distance of the eight vertices, up to the box's
symmetries.
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
from spear.labels.fit.accuracy import (
    BoxErrors,
    choose_instance_with_most_mask_pixels,
    compare_labels,
    compute_box_errors,
)
from spear.labels.fit.box3d import make_box, make_box_from_vertices
from spear.labels.fit.masks import decode_mask
from spear.labels.models.ground_truth import GroundTruth
from spear.labels.models.protocols import Detection, PointMapResult
from spear.labels.pipeline import label_images, label_with_ground_truth
from spear.labels.questions.generate import find_failed_scores
from spear.sim.render import render_frame
from spear.sim.scene import sample_clutter_scene
from spear.sim.world import GRIPPER_NAME, World
from spear.types import Array, Box3D, Frame, LabeledImage, LabeledObject

METHODS = ("ours", "Open3D oriented", "Open3D minimal")
MIN_UNOCCLUDED_VISIBLE = 0.95  # an object less of whose outline is visible counts as occluded
NUM_RESAMPLES = 500

# Wrong depth
BLUR_PX = 0.7  # flying pixels at every outline
NOISE = 0.003  # at every pixel, as a fraction of the depth
BEND = 0.01  # smooth errors, as a fraction of the depth
BEND_WIDTH_PX = 12.0  # of the Gaussian filter that makes these smooth
MAX_SCALE = 2.0  # of the depth, either way

VIEWS = (("external", (192, 128)), ("external", (280, 210)), ("wrist", (112, 112)))


class WrongMasks:
    """A segmenter with true masks, grown by some pixels (shrunk where negative)."""

    name = "wrong-masks"

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels

    def segment(
        self, frames: Sequence[Frame], detections: Sequence[Sequence[Detection]]
    ) -> list[Array]:
        """As `spear.labels.models.protocols.Segmenter`."""
        wrong_masks = []
        for masks in GroundTruth().segment(frames, detections):
            changed = np.array([self._change(mask) for mask in masks], bool)
            wrong_masks.append(changed.reshape(masks.shape))
        return wrong_masks

    def _change(self, mask: Array) -> Array:
        change = ndimage.binary_dilation if self.pixels > 0 else ndimage.binary_erosion
        return np.asarray(change(mask, iterations=abs(self.pixels), border_value=self.pixels < 0))


def make_wrong_depth(frame: Frame, seed: int, max_scale: float = MAX_SCALE) -> Frame:
    """Give a frame depth as from a network or a cheap sensor, with its scale off by at most
    `max_scale`."""
    rng = np.random.default_rng((7, seed))
    assert frame.depth is not None
    is_known = np.isfinite(frame.depth) & (frame.depth > 0)
    filled_depth = np.where(is_known, frame.depth, frame.depth[is_known].max())
    depth = ndimage.gaussian_filter(filled_depth, BLUR_PX)
    bend = ndimage.gaussian_filter(rng.normal(size=depth.shape), BEND_WIDTH_PX)
    factor = 1 + BEND * bend / bend.std() + NOISE * rng.normal(size=depth.shape)
    scale = max_scale ** rng.uniform(-1, 1)
    return dataclasses.replace(frame, depth=(scale * factor * depth).astype(np.float32))


def fit_open3d_boxes(points: Array) -> list[Box3D] | None:
    """Open3D's two boxes (oriented, minimal oriented) around points [n, 3] without outliers; None
    if it fails."""
    import open3d

    # Otherwise Open3D warns that its own boxes are invalid.
    open3d.utility.set_verbosity_level(open3d.utility.VerbosityLevel.Error)
    cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points.astype(np.float64)))
    cloud, _ = cloud.remove_statistical_outlier(nb_neighbors=20, std_ratio=2.0)
    try:
        boxes = [cloud.get_oriented_bounding_box(), cloud.get_minimal_oriented_bounding_box()]
    except RuntimeError:
        return None
    return [make_box_from_vertices(np.asarray(box.get_box_points())) for box in boxes]


@dataclasses.dataclass
class Comparison:
    """Errors of the objects of each image.

    Attributes:
        errors: [k, 3 methods, 3 numbers] (m, m, IoU).
        occluded: [k], which objects are occluded.
        is_asked_about: [k], which objects are good enough to be asked about.
    """

    errors: list[Array] = dataclasses.field(default_factory=list)
    occluded: list[Array] = dataclasses.field(default_factory=list)
    is_asked_about: list[Array] = dataclasses.field(default_factory=list)


def measure(
    frames: Sequence[Frame], inputs: Sequence[Frame], segmenter: Any, exact: bool
) -> Comparison:
    """Label the inputs, and compare with the truth of `frames`."""
    comparison = Comparison()
    labels = label_images(inputs, GroundTruth(), segmenter, GroundTruth(), exact)
    for label, frame, given_frame in zip(labels, frames, inputs, strict=True):
        (point_map,) = GroundTruth().predict([given_frame])
        scale = measure_scale(frame, given_frame, point_map)
        errors = []
        occluded = []
        is_asked_about = []
        for o in label.objects:
            errors_of_object = measure_object(o, label, frame, point_map, scale)
            if errors_of_object is not None:
                errors.append(errors_of_object)
                occluded.append(o.scores["visible"] < MIN_UNOCCLUDED_VISIBLE)
                is_asked_about.append(not find_failed_scores(o.scores))
        comparison.errors.append(np.array(errors).reshape(-1, len(METHODS), 3))
        comparison.occluded.append(np.array(occluded, bool))
        comparison.is_asked_about.append(np.array(is_asked_about, bool))
    return comparison


def measure_scale(frame: Frame, given_frame: Frame, point_map: PointMapResult) -> float:
    """By how much wrong depth has to be multiplied."""
    assert frame.depth is not None and given_frame.depth is not None
    is_known = np.isfinite(frame.depth) & (frame.depth > 0) & point_map.mask
    return float(np.median(frame.depth[is_known] / given_frame.depth[is_known]))


def measure_object(
    o: LabeledObject, label: LabeledImage, frame: Frame, point_map: PointMapResult, scale: float
) -> list[BoxErrors] | None:
    """The errors of each method's box; None where a box is missing."""
    assert frame.boxes is not None
    instance = choose_instance_with_most_mask_pixels(o, label, frame)
    if o.box3d is None or instance not in frame.boxes:
        return None
    mask = decode_mask(o.mask_runs, label.height, label.width)
    open3d_boxes = fit_open3d_boxes(point_map.points[mask & point_map.mask])
    if open3d_boxes is None:
        return None
    true_box = make_box_from_vertices(frame.boxes[instance])
    errors = []
    for box in (o.box3d, *open3d_boxes):
        scaled_box = make_box(scale * box.center, scale * box.size, box.rotation)
        errors.append(compute_box_errors(scaled_box, true_box))
    return errors


def format_table(name: str, comparison: Comparison) -> Iterator[str]:
    """Markdown rows: the three methods, ours for occluded objects only, and for those asked
    about."""
    median, replicas = compute_medians(comparison.errors)
    num_objects = sum(len(errors) for errors in comparison.errors)
    cells = format_cells(median[0], replicas[:, 0])
    yield f"| {name} | ours | {num_objects} | {' | '.join(cells)} |"

    for method in (1, 2):
        ratio = median[0] / median[method]
        ratio_replicas = replicas[:, 0] / replicas[:, method]
        cells = []
        for i, cell in enumerate(format_cells(median[method], replicas[:, method])):
            low, high = np.percentile(ratio_replicas[:, i], [2.5, 97.5])
            cells.append(f"{cell} · ours ×{ratio[i]:.2f} [{low:.2f}, {high:.2f}]")
        yield f"| | {METHODS[method]} | {num_objects} | {' | '.join(cells)} |"

    groups = (("occluded", comparison.occluded), ("asked about", comparison.is_asked_about))
    for group_name, is_in_group in groups:
        pairs = zip(comparison.errors, is_in_group, strict=True)
        group_errors = [errors[is_chosen] for errors, is_chosen in pairs]
        median, replicas = compute_medians(group_errors)
        num_objects = sum(len(errors) for errors in group_errors)
        cells = format_cells(median[0], replicas[:, 0])
        yield f"| | ours, {group_name} | {num_objects} | {' | '.join(cells)} |"


def compute_medians(errors: Sequence[Array]) -> tuple[Array, Array]:
    """Medians [3 methods, 3], and those of images drawn with replacement [resamples, 3, 3].

    Images without objects are left out.
    """
    groups = [group for group in errors if len(group)]

    def compute_median(draw: Array) -> Array:
        return np.asarray(np.median(np.concatenate([groups[i] for i in draw]), axis=0))

    draws = np.random.default_rng(0).integers(len(groups), size=(NUM_RESAMPLES, len(groups)))
    replicas = np.stack([compute_median(draw) for draw in draws])
    return compute_median(np.arange(len(groups))), replicas


def format_cells(median: Array, replicas: Array) -> list[str]:
    """Center error, vertex error and IoU with their intervals."""
    low, high = np.percentile(replicas, [2.5, 97.5], axis=0)
    cells = []
    for i in (0, 1):
        cells.append(f"{1000 * median[i]:.1f} [{1000 * low[i]:.1f}, {1000 * high[i]:.1f}] mm")
    cells.append(f"{median[2]:.2f} [{low[2]:.2f}, {high[2]:.2f}]")
    return cells


def render_frames(worlds: Sequence[World], camera: str, size: tuple[int, int]) -> list[Frame]:
    """Frames of the worlds, in which the gripper has no name."""
    frames = []
    for world in worlds:
        frame = render_frame(world, camera, size)
        names = {i: name for i, name in frame.names.items() if name != GRIPPER_NAME}
        frames.append(dataclasses.replace(frame, names=names))
    return frames


def print_views(worlds: Sequence[World]) -> None:
    """Print the first table."""
    print("| view | objects | centre | vertex | IoU |\n|---|---|---|---|---|")
    for camera, (width, height) in VIEWS:
        frames = render_frames(worlds, camera, (width, height))
        accuracy = compare_labels(label_with_ground_truth(frames), frames)
        print(
            f"| {camera} {width}×{height} | {accuracy.n} | {1000 * accuracy.center:.1f} mm | "
            f"{1000 * accuracy.vertex:.1f} mm | {accuracy.iou:.2f} |"
        )


def print_comparison(worlds: Sequence[World]) -> None:
    """Print the second table."""
    frames = render_frames(worlds, "external", (192, 128))
    unaided = [dataclasses.replace(frame, extrinsics=None) for frame in frames]
    noisy = [make_wrong_depth(frame, i) for i, frame in enumerate(unaided)]
    truth = GroundTruth()
    # Name of the row, frames to label, segmenter, whether masks and depth are known to be exact
    conditions: tuple[tuple[str, list[Frame], Any, bool], ...] = (
        ("true, true, known to be", unaided, truth, True),
        ("true, true", unaided, truth, False),
        ("eroded by 1 px, true", unaided, WrongMasks(-1), False),
        ("dilated by 1 px, true", unaided, WrongMasks(1), False),
        ("true, wrong", noisy, truth, False),
    )
    print("| mask, depth | boxes | objects | centre | vertex | IoU |\n|---|---|---|---|---|---|")
    for name, inputs, segmenter, exact in conditions:
        for line in format_table(name, measure(frames, inputs, segmenter, exact)):
            print(line, flush=True)


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
    worlds = [World(sample_clutter_scene(seed)) for seed in range(first_seed, first_seed + scenes)]
    if views:
        print_views(worlds)
    if open3d:
        print_comparison(worlds)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
