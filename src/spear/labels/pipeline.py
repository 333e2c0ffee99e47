"""Images in, 3D-labelled images out: detect → segment → point map → box."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from PIL import Image

from spear.errors import SpearError
from spear.labels.ground_truth import GROUND_TRUTH
from spear.labels.objects import ESTIMATED, BoxSettings, label_object
from spear.labels.points import noise_level, support_plane
from spear.labels.protocols import Detector, PointMap, PointMapResult, Segmenter
from spear.types import Array, Frame, LabeledImage

MIN_SIDE = 16
"""Images with a shorter side than this hold nothing to label."""


@dataclass
class Failures:
    """The images that were set aside, and why; stops a run in which too many are bad.

    limit      the largest fraction of bad images that is put up with.
    patience   how many images to see before judging the fraction (a short run is judged at its end).
    """

    limit: float = 0.1
    patience: int = 200
    seen: int = 0
    rows: list[tuple[str, str]] = field(default_factory=list)

    def add(self, source: str, reason: str) -> None:
        """Set one image aside, with its reason."""
        self.rows.append((source, reason))

    def check(self, finished: bool = False) -> None:
        """Raise `SpearError` when more than the set fraction of the images seen so far were bad."""
        judged = self.seen >= self.patience or (finished and self.seen)
        if judged and len(self.rows) > self.limit * self.seen:
            source, reason = self.rows[-1]
            raise SpearError(
                f"{len(self.rows)} of {self.seen} images are bad (more than {self.limit:.0%}); the last "
                f"was {source or 'unnamed'}: {reason}: check the input, or allow a larger fraction"
            )


def encode_jpeg(image: Array, quality: int = 95) -> bytes:
    """[h, w, 3] uint8 RGB -> JPEG bytes, colour at full resolution: small objects are told apart by it."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def decode_image(data: bytes) -> Array:
    """JPEG or PNG bytes -> [h, w, 3] uint8 RGB; `SpearError` when they are not a whole image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise SpearError(f"image bytes: {error}: replace the image") from error


def label(
    frames: Iterable[Frame],
    detector: Detector,
    segmenter: Segmenter,
    pointmap: PointMap,
    settings: BoxSettings | None = None,
    failures: Failures | None = None,
    batch_size: int = 8,
) -> Iterator[LabeledImage]:
    """Label images with 3D boxes, as they come.

    Args:
        frames: images, with ground truth where the components read it.
        detector, segmenter, pointmap: the models; each gets `batch_size` images at a time.
        settings: how boxes are fitted; None for `BoxSettings()` where masks and depth are ground truth, and
            `objects.ESTIMATED` otherwise.
        failures: filled with the images set aside; pass one to read it afterwards.
        batch_size: images per call of a model.

    Yields:
        One label per good image, in order; an image without any detection is a label without objects.

    Raises:
        SpearError: more images than `failures.limit` were bad.
    """
    failures = Failures() if failures is None else failures
    if settings is None:
        exact = segmenter.name == pointmap.name == GROUND_TRUTH
        settings = BoxSettings() if exact else ESTIMATED
    names = {"detector": detector.name, "segmenter": segmenter.name, "pointmap": pointmap.name}
    source = iter(frames)
    while batch := list(islice(source, batch_size)):
        good = []
        for frame in batch:
            failures.seen += 1
            if reason := _unusable(frame):
                failures.add(frame.source, reason)
            else:
                good.append(frame)
        yield from _label_batch(good, detector, segmenter, pointmap, settings, failures, names)
        failures.check()
    failures.check(finished=True)


def _unusable(frame: Frame) -> str | None:
    image = frame.image
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        return f"image is {got}: convert it to [h, w, 3] uint8 RGB"
    if min(image.shape[:2]) < MIN_SIDE:
        return f"image is {image.shape[1]}×{image.shape[0]} pixels: give at least {MIN_SIDE}×{MIN_SIDE}"
    return None


def _label_batch(
    frames: Sequence[Frame],
    detector: Detector,
    segmenter: Segmenter,
    pointmap: PointMap,
    settings: BoxSettings,
    failures: Failures,
    names: dict[str, str],
) -> Iterator[LabeledImage]:
    """Label a batch; when a model refuses it, image by image, setting aside those that are refused alone."""
    if not frames:
        return
    try:
        detections = detector.detect(frames)
        masks = segmenter.segment(frames, detections)
        maps = pointmap.predict(frames)
    except SpearError as error:
        if len(frames) == 1:
            failures.add(frames[0].source, str(error))
            return
        for frame in frames:
            yield from _label_batch([frame], detector, segmenter, pointmap, settings, failures, names)
        return
    for frame, found, outlines, geometry in zip(frames, detections, masks, maps, strict=True):
        geometry = _finite(geometry)
        up = None if frame.extrinsics is None else frame.extrinsics[2, :3]
        taken = np.asarray(outlines.any(axis=0))
        plane = support_plane(geometry.points[geometry.mask & ~taken], up)
        noise = noise_level(geometry.points, geometry.mask)
        lifted = (
            label_object(detection, mask, geometry, plane, settings, taken, noise)
            for detection, mask in zip(found, outlines, strict=True)
        )
        height, width = frame.image.shape[:2]
        yield LabeledImage(
            image=encode_jpeg(frame.image),
            width=width,
            height=height,
            intrinsics=np.asarray(geometry.intrinsics, np.float64),
            objects=[o for o in lifted if o is not None],
            unit=geometry.unit,
            source=frame.source,
            provenance=names,
        )


def _finite(geometry: PointMapResult) -> PointMapResult:
    """Points that are NaN, infinite or behind the camera become unknown."""
    mask = geometry.mask & np.isfinite(geometry.points).all(axis=-1) & (geometry.points[..., 2] > 0)
    return PointMapResult(geometry.points, mask, geometry.intrinsics, geometry.unit)
