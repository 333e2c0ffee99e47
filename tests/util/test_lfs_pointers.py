"""A Git LFS pointer in place of a file is refused by name wherever files are opened, with a cure.

A repository that was cloned without Git LFS has such a pointer, a short text, in place of every
large file.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tiny import make_episode, write_store
from refusals import refuses
from spear.data.readers.tfrecord import read_records
from spear.data.readers.video import read_frames
from spear.data.store.episode_store import EpisodeStore
from spear.errors import SpearError
from spear.labels.inputs import list_images_in_parquet, list_images_in_tar
from spear.labels.store import read_labels
from spear.models.moge.checkpoint import load_moge
from spear.models.weights.load import StoredCheckpoint, load_tokenizer
from spear.util.files import is_lfs_pointer, read_json
from spear.util.images import load_image

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 12345\n"
)
CURE = r"Git LFS pointer.*git lfs pull.*hf download"


# Hawser was the name of Git LFS before its release.
@pytest.mark.parametrize("content", [POINTER, POINTER.replace(b"git-lfs", b"hawser", 1)])
def test_pointers_are_recognized_by_path_and_content(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "file-000.parquet"
    file.write_bytes(content)

    assert is_lfs_pointer(file)
    assert is_lfs_pointer(content)


@pytest.mark.parametrize("content", [b"", b"version 2", b"\x89PNG"])
def test_other_files_are_no_pointers(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)

    assert not is_lfs_pointer(file)
    assert not is_lfs_pointer(tmp_path / "missing")


@pytest.mark.parametrize(
    ("name", "open_file"),
    [
        ("photo.jpg", load_image),
        ("photo.png", lambda file: load_image(file.read_bytes(), "photo.png")),
        ("film.mp4", lambda file: next(read_frames(file, 0.0, 1.0))),
        ("photos.tar", lambda file: list(list_images_in_tar(str(file)))),
        ("photos.parquet", lambda file: list(list_images_in_parquet(str(file)))),
        ("moge.pt", load_moge),
        ("config.json", lambda file: read_json(file, "copy it")),
        ("model.safetensors", lambda file: StoredCheckpoint.open(file.parent, "checkpoint")),
        ("tokenizer.json", lambda file: load_tokenizer(file.parent)),
    ],
)
def test_a_pointer_is_named_where_the_file_is_opened(
    tmp_path: Path, name: str, open_file: Callable[[Path], Any]
) -> None:
    file = tmp_path / name
    file.write_bytes(POINTER)

    refuses(rf"{name}.*{CURE}", open_file, file)


def test_every_record_of_a_pointer_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.tfrecord-00000-of-00001"
    file.write_bytes(POINTER)

    errors = [record for _, record in read_records(file, 0, 2)]  # errors take the records' places

    assert len(errors) == 2
    for error in errors:
        assert isinstance(error, SpearError)
        assert "git lfs pull" in str(error)


@pytest.mark.parametrize("pattern", ["*.arrow", "*.images"])
def test_a_shard_of_our_store_that_is_a_pointer_is_named(tmp_path: Path, pattern: str) -> None:
    write_store([make_episode(0)], tmp_path)
    (file,) = tmp_path.glob(pattern)
    file.write_bytes(POINTER)

    refuses(CURE, EpisodeStore, tmp_path)


def test_labels_that_are_pointers_are_named(tmp_path: Path) -> None:
    (tmp_path / "labels-00000.parquet").write_bytes(POINTER)

    refuses(CURE, list, read_labels(tmp_path))
