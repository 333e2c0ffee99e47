"""Images in, 3D-labeled images out: read → detect → segment → predict point maps → fit boxes.

Each stage is a function on a batch of `PendingImage`s. `label_images` runs the stages one after the
other. The engines (`spear.labels.engine`) run the same functions in processes or on a cluster.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TypeVar

import numpy as np

from spear.errors import SpearError, notice
from spear.labels.fit.image import find_first_and_last_lit_row_and_column, shrink_image
from spear.labels.fit.points import (
    MAX_PLANE_POINTS,
    Plane,
    estimate_relative_noise,
    fit_support_plane,
    select_evenly_spread_points,
)
from spear.labels.inputs import Content, Item, hash_content, read_contents
from spear.labels.models.ground_truth import GROUND_TRUTH, GroundTruth
from spear.labels.models.protocols import (
    Detection,
    Detector,
    PointMapModel,
    PointMapResult,
    Segmenter,
)
from spear.labels.objects import ImageGeometry, label_object
from spear.types import Array, Frame, LabeledImage
from spear.util.images import encode_jpeg, load_image_and_is_turned_invisibly

T = TypeVar("T")  # what a model returns for one image

MIN_SIDE_PX = 16  # images with a shorter side are too small to label
BATCH_SIZE = 8  # number of images that `label_images` hands to a model at a time
MAX_OBJECT_FRACTION = 0.1
"""An object that covers more than this fraction of the image may be a table on which other objects
stand (our choice)."""
NO_OBJECTS_REASON = "no object was found"
"""The error of images that are skipped because they show no object. It does not count as a
failure."""


@dataclass
class PendingImage:
    """One image on its way through the stages; each stage fills in its part.

    Attributes:
        source: Where the image came from; it becomes the label's source.
        frame: The image; None when it could not be read.
        error: Why this stage and all later ones skip the image; None while all is well.
        encoded: The image as JPEG, as labels store it; None leaves encoding to `fit_boxes`.
        detections: The image's n objects, filled in by `detect_and_add_detections`.
        masks: [n, h, w] bool, the objects' masks, filled in by `segment_and_add_masks`.
        point_map: The 3D point of each pixel, filled in by `predict_and_add_point_maps`.
        provenance: The name of each model that has seen the image, by role: {"detector": …,
            "segmenter": …, "pointmap": …}.
        content_hash: A short hash of the file's content; empty for images that were not read from
            a file.
        lit_part: [[first row, last row], [first column, last column]] of the part of the image
            without black bars (`find_first_and_last_lit_row_and_column`).
    """

    source: str
    frame: Frame | None
    error: SpearError | None = None
    encoded: bytes | None = None
    detections: Sequence[Detection] = ()
    masks: Array | None = None
    point_map: PointMapResult | None = None
    provenance: dict[str, str] = field(default_factory=dict)
    content_hash: str = ""
    lit_part: Array | None = None


def read_and_encode_images(
    items: Sequence[Item], max_side_px: int | None = None
) -> list[PendingImage]:
    """Read images and encode them as JPEG, as labels store them.

    An image that cannot be read carries the error with which all stages skip it.

    Args:
        items: The images to read. Keep the order in which they were listed, so that items that are
            neighbors in one file are read together.
        max_side_px: The longer side, in pixels, to which larger images are shrunk with their aspect
            kept. Frames with ground truth keep their size. None keeps the size of all images.
    """
    images = []
    for item, content in zip(items, read_contents(items), strict=True):
        image = _make_pending_image(item.key, content, max_side_px)
        image.content_hash = hash_content(content)
        images.append(image)
    return images


def _make_pending_image(source: str, content: Content, max_side_px: int | None) -> PendingImage:
    """Decode, shrink, check and encode the content of one item.

    If the content cannot be used, the image carries the error.
    """
    if isinstance(content, SpearError):
        return PendingImage(source, frame=None, error=content)
    if isinstance(content, Frame):
        frame = content
    else:
        try:
            pixels, is_turned = _decode_image_and_is_turned_invisibly(content, source)
        except SpearError as error:
            return PendingImage(source, frame=None, error=error)
        frame = Frame(shrink_image(pixels, max_side_px), is_turned=is_turned)
    image = make_checked_pending_image(replace(frame, source=source))
    if image.error is None:
        image.encoded = encode_jpeg(frame.image)
    return image


def _decode_image_and_is_turned_invisibly(
    content: bytes | Array, source: str
) -> tuple[Array, bool]:
    """Decode an image file's bytes; pixels that are decoded already are returned unchanged.

    Returns:
        The pixels [h, w, 3], and whether the image's EXIF data turns or mirrors the image in a way
        that its size does not show.
    """
    if isinstance(content, bytes):
        return load_image_and_is_turned_invisibly(content, source)
    return content, False


def label_images(
    frames: Iterable[Frame],
    detector: Detector,
    segmenter: Segmenter,
    point_map_model: PointMapModel,
    inputs_are_exact: bool | None = None,
) -> Iterator[LabeledImage]:
    """Label images with 3D boxes, batch by batch. An image without detections gets a label without
    objects.

    Args:
        frames: The images. Models that answer from ground truth need frames that contain it.
        detector: Finds and names objects.
        segmenter: Outlines the detected objects.
        point_map_model: Predicts the 3D point of every pixel.
        inputs_are_exact: Whether masks and depth are exact. With None they count as exact if both
            are ground truth from a simulator, and as estimates if a model predicted or a sensor
            measured them.

    Yields:
        One label per frame, in order.

    Raises:
        SpearError: An image is bad, or a model refuses it.
    """
    remaining_frames = iter(frames)
    while batch := list(islice(remaining_frames, BATCH_SIZE)):
        images = [make_checked_pending_image(frame) for frame in batch]
        detect_and_add_detections(images, detector)
        segment_and_add_masks(images, segmenter)
        predict_and_add_point_maps(images, point_map_model)
        for image in images:
            if image.error is not None:
                raise image.error
            yield fit_boxes(image, inputs_are_exact)


def label_with_ground_truth(frames: Iterable[Frame]) -> Iterator[LabeledImage]:
    """Label frames from the ground truth that they contain, instead of with the three models."""
    truth = GroundTruth()
    return label_images(frames, truth, truth, truth)


def make_checked_pending_image(frame: Frame) -> PendingImage:
    """Begin the labeling of a frame.

    A frame whose image is too small or not [h, w, 3] uint8 carries the error with which all stages
    skip it.
    """
    problem = _find_problem(frame.image)
    if problem is not None:
        return PendingImage(frame.source, frame, SpearError(problem))
    return PendingImage(
        frame.source, frame, lit_part=find_first_and_last_lit_row_and_column(frame.image)
    )


def _find_problem(image: Array) -> str | None:
    """Why an image cannot be labeled; None if it can."""
    if not isinstance(image, np.ndarray):
        return f"the image is {type(image).__name__}. Convert it to [h, w, 3] uint8 RGB."
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        return f"the image is {image.dtype} {image.shape}. Convert it to [h, w, 3] uint8 RGB."
    height, width = image.shape[:2]
    if min(height, width) < MIN_SIDE_PX:
        return f"the image has {width}×{height} pixels. Give at least {MIN_SIDE_PX}×{MIN_SIDE_PX}."
    return None


def detect_and_add_detections(
    images: Sequence[PendingImage], detector: Detector, skip_empty: bool = False
) -> None:
    """Find each image's objects, and store them in its `detections`.

    With `skip_empty`, images without objects get an error, so that later stages skip them.
    """

    def detect(batch: Sequence[PendingImage], frames: Sequence[Frame]) -> list[list[Detection]]:
        return detector.detect(frames)

    for image, detections in _apply_model(images, detect):
        image.detections = detections
        image.provenance["detector"] = detector.name
        if skip_empty and not detections:
            image.error = SpearError(NO_OBJECTS_REASON)


def segment_and_add_masks(images: Sequence[PendingImage], segmenter: Segmenter) -> None:
    """Outline the objects of each image, and store their outlines in its `masks`."""

    def segment(batch: Sequence[PendingImage], frames: Sequence[Frame]) -> list[Array]:
        return segmenter.segment(frames, [image.detections for image in batch])

    for image, masks in _apply_model(images, segment):
        image.masks = masks
        image.provenance["segmenter"] = segmenter.name


def predict_and_add_point_maps(
    images: Sequence[PendingImage], point_map_model: PointMapModel
) -> None:
    """Predict the 3D point of every pixel of each image, and store them in its `point_map`."""

    def predict(batch: Sequence[PendingImage], frames: Sequence[Frame]) -> list[PointMapResult]:
        return point_map_model.predict(frames)

    for image, point_map in _apply_model(images, predict):
        image.point_map = point_map
        image.provenance["pointmap"] = point_map_model.name


def _apply_model(
    images: Sequence[PendingImage],
    call_model: Callable[[Sequence[PendingImage], Sequence[Frame]], list[T]],
) -> list[tuple[PendingImage, T]]:
    """Call a model with the images that are not skipped, and pair each of them with its result.

    If the model refuses the batch with a `SpearError`, it is called again image by image. An image
    that the model refuses again is skipped from then on, with the model's error.

    Args:
        images: The batch.
        call_model: Calls the model with the images that are not skipped and with their frames. It
            returns one result per image.
    """
    active_images = [image for image in images if image.error is None]
    if not active_images:
        return []
    frames = [image.frame for image in active_images if image.frame is not None]
    try:
        return list(zip(active_images, call_model(active_images, frames), strict=True))
    except SpearError as error:
        if len(active_images) == 1:
            active_images[0].error = error
            return []
    pairs = []
    for image in active_images:
        pairs += _apply_model([image], call_model)
    return pairs


def fit_boxes(image: PendingImage, inputs_are_exact: bool | None = None) -> LabeledImage:
    """Fit the boxes of an image that has gone through all models.

    Points that are NaN, infinite or behind the camera count as unknown.

    Args:
        image: The image, with detections, masks and point map.
        inputs_are_exact: Whether masks and depth are exact. With None they count as exact if both
            are ground truth from a simulator.
    """
    assert image.frame is not None and image.masks is not None and image.point_map is not None
    assert image.lit_part is not None
    frame = image.frame
    points = image.point_map.points
    is_valid = np.isfinite(points).all(axis=-1) & (points[..., 2] > 0)
    point_map = replace(image.point_map, mask=image.point_map.mask & is_valid)
    if inputs_are_exact is None:
        inputs_are_exact = _has_exact_ground_truth(image)

    geometry = ImageGeometry(
        point_map=point_map,
        support_plane=_find_support_plane(point_map, image.masks, frame.extrinsics),
        is_exact=inputs_are_exact,
        occupied=np.asarray(image.masks.any(axis=0)),
        noise=estimate_relative_noise(points, point_map.mask),
        lit_part=image.lit_part,
    )
    objects = []
    for detection, mask in zip(image.detections, image.masks, strict=True):
        objects.append(label_object(detection, mask, geometry))

    height, width = frame.image.shape[:2]
    return LabeledImage(
        image=image.encoded or encode_jpeg(frame.image),
        width=width,
        height=height,
        intrinsics=np.asarray(point_map.intrinsics, np.float64),
        objects=objects,
        unit=point_map.unit,
        source=image.source,
        provenance=image.provenance,
    )


def _has_exact_ground_truth(image: PendingImage) -> bool:
    """Whether masks and depth are exact ground truth of a simulator, not measured."""
    assert image.frame is not None
    models = (image.provenance["segmenter"], image.provenance["pointmap"])
    return models == (GROUND_TRUTH, GROUND_TRUTH) and not image.frame.is_measured


def _find_support_plane(
    point_map: PointMapResult, masks: Array, extrinsics: Array | None
) -> Plane | None:
    """The plane that the objects of an image stand on; None if no such plane is seen.

    The plane is fitted to the background: all pixels outside the masks of small objects. A large
    object may be the support itself (a table), so its pixels belong to the background.

    Args:
        point_map: Point map of the image.
        masks: [n, h, w] bool, the masks of the image's objects.
        extrinsics: [4, 4] camera → world with z up, when known.
    """
    mask_fractions = masks.mean(axis=(1, 2))  # [n]
    small_masks = masks[mask_fractions < MAX_OBJECT_FRACTION]
    is_background = point_map.mask & ~small_masks.any(axis=0)  # [h, w]
    pixels = select_evenly_spread_points(
        np.argwhere(is_background), MAX_PLANE_POINTS
    )  # [k, 2] rows, columns
    background = point_map.points[pixels[:, 0], pixels[:, 1]]  # [k, 3]
    if extrinsics is None:
        return fit_support_plane(background)

    up = extrinsics[2, :3]  # the world's z axis, in the camera frame
    plane = fit_support_plane(background, up=up)
    if plane is not None:
        return plane

    # No plane is level according to the pose: the pose may be wrong, so try without it.
    plane = fit_support_plane(background)
    if plane is not None:
        notice(
            "Poses fit no level surface that is seen, so they are not used. Check that they are "
            "camera to world, z up."
        )
    return plane
