"""Labelled images to ask about: of a folder, or of held-out scenes of the simulator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from spear.errors import SpearError, unknown_name
from spear.labels.scenes import label_frames
from spear.labels.store import LabelStore, choose
from spear.models.processing import Processor
from spear.types import Frame, LabeledImage


def find_images(where: str, images: int, view: str, processor: Processor) -> list[LabeledImage]:
    """At most `images` labelled images.

    Args:
        where: a folder of label shards, or with a sub-folder of them per view; taken evenly spread. Or "sim"
            or "sim:SEED": so many held-out scenes from SEED on, as the model's camera sees them.
        images: how many.
        view: of the model's cameras.
        processor: of the model to be asked: its views and the unit of its numbers.

    Raises:
        SpearError: an unknown view, no labels there, labels in another unit than the model's numbers, or
            seeds that are not held out.
    """
    if view not in processor.image_sizes:
        raise unknown_name("view", view, processor.image_sizes)
    if (where == "sim" or where.startswith("sim:")) and not Path(where).exists():
        labels = held_out_labels(images, sim_seed(where), processor.image_sizes[view], view)
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
    """Scenes first_seed, first_seed + 1, … as seen by a camera of `size` (width, height), with their truth.

    Raises SpearError for seeds that training uses (10,000 and above).
    """
    from spear.sim.frames import clutter_frame
    from spear.sim.render import Renderer
    from spear.sim.scene import held_out_seeds

    seeds, renderer = held_out_seeds(first_seed, scenes), Renderer()
    for seed in seeds:
        yield clutter_frame(seed, camera, size, renderer)


def held_out_labels(
    scenes: int, first_seed: int, size: tuple[int, int], camera: str = "external"
) -> list[LabeledImage]:
    """The same scenes with 3D labels."""
    return list(label_frames(held_out_frames(scenes, first_seed, size, camera)))
