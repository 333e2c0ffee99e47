"""Files appear whole or not at all, and a folder holds one thing."""

import errno
import os
from pathlib import Path

import pytest

from refusals import refuses
from spear.util.files import check_new_folder, write_bytes


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "folder")]
)
def test_a_file_that_cannot_be_written_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def stop(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(number, os.strerror(number))

    write_bytes(path := tmp_path / "picture.png", b"old")
    monkeypatch.setattr(Path, "write_bytes", stop)
    refuses(rf"picture\.png: .*{words}", write_bytes, path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("picture.png", b"old")]


def test_links_devices_and_pipes_stay_what_they_are(tmp_path: Path) -> None:
    for target in (tmp_path / "page", Path("/dev/null")):
        (link := tmp_path / f"to-{target.name}").symlink_to(target)
        write_bytes(link, b"old")
        write_bytes(link, b"new")
        assert link.is_symlink() and link.read_bytes() == (b"new" if target.is_file() else b"")


@pytest.mark.parametrize("name", ["page.html", "folder/page.html"])
def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path, name: str) -> None:
    taken = tmp_path / "results"
    taken.touch()
    refuses(rf"^{taken}: .*not a folder", write_bytes, taken / name, b"new")


def test_the_folder_that_one_is_in_is_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (Path(), tmp_path):
        refuses("folder that you are in", check_new_folder, folder)
        refuses("cannot be written", write_bytes, folder, b"new")
    assert list(tmp_path.iterdir()) == []
