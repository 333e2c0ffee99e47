"""The commands on robot data, end to end."""

import json
import re
import shutil
from pathlib import Path

import pytest

from data_tiny import make
from refusals import Command
from spear.data.readers.formats import read_episodes
from spear.data.store.episode_store import EpisodeStore, write_episodes
from spear.labels.sources import list_items


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_episodes([make(0, success=True), make(1, 9), make(2, 1)], tmp_path / "store")
    return tmp_path / "store"


def test_there_and_back_again(store: Path, tmp_path: Path, done: Command) -> None:
    """A store, exported, inspected, prepared and listed for labelling."""
    out = tmp_path / "set"
    assert "2 episodes in" in done(
        "data", "export", str(store), "--out", str(out), "--split", "train[:2]"
    )
    assert [e.source for e in read_episodes(out)] == ["made#0", "made#1"]
    text = done("data", "inspect", str(out))
    assert (
        "a LeRobot dataset, v3.0" in text
        and "episodes      train 2, 15 steps (6 … 7 … 9 each)" in text
    )
    assert re.search(r"observation/images/external +images, 64 x 80 x 3", text)
    assert "layout        described by" in text and "1 × push the block 0" in text
    done("data", "prepare", str(out), "--out", str(tmp_path / "again"), "--workers", "0")
    assert len(EpisodeStore(tmp_path / "again")) == 2
    listed = list(list_items([str(out)], per_episode=2))
    assert [item.key for item in listed] == [
        f"{out}/train#{e}/{n}-of-2" for e in (0, 1) for n in (1, 2)
    ]
    assert list(listed[2].reader(listed[2].path, [listed[2].location])) == [
        make(1, 9).images["external"][0]
    ]


def test_each_dataset_keeps_its_cameras(
    store: Path, tmp_path: Path, done: Command, refused: Command
) -> None:
    write_episodes([make(3, images={"wrist": make(3).images["external"]})], tmp_path / "other")
    prepare = ["data", "prepare", str(store), str(tmp_path / "other"), "--workers", "0", "--out"]
    assert "'wrist'" in refused(*prepare, str(tmp_path / "out"), "--size", "wrsit=16x16")
    done(*prepare, str(tmp_path / "out"), "--size", "32x32", "wrist=16x16")
    for name, camera in (("store", "external"), ("other", "wrist")):
        assert EpisodeStore(tmp_path / "out" / name).cameras == [camera]


@pytest.mark.parametrize("version", ["v2.1_video", "v3.0_image", "v3.0_video"])
def test_data_without_a_layout_are_shown(
    shared: Path, tmp_path: Path, done: Command, version: str
) -> None:
    """Before anybody has written a spear.json: what is needed to write it."""
    page = tmp_path / "look.html"
    done("data", "inspect", str(shared / "data" / "lerobot" / version), "--out", str(page))
    html = page.read_text()
    assert [html.count(tag) for tag in ("<h2", "<img", "<script")] == [5, 4 * 8, 0]
    body = html.partition("</pre>")[2]
    for words in ("observation/state[3:6]", "observation/state[6:7]", "action[0:3]", "spear.json"):
        assert words in body, words
    assert (
        "counts from 0 to 9" in body and "<b>frame_index</b>" not in body
    )  # a row's number is no signal
    assert not any("nan" in plot for plot in re.findall(r"<svg.*?</svg>", body))


def test_bad_input_is_one_line(shared: Path, tmp_path: Path, refused: Command) -> None:
    data = shared / "data" / "lerobot" / "v3.0_image"
    (tmp_path / "empty").mkdir()
    out, layout = ["--out", str(tmp_path / "out")], tmp_path / "layout.json"
    layout.write_text(
        json.dumps({"like": "bridge_dataset", "images": {"external": "observation/image_9"}})
    )
    for arguments, message in (
        (["data", "inspect", str(tmp_path / "empty")], "no robot data"),
        (["data", "inspect", str(data), *out, "--layout", str(layout)], "'observation/image_9'"),
        (["data", "export", str(data), *out, "--layout", str(layout)], "'observation/image_9'"),
        (["data", "export", str(data), "--out", "x", "--images", "gif"], "gif"),
        (["data", "prepare", str(data), *out, "--rate", "nan"], "--rate nan"),
    ):
        assert message in refused(*arguments)
    assert not (tmp_path / "out").exists()


def test_a_layout_is_never_ignored(
    store: Path, tmp_path: Path, done: Command, refused: Command
) -> None:
    exported, layout = tmp_path / "set", tmp_path / "layout.json"
    done("data", "export", str(store), "--out", str(exported))
    out = ["--out", str(tmp_path / "out")]
    commands = (["audit"], ["export", *out], ["inspect"], ["prepare", *out])
    for folder in (exported, store):
        for name, *rest in commands:
            said = refused("data", name, str(folder), *rest, "--layout", str(layout))
            assert f"--layout {layout}: no such file" in said
    shutil.copy(exported / "spear.json", layout)
    for name, *rest in commands:
        assert "needs no layout" in refused(
            "data", name, str(store), *rest, "--layout", str(layout)
        )
    assert not (tmp_path / "out").exists()
    refused("data", "inspect", str(exported), "--layout", str(layout))
    done("data", "inspect", str(exported), "--layout", str(layout), *out)
