"""Options: ranges are checked when they are made, and the command line knows their names."""

from dataclasses import field
from typing import Annotated

from tyro.conf import Positional

from refusals import refuses
from spear.util.options import Options, Range, list_option_names, parse_key_values


class Inner(Options):
    quality: Annotated[int, Range(1, 100)] = 95


class Outer(Options):
    name: Positional[str] = "a"
    first_seed: Annotated[int | None, Range(0)] = None
    pairs: Annotated[tuple[int, int], Range(1)] = (1, 2)
    dry: bool = False
    inner: Inner = field(default_factory=Inner)


def test_names_are_those_of_the_command_line_and_values_json_where_they_are_some() -> None:
    assert list_option_names(Outer) == ["--first-seed", "--pairs", "--dry", "--no-dry", "--quality"]
    assert parse_key_values(["a=1", "b=[1]", "c=x=y"]) == {"a": 1, "b": [1], "c": "x=y"}
    assert parse_key_values(["a=1"], b=None, c=2) == {"a": 1, "c": 2}
    for twice in ({"items": ["a=1", "a=1"]}, {"items": ["a=1"], "a": 2}):
        refuses("--set a", parse_key_values, **twice)
