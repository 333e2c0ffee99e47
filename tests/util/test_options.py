"""Options have names on the command line, and their ranges are checked when they are made."""

from dataclasses import field
from typing import Annotated, Any

import pytest
from tyro.conf import Positional

from refusals import refuses
from spear.util.options import Options, Range, list_option_names, parse_key_values


class InnerOptions(Options):
    """Options that are a field of other options."""

    quality: Annotated[int, Range(1, 100)] = 95


class OuterOptions(Options):
    """Options of each kind: positional, with ranges, a flag, and a dataclass."""

    name: Positional[str] = "a"
    first_seed: Annotated[int | None, Range(0)] = None
    pairs: Annotated[tuple[int, int], Range(1)] = (1, 2)
    dry: bool = False
    inner: InnerOptions = field(default_factory=InnerOptions)


def test_option_names_include_those_of_dataclasses_inside_but_no_positional_arguments() -> None:
    names = list_option_names(OuterOptions)

    assert names == ["--first-seed", "--pairs", "--dry", "--no-dry", "--quality"]


def test_numbers_out_of_range_are_refused() -> None:
    refuses("--quality 101 is out of range. Give at most 100", InnerOptions, quality=101)
    refuses("--first-seed -1 is out of range. Give at least 0", OuterOptions, first_seed=-1)
    refuses("--pairs 0 is out of range. Give at least 1", OuterOptions, pairs=(0, 2))


def test_values_of_keys_are_json_if_they_are_any() -> None:
    assert parse_key_values(["a=1", "b=[1]", "c=x=y"]) == {"a": 1, "b": [1], "c": "x=y"}


def test_keys_with_options_of_their_own_are_added_if_given() -> None:
    assert parse_key_values(["a=1"], b=None, c=2) == {"a": 1, "c": 2}


@pytest.mark.parametrize(
    ("items", "named"), [(["a=1", "a=1"], {}), (["a=1"], {"a": 2})], ids=["twice", "option"]
)
def test_a_key_that_is_given_twice_is_refused(items: list[str], named: dict[str, Any]) -> None:
    refuses("--set a", parse_key_values, items, **named)
