"""One question about one image, for people: an answer in words and numbers."""

from __future__ import annotations

from dataclasses import dataclass

from spear.errors import SpearError, unknown_name
from spear.evaluate.vqa.images import held_out_frames
from spear.evaluate.vqa.measures import numbers
from spear.labels.images import load_image
from spear.labels.questions.generate import FAMILIES
from spear.models.readout import Decode
from spear.policy import Answer, VlmBundle
from spear.sim.render import Size
from spear.types import Array, Pixel


@dataclass(frozen=True)
class Picture:
    """An image [h, w, 3] uint8 and its camera's intrinsics [3, 3], None when they are not known."""

    image: Array
    intrinsics: Array | None


def read_picture(where: str, size: Size) -> Picture:
    """An image file (see `labels.images.load_image`), or "sim:SEED": that held-out scene at `size` (width,
    height).

    Raises SpearError for a file that is not there or not an image, and for a seed that is not held out.
    """
    if where.startswith("sim:"):
        if not where[4:].isdigit():
            raise SpearError(f"image {where!r}: write sim:SEED with a number, for example sim:7")
        frame = next(held_out_frames(1, int(where[4:]), size))
        return Picture(frame.image, frame.intrinsics)
    return Picture(load_image(where), None)


def ask(
    model: VlmBundle, picture: Picture, question: str, family: str | None = None, decode: Decode = "mode"
) -> Answer:
    """The model's answer, its numbers read as `decode` says (`models.readout`).

    Raises SpearError for an unknown question family or an empty question.
    """
    if family is not None and family not in FAMILIES:
        raise unknown_name("question family", family, FAMILIES)
    if not question.strip():
        raise SpearError("empty question: ask something about the image, in words")
    return model.answer([picture.image], [question], family, decode=decode)[0]


def words(answer: Answer, picture: Picture) -> str:
    """An answer to read: 3D numbers in the model's unit, image points in pixels, a box by its centre and
    vertices."""
    unit = "m" if answer.unit == "metre" else "units"
    values = numbers(answer.segments)
    if len(values) == 24 and len(answer.segments) == 24:
        vertices = values.reshape(8, 3)
        lines = [f"  {_point(v)}" for v in vertices]
        return "\n".join([f"centre {_point(vertices.mean(0))} {unit}; vertices:", *lines])
    height, width = picture.image.shape[:2]
    parts = []
    for segment in answer.segments:
        if isinstance(segment, Pixel):
            parts.append(f"({segment.x * width:.0f}, {segment.y * height:.0f}) px")
        else:
            parts.append(f"{segment:.3f} {unit}" if isinstance(segment, float) else segment.strip())
    return " ".join(parts) or "(no answer)"


def _point(v: Array) -> str:
    return f"({v[0]:+.3f}, {v[1]:+.3f}, {v[2]:+.3f})"
