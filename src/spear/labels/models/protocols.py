"""The interfaces of the pipeline's three models: detector, segmenter and point-map model.

Each model takes a batch of `Frame`s. A network reads only `frame.image`; a model that answers from
ground truth reads the other fields. A model that cannot handle an image raises `SpearError`. The
pipeline then calls the model again with one image at a time, so that it skips only the image at
fault.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from spear.types import Array, Frame, Unit


@dataclass(frozen=True)
class Detection:
    """One detected object.

    Attributes:
        name: What the object is, in words.
        box2d: [4] x0, y0, x1, y1 in pixels; x1 and y1 are exclusive.
        score: The detector's confidence, 0 to 1.
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
    """Finds and names objects. The detector's `name` goes into the label's provenance."""

    name: str

    def detect(self, frames: Sequence[Frame]) -> list[list[Detection]]:
        """Find the objects of each image."""


class Segmenter(Protocol):
    """Outlines detected objects. The segmenter's `name` goes into the label's provenance."""

    name: str

    def segment(
        self, frames: Sequence[Frame], detections: Sequence[Sequence[Detection]]
    ) -> list[Array]:
        """Outline the n detections of each image as masks [n, h, w] bool.

        Networks read only the 2D boxes of the detections.
        """


class PointMapModel(Protocol):
    """Predicts an image's geometry. The model's `name` goes into the label's provenance."""

    name: str

    def predict(self, frames: Sequence[Frame]) -> list[PointMapResult]:
        """Predict the point map of each image."""
