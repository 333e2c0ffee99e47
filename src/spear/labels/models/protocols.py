"""What the labelling pipeline needs from its models, and nothing more.

All three take a batch of `Frame`s: a network reads only `frame.image`, ground truth reads the other fields. A
component that cannot handle an image raises `SpearError`; the pipeline then retries the batch one image at a
time, so that only the image at fault is set aside.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from spear.types import Array, Frame, Unit


@dataclass(frozen=True)
class Detection:
    """One detected object: name, box2d [4] (x0, y0, x1, y1 in pixels, x1 and y1 exclusive), score 0 … 1."""

    name: str
    box2d: Array
    score: float = 1.0


@dataclass(frozen=True)
class PointMapResult:
    """The 3D point that each pixel sees.

    points      [h, w, 3] float32, camera frame (x right, y down, z forward).
    mask        [h, w] bool, False where the point is unknown.
    intrinsics  [3, 3] pixels, known or recovered; pixel centres at integer + 0.5.
    unit        of the points: "metre", or "relative" when the scale is unknown.
    """

    points: Array
    mask: Array
    intrinsics: Array
    unit: Unit


class Detector(Protocol):
    """Finds and names objects. `name` goes into the label's provenance."""

    name: str

    def detect(self, frames: Sequence[Frame]) -> list[list[Detection]]:
        """The objects of each image."""


class Segmenter(Protocol):
    """Outlines detected objects. `name` goes into the label's provenance."""

    name: str

    def segment(
        self, frames: Sequence[Frame], detections: Sequence[Sequence[Detection]]
    ) -> list[Array]:
        """For each image, the masks [n, h, w] bool of its n detections (a network reads only their boxes)."""


class PointMapModel(Protocol):
    """Predicts the geometry of whole images. `name` goes into the label's provenance."""

    name: str

    def predict(self, frames: Sequence[Frame]) -> list[PointMapResult]:
        """The point map of each image."""
