"""The settings of a run, recorded in its folder: a resumed run must have the same ones."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from spear.errors import SpearError
from spear.util.files import read_json, write_text

_UNREADABLE_VALUE = re.compile(r"[0-9a-f]{32}|\\n")
"""Matches hashes, and texts of several lines as JSON writes them. A message does not show two of
these values, because a reader could not see how they differ."""


def to_plain_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings as they are after JSON has been written and read: tuples become lists.

    >>> to_plain_json({"size": (4, 3)})
    {'size': [4, 3]}
    """
    return json.loads(json.dumps(settings))


def describe_difference(
    recorded_settings: Mapping[str, Any],
    current_settings: Mapping[str, Any],
    option_names: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Describe in which keys two settings differ; the empty string if they are equal.

    Args:
        recorded_settings: the settings of earlier work.
        current_settings: the settings of this command.
        option_names: key -> what the description calls it, such as the option that sets it.

    Example:
        >>> describe_difference({"size": 840, "seed": 0}, {"size": 560, "seed": 0})
        'size is 840 there, 560 here'
        >>> describe_difference({"size": 840}, {"size": 560}, {"size": "--max-size"})
        '--max-size is 840 there, 560 here'
        >>> describe_difference({"data": "0" * 32}, {"data": "1" * 32})
        'data is not what it was'
    """
    recorded_settings = to_plain_json(recorded_settings)
    current_settings = to_plain_json(current_settings)

    differences = []
    for key in sorted({*recorded_settings, *current_settings}):
        recorded_value = recorded_settings.get(key)
        current_value = current_settings.get(key)
        if recorded_value == current_value:
            continue
        values = f"{_to_text(recorded_value)} there, {_to_text(current_value)} here"
        if _UNREADABLE_VALUE.search(values):
            values = "not what it was"
        differences.append(f"{option_names.get(key, key)} is {values}")
    return "; ".join(differences)


def _to_text(value: Any) -> str:
    """Return a value as JSON writes it, but "not set" for None."""
    return "not set" if value is None else json.dumps(value)


def record_or_check_settings(
    path: Path,
    settings: Mapping[str, Any],
    is_resuming: bool,
    option_names: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Record the settings of new work in a file, or compare those of resumed work with the file.

    Args:
        path: the file of settings. New work overwrites it.
        settings: the settings of this command. JSON must be able to express their values.
        is_resuming: whether the folder already contains work that is to be continued.
        option_names: key of the settings -> the option that sets it, for the message.

    Raises:
        SpearError: the resumed work has other settings (the message says which), or its file is
            missing.
    """
    if not is_resuming:
        write_text(path, json.dumps(to_plain_json(settings), indent=2) + "\n")
        return
    recorded_settings = read_json(path, advice="choose another folder")
    difference = describe_difference(recorded_settings, settings, option_names)
    if difference:
        raise SpearError(
            f"{path.parent} was begun with other settings ({difference}). Use the same ones, or "
            "another folder."
        )
