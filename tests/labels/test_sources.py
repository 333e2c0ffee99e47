"""Robot episodes and simulator scenes as items beside photos."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spear.data.store.episode_store import write_episodes
from spear.errors import SpearError
from spear.labels.inputs import read
from spear.labels.sources import items
from spear.types import Episode


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 24), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def episode(steps: int, camera: str, first: int) -> Episode:
    """An episode whose image at step i is grey of value `first` + i."""
    return Episode(
        images={camera: [png(first + i) for i in range(steps)], "wrist": [png(255)] * steps},
        position=np.zeros((steps, 3), np.float32),
        rotation=np.tile(np.array([1, 0, 0, 0], np.float32), (steps, 1)),
        gripper=np.ones(steps, np.float32),
        instruction="put the carrot on the plate",
        rate_hz=5.0,
        source="here",
    )


def test_frames_of_episodes_are_spread_over_each(tmp_path: Path) -> None:
    write_episodes([episode(10, "external", 0), episode(2, "front", 100)], tmp_path / "robot")
    found = list(items([str(tmp_path / "robot")], per_episode=4))
    places = [item.key.rpartition("#")[2] for item in found]
    assert places == [f"{e}/{n}-of-4" for e in (0, 1) for n in (1, 2, 3, 4)]
    works = read(found)
    values = [work.frame.image[0, 0, 0] for work in works if work.frame is not None]
    assert values == [0, 3, 6, 9, 100, 101]
    assert all("only 2 steps" in (work.reason or "") for work in works[6:])


def test_frames_of_a_real_rlds_dataset(shared: Path) -> None:
    pytest.importorskip("crc32c")
    folder = str(shared / "data/bridge_v2_sample/1.0.0")
    found = list(items([folder], per_episode=2))
    assert len(found) == 50 and len({item.key for item in found}) == 50
    first, last = read([found[6], found[7]])
    assert first.frame is not None and last.frame is not None
    assert first.frame.image.shape == last.frame.image.shape
    assert (first.frame.image != last.frame.image).any()


def test_the_same_image_given_twice_is_labelled_once(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png(3))
    given = [str(tmp_path / "b.png"), f"{tmp_path}/", f"{tmp_path}/./*.png"]
    assert [Path(item.key).name for item in items(given)] == ["b.png", "a.png"]


def test_scenes_of_the_simulator_come_with_their_truth() -> None:
    pytest.importorskip("mujoco")
    found = list(items(["sim:3-4"]))
    assert [item.key for item in found] == ["sim:3", "sim:4"]
    (work,) = read(found[1:], longest=100)
    assert work.frame is not None and work.frame.source == "sim:4"
    assert work.frame.image.shape == (630, 840, 3)
    assert work.frame.depth is not None and work.frame.depth.shape == (630, 840)
    assert work.frame.names


@pytest.mark.parametrize(
    ("given", "hint"), [("sim:x", "sim:10000-10499"), ("sim:1-", "sim:7"), ("nowhere", "no such file")]
)
def test_bad_input_is_named(given: str, hint: str) -> None:
    with pytest.raises(SpearError, match=hint):
        list(items([given]))
