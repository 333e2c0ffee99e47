"""Our LeRobot v3.0 datasets: the files, schemas and metadata of the library's own, and read back the same."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest

from data_tiny import assert_same, make_episode
from refusals import refuses
from spear.data.readers.formats import read_episodes
from spear.data.readers.lerobot import open_lerobot
from spear.data.readers.video import VideoWriter
from spear.data.store import lerobot_write
from spear.data.store.episode_store import EpisodeStore
from spear.data.store.lerobot_write import write_lerobot
from spear.data.store.prepare import open_store
from spear.types import Episode
from spear.util.images import decode_image

EXTRA = ("action_mask", "success", "source")


@pytest.fixture(scope="module")
def rewritten(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """What the library wrote with images and with video, and our copies of the former in both ways."""
    theirs = shared / "data" / "lerobot"
    layout = tmp_path_factory.mktemp("layout") / "bridge.json"
    camera = {"external": "observation/images/image_0"}
    layout.write_text(json.dumps({"like": "bridge_dataset", "images": camera}))
    out = tmp_path_factory.mktemp("ours")
    for kind in ("image", "video"):
        episodes = read_episodes(theirs / "v3.0_image", layout_file=layout)
        assert write_lerobot(episodes, out / f"v3.0_{kind}", images=kind) == 8
    return theirs, out, layout


@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_same_files_schemas_and_metadata(rewritten: tuple[Path, Path, Path], kind: str) -> None:
    theirs, ours = rewritten[0] / f"v3.0_{kind}", rewritten[1] / f"v3.0_{kind}"

    def files(folder: Path) -> list[str]:
        paths = (str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        return sorted(path.replace("image_0", "external") for path in paths)

    assert files(ours) == sorted([*files(theirs), "spear.json"])
    a, b = (json.loads((folder / "meta/info.json").read_text()) for folder in (theirs, ours))
    assert list(a) == list(b)
    for key in set(a) - {"features", "robot_type"}:
        assert a[key] == b[key], key
    features = {name.replace("image_0", "external"): f for name, f in a["features"].items()}
    assert [name for name in b["features"] if name not in EXTRA] == list(features)
    for name, feature in features.items():
        if name not in (
            "observation.state",
            "action",
        ):  # theirs have Euler angles, ours a quaternion
            assert feature == b["features"][name]
        else:
            assert list(feature) == list(b["features"][name])

    data, episodes = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
    for file in (data, episodes, "meta/tasks.parquet"):
        schema = {
            f.name.replace("image_0", "external"): f.type for f in pq.read_schema(theirs / file)
        }
        written = {f.name: f.type for f in pq.read_schema(ours / file)}
        own = {
            n
            for n in written
            if n in EXTRA or (n.startswith("stats/") and n.split("/")[1] in EXTRA)
        }
        assert [n for n in written if n not in own] == list(schema)
        for name, kind_of in schema.items():
            assert str(written[name]).replace("[8]", "[7]") == str(kind_of), f"{file} {name}"
    assert (
        pq.ParquetFile(ours / data).num_row_groups
        == pq.ParquetFile(theirs / data).num_row_groups
        == 8
    )
    for folder in (theirs, ours):
        table = pandas.read_parquet(folder / "meta/tasks.parquet")
        assert (
            list(table.columns) == ["task_index"]
            and table.loc["put carrot on plate"].task_index == 3
        )
    a, b = (json.loads((folder / "meta/stats.json").read_text()) for folder in (theirs, ours))
    assert set(b) - {"action_mask", "success"} == {
        name.replace("image_0", "external") for name in a
    }
    for name, stats in a.items():
        mine = b[name.replace("image_0", "external")]
        assert list(mine) == list(stats)
        if name in ("observation.state", "action"):
            continue
        picture = "images" in name  # of pictures, the library's own std is not that of the pixels
        for which in ("min", "max", "mean", "count", *(() if picture else ("std",))):
            np.testing.assert_allclose(
                mine[which], stats[which], atol=1e-6, err_msg=f"{name} {which}"
            )
    a, b = (pq.read_table(folder / episodes).to_pylist() for folder in (theirs, ours))
    for row, mine in zip(a, b, strict=True):
        for name, value in row.items():
            if not name.startswith("stats/"):
                assert mine[name.replace("image_0", "external")] == value, name


def test_the_datasets_library_opens_the_rows(
    rewritten: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    file = rewritten[1] / "v3.0_image/data/chunk-000/file-000.parquet"
    rows = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path))
    assert isinstance(rows.features["observation.images.external"], datasets.Image)
    assert len(rows) == 80 and rows[10]["observation.images.external"].size == (64, 64)
    assert len(rows[10]["observation.state"]) == 8 and rows[10]["episode_index"] == 1


@pytest.mark.parametrize("kind", ["image", "video"])
def test_what_is_written_is_read_back(
    rewritten: tuple[Path, Path, Path], tmp_path: Path, kind: str
) -> None:
    theirs, ours, layout = rewritten
    before = list(read_episodes(theirs / "v3.0_image", layout_file=layout))
    for a, b in zip(before, read_episodes(ours / f"v3.0_{kind}"), strict=True):
        assert_same(replace(a, images={}), replace(b, images={}), 1e-7)
        if kind == "image":
            assert list(a.images["external"]) == list(b.images["external"])
        else:
            for x, y in zip(a.images["external"], b.images["external"], strict=True):
                assert np.abs(decode_image(x).astype(float) - decode_image(y)).mean() < 12
    store, reasons = open_store(ours / f"v3.0_{kind}", tmp_path)
    assert len(store) == 8 and not reasons and store.source(3) == before[3].source
    (prepared,) = tmp_path.glob(f"v3.0_{kind}-*")
    assert len(EpisodeStore(prepared)) == 8


def test_files_are_cut_and_every_part_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "MAX_DATA_FILE_MIB": 0,
        "MAX_VIDEO_FILE_MIB": -1,
        "EPISODES_PER_FILE": 2,
        "FILES_PER_CHUNK": 2,
    }.items():
        monkeypatch.setattr(lerobot_write, name, value)
    action = np.tile(np.array([0.01, 0, 0, 1, 0, 0, 0, 1], np.float32), (5, 1))
    episodes = [
        make_episode(0, success=True),
        make_episode(1, 5, action=action, success=False),
        make_episode(2, 1),
    ]
    episodes += [make_episode(3, 5, action=action, action_mask=np.array([1, 0, 1, 1, 0], bool))]
    for kind in ("image", "video"):
        folder = tmp_path / kind
        assert write_lerobot(episodes, folder, kind) == 4
        assert (folder / "data/chunk-001/file-001.parquet").is_file()
        assert (folder / "meta/episodes/chunk-000/file-001.parquet").is_file()
        read = list(read_episodes(folder))
        assert [e.success for e in read] == [True, False, None, None]
        assert [len(e) for e in read] == [6, 5, 1, 5]
        np.testing.assert_array_equal(read[1].action, action)
        np.testing.assert_array_equal(read[3].action_mask, [1, 0, 1, 1, 0])
        for a, b in zip(episodes, read, strict=True):
            for x, y in zip(a.images["external"], b.images["external"], strict=True):
                assert np.abs(decode_image(x).astype(float) - decode_image(y)).mean() < 3
    assert open_lerobot(tmp_path / "image").tasks == {0: "push the block 0", 1: "push the block 1"}


def test_what_cannot_be_one_dataset_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    small = make_episode(1, size=(48, 48))
    wrist = {**make_episode(1).images, "wrist": make_episode(1).images["external"]}
    for bad, message in (
        (make_episode(1, rate_hz=10.0), "made#1 is at 10 Hz"),
        (make_episode(1, images=wrist), "made#1 has external, wrist"),
        (small, "made#1 step 0 camera 'external' is 48 x 48"),
        (make_episode(1, instruction=" "), "instruction: made#1"),
    ):
        refuses(message, write_lerobot, [make_episode(0), bad], tmp_path / "set")
    refuses(
        "AV1 needs even sides of at least 64", write_lerobot, [small], tmp_path / "set", "video"
    )
    refuses("no episodes", write_lerobot, [], tmp_path / "set")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "set").mkdir()
    (tmp_path / "set/mine.txt").write_text("keep me")
    refuses("not empty", write_lerobot, [make_episode(0)], tmp_path / "set")
    assert (tmp_path / "set/mine.txt").read_text() == "keep me"


def test_two_exports_into_one_folder_are_kept_apart(tmp_path: Path) -> None:
    def meanwhile() -> Iterator[Episode]:
        yield make_episode(0)
        refuses(r"\.set\.part: another process", write_lerobot, [make_episode(1)], tmp_path / "set")
        yield make_episode(2)

    assert write_lerobot(meanwhile(), tmp_path / "set") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert [e.instruction for e in read_episodes(tmp_path / "set")] == [
        make_episode(i).instruction for i in (0, 2)
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="scheduling is told as Linux tells it")
def test_no_thread_becomes_a_real_time_one(tmp_path: Path) -> None:
    # As root, SVT-AV1 makes the calling thread one, which would starve whatever else is on the machine.
    def schedulers() -> set[int]:
        found = set()
        for thread in map(int, os.listdir("/proc/self/task")):
            with suppress(OSError):  # it has ended
                found.add(os.sched_getscheduler(thread))
        return found

    before = schedulers()
    with closing(VideoWriter(tmp_path / "video.mp4", 64, 64, 10)) as video:
        for _ in range(3):
            video.write(np.zeros((64, 64, 3), np.uint8))
            assert schedulers() <= before
