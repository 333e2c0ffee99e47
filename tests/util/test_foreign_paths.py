"""Names of files in data of others stay inside their folder, and templates cannot take memory."""

from pathlib import Path

import pytest

from spear.errors import SpearError
from spear.util.foreign_paths import fill_path_template, join_inside

FOLDER = Path("dataset")


@pytest.mark.parametrize("name", ["a.png", "images/a.png", "./a.png", "a..b/..c.png", "..."])
def test_names_inside_the_folder_are_joined(name: str) -> None:
    assert join_inside(FOLDER, name) == FOLDER / name


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../a.png",
        "images/../../a.png",
        "..",
        "..\\a.png",
        "C:\\a.png",
        "\\\\host\\a",
    ],
)
def test_names_outside_the_folder_are_refused(name: str) -> None:
    with pytest.raises(SpearError, match="outside this folder"):
        join_inside(FOLDER, name)


def test_links_of_the_owner_are_followed(tmp_path: Path) -> None:
    blob = tmp_path / "blobs/0a1b"
    blob.parent.mkdir()
    blob.write_text("weights")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(blob)

    assert join_inside(folder, "model.safetensors").read_text() == "weights"


@pytest.mark.parametrize(
    ("template", "path"),
    [
        ("data/chunk-{chunk:03d}/file-{file:03d}.parquet", "data/chunk-001/file-012.parquet"),
        ("{file}.parquet", "12.parquet"),
        ("{{{file:4d}}}", "{  12}"),  # doubled braces are literal ones
        ("all.parquet", "all.parquet"),
    ],
)
def test_documented_placeholders_are_filled(template: str, path: str) -> None:
    assert fill_path_template(template, {"chunk": 1, "file": 12}) == path


@pytest.mark.parametrize(
    "template",
    [
        "{file:>9999999999}",  # would be gigabytes of spaces
        "{file:999d}",
        "{file.__class__}",
        "{file[0]}",
        "{file!r}",
        "{file:{chunk}}",
        "{}",
        "{other}",
        "{file",
    ],
)
def test_other_placeholders_are_refused(template: str) -> None:
    with pytest.raises(SpearError, match=r"may use \{chunk\}, \{file\}"):
        fill_path_template(template, {"chunk": 1, "file": 12})


def test_a_name_with_a_null_character_is_refused() -> None:
    with pytest.raises(SpearError, match="cannot exist"):
        join_inside(FOLDER, "a\0b.png")
