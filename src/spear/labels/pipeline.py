"""Images in, 3D-labelled images out: detect → segment → point map → box.

Each stage is a function on a batch of `Work`. `label` runs them one after the other; the engines
(`spear.labels.engine`) run the same functions in processes or on a cluster.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from spear.errors import SpearError, notice
from spear.labels.fit.image import find_lit_part
from spear.labels.fit.points import MAX_PLANE_POINTS, estimate_noise, fit_support_plane, subsample
from spear.labels.models.ground_truth import GROUND_TRUTH, GroundTruth
from spear.labels.models.protocols import (
    Detection,
    Detector,
    PointMapModel,
    PointMapResult,
    Segmenter,
)
from spear.labels.objects import label_object
from spear.types import Array, Frame, LabeledImage
from spear.util.images import encode_jpeg

T = TypeVar("T")
MIN_SIDE_PX = 16
"""Images with a shorter side than this hold nothing to label."""
MAX_OBJECT_FRACTION = 0.1
"""Objects with a larger share of the image than this may be what others stand on: a table (our choice)."""
NO_OBJECTS_REASON = "no object was found"
"""Why an image is skipped in which nothing was found, which is no failure."""


@dataclass
class PendingImage:
    """One image on its way through the stages; each stage fills in its part.

    source      where the image came from: the label's source.
    frame       the image; None when it could not be read.
    error       why it is skipped, by all later stages too; None while all is well.
    encoded     the image as it is kept; None leaves encoding to `lift`.
    detections  of `detect`.
    masks       [n, h, w] bool, of `segment`.
    geometry    of `locate`.
    provenance  names of the models so far, as in `LabeledImage`.
    digest      a short hash of what was read; empty for other images.
    lit         the ends of the image without black bars, as `lit_part`.
    """

    source: str
    frame: Frame | None
    error: SpearError | None = None
    encoded: bytes | None = None
    detections: Sequence[Detection] = ()
    masks: Array | None = None
    geometry: PointMapResult | None = None
    provenance: dict[str, str] = field(default_factory=dict)
    digest: str = ""
    lit: Any = None


def label_images(
    frames: Iterable[Frame],
    detector: Detector,
    segmenter: Segmenter,
    pointmap: PointMapModel,
    exact: bool | None = None,
) -> Iterator[LabeledImage]:
    """Label images with 3D boxes, as they come, one label each; without any detection it has no objects.

    frames    images, with ground truth where the models read it; these get eight at a time.
    exact     whether masks and depth are true; None: where they are ground truth, not measured.

    Raises `SpearError` for the first image that is bad or that a model refuses.
    """
    source = iter(frames)
    while works := [admit_frame(frame) for frame in islice(source, 8)]:
        detect_objects(works, detector)
        segment_objects(works, segmenter)
        predict_point_maps(works, pointmap)
        for work in works:
            if work.error is not None:
                raise work.error
            yield fit_boxes(work, exact)


def label_with_ground_truth(frames: Iterable[Frame]) -> Iterator[LabeledImage]:
    """Label frames from their own ground truth, in the place of all three models."""
    truth = GroundTruth()
    return label_images(frames, truth, truth, truth)


def admit_frame(frame: Frame) -> PendingImage:
    """The work of labelling a frame, skipped when its image is not [h, w, 3] uint8 or too small."""
    image, error = frame.image, None
    if (
        not isinstance(image, np.ndarray)
        or image.ndim != 3
        or image.shape[2] != 3
        or image.dtype != np.uint8
    ):
        got = (
            f"{image.dtype} {image.shape}"
            if isinstance(image, np.ndarray)
            else type(image).__name__
        )
        error = SpearError(f"image is {got}: convert it to [h, w, 3] uint8 RGB")
    elif min(image.shape[:2]) < MIN_SIDE_PX:
        size = f"{image.shape[1]}×{image.shape[0]}"
        error = SpearError(f"image is {size} pixels: give at least {MIN_SIDE_PX}×{MIN_SIDE_PX}")
    return PendingImage(frame.source, frame, error, lit=None if error else find_lit_part(image))


def detect_objects(
    works: Sequence[PendingImage], detector: Detector, need_objects: bool = False
) -> None:
    """Find the objects of each image. With `need_objects`, images in which none is found are skipped."""
    for work, found in _answers(works, lambda good, frames: detector.detect(frames)):
        work.detections = found
        work.provenance["detector"] = detector.name
        if need_objects and not found:
            work.error = SpearError(NO_OBJECTS_REASON)


def segment_objects(works: Sequence[PendingImage], segmenter: Segmenter) -> None:
    """Outline the objects of each image."""
    answers = _answers(
        works, lambda good, frames: segmenter.segment(frames, [w.detections for w in good])
    )
    for work, masks in answers:
        work.masks = masks
        work.provenance["segmenter"] = segmenter.name


def predict_point_maps(works: Sequence[PendingImage], pointmap: PointMapModel) -> None:
    """Predict the point map of each image."""
    for work, geometry in _answers(works, lambda good, frames: pointmap.predict(frames)):
        work.geometry = geometry
        work.provenance["pointmap"] = pointmap.name


def _answers(
    works: Sequence[PendingImage],
    call: Callable[[Sequence[PendingImage], Sequence[Frame]], list[T]],
) -> list[tuple[PendingImage, T]]:
    """The answer to each good image by a model, which gets the works and their frames; when it refuses them,
    image by image, skipping those that it refuses alone."""
    good = [work for work in works if work.error is None]
    try:
        frames = [work.frame for work in good if work.frame is not None]
        return list(zip(good, call(good, frames), strict=True)) if good else []
    except SpearError as error:
        if len(good) > 1:
            return [pair for work in good for pair in _answers([work], call)]
        good[0].error = error
        return []


def fit_boxes(work: PendingImage, exact: bool | None = None) -> LabeledImage:
    """Fit the boxes of an image that has gone through all models; `exact` as in `label`. Points that are NaN,
    infinite or behind the camera count as unknown."""
    assert work.frame is not None and work.masks is not None and work.geometry is not None
    frame, geometry = work.frame, work.geometry
    known = (
        geometry.mask & np.isfinite(geometry.points).all(axis=-1) & (geometry.points[..., 2] > 0)
    )
    geometry = replace(geometry, mask=known)
    if exact is None:
        said = work.provenance
        exact = said["segmenter"] == said["pointmap"] == GROUND_TRUTH and not frame.measured
    up = None if frame.extrinsics is None else frame.extrinsics[2, :3]
    small = work.masks[work.masks.mean(axis=(1, 2)) < MAX_OBJECT_FRACTION]
    seen = geometry.points[
        tuple(subsample(np.argwhere(known & ~small.any(axis=0)), MAX_PLANE_POINTS).T)
    ]
    plane = fit_support_plane(seen, up)
    if plane is None and up is not None and (plane := fit_support_plane(seen)):
        notice(
            "poses fit no level surface that is seen, so are not used: are they camera to world, z up?"
        )
    taken, noise = np.asarray(work.masks.any(axis=0)), estimate_noise(geometry.points, known)
    given = geometry, plane, exact, taken, noise, work.lit
    return LabeledImage(
        image=work.encoded or encode_jpeg(frame.image),
        width=frame.image.shape[1],
        height=frame.image.shape[0],
        intrinsics=np.asarray(geometry.intrinsics, np.float64),
        objects=[
            label_object(d, m, *given) for d, m in zip(work.detections, work.masks, strict=True)
        ],
        unit=geometry.unit,
        source=work.source,
        provenance=work.provenance,
    )
