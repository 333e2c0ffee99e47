"""The detector, segmenter and point-map model that a user names, as factories.

A description is `NAME`, `NAME=MODEL` with a Hub name or folder, `NAME:FILE`, or `FIRST+SECOND`,
where the second model does what the first one lacks:

    gemini   grounding-dino=IDEA-Research/grounding-dino-tiny   owlv2=my_folder   file:boxes.json
    sam2     file:relations_train.json+sam2                      moge-2           ground-truth

`resolve_factory` checks a description and returns a factory, which may load a network when it is
called and can be sent to another process.
"""

import importlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from spear.errors import SpearError, check_known
from spear.labels.engine import ModelFactories
from spear.labels.options import LabelOptions
from spear.models.weights.published import PUBLISHED
from spear.util.network import check_available_on_hub
from spear.util.options import list_changed_options


class ModelEntry(NamedTuple):
    """How a model is made.

    Attributes:
        location: FILE:NAME of its class or factory in `spear.labels.models`.
        arguments: The keyword arguments that it takes; most are named like their options.
    """

    location: str
    arguments: tuple[str, ...] = ()


_GROUND_TRUTH = ModelEntry("ground_truth:GroundTruth")
_MOGE = ModelEntry("pointmap:load_point_map_model", ("model", "device"))

MODELS_BY_ROLE: dict[str, dict[str, ModelEntry]] = {
    "detector": {
        "gemini": ModelEntry(
            "gemini:GeminiDetector", ("model", "vocabulary", "cache", "requests_per_minute")
        ),
        "grounding-dino": ModelEntry(
            "open_vocabulary:GroundingDinoDetector", ("model", "device", "vocabulary")
        ),
        "owlv2": ModelEntry("open_vocabulary:Owlv2Detector", ("model", "device", "vocabulary")),
        "file": ModelEntry("annotations:FileDetector"),
        "ground-truth": _GROUND_TRUTH,
    },
    "segmenter": {
        "sam2": ModelEntry("sam2:Sam2Segmenter", ("model", "device")),
        "file": ModelEntry("annotations:FileSegmenter"),
        "ground-truth": _GROUND_TRUTH,
    },
    "point map": {
        "moge": _MOGE,
        "moge-2": _MOGE,
        "ground-truth": _GROUND_TRUTH,
    },
}
"""Role → name → how the model is made."""

OPTIONS_OF_SOME_MODELS = frozenset({"vocabulary", "cache", "requests_per_minute"})


def resolve_factory(role: str, description: str, options: LabelOptions) -> Callable[[], Any]:
    """Find the factory of the model that a description names.

    Args:
        role: A key of `MODELS_BY_ROLE`.
        description: As in this module's docstring.
        options: Options of the command, from which the model's arguments come.

    Returns:
        The factory. It raises what the model itself complains about.

    Raises:
        SpearError: A name or file does not exist. Nothing is loaded before that is known.
    """
    first, plus, second = description.partition("+")
    name, argument = parse_description(first)
    check_known(role, MODELS_BY_ROLE[role], name)
    entry = MODELS_BY_ROLE[role][name]
    if name == "file":
        if not argument or not Path(argument).is_file():
            raise SpearError(f"{role} {first} names no existing file. Write file:PATH.")
        make_second = resolve_factory(role, second, options) if plus else None
        return partial(_make_file_model, entry.location, argument, make_second)
    if plus:
        raise SpearError(
            f"{role} {description} is not possible, because only file:PATH leaves the rest to "
            "another."
        )
    if argument and "model" not in entry.arguments:
        raise SpearError(
            f"{role} {first} names weights, but {name} has none. Leave out what follows its name."
        )
    return partial(_make_model, entry, name, argument, options)


def _make_file_model(location: str, path: str, make_second: Callable[[], Any] | None) -> Any:
    """Make a `FileDetector` or `FileSegmenter`; the second model does what the file lacks."""
    annotations = _import_from_models("annotations:open_annotations")(path)
    second_model = make_second() if make_second is not None else None
    return _import_from_models(location)(annotations, second_model)


def _make_model(entry: ModelEntry, name: str, model: str | None, options: LabelOptions) -> Any:
    """Make any other model. A network that is only named gets the weights of `PUBLISHED`."""
    if name in PUBLISHED:  # checked first: to import the network takes longer than to ask the Hub
        model = model or PUBLISHED[name].repository
        if "vocabulary" in entry.arguments and not options.vocabulary_names:
            raise SpearError(
                f'--detector {name} needs names to look for. Add --vocabulary "mug, spoon".'
            )
        check_available_on_hub(model, f"a folder or file that holds it, as in {name}=PATH")
    values = {
        "model": model,
        "vocabulary": options.vocabulary_names,
        "cache": options.cache or options.out / ".answers",
        "requests_per_minute": options.requests_per_minute,
        "device": options.device,
    }
    arguments = {}
    for argument in entry.arguments:
        if argument == "model" and not model:
            continue  # the class has a default
        arguments[argument] = values[argument]
    return _import_from_models(entry.location)(**arguments)


def _import_from_models(location: str) -> Any:
    file, name = location.split(":")
    return getattr(importlib.import_module(f"spear.labels.models.{file}"), name)


def parse_description(description: str) -> tuple[str, str | None]:
    """Split the description of one model into its name and what follows the first = or :, or None.

    Example:
        >>> parse_description("owlv2=my_folder"), parse_description("sam2")
        (('owlv2', 'my_folder'), ('sam2', None))
    """
    name, *argument = re.split("[=:]", description, maxsplit=1)
    return name, argument[0] if argument else None


def resolve_factories(options: LabelOptions) -> ModelFactories:
    """Find the factories of the three models that the options name; nothing is loaded yet.

    Raises:
        SpearError: A model is unknown, or an option has no effect on the models.
    """
    factories = (
        resolve_factory("detector", options.detector, options),
        resolve_factory("segmenter", options.segmenter, options),
        resolve_factory("point map", options.pointmap, options),
    )
    _check_options_have_effect(options)
    return factories


def _check_options_have_effect(options: LabelOptions) -> None:
    descriptions = (options.detector, options.segmenter, options.pointmap)
    used = set[str]()
    for role, description in zip(MODELS_BY_ROLE, descriptions, strict=True):
        name, _ = parse_description(description.rpartition("+")[2])
        used.update(MODELS_BY_ROLE[role][name].arguments)
    unused = list_changed_options(options, *(OPTIONS_OF_SOME_MODELS - used))
    if unused:
        raise SpearError(
            f"{min(unused)} has no effect on {', '.join(descriptions)}. Leave it out, or choose "
            "a model that takes it."
        )
