"""Which values the keys of a recipe take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from spear.errors import SpearError, unknown_name
from spear.labels.questions.generate import FAMILIES, FAMILIES_2D, FAMILIES_PIXEL

LEAST = {
    "steps": 0, "batch_size": 1, "flow_samples": 1, "accumulate": 1, "bins": 2, "lr": 0, "lr_scale": 0, "final_lr": 0,
    "warmup": 0, "ema": 0, "betas": 0, "weight_decay": 0, "max_skipped": 0, "augment": 0, "question_images": 0,
    "question_weight": 0, "pairs": 1, "wrist": 0, "coordinate_weight": 0, "coordinate_smoothing": 0, "most_images": 0,
}  # fmt: skip
ABOVE = {"grad_clip": 0, "lora_alpha": 0}
MOST = {"augment": 1, "wrist": 1, "final_lr": 1}
BELOW = {"ema": 1, "betas": 1}
"""Bounds of numbers; of lists and mappings, of each number in them."""
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}


def check_value(part: Any, key: str, value: Any) -> None:
    """Raises `SpearError` for a value that is not of the kind, or not in the range, of a field of a
    dataclass."""
    hint = get_type_hints(type(part))[key]
    if not _fits(value, hint):
        choices = [word for h in (hint, *get_args(hint)) if get_origin(h) is Literal for word in get_args(h)]
        if choices:
            raise unknown_name(key, str(value), choices)
        kind = _WORDS.get(hint, "a list" if get_origin(hint) is tuple else "another value")
        raise SpearError(f"recipe key {key} is {value!r}: give {kind}")
    wrong = f"recipe key {key} is {value}"
    for number in _numbers(value):
        if not math.isfinite(number):
            raise SpearError(f"{wrong}: give finite numbers")
        if number < LEAST.get(key, -math.inf):
            raise SpearError(f"{wrong}: give at least {LEAST[key]}")
        if number <= ABOVE.get(key, -math.inf):
            raise SpearError(f"{wrong}: give more than {ABOVE[key]}")
        if number > MOST.get(key, math.inf):
            raise SpearError(f"{wrong}: give at most {MOST[key]}")
        if number >= BELOW.get(key, math.inf):
            raise SpearError(f"{wrong}: give less than {BELOW[key]}")
    if key == "pairs" and value[0] > value[1]:
        raise SpearError(f"{wrong}: the fewest come first")
    if key == "families":
        known = (*FAMILIES, *FAMILIES_2D, *FAMILIES_PIXEL)
        for family in value:
            if family not in known:
                raise unknown_name("family of questions", family, known)
        if not value:
            raise SpearError(f"{wrong}: give at least one of {', '.join(known)}")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _fits(value: Any, hint: Any) -> bool:
    kind, inner = get_origin(hint), get_args(hint)
    if kind is Literal:
        return value in inner
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    if kind is tuple:
        if not isinstance(value, list | tuple):
            return False
        each = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return len(value) == len(each) and all(map(_fits, value, each))
    return isinstance(value, kind or hint)
