"""Robot episodes as items beside photos; scenes of the simulator as a folder of labels."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tiny import make_episode, make_png
from refusals import refuses
from spear.data.store.episode_store import write_episodes
from spear.errors import Notice
from spear.labels.inputs import read_contents
from spear.labels.pipeline import label_with_ground_truth, read_images
from spear.labels.sources import list_items
from spear.labels.store import read_labels as read_labels
from spear.sim_data.label_scenes import label_scenes
from spear.types import Episode, Frame, LabeledImage
from spear.util.held_out import is_held_out


def episode(steps: int, camera: str, first: int) -> Episode:
    """An episode whose image at step i is grey of value `first` + i."""
    images = {camera: [make_png(first + i) for i in range(steps)], "wrist": [make_png(255)] * steps}
    return make_episode(0, steps, images=images)


def test_frames_of_episodes_are_spread_over_each(tmp_path: Path) -> None:
    write_episodes([episode(10, "external", 0), episode(2, "front", 100)], tmp_path / "robot")
    found = list(list_items([str(tmp_path / "robot")], per_episode=4))
    places = [item.key.rpartition("#")[2] for item in found]
    assert places == [f"{e}/{n}-of-4" for e in (0, 1) for n in (1, 2, 3, 4)]
    works = read_images(found)
    assert [work.frame.image[0, 0, 0] for work in works if work.frame is not None] == [
        0,
        3,
        6,
        9,
        100,
        101,
    ]
    assert all("only 2 steps" in str(work.error) for work in works[6:])
    write_episodes([episode(10, "external", 0), episode(3, "front", 100)], tmp_path / "anew")
    again = list(list_items([str(tmp_path / "anew")], per_episode=4))
    same = [
        now == then for now, then in zip(read_contents(again), read_contents(found), strict=True)
    ]
    assert again[0].stamp != found[0].stamp and same == [True] * 6 + [False] * 2


@pytest.mark.parametrize(
    "kind", ["sim:", "sim/clutter/", "simpler:", "simpler/PutCarrotOnPlateInScene-v1/"]
)
def test_scenes_that_are_kept_for_testing_are_known_by_their_seed(kind: str) -> None:
    assert is_held_out(f"{kind}9999") and not is_held_out(f"{kind}10000")
    assert not is_held_out("photos/sim/7.jpg")


def test_the_same_image_given_twice_is_labelled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(make_png(3))
    given = [str(tmp_path / "b.png"), f"{tmp_path}/", f"{tmp_path}/./*.png"]
    assert [Path(item.key).name for item in list_items(given)] == ["b.png", "a.png"]
    monkeypatch.chdir(tmp_path)
    assert [item.key for item in list_items([".", str(tmp_path)])] == ["./a.png", "./b.png"]


def test_names_that_are_no_text_are_named_in_text(tmp_path: Path) -> None:
    for letter in (b"\xe8", b"\xe9"):  # as Latin-1 has them, in files of old disks and archives
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf" + letter + b".png")).write_bytes(
            make_png(3)
        )
    works = read_images(list(list_items([str(tmp_path)])))
    assert [work.error for work in works] == [None, None]
    assert len({work.source.encode() for work in works}) == 2


def by_hand(frames: Iterator[Frame]) -> Iterator[LabeledImage]:
    return (
        dataclasses.replace(label, source=f"by hand/{label.source}")
        for label in label_with_ground_truth(frames)
    )


def never(frames: Iterator[Frame]) -> Iterator[LabeledImage]:
    raise AssertionError("what is there is not labelled again")


def test_scenes_are_labelled_in_the_way_that_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("mujoco")
    sizes = {"external": (96, 64), "wrist": (64, 64)}
    assert label_scenes(tmp_path, 2, sizes, 10_000, workers=1, label_frames=by_hand) == 4
    for view, (width, height) in sizes.items():
        labels = list(read_labels(tmp_path / view))
        assert [label.source for label in labels] == [
            f"by hand/sim/clutter/1000{i}/{view}" for i in (0, 1)
        ]
        assert all((label.width, label.height) == (width, height) for label in labels)
        assert (tmp_path / "depth" / view / "depth-00000.parquet").is_file()
    assert "carrot" in (tmp_path / "wording.txt").read_text()
    assert label_scenes(tmp_path, 2, sizes, 10_000, workers=1, label_frames=never) == 4
    (tmp_path / "wrist/labels-00000.parquet").unlink()
    (tmp_path / "external/questions.parquet").touch()
    with pytest.warns(Notice, match="spear questions"):
        label_scenes(tmp_path, 2, sizes, 10_000, workers=1)
    assert not (tmp_path / "external/questions.parquet").exists()
    assert label_scenes(tmp_path, 3, sizes, 10_000, workers=1) == 6
    assert label_scenes(tmp_path, 1, sizes, 10_000, workers=1, label_frames=never) == 6
    for key, value in {"first_seed": 10_001, "sizes": {**sizes, "wrist": (48, 48)}}.items():
        wanted = {"scenes": 2, "sizes": sizes, "first_seed": 10_000, key: value}
        refuses(
            f"other settings: {key} is",
            label_scenes,
            tmp_path,
            **wanted,
            workers=1,
            label_frames=never,
        )
