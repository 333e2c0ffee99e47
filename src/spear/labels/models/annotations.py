"""Detector and segmenter that read what somebody has annotated: see `coco` and `egoexo` for the formats.

Annotated masks are used as they are. Where a file does not know an image, or knows no mask of an object,
another detector or segmenter can take over.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from spear.errors import SpearError
from spear.labels.fit.boxes2d import clip, iou2d, tight_box
from spear.labels.models.protocols import Detection, Detector, Segmenter
from spear.types import Array, Frame


@dataclass(frozen=True)
class Annotation:
    """One annotated object.

    name     what it is called.
    box2d    [4] x0, y0, x1, y1 in pixels of the image as annotated, the upper ends exclusive; None for the
             tight box of the mask.
    size     (height, width) of the image as annotated; None when the file does not say (then it is that of
             the image at hand).
    outline  (height, width) -> mask [height, width] bool; None when only the box is annotated.
    score    1 for a person's annotation.
    """

    name: str
    box2d: Array | None
    size: tuple[int, int] | None
    outline: Callable[[int, int], Array] | None
    score: float = 1.0

    def box_in(self, height: int, width: int) -> Array:
        """The box [4] float32 in pixels of an image of this size, inside it; zeros for an empty mask.

        Raises:
            SpearError: the annotation is for an image of another shape.
        """
        if self.box2d is None:
            mask = self.mask_in(height, width)
            return tight_box(mask) if mask is not None else np.zeros(4, np.float32)
        rows, columns = self._annotated_size(height, width)
        scale = np.array([width / columns, height / rows] * 2)
        return clip(self.box2d * scale, height, width)

    def mask_in(self, height: int, width: int) -> Array | None:
        """The mask [height, width] bool in an image of this size (nearest pixel); None without an outline.

        Raises:
            SpearError: the annotation is for an image of another shape, or its mask is broken.
        """
        if self.outline is None:
            return None
        rows, columns = self._annotated_size(height, width)
        mask = self.outline(rows, columns)
        row = ((np.arange(height) + 0.5) * rows / height).astype(np.intp)
        column = ((np.arange(width) + 0.5) * columns / width).astype(np.intp)
        nearest: Array = mask[np.ix_(row, column)]
        return nearest

    def _annotated_size(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = self.size or (height, width)
        if abs(height * columns - width * rows) > max(rows, columns):  # more than a pixel of rounding
            raise SpearError(
                f"annotation of {self.name!r} is for an image of {columns}×{rows}, this one is {width}×{height}: "
                "give the image that was annotated, at most resized"
            )
        return rows, columns


class Annotations(Protocol):
    """A file of annotations. `name` goes into the label's provenance."""

    name: str

    def find(self, source: str) -> list[Annotation] | None:
        """What is annotated in the image of this source (see `Frame`); None when the file does not know
        it."""
        ...


class FileDetector:
    """Boxes and names from a file of annotations.

    Args:
        annotations: `CocoAnnotations` or `RelationAnnotations`.
        otherwise: detector for the images that the file does not know; without one they are a `SpearError`.
    """

    def __init__(self, annotations: Annotations, otherwise: Detector | None = None) -> None:
        self.annotations, self.otherwise = annotations, otherwise
        self.name = annotations.name + (f", otherwise {otherwise.name}" if otherwise else "")

    def detect(self, frames: Sequence[Frame]) -> list[list[Detection]]:
        """The annotated objects of each image, in the file's order; those with an empty box are left out."""
        found = [self.annotations.find(frame.source) for frame in frames]
        unknown = [frame for frame, annotated in zip(frames, found, strict=True) if annotated is None]
        if unknown and self.otherwise is None:
            raise SpearError(
                f"{unknown[0].source}: not in {self.annotations.name}: name images as that file does, or add a "
                "detector for the others"
            )
        others = iter(self.otherwise.detect(unknown) if unknown and self.otherwise else ())
        return [
            next(others) if annotated is None else _detections(frame, annotated)
            for frame, annotated in zip(frames, found, strict=True)
        ]


class FileSegmenter:
    """Masks from a file of annotations, for detections of that file or of any other detector.

    A detection gets the mask of the annotated object whose box overlaps its own most (IoU > 0.5, one of the
    same name first, each object once).

    Args:
        annotations: `CocoAnnotations` or `RelationAnnotations`.
        otherwise: segmenter for detections without an annotated mask; without one they are a `SpearError`.
    """

    def __init__(self, annotations: Annotations, otherwise: Segmenter | None = None) -> None:
        self.annotations, self.otherwise = annotations, otherwise
        self.name = annotations.name + (f", otherwise {otherwise.name}" if otherwise else "")

    def segment(self, frames: Sequence[Frame], detections: Sequence[Sequence[Detection]]) -> list[Array]:
        """For each frame, masks [n, h, w] bool."""
        results, rest = [], []
        for frame, found in zip(frames, detections, strict=True):
            masks, missing = self._masks(frame, found)
            results.append(masks)
            if missing:
                rest.append((frame, masks, missing, [found[i] for i in missing]))
        if rest and self.otherwise is None:
            frame, _, _, without = rest[0]
            raise SpearError(
                f"{frame.source}: no mask of {without[0].name!r} in {self.annotations.name}: add a segmenter for "
                "objects without one"
            )
        if rest and self.otherwise is not None:
            made = self.otherwise.segment([frame for frame, *_ in rest], [without for *_, without in rest])
            for (_, masks, missing, _), others in zip(rest, made, strict=True):
                masks[missing] = others
        return results

    def _masks(self, frame: Frame, detections: Sequence[Detection]) -> tuple[Array, list[int]]:
        """Masks [n, h, w] of the detections, and the numbers of those that have none in the file."""
        height, width = frame.image.shape[:2]
        masks = np.zeros((len(detections), height, width), bool)
        annotated = [a for a in self.annotations.find(frame.source) or () if a.outline is not None]
        boxes = [a.box_in(height, width) for a in annotated]
        pairs = []
        for i, detection in enumerate(detections):
            for j, (annotation, box) in enumerate(zip(annotated, boxes, strict=True)):
                overlap = float(iou2d(detection.box2d, box))
                if overlap > 0.5:
                    pairs.append((annotation.name != detection.name, -overlap, i, j))
        matched: dict[int, int] = {}
        for _, _, i, j in sorted(pairs):
            if i not in matched and j not in matched.values():
                matched[i] = j
        for i, j in matched.items():
            masks[i] = annotated[j].mask_in(height, width)
        return masks, [i for i in range(len(detections)) if i not in matched]


def _detections(frame: Frame, annotated: Sequence[Annotation]) -> list[Detection]:
    boxes = [a.box_in(*frame.image.shape[:2]) for a in annotated]
    return [
        Detection(a.name, box, a.score)
        for a, box in zip(annotated, boxes, strict=True)
        if box[2] > box[0] and box[3] > box[1]
    ]


def load_json(path: Path, kind: str) -> tuple[dict[str, Any], str]:
    """The JSON object in a file, and its name for the provenance: kind, file name and a hash of the content.

    Raises:
        SpearError: no such file, or no JSON object in it.
    """
    try:
        data = path.read_bytes()
        content = json.loads(data)
    except OSError as error:
        raise SpearError(f"{path}: cannot read the annotations ({error.strerror}): check the path") from error
    except ValueError as error:
        raise SpearError(f"{path}: not JSON ({error}): give a file of annotations") from error
    if not isinstance(content, dict):
        raise SpearError(f"{path}: its JSON is a {type(content).__name__}: give a file of annotations")
    return content, f"{kind} {path.name} ({hashlib.sha256(data).hexdigest()[:8]})"


def path_parts(path: str) -> list[str]:
    """The folders and the file of a path, whichever slashes it has; "#" separates like a slash."""
    return [part for part in re.split(r"[\\/#]+", path) if part not in ("", ".")]
