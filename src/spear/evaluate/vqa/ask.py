"""Images to ask about, from files or held-out scenes of the simulator; and one question about one image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from spear.errors import SpearError, unknown_name
from spear.evaluate.vqa.measures import numbers
from spear.labels.questions.generate import FAMILIES
from spear.labels.scenes import label_frames
from spear.labels.store import LabelStore, choose
from spear.models.processing import Processor
from spear.models.readout import Decode
from spear.policy import Answer, VlmBundle
from spear.types import Array, Frame, LabeledImage, Pixel
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


def find_images(where: str, images: int, view: str, processor: Processor) -> list[LabeledImage]:
    """At most `images` labelled images, as the camera `view` of the model with this processor sees them.

    where: a folder of label shards, or with a sub-folder of them per view, taken evenly spread. Or "sim" or
    "sim:SEED": held-out scenes from SEED on.

    Raises SpearError for an unknown view, no labels there, labels in another unit than the model's numbers,
    and seeds that are not held out.
    """
    if view not in processor.image_sizes:
        raise unknown_name("view", view, processor.image_sizes)
    if (where == "sim" or where.startswith("sim:")) and not Path(where).exists():
        frames = held_out_frames(images, sim_seed(where), processor.image_sizes[view], view)
        labels = list(label_frames(frames))
    else:
        folder = Path(where)
        if not folder.exists():
            raise SpearError(f"no such folder: {folder}: give one that `spear label` wrote, or sim")
        labels = choose(LabelStore(folder / view if (folder / view).is_dir() else folder), images)
    unit = processor.coordinates.unit
    other = next((label for label in labels if label.unit != unit), None)
    if other is not None:
        raise SpearError(
            f"{where}: {other.source} is labelled in unit {other.unit!r}, the model answers in {unit!r}: "
            "label the images with a point map of that unit, or ask another model"
        )
    return labels


def sim_seed(where: str) -> int:
    """The seed in "sim:SEED"; 0 of "sim". Raises SpearError where it is no number."""
    seed = where.partition(":")[2] or "0"
    if not seed.isdecimal():
        raise SpearError(f"{where!r}: write sim:SEED with a number, for example sim:7")
    return int(seed)


def held_out_frames(
    scenes: int, first_seed: int, size: tuple[int, int], camera: str = "external"
) -> Iterator[Frame]:
    """Scenes first_seed, first_seed + 1, … as a camera of `size` (width, height) sees them, with their truth.

    Raises SpearError for seeds that training uses (10,000 and above).
    """
    from spear.sim.render import Renderer, clutter_frame
    from spear.sim.scene import held_out_seeds

    seeds, renderer = held_out_seeds(first_seed, scenes), Renderer()
    for seed in seeds:
        yield clutter_frame(seed, camera, size, renderer)
