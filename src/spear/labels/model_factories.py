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
from spear.labels.engine import ModelFactories
from spear.labels.options import LabelOptions
from spear.models.weights.published import PUBLISHED
from spear.util.network import check_available_on_hub
from spear.util.options import list_changed_options

MODELS_BY_ROLE: dict[str, dict[str, tuple[str, ...]]] = {
    "detector": {
        "gemini": ("gemini:GeminiDetector", "model", "vocabulary", "cache", "per_minute"),
        "grounding-dino": (
            "open_vocabulary:GroundingDinoDetector",
            "model",
            "device",
            "vocabulary",
        ),
        "owlv2": ("open_vocabulary:Owlv2Detector", "model", "device", "vocabulary"),
        "file": ("annotations:FileDetector",),
        "ground-truth": ("ground_truth:GroundTruth",),
    },
    "segmenter": {
        "sam2": ("sam2:Sam2Segmenter", "model", "device"),
        "file": ("annotations:FileSegmenter",),
        "ground-truth": ("ground_truth:GroundTruth",),
    },
    "point map": {
        "moge": ("pointmap:load_pointmap", "model", "device"),
        "moge-2": ("pointmap:load_pointmap", "model", "device"),
        "ground-truth": ("ground_truth:GroundTruth",),
    },
}
"""Kind of component → name → what makes it, FILE:NAME of `spear.labels.models`, and the options it takes."""


def resolve_factory(kind: str, description: str, options: LabelOptions) -> Callable[[], Any]:
    """What makes a component: kind is one of `KINDS`. Raises `SpearError` for a name or file that does not
    exist, before anything is loaded; made, it raises what the component itself complains about."""
    first, plus, otherwise = description.partition("+")
    name, argument = split_description(first)
    check_known(kind, MODELS_BY_ROLE[kind], name)
    place, *takes = MODELS_BY_ROLE[kind][name]
    if name == "file":
        if not (argument and Path(argument).is_file()):
            raise SpearError(f"{kind} {first!r}: no such file: write file:PATH")
        return partial(
            _from_file, place, argument, resolve_factory(kind, otherwise, options) if plus else None
        )
    if plus:
        raise SpearError(f"{kind} {description!r}: only file:… can leave the rest to another")
    if argument and "model" not in takes:
        raise SpearError(f"{kind} {first!r}: {name} is no network: leave out what follows its name")
    return partial(_make, place, takes, name, argument, options)


def _from_file(place: str, path: str, otherwise: Callable[[], Any] | None) -> Any:
    """A `FileDetector` or `FileSegmenter`; another component does what the file lacks."""
    return _class(place)(_class("annotations:open_annotations")(path), otherwise and otherwise())


def _make(place: str, takes: list[str], name: str, model: str | None, options: LabelOptions) -> Any:
    """Any other component; without a model, a network has the weights of its name among `PUBLISHED`."""
    if name in PUBLISHED:  # importing it takes longer than asking the Hub
        model = model or PUBLISHED[name].repository
        if "vocabulary" in takes and not options.names:
            raise SpearError(f'--detector {name}: name what to look for: --vocabulary "mug, spoon"')
        check_available_on_hub(model, f"a folder or file that holds it, as in {name}=PATH")
    known = {
        **vars(options),
        "vocabulary": options.names,
        "cache": options.cache or options.out / ".answers",
    }
    known["model"] = model
    return _class(place)(**{part: known[part] for part in takes if part != "model" or model})


def _class(place: str) -> Any:
    file, name = place.split(":")
    return getattr(importlib.import_module(f"spear.labels.models.{file}"), name)


def split_description(description: str) -> tuple[str, str | None]:
    """NAME, and what follows the first = or :, or None."""
    name, *argument = re.split("[=:]", description, maxsplit=1)
    return name, argument[0] if argument else None


def resolve_factories(options: LabelOptions) -> ModelFactories:
    """What makes the components; nothing is loaded yet. `SpearError`: an unknown name, an idle option."""
    described = dict(
        zip(MODELS_BY_ROLE, (options.detector, options.segmenter, options.pointmap), strict=True)
    )
    detector, segmenter, pointmap = (
        resolve_factory(kind, said, options) for kind, said in described.items()
    )
    last = (
        (kind, split_description(said.rpartition("+")[2])[0]) for kind, said in described.items()
    )
    taken = {part for kind, name in last for part in MODELS_BY_ROLE[kind][name]}
    if idle := list_changed_options(options, *({"vocabulary", "cache", "per_minute"} - taken)):
        what = f"{min(idle)} says nothing to {', '.join(described.values())}"
        raise SpearError(f"{what}: leave it out, or choose a component that takes it")
    return detector, segmenter, pointmap
