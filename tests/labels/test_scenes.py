"""Scenes of the simulator as a folder of labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from spear.errors import SpearError
from spear.labels.scenes import label_frames, label_scenes
from spear.labels.store import read
from spear.types import Frame, LabeledImage


def by_hand(frames: Iterator[Frame]) -> Iterator[LabeledImage]:
    """A way of labelling of one's own."""
    return (dataclasses.replace(label, source=f"by hand/{label.source}") for label in label_frames(frames))


def never(frames: Iterator[Frame]) -> Iterator[LabeledImage]:
    raise AssertionError("what is there is not labelled again")


def test_scenes_are_labelled_in_the_way_that_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("mujoco")
    sizes = {"external": (96, 64), "wrist": (64, 64)}
    assert label_scenes(tmp_path, 2, sizes, 10_000, workers=1, labelled=by_hand) == 4
    for view, (width, height) in sizes.items():
        labels = list(read(tmp_path / view))
        assert [label.source for label in labels] == [f"by hand/sim/clutter/1000{i}/{view}" for i in (0, 1)]
        assert all((label.width, label.height) == (width, height) for label in labels)
        assert (tmp_path / "depth" / view / "depth-00000.parquet").is_file()
    assert "carrot" in (tmp_path / "wording.txt").read_text()
    assert label_scenes(tmp_path, 2, sizes, 10_000, workers=1, labelled=never) == 4
    for key, value in {"scenes": 3, "first_seed": 10_001, "sizes": {**sizes, "wrist": (48, 48)}}.items():
        wanted = {"scenes": 2, "sizes": sizes, "first_seed": 10_000, key: value}
        with pytest.raises(SpearError, match=f"other settings: {key} is"):
            label_scenes(tmp_path, **wanted, workers=1, labelled=never)  # type: ignore[arg-type]


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "episodes-00000.arrow").touch()
    with pytest.raises(SpearError, match="holds other files: label into a folder of its own"):
        label_scenes(tmp_path, 1, {"external": (96, 64)}, 10_000, workers=1, labelled=never)
    assert [path.name for path in tmp_path.iterdir()] == ["episodes-00000.arrow"]
