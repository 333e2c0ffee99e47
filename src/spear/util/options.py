"""Options of commands: dataclasses from which tyro makes the command line.

The docstring below a field is the option's help. Options that several commands have are defined
here, each with one description. An annotation `Range` limits a number; it is checked whenever an
object of options is made, from the command line or in Python.
"""

import dataclasses
import json
import typing
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from docstring_parser import parse_from_object
from tyro.conf import Positional, arg

from spear.errors import SpearError


@dataclasses.dataclass(frozen=True)
class Range:
    """Annotation: the range of a number, or of each number in a tuple.

    Values that are no numbers (None, words) are always allowed.
    """

    minimum: float
    maximum: float = 1e15


class RarelyUsed:
    """Annotation: only `--help-all` shows the option. Write `Annotated[int, RarelyUsed()]`."""


@typing.dataclass_transform(frozen_default=True)
class Options:
    """Base class of options: it makes a subclass a frozen dataclass, and checks the ranges.

    Raises:
        SpearError: a number is out of its range. The message names the field as the command line
            does.

    Example:
        >>> class EvaluateOptions(Options):
        ...     num_scenes: Annotated[int, Range(1)] = 384
        >>> EvaluateOptions(num_scenes=0)
        Traceback (most recent call last):
        spear.errors.SpearError: --num-scenes 0 is out of range. Give at least 1.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __init_subclass__(cls, kw_only: bool = False) -> None:
        dataclasses.dataclass(frozen=True, kw_only=kw_only)(cls)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self), include_extras=True)
        for name, hint in hints.items():
            for annotation in getattr(hint, "__metadata__", ()):
                if isinstance(annotation, Range):
                    _check_range(name, getattr(self, name), annotation)


def _check_range(name: str, value: Any, allowed: Range) -> None:
    """Raise `SpearError` if the value, or an element of a tuple, is a number out of range."""
    elements = value if isinstance(value, tuple) else (value,)
    for element in elements:
        if not isinstance(element, int | float):
            continue
        if allowed.minimum <= element <= allowed.maximum:
            continue
        if element > allowed.maximum:
            bound = f"most {allowed.maximum:g}"
        else:
            bound = f"least {allowed.minimum:g}"
        raise SpearError(f"{to_option_name(name)} {element:g} is out of range. Give at {bound}.")


def to_option_name(field: str) -> str:
    """Return a field's name on the command line.

    >>> to_option_name("first_seed")
    '--first-seed'
    """
    return "--" + field.replace("_", "-")


def list_changed_options(options: Options, *names: str) -> list[str]:
    """Return the command-line names of the fields in `names` that differ from their defaults."""
    return [
        to_option_name(name)
        for name in names
        if getattr(options, name) != getattr(type(options), name)
    ]


def list_option_names(options: type) -> list[str]:
    """Return the command-line names of a dataclass's options.

    The names include the options of fields that are dataclasses themselves. Positional arguments
    are left out.
    """
    names = []
    hints = typing.get_type_hints(options, include_extras=True)
    types = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        field_type = types[field.name]
        if dataclasses.is_dataclass(field_type):
            names += list_option_names(typing.cast(type, field_type))
        elif not _is_positional(hints[field.name]):
            names.append(to_option_name(field.name))
            if field_type is bool:  # tyro also accepts --no-NAME
                names.append(to_option_name("no_" + field.name))
    return names


def set_help_texts(options: type) -> None:
    """Make the docstring of each field of a dataclass the field's help text for tyro.

    The text is one paragraph; tyro by itself would keep the docstring's line breaks. Fields that
    are dataclasses themselves get the help texts of their fields, too.
    """
    types = typing.get_type_hints(options)
    descriptions = _read_field_docstrings(options)
    for field in dataclasses.fields(options):
        help_text = _join_lines(descriptions.get(field.name))
        field.metadata = MappingProxyType({**field.metadata, "help": help_text})
        field_type = types[field.name]
        if dataclasses.is_dataclass(field_type):
            set_help_texts(typing.cast(type, field_type))


def _join_lines(docstring: str | None) -> str | None:
    """Return a docstring as one paragraph; None if there is none or it has no words."""
    return " ".join((docstring or "").split()) or None


@dataclasses.dataclass(frozen=True)
class OptionHelp:
    """What the help shows of an option.

    Attributes:
        name: The field's name.
        hint: The field's type, with its annotations.
        default: The field's default; `dataclasses.MISSING` for an option that is required.
        text: The field's docstring. It is None if an annotation of the type has the help text.
        is_rare: Whether only `--help-all` shows the option.
    """

    name: str
    hint: Any
    default: Any
    text: str | None
    is_rare: bool


def list_option_help(options: type, defaults: Any = None) -> list[OptionHelp]:
    """List what the help shows of a dataclass's options.

    The list includes the options of fields that are dataclasses themselves.

    Args:
        options: The dataclass.
        defaults: An instance whose values are shown as the defaults; None for the defaults of the
            class. (A field that is a dataclass may have other defaults than its class.)
    """
    option_help: list[OptionHelp] = []
    hints = typing.get_type_hints(options, include_extras=True)
    descriptions = _read_field_docstrings(options)
    for field in dataclasses.fields(options):
        default = _get_default(field) if defaults is None else getattr(defaults, field.name)
        if dataclasses.is_dataclass(default):
            option_help += list_option_help(type(default), default)
            continue
        hint = hints[field.name]
        annotations = getattr(hint, "__metadata__", ())
        text = _join_lines(descriptions.get(field.name))
        is_rare = any(isinstance(annotation, RarelyUsed) for annotation in annotations)
        option_help.append(OptionHelp(field.name, hint, default, text, is_rare))
    return option_help


def _get_default(field: dataclasses.Field[Any]) -> Any:
    """Return a field's default; `dataclasses.MISSING` if it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _read_field_docstrings(options: type) -> dict[str, str | None]:
    """Return the docstrings of a class's fields by name, including inherited fields."""
    descriptions = {}
    bases_before_subclasses = options.__mro__[-2::-1]  # from the class below `object` to `options`
    for base in bases_before_subclasses:
        for param in parse_from_object(base).params:
            descriptions[param.arg_name] = param.description
    return descriptions


def _is_positional(hint: Any) -> bool:
    """Return whether a field is given by its position, without an option's name."""
    # tyro marks such a field: Positional[T] is Annotated[T, marker], with one marker for all T.
    marker = Positional[int].__metadata__[0]  # type: ignore[attr-defined]
    return marker in getattr(hint, "__metadata__", ())


OptionalFolder = Annotated[Path | None, arg(metavar="FOLDER")]
OptionalFile = Annotated[Path | None, arg(metavar="FILE")]
OptionalName = Annotated[str | None, arg(metavar="NAME")]
OptionalInt = Annotated[int | None, arg(metavar="INT")]
Preset = Annotated[str, arg(metavar="{nano,small,spear1}")]
OptionalPreset = Annotated[str | None, arg(metavar="{nano,small,spear1}")]
# The help names the cameras of the presets. The commands accept every camera of the model.
CameraView = Annotated[str, arg(metavar="{external,wrist}")]
Seed = Annotated[int, Range(0), arg(help="The same seed gives the same result.")]
Device = Annotated[
    str,
    arg(
        metavar="{auto,cpu,cuda,cuda:N}",
        help="Where to compute; auto takes a GPU when there is one.",
    ),
]
_DTYPE_HELP = "Precision of the weights: bfloat16 takes half the memory of float32."
Dtype = Annotated[Literal["float32", "bfloat16"], arg(help=_DTYPE_HELP)]
_QUANTIZE_HELP = (
    "Keep the weights of linear layers in 8 or 4 bits, to save memory; int8-dynamic also rounds"
    " their inputs, which is faster on a CPU. By default no weight is quantized."
)
Quantize = Annotated[
    Literal["int8", "int8-dynamic", "int4"] | None,
    arg(metavar="{int8,int8-dynamic,int4}", help=_QUANTIZE_HELP),
]
PolicyName = Annotated[
    str, arg(help="nano (comes with this package) or a folder with a trained policy.")
]
_MODEL_HELP = "The SPEAR-VLM: nano-vlm (comes with this package) or a folder with a trained one."
ModelName = Annotated[str, arg(help=_MODEL_HELP)]
_DATASET_HELP = (
    "The dataset whose statistics to use, if each of the policy's training datasets was normalized "
    "by itself."
)
DatasetName = Annotated[str | None, arg(metavar="NAME", help=_DATASET_HELP)]
_LAYOUT_HELP = "What the dataset's columns mean, as JSON, when its folder has no spear.json."
LayoutFile = Annotated[Path | None, arg(metavar="FILE", help=_LAYOUT_HELP)]
EpisodeSplit = Annotated[
    str, arg(help="Which episodes: train, val, train[:90%], train[90%:], train+val …")
]
_CHANGES_HELP = "Changes to the recipe as KEY=VALUE, for example batch_size=16 lr=1e-4."
RecipeChanges = Annotated[tuple[str, ...], arg(help=_CHANGES_HELP)]


def parse_key_values(items: Sequence[str], **option_values: Any) -> dict[str, Any]:
    """Parse the KEY=VALUE words of --set.

    Args:
        items: the words. A VALUE that is valid JSON (a number, true, a list and so on) is read as
            JSON, and any other VALUE as a string.
        option_values: values of keys that also have an option of the command; None if the user did
            not give that option.

    Raises:
        SpearError: a word has no =, or a key is given twice.

    Example:
        >>> parse_key_values(["lr=1e-4", "rotation=s3"], batch_size=16, seed=None)
        {'batch_size': 16, 'lr': 0.0001, 'rotation': 's3'}
    """
    values = {key: value for key, value in option_values.items() if value is not None}
    for item in items:
        key, equals_sign, text = item.partition("=")
        if not equals_sign:
            raise SpearError(f"--set {item} has no value. Write it as KEY=VALUE.")
        if key in values:
            raise SpearError(
                f"--set {item} contradicts another --set, by which {key} is {values[key]}. Give "
                "it once."
            )
        try:
            values[key] = json.loads(text)
        except ValueError:
            values[key] = text
    return values
