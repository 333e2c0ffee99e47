"""One question about one image, for people: an answer in words and numbers."""

from __future__ import annotations

from spear.errors import SpearError, unknown_name
from spear.evaluate.vqa.images import held_out_frames, sim_seed
from spear.evaluate.vqa.measures import numbers
from spear.labels.questions.generate import FAMILIES
from spear.models.readout import Decode
from spear.policy import Answer, VlmBundle
from spear.types import Array, Frame, Pixel
from spear.util.images import load_image


def read_picture(where: str, size: tuple[int, int]) -> Frame:
    """An image file (see `util.images.load_image`), or "sim:SEED": that held-out scene at `size` (width,
    height), whose camera is known.

    Raises SpearError for a file that is not there or not an image, and for a seed that is not held out.
    """
    if where.startswith("sim:"):
        return next(held_out_frames(1, sim_seed(where), size))
    return Frame(load_image(where))


def ask(
    model: VlmBundle, image: Array, question: str, family: str | None = None, decode: Decode = "mode"
) -> Answer:
    """The model's answer about an image [h, w, 3] uint8, its numbers read as `decode` says.

    Raises SpearError for an unknown question family or an empty question.
    """
    if family is not None and family not in FAMILIES:
        raise unknown_name("question family", family, FAMILIES)
    if not question.strip():
        raise SpearError("empty question: ask something about the image, in words")
    return model.answer([image], [question], family, decode=decode)[0]


def words(answer: Answer, image: Array) -> str:
    """An answer to read: 3D numbers in the model's unit, image points in pixels of `image`, a box by its
    centre and vertices."""
    unit = "m" if answer.unit == "metre" else "units"
    values = numbers(answer.segments)
    if len(values) == 24 and len(answer.segments) == 24:
        vertices = values.reshape(8, 3)
        places = [f"({x:+.3f}, {y:+.3f}, {z:+.3f})" for x, y, z in (vertices.mean(0), *vertices)]
        return "\n  ".join([f"centre {places[0]} {unit}; vertices:", *places[1:]])
    height, width = image.shape[:2]
    parts = []
    for segment in answer.segments:
        if isinstance(segment, Pixel):
            parts.append(f"({segment.x * width:.0f}, {segment.y * height:.0f}) px")
        else:
            parts.append(f"{segment:.3f} {unit}" if isinstance(segment, float) else segment.strip())
    return " ".join(parts) or "(no answer)"
