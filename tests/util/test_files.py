"""Files appear whole or not at all, and a folder holds one thing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from spear.errors import SpearError
from spear.util.files import check_own, write_bytes


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "folder")])
def test_a_file_that_cannot_be_written_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def stop(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(number, os.strerror(number))

    path = tmp_path / "picture.png"
    write_bytes(path, b"old")
    monkeypatch.setattr(Path, "write_bytes", stop)
    with pytest.raises(SpearError, match=rf"picture\.png: .*{words}"):
        write_bytes(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("picture.png", b"old")]


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    check_own(tmp_path / "new", "*.arrow", "record")
    (tmp_path / ".hidden").touch()
    check_own(tmp_path, "*.arrow", "record")
    (tmp_path / "meta").mkdir()
    with pytest.raises(SpearError, match="holds other files: record into a folder of its own"):
        check_own(tmp_path, "*.arrow", "record")
    (tmp_path / "episodes.arrow").touch()
    check_own(tmp_path, "*.arrow", "record")
