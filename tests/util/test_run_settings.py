"""The settings of a run are recorded when it begins, and compared when it is resumed."""

from pathlib import Path
from typing import Any

import pytest

from refusals import refuses
from spear.util.run_settings import record_or_check_settings

SETTINGS: dict[str, Any] = {"size": [4, 3], "data": 32 * "0", "layout": "{\n}"}
"""A list, a hash, and a text of several lines; messages do not show the last two."""


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    """The file in which a new run has recorded `SETTINGS`."""
    path = tmp_path / "run.json"
    record_or_check_settings(path, SETTINGS, is_resuming=False)
    return path


def test_a_run_is_resumed_with_the_same_settings(settings_file: Path) -> None:
    same_settings = {**SETTINGS, "size": (4, 3)}  # JSON has no tuples

    record_or_check_settings(settings_file, same_settings, is_resuming=True)


def test_a_run_without_its_settings_file_is_not_resumed(tmp_path: Path) -> None:
    refuses(
        r"run\.json", record_or_check_settings, tmp_path / "run.json", SETTINGS, is_resuming=True
    )


def test_other_settings_are_refused_and_named(settings_file: Path) -> None:
    other_settings = {"size": [4], "data": 32 * "1", "layout": "None"}
    difference = (
        r"data is not what it was; layout is not what it was; size is \[4, 3\] there, \[4\] here"
    )

    refuses(difference, record_or_check_settings, settings_file, other_settings, is_resuming=True)
