"""The labeller's components by name: `NAME`, `NAME=MODEL` with a Hub name or folder, `NAME:FILE`,
`FIRST+OTHERWISE`.

    gemini   grounding-dino=IDEA-Research/grounding-dino-tiny   owlv2=my_folder   file:boxes.json
    sam2     file:relations_train.json+sam2                      moge-2           ground-truth

A component is made by `build`, which may load a network; until then it is a description that any process can
have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from spear.errors import SpearError, unknown_name
from spear.labels.engine import Graph
from spear.labels.pipeline import settings_for


@dataclass(frozen=True)
class Choice:
    """What the user has chosen for all components.

    vocabulary  names to look for; none for whatever is there, where the detector can.
    device      "cpu", "cuda", …; None takes the GPU if there is one.
    cache       folder of answers of a remote detector, so that asking again costs nothing.
    """

    vocabulary: tuple[str, ...] = ()
    device: str | None = None
    cache: Path | None = None


Maker = Callable[[str | None, Choice], Any]
"""(what follows NAME= or NAME:, choice) → the component."""


def _gemini(model: str | None, choice: Choice) -> Any:
    from spear.labels.models.gemini import GeminiDetector

    return GeminiDetector(**_model(model), vocabulary=choice.vocabulary or None, cache=choice.cache)


def _grounding_dino(model: str | None, choice: Choice) -> Any:
    from spear.labels.models.open_vocabulary import GroundingDinoDetector

    return GroundingDinoDetector(**_model(model), vocabulary=_needed(choice), device=_device(choice))


def _owlv2(model: str | None, choice: Choice) -> Any:
    from spear.labels.models.open_vocabulary import Owlv2Detector

    return Owlv2Detector(**_model(model), vocabulary=_needed(choice), device=_device(choice))


def _sam2(model: str | None, choice: Choice) -> Any:
    from spear.labels.models.sam2 import Sam2Segmenter

    return Sam2Segmenter(**_model(model), device=_device(choice))


def _moge(default: str, model: str | None, choice: Choice) -> Any:
    from spear.labels.models.pointmap import MogePointMap

    return MogePointMap.load(model or default, choice.device)


def _true_objects(_: str | None, choice: Choice) -> Any:
    from spear.labels.models.ground_truth import GroundTruthDetector

    return GroundTruthDetector()


def _true_masks(_: str | None, choice: Choice) -> Any:
    from spear.labels.models.ground_truth import GroundTruthSegmenter

    return GroundTruthSegmenter()


def _true_points(_: str | None, choice: Choice) -> Any:
    from spear.labels.models.ground_truth import GroundTruthPointMap

    return GroundTruthPointMap()


def _file_boxes(path: str | None, choice: Choice) -> Any:
    from spear.labels.models.annotations import FileDetector

    return partial(FileDetector, _annotations(path))


def _file_masks(path: str | None, choice: Choice) -> Any:
    from spear.labels.models.annotations import FileSegmenter

    return partial(FileSegmenter, _annotations(path))


DETECTORS: Mapping[str, Maker] = {
    "gemini": _gemini,
    "grounding-dino": _grounding_dino,
    "owlv2": _owlv2,
    "file": _file_boxes,
    "ground-truth": _true_objects,
}
SEGMENTERS: Mapping[str, Maker] = {"sam2": _sam2, "file": _file_masks, "ground-truth": _true_masks}
POINTMAPS: Mapping[str, Maker] = {
    "moge": partial(_moge, "Ruicheng/moge-vitl"),
    "moge-2": partial(_moge, "Ruicheng/moge-2-vitl-normal"),
    "ground-truth": _true_points,
}
KINDS: Mapping[str, Mapping[str, Maker]] = {
    "detector": DETECTORS,
    "segmenter": SEGMENTERS,
    "point map": POINTMAPS,
}


def build(kind: str, description: str, choice: Choice) -> Any:
    """Make a component: kind is one of `KINDS`.

    Raises:
        SpearError: an unknown name, or what the component itself complains about.
    """
    first, plus, otherwise = description.partition("+")
    made = _build(kind, first, choice)
    if isinstance(made, partial):  # from a file, which may leave some images to another component
        return made(_build(kind, otherwise, choice) if plus else None)
    if plus:
        raise SpearError(f"{kind} {description!r}: only file:… can leave the rest to another")
    return made


def _build(kind: str, description: str, choice: Choice) -> Any:
    name, argument = _split(description)
    check(kind, description)
    return KINDS[kind][name](argument, choice)


def check(kind: str, description: str) -> None:
    """Raise `SpearError` for a name that does not exist, before anything is loaded."""
    for part in description.split("+"):
        name, argument = _split(part)
        if name not in KINDS[kind]:
            raise unknown_name(kind, name, KINDS[kind])
        if name == "file" and not (argument and Path(argument).is_file()):
            raise SpearError(f"{kind} {part!r}: no such file: write file:PATH")


def _split(description: str) -> tuple[str, str | None]:
    """NAME, and what follows the first = or :, or None."""
    for at, letter in enumerate(description):
        if letter in "=:":
            return description[:at], description[at + 1 :]
    return description, None


def graph(detector: str, segmenter: str, pointmap: str, choice: Choice, longest: int | None = 840) -> Graph:
    """The whole of what is done with an image, from the three descriptions; nothing is loaded yet.

    longest: see `Graph`.

    Raises:
        SpearError: an unknown name.
    """
    for kind, description in zip(KINDS, (detector, segmenter, pointmap), strict=True):
        check(kind, description)
    return Graph(
        partial(build, "detector", detector, choice),
        partial(build, "segmenter", segmenter, choice),
        partial(build, "point map", pointmap, choice),
        boxes=settings_for(segmenter, pointmap),
        longest=longest,
    )


def _model(model: str | None) -> dict[str, Any]:
    return {"model": model} if model else {}


def _needed(choice: Choice) -> tuple[str, ...]:
    if not choice.vocabulary:
        raise SpearError('this detector must be told what to look for: --vocabulary "mug, spoon, bowl"')
    return choice.vocabulary


def _device(choice: Choice) -> str:
    if choice.device is not None:
        return choice.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _annotations(path: str | None) -> Any:
    """A COCO file has "images"; what else is JSON is taken for Ego-Exo4D's relations."""
    from spear.labels.models.coco import CocoAnnotations
    from spear.labels.models.egoexo import RelationAnnotations

    assert path is not None
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise SpearError(f"{path}: not JSON ({error}): give a file of annotations") from error
    return CocoAnnotations(path) if "images" in content else RelationAnnotations(path)
