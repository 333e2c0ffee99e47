"""Labelled images to ask about: of a folder, or of held-out scenes of the simulator."""

from __future__ import annotations

from pathlib import Path

from spear.errors import SpearError, unknown_name
from spear.labels.store import LabelStore
from spear.models.processing import Processor
from spear.report.labels import choose
from spear.types import LabeledImage


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
        from spear.evaluate.vqa.held_out import held_out_labels

        seed = where.partition(":")[2] or "0"
        if not seed.isdecimal():
            raise SpearError(f"questions {where!r}: write sim:SEED with a number, for example sim:100")
        labels = held_out_labels(images, int(seed), processor.image_sizes[view], view)
    else:
        folder = Path(where)
        if not folder.exists():
            raise SpearError(f"no such folder: {folder}: give one that `spear label` wrote, or sim")
        store = LabelStore(folder / view if (folder / view).is_dir() else folder)
        labels = choose(store, images)
    unit = processor.coordinates.unit
    other = next((label for label in labels if label.unit != unit), None)
    if other is not None:
        raise SpearError(
            f"{where}: {other.source} is labelled in unit {other.unit!r}, the model answers in {unit!r}: label the "
            "images with a point map of that unit, or ask another model"
        )
    return labels
