"""The settings of a run: recorded when it begins, compared when it is resumed."""

from pathlib import Path
from typing import Any

import pytest

from refusals import refuses
from spear.util.run_settings import record_or_check_settings

SETTINGS: dict[str, Any] = {"size": [4, 3], "data": 32 * "0", "layout": "{\n}"}


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    record_or_check_settings(path, SETTINGS, is_resuming=False)
    return path


def test_a_run_is_resumed_with_the_same_settings(settings_file: Path) -> None:
    as_tuple = {**SETTINGS, "size": (4, 3)}

    record_or_check_settings(settings_file, as_tuple, is_resuming=True)


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
