"""What the labeling pipeline needs from its models, and nothing more.

All three take a batch of `Frame`s: a network reads only `frame.image`, ground truth reads the other
fields. A model that cannot handle an image raises `SpearError`; the pipeline then retries the batch
one image at a time, so that it skips only the image at fault.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from spear.types import Array, Frame, Unit


@dataclass(frozen=True)
class Detection:
    """One detected object.

    Attributes:
        name: What it is.
        box2d: [4] x0, y0, x1, y1 in pixels; x1 and y1 are exclusive.
        score: 0 … 1.
    """

    name: str
    box2d: Array
    score: float = 1.0


@dataclass(frozen=True)
class PointMapResult:
    """The 3D point that each pixel shows.

    Attributes:
        points: [h, w, 3] float32, camera frame (x right, y down, z forward).
        mask: [h, w] bool, False where the point is unknown.
        intrinsics: [3, 3] pixels, known or recovered; pixel centers at integer + 0.5.
        unit: Unit of the points: "metre", or "relative" when the scale is unknown.
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
        """For each image, the masks [n, h, w] bool of its n detections, of which networks read only
        the boxes."""


class PointMapModel(Protocol):
    """Predicts the geometry of whole images. `name` goes into the label's provenance."""

    name: str

    def predict(self, frames: Sequence[Frame]) -> list[PointMapResult]:
        """The point map of each image."""
