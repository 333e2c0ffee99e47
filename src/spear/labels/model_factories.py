"""Factories of the detector, segmenter and point-map model that a user describes in options.

A description is the name of a model, perhaps with weights or a file:

    NAME            gemini, sam2, moge-2, ground-truth, …
    NAME=MODEL      owlv2=my_folder, grounding-dino=IDEA-Research/grounding-dino-tiny
                    (MODEL is a name on the Hugging Face Hub, or a folder)
    file:PATH       file:boxes.json (detections or masks come from an annotation file)
    file:PATH+NAME  file:relations_train.json+sam2 (the model labels what the file lacks)

`resolve_factory` checks a description and returns a factory: a function without arguments that
makes the model and may load a network. A factory can be pickled for another process.
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
from spear.util.network import check_hub_reachable_or_cached
from spear.util.options import list_changed_options


class ModelEntry(NamedTuple):
    """How to make a model.

    Attributes:
        location: MODULE:NAME of the model's class or factory in `spear.labels.models`.
        arguments: The names of the keyword arguments that the class or factory takes
            (`_make_model` computes their values from the options).
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
"""Role → name of the model → how to make it. The roles are in the order of the pipeline."""

OPTIONS_OF_SOME_MODELS = frozenset({"vocabulary", "cache", "requests_per_minute"})
"""Options that only some models use. Without such a model they are refused."""


def resolve_factory(role: str, description: str, options: LabelOptions) -> Callable[[], Any]:
    """Find the factory of the model that a description names, without loading the model.

    Args:
        role: A key of `MODELS_BY_ROLE`.
        description: The user's description; the module's docstring lists its forms.
        options: Options of the command, from which the model's arguments come.

    Returns:
        The factory. When called, it may raise errors of the model itself.

    Raises:
        SpearError: The description is wrong, or its file does not exist.
    """
    first, plus, second = description.partition("+")
    name, weights_or_file = split_model_description(first)
    check_known(role, MODELS_BY_ROLE[role], name)
    entry = MODELS_BY_ROLE[role][name]
    if name == "file":
        if not weights_or_file or not Path(weights_or_file).is_file():
            raise SpearError(f"{role} {first} names no existing file. Write file:PATH.")
        make_second = resolve_factory(role, second, options) if plus else None
        return partial(_make_annotation_file_model, entry.location, weights_or_file, make_second)
    if plus:
        raise SpearError(
            f"{role} {description} is not possible, because only file:PATH leaves the rest to "
            f"another. Give {first} alone."
        )
    if weights_or_file and "model" not in entry.arguments:
        raise SpearError(
            f"{role} {first} names weights, but {name} has none. Leave out what follows its name."
        )
    return partial(_make_model, entry, name, weights_or_file, options)


def _make_annotation_file_model(
    location: str, annotation_file: str, make_second: Callable[[], Any] | None
) -> Any:
    """Make a `FileDetector` or `FileSegmenter`.

    Args:
        location: `ModelEntry.location` of the class.
        annotation_file: The annotation file.
        make_second: Makes the model that labels what the file lacks; None if there is none.
    """
    annotations = _import_from_models("annotations:load_annotations")(annotation_file)
    second_model = make_second() if make_second is not None else None
    return _import_from_models(location)(annotations, second_model)


def _make_model(
    entry: ModelEntry, model_name: str, weights: str | None, options: LabelOptions
) -> Any:
    """Make a model that does not read a file.

    Args:
        entry: How to make the model.
        model_name: The model's name: a key of one of the dicts in `MODELS_BY_ROLE`.
        weights: The weights that the user's description names after "=": a name on the Hub or a
            folder. With None, a network in `PUBLISHED` gets its published weights.
        options: Options of the command.
    """
    # Check the weights before the import of the network, which takes longer.
    if model_name in PUBLISHED:
        weights = weights or PUBLISHED[model_name].repository
        if "vocabulary" in entry.arguments and not options.vocabulary_names:
            raise SpearError(
                f'--detector {model_name} needs names to look for. Add --vocabulary "mug, spoon".'
            )
        instead = f"a folder or file that holds it, as in {model_name}=PATH"
        check_hub_reachable_or_cached(weights, instead=instead)
    values = {
        "model": weights,
        "vocabulary": options.vocabulary_names,
        "cache": options.cache or options.out / ".answers",
        "requests_per_minute": options.requests_per_minute,
        "device": options.device,
    }
    arguments = {}
    for argument in entry.arguments:
        if argument == "model" and not weights:
            continue  # the class has a default model
        arguments[argument] = values[argument]
    return _import_from_models(entry.location)(**arguments)


def _import_from_models(location: str) -> Any:
    """Import MODULE:NAME from `spear.labels.models`."""
    file, name = location.split(":")
    return getattr(importlib.import_module(f"spear.labels.models.{file}"), name)


def split_model_description(description: str) -> tuple[str, str | None]:
    """Split the description of one model into its name and its weights or file.

    Weights or file follow the first "=" or ":"; they are None if the description is only a name.

    Example:
        >>> split_model_description("owlv2=my_folder"), split_model_description("sam2")
        (('owlv2', 'my_folder'), ('sam2', None))
    """
    name, *argument = re.split("[=:]", description, maxsplit=1)
    return name, argument[0] if argument else None


def resolve_factories(options: LabelOptions) -> ModelFactories:
    """Find the factories of the three models that the options name, without loading a model.

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
    """Raise `SpearError` if an option was set that none of the chosen models uses."""
    descriptions = (options.detector, options.segmenter, options.pointmap)
    used_options = set[str]()
    for role, description in zip(MODELS_BY_ROLE, descriptions, strict=True):
        # After "+", if there is one: models that read files use none of these options.
        last_description = description.rpartition("+")[2]
        name, _ = split_model_description(last_description)
        used_options.update(MODELS_BY_ROLE[role][name].arguments)
    unused_options = list_changed_options(options, *(OPTIONS_OF_SOME_MODELS - used_options))
    if unused_options:
        raise SpearError(
            f"{min(unused_options)} has no effect on {', '.join(descriptions)}. Leave it out, or "
            "choose a model that takes it."
        )
