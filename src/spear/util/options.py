"""Options of commands: dataclasses beside what they configure, from which the command line is made.

Each field is followed by a docstring, which is its help; what several commands take has its one description
here. Ranges are annotations and are checked whenever options are made, from the command line or in Python.
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
    """The range that a number, or each number of a tuple, must lie in. None and words are always allowed."""

    least: float
    most: float = 1e15


@typing.dataclass_transform(frozen_default=True)
class Options:
    """What options inherit, which makes a class a frozen dataclass; ranges are checked when one is made.

    Raises `SpearError` for a number outside its range, naming the field as the command line does.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __init_subclass__(cls, kw_only: bool = False) -> None:
        dataclasses.dataclass(frozen=True, kw_only=kw_only)(cls)

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            for mark in (m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Range)):
                for number in value if isinstance(value, tuple) else (value,):
                    if isinstance(number, int | float) and not mark.least <= number <= mark.most:
                        bound = (
                            f"most {mark.most:g}" if number > mark.most else f"least {mark.least:g}"
                        )
                        raise SpearError(f"{to_option_name(name)} {number:g}: give at {bound}")


def to_option_name(field: str) -> str:
    """A field as the command line has it: first_seed is --first-seed."""
    return "--" + field.replace("_", "-")


def list_changed_options(options: Options, *names: str) -> list[str]:
    """Those of the options that are not as they are by default, as the command line has them."""
    return [to_option_name(n) for n in names if getattr(options, n) != getattr(type(options), n)]


def list_option_names(options: type) -> list[str]:
    """The options of a dataclass, with those of dataclasses inside it; positional arguments are none.

    What stands below each field becomes its help, as one paragraph: tyro by itself keeps the line breaks.
    """
    found = []
    hints, types = (
        typing.get_type_hints(options, include_extras=True),
        typing.get_type_hints(options),
    )
    inherited = (parse_from_object(kind).params for kind in options.__mro__[-2::-1])
    said = {param.arg_name: param.description for params in inherited for param in params}
    for field in dataclasses.fields(options):
        help = " ".join((said.get(field.name) or "").split())
        field.metadata = MappingProxyType({**field.metadata, "help": help or None})
        hint, inner = hints[field.name], types[field.name]
        if dataclasses.is_dataclass(inner):
            found += list_option_names(typing.cast(type, inner))
        elif Positional[int].__metadata__[0] not in getattr(hint, "__metadata__", ()):  # type: ignore[attr-defined]
            found.append(to_option_name(field.name))
            if inner is bool:
                found.append(to_option_name("no_" + field.name))
    return found


OptionalFolder = Annotated[Path | None, arg(metavar="FOLDER")]
OptionalFile = Annotated[Path | None, arg(metavar="FILE")]
OptionalName = Annotated[str | None, arg(metavar="NAME")]
OptionalInt = Annotated[int | None, arg(metavar="INT")]
Seed = Annotated[int, Range(0), arg(help="The same seed gives the same result.")]
Device = Annotated[str, arg(help="cpu, cuda, cuda:1 …; auto takes a GPU when there is one.")]
_HALF = "Precision of the weights: bfloat16 takes half the memory of float32."
Dtype = Annotated[Literal["float32", "bfloat16"], arg(help=_HALF)]
PolicyName = Annotated[
    str, arg(help="nano (comes with this package) or a folder with a trained policy.")
]
_MODEL = "The SPEAR-VLM: nano-vlm (comes with this package) or a folder with a trained one."
ModelName = Annotated[str, arg(help=_MODEL)]
_UNITS = "Of a policy whose training datasets were each normalised by itself: whose units to use."
DatasetName = Annotated[str | None, arg(metavar="NAME", help=_UNITS)]
_LAYOUT = "What the dataset's columns mean, as JSON, when its folder has no spear.json."
LayoutFile = Annotated[Path | None, arg(metavar="FILE", help=_LAYOUT)]
EpisodeSplit = Annotated[
    str, arg(help="Which episodes: train, val, train[:90%], train[90%:], train+val …")
]
_CHANGES = "Changes to the recipe as KEY=VALUE, for example batch_size=16 lr=1e-4."
RecipeChanges = Annotated[tuple[str, ...], arg(help=_CHANGES)]


def parse_key_values(items: Sequence[str], **named: Any) -> dict[str, Any]:
    """KEY=VALUE words of --set; a value is read as JSON (numbers, true, lists …) if it is any, else a string.

    named: keys that have options of their own, with what those say (None: nothing). Raises `SpearError` for a
    word without =, and for a key that is given twice.
    """
    found = {key: value for key, value in named.items() if value is not None}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals:
            raise SpearError(f"--set {item}: write it as KEY=VALUE")
        if key in found:
            raise SpearError(f"--set {item}: {key} is also given as {found[key]}: give it once")
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = text
    return found
