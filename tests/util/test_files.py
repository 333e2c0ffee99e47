"""Files appear completely or not at all, and wrong places for output are refused."""

import errno
import os
from pathlib import Path

import pytest

from refusals import refuses
from spear.util.files import advise_on_downloaded_file_error, check_new_or_empty_folder, write_bytes


@pytest.mark.parametrize(
    ("error_number", "message"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "folder")]
)
def test_a_file_that_cannot_be_written_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_number: int, message: str
) -> None:
    def fail_halfway(path: Path, data: bytes) -> int:
        """Leave an incomplete file."""
        path.touch()
        raise OSError(error_number, os.strerror(error_number))

    path = tmp_path / "picture.png"
    write_bytes(path, b"old")
    monkeypatch.setattr(Path, "write_bytes", fail_halfway)

    refuses(rf"picture\.png cannot be written.*{message}", write_bytes, path, b"new")

    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


def test_a_link_stays_a_link_to_the_written_file(tmp_path: Path) -> None:
    link = tmp_path / "to-page"
    link.symlink_to(tmp_path / "page")

    write_bytes(link, b"old")
    write_bytes(link, b"new")

    assert link.is_symlink()
    assert (tmp_path / "page").read_bytes() == b"new"


def test_no_file_takes_the_place_of_a_device(tmp_path: Path) -> None:
    link = tmp_path / "to-null"
    link.symlink_to("/dev/null")

    write_bytes(link, b"new")

    assert link.is_symlink()
    assert link.read_bytes() == b""


@pytest.mark.parametrize("name", ["page.html", "folder/page.html"])
def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path, name: str) -> None:
    file = tmp_path / "results"
    file.touch()

    refuses(rf"^{file} is a file, not a folder", write_bytes, file / name, b"new")


@pytest.mark.parametrize("is_relative", [True, False])
def test_the_current_folder_is_no_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_relative: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path() if is_relative else tmp_path

    refuses("folder that you are in", check_new_or_empty_folder, folder)
    refuses("cannot be written", write_bytes, folder, b"new")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        (FileNotFoundError(), "missing"),
        (PermissionError(), "chmod"),
        (OSError("Parquet magic bytes not found"), "cut off or damaged"),
    ],
)
def test_each_error_of_reading_has_its_own_cure(error: OSError, cure: str) -> None:
    assert cure in advise_on_downloaded_file_error(error)
