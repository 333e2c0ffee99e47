"""Folders with random changes are read or refused in a sentence, and the check itself works.

The first two tests are a slice of the fuzz of folders (`benchmarks/data/fuzz_folders.py`). The
other tests check that the fuzz (`folder_fuzz`) finds what a reader must not do.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from folder_fuzz import (
    MAX_MEMORY_BYTES,
    FolderFuzz,
    ForbiddenDeedError,
    change_value,
    forbid_deeds,
)
from hostile_folders import SAMPLES, make_labels, open_fuzz, read_all_labels

NUM_CHANGES = {"model": 6, "labels": 30, "recording": 30, "rgbd": 30}
"""Kind of folder -> how many changed copies of it are read."""


@pytest.mark.parametrize("kind", NUM_CHANGES)
def test_a_changed_folder_is_read_or_refused_in_a_sentence(kind: str, tmp_path: Path) -> None:
    report = open_fuzz(kind, tmp_path).run(NUM_CHANGES[kind], seed=1)

    assert report.findings == []
    assert report.num_changes == NUM_CHANGES[kind]
    assert report.num_refused > 0


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_changed_dataset_is_read_or_refused_in_a_sentence(
    kind: str, tmp_path: Path, shared: Path
) -> None:
    report = open_fuzz(kind, tmp_path, shared).run(15, seed=1)

    assert report.findings == []
    assert report.num_refused > 0


def run_bad_reader(tmp_path: Path, misbehave: Any) -> str:
    """The problem that the fuzz finds with a reader that misbehaves in changed folders."""
    make_labels(tmp_path / "labels")

    def read(folder: Path) -> None:
        if folder.name.startswith("changed"):
            misbehave()

    report = FolderFuzz("labels", tmp_path / "labels", read, tmp_path).run(1)
    [finding] = report.findings
    return finding.problem


def test_a_traceback_is_found(tmp_path: Path) -> None:
    empty: list[int] = []

    assert run_bad_reader(tmp_path, lambda: empty[0]).startswith("IndexError")


def test_a_question_is_found(tmp_path: Path) -> None:
    assert "asks a question" in run_bad_reader(tmp_path, lambda: input("run the code? [y/N]"))


def test_a_read_outside_is_found(tmp_path: Path) -> None:
    secret = tmp_path / "outside/secret.json"

    assert "secret.json" in run_bad_reader(tmp_path, lambda: secret.read_text())


def test_too_much_memory_is_found(tmp_path: Path) -> None:
    problem = run_bad_reader(tmp_path, lambda: np.ones(MAX_MEMORY_BYTES + 2**29, np.uint8))

    assert "MemoryError" in problem


def test_the_limits_end_with_the_fuzz(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")

    with forbid_deeds(tmp_path):
        with pytest.raises(ForbiddenDeedError):
            (tmp_path / "file").read_text()

    assert (tmp_path / "file").read_text() == "text"


def test_changes_leave_the_good_folder_as_it_was(tmp_path: Path) -> None:
    fuzz = open_fuzz("labels", tmp_path)

    fuzz.run(10)

    read_all_labels(tmp_path / "labels")


def test_a_change_of_json_is_json() -> None:
    rng = np.random.default_rng(0)
    content = {"a": [1, {"b": 2}], "c": "text"}

    changed = [change_value(rng, content) for _ in range(100)]

    texts = {json.dumps(entry) for entry in changed}
    assert len(texts) > 20
