"""The labeller's components by name: `NAME`, `NAME=MODEL` with a Hub name or folder, `NAME:FILE`,
`FIRST+OTHERWISE`.

    gemini   grounding-dino=IDEA-Research/grounding-dino-tiny   owlv2=my_folder   file:boxes.json
    sam2     file:relations_train.json+sam2                      moge-2           ground-truth

`build` makes a component, which may load a network; until then it is a description that any process can have.
"""

import importlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from spear.errors import SpearError, check_known
from spear.labels.engine import Graph
from spear.labels.options import LabelOptions
from spear.labels.pipeline import settings_for
from spear.models.weights.published import PUBLISHED
from spear.util.network import need_on_hub

Maker = Callable[[str | None, LabelOptions], Any]
"""(what follows NAME= or NAME:, options) → the component."""


def _named(place: str, *takes: str, usual: str = "") -> Maker:
    """Makes what is at FILE:NAME of `spear.labels.models`, with those of the options that it takes.

    usual: the network among `PUBLISHED` that it is without another.
    """

    def make(model: str | None, options: LabelOptions) -> Any:
        if usual:  # importing it takes longer than asking the Hub
            model = model or PUBLISHED[usual].repository
            if "vocabulary" in takes and not options.names:
                raise SpearError(f'--detector {usual}: name what to look for: --vocabulary "mug, spoon"')
            need_on_hub(model, f"a folder or file that holds it, as in {usual}=PATH")
        file, name = place.split(":")
        made = getattr(importlib.import_module(f"spear.labels.models.{file}"), name)
        known = {**vars(options), "vocabulary": options.names}
        known["cache"] = options.cache or options.out / ".answers"
        return made(**({"model": model} if model else {}), **{part: known[part] for part in takes})

    return make


def _from_file(name: str, path: str | None, options: LabelOptions) -> Any:
    """A `FileDetector` or `FileSegmenter` that still wants another component for what the file lacks."""
    from spear.labels.models import annotations

    return partial(getattr(annotations, name), annotations.open_annotations(path or ""))


KINDS: dict[str, dict[str, Maker]] = {
    "detector": {
        "gemini": _named("gemini:GeminiDetector", "vocabulary", "cache", "per_minute"),
        "grounding-dino": _named(
            "open_vocabulary:GroundingDinoDetector", "device", "vocabulary", usual="grounding-dino"
        ),
        "owlv2": _named("open_vocabulary:Owlv2Detector", "device", "vocabulary", usual="owlv2"),
        "file": partial(_from_file, "FileDetector"),
        "ground-truth": _named("ground_truth:GroundTruthDetector"),
    },
    "segmenter": {
        "sam2": _named("sam2:Sam2Segmenter", "device", usual="sam2"),
        "file": partial(_from_file, "FileSegmenter"),
        "ground-truth": _named("ground_truth:GroundTruthSegmenter"),
    },
    "point map": {
        "moge": _named("pointmap:load_pointmap", "device", usual="moge"),
        "moge-2": _named("pointmap:load_pointmap", "device", usual="moge-2"),
        "ground-truth": _named("ground_truth:GroundTruthPointMap"),
    },
}
"""Kind of component → name → what makes it."""


def build(kind: str, description: str, options: LabelOptions) -> Any:
    """Make a component: kind is one of `KINDS`. Raises `SpearError` for an unknown name, and what the
    component itself complains about."""
    check(kind, description)
    first, plus, otherwise = description.partition("+")
    name, argument = split(first)
    made = KINDS[kind][name](argument, options)
    if isinstance(made, partial):  # from a file, which may leave some images to another component
        return made(build(kind, otherwise, options) if plus else None)
    if plus:
        raise SpearError(f"{kind} {description!r}: only file:… can leave the rest to another")
    return made


def check(kind: str, description: str) -> None:
    """Raise `SpearError` for a name that does not exist, before anything is loaded."""
    for part in description.split("+"):
        name, argument = split(part)
        check_known(kind, KINDS[kind], name)
        if name == "file" and not (argument and Path(argument).is_file()):
            raise SpearError(f"{kind} {part!r}: no such file: write file:PATH")


def split(description: str) -> tuple[str, str | None]:
    """NAME, and what follows the first = or :, or None."""
    name, *argument = re.split("[=:]", description, maxsplit=1)
    return name, argument[0] if argument else None


def graph(options: LabelOptions) -> Graph:
    """The whole of what is done with an image; nothing is loaded yet. `SpearError` for an unknown name."""
    descriptions = options.detector, options.segmenter, options.pointmap
    for kind, description in zip(KINDS, descriptions, strict=True):
        check(kind, description)
    detector, segmenter, pointmap = (
        partial(build, kind, description, options)
        for kind, description in zip(KINDS, descriptions, strict=True)
    )
    boxes = settings_for(options.segmenter, options.pointmap)
    return Graph(detector, segmenter, pointmap, boxes, longest=options.size or None)
