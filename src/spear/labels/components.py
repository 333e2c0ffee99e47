"""The labeller's components by name: `NAME`, `NAME=MODEL` with a Hub name or folder, `NAME:FILE`,
`FIRST+OTHERWISE`.

    gemini   grounding-dino=IDEA-Research/grounding-dino-tiny   owlv2=my_folder   file:boxes.json
    sam2     file:relations_train.json+sam2                      moge-2           ground-truth

`component` describes how one is made, which may load a network; any process can have the description.
"""

import importlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from spear.errors import SpearError, check_known
from spear.labels.engine import Graph
from spear.labels.options import LabelOptions, changed
from spear.labels.pipeline import settings_for
from spear.models.weights.published import PUBLISHED
from spear.util.network import need_on_hub

Maker = partial[Any]
"""(what follows NAME= or NAME:, options, what makes the one after +) → the component; `takes`: the options
that it is made with."""


def _make(
    place: str, usual: str, model: str | None, options: LabelOptions, _: Any, *, takes: tuple[str, ...]
) -> Any:
    """What is at FILE:NAME of `spear.labels.models`, made with those of the options that it takes.

    usual: the network among `PUBLISHED` that it is without another; "" for what is no network.
    """
    if usual:  # importing it takes longer than asking the Hub
        model = model or PUBLISHED[usual].repository
        if "vocabulary" in takes and not options.names:
            raise SpearError(f'--detector {usual}: name what to look for: --vocabulary "mug, spoon"')
        need_on_hub(model, f"a folder or file that holds it, as in {usual}=PATH")
    known = {**vars(options), "vocabulary": options.names, "cache": options.cache or options.out / ".answers"}
    given = {"model": model} if model else {}
    return _class(place)(**given, **{part: known[part] for part in takes})


def _from_file(place: str, path: str, options: LabelOptions, otherwise: Maker | None) -> Any:
    """A `FileDetector` or `FileSegmenter`; another component does what the file lacks."""
    return _class(place)(_class("annotations:open_annotations")(path), otherwise and otherwise())


def _class(place: str) -> Any:
    file, name = place.split(":")
    return getattr(importlib.import_module(f"spear.labels.models.{file}"), name)


KINDS: dict[str, dict[str, Maker]] = {
    "detector": {
        "gemini": partial(_make, "gemini:GeminiDetector", "", takes=("vocabulary", "cache", "per_minute")),
        "grounding-dino": partial(
            _make, "open_vocabulary:GroundingDinoDetector", "grounding-dino", takes=("device", "vocabulary")
        ),
        "owlv2": partial(_make, "open_vocabulary:Owlv2Detector", "owlv2", takes=("device", "vocabulary")),
        "file": partial(_from_file, "annotations:FileDetector"),
        "ground-truth": partial(_make, "ground_truth:GroundTruthDetector", "", takes=()),
    },
    "segmenter": {
        "sam2": partial(_make, "sam2:Sam2Segmenter", "sam2", takes=("device",)),
        "file": partial(_from_file, "annotations:FileSegmenter"),
        "ground-truth": partial(_make, "ground_truth:GroundTruthSegmenter", "", takes=()),
    },
    "point map": {
        "moge": partial(_make, "pointmap:load_pointmap", "moge", takes=("device",)),
        "moge-2": partial(_make, "pointmap:load_pointmap", "moge-2", takes=("device",)),
        "ground-truth": partial(_make, "ground_truth:GroundTruthPointMap", "", takes=()),
    },
}
"""Kind of component → name → what makes it."""


def component(kind: str, description: str, options: LabelOptions) -> Callable[[], Any]:
    """What makes a component: kind is one of `KINDS`. Raises `SpearError` for a name or file that does not
    exist, before anything is loaded; made, it raises what the component itself complains about."""
    first, plus, otherwise = description.partition("+")
    name, argument = split(first)
    check_known(kind, KINDS[kind], name)
    if name == "file" and not (argument and Path(argument).is_file()):
        raise SpearError(f"{kind} {first!r}: no such file: write file:PATH")
    if plus and name != "file":
        raise SpearError(f"{kind} {description!r}: only file:… can leave the rest to another")
    rest = component(kind, otherwise, options) if plus else None
    return partial(KINDS[kind][name], argument, options, rest)


def split(description: str) -> tuple[str, str | None]:
    """NAME, and what follows the first = or :, or None."""
    name, *argument = re.split("[=:]", description, maxsplit=1)
    return name, argument[0] if argument else None


def graph(options: LabelOptions) -> Graph:
    """What is done with an image; nothing is loaded yet. `SpearError`: an unknown name, an idle option."""
    described = dict(zip(KINDS, (options.detector, options.segmenter, options.pointmap), strict=True))
    detector, segmenter, pointmap = (component(kind, said, options) for kind, said in described.items())
    makers = (KINDS[kind][split(said.rpartition("+")[2])[0]] for kind, said in described.items())
    taken = {part for maker in makers for part in maker.keywords.get("takes", ())}
    if idle := changed(options, *({"vocabulary", "cache", "per_minute"} - taken)):
        what = f"{min(idle)} says nothing to {', '.join(described.values())}"
        raise SpearError(f"{what}: leave it out, or choose a component that takes it")
    boxes = settings_for(options.segmenter, options.pointmap)
    return Graph((detector, segmenter, pointmap), boxes, longest=options.size or None)
