"""LeRobot: datasets that its own library wrote, read exactly; broken ones named."""

import json
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tiny import LAYOUT, copy_dataset, edit_json, make_episode
from refusals import refuses
from spear.audit.dataset_audit import audit
from spear.audit.describe import describe
from spear.audit.inspect import inspect
from spear.data.readers.formats import read_episodes
from spear.data.readers.lerobot import open_lerobot
from spear.data.readers.rlds import open_rlds
from spear.data.store.lerobot_write import write_lerobot
from spear.data.store.prepare import prepare
from spear.errors import Notice, SpearError
from spear.util.images import decode_image

VERSIONS = ("v2.1_video", "v3.0_image", "v3.0_video")


@pytest.fixture(scope="session")
def lerobot(shared: Path) -> Path:
    return shared / "data" / "lerobot"


@pytest.fixture(scope="session")
def raw(shared: Path) -> list[Any]:
    """The same episodes as the RLDS folder has them."""
    return [
        steps for _, steps in open_rlds(shared / "data/bridge_v2_sample").read_steps("train[:8]")
    ]


@pytest.mark.parametrize("version", VERSIONS)
def test_what_the_library_wrote_is_read_exactly(
    lerobot: Path, raw: list[Any], version: str
) -> None:
    folder = open_lerobot(lerobot / version)
    assert folder.info.codebase_version == version[:4] and folder.info.fps == 5
    assert folder.split_lengths == {"train": 8} and folder.cameras == ["observation.images.image_0"]
    assert [e.length for e in folder.episodes] == [10] * 8 and len(folder.tasks) == 4
    for episode, steps in zip(folder.episodes, raw, strict=True):
        got = folder.read_episode(episode.index)
        np.testing.assert_array_equal(got["observation/state"], steps["observation"]["state"])
        np.testing.assert_array_equal(got["action"], steps["action"])
        np.testing.assert_array_equal(got["frame_index"], np.arange(10))
        np.testing.assert_array_equal(got["index"], 10 * episode.index + np.arange(10))
        np.testing.assert_array_equal(got["timestamp"], (np.arange(10) / 5).astype(np.float32))
        assert set(got["task"]) == {steps["language_instruction"][0]}
        images = [decode_image(image).astype(float) for image in got["observation/images/image_0"]]
        truth = [decode_image(image).astype(float) for image in steps["observation"]["image_0"]]
        errors = np.array([np.abs(a - b).mean() for a, b in zip(images, truth, strict=True)])
        # Lossless images: only the difference of two JPEG decoders; AV1 at 64 x 64 costs a few grey levels.
        assert len(images) == 10 and errors.max() < (1.5 if "image" in version else 12)
        if "video" in version:  # and every frame is the one of its row, where frames differ at all
            for step, image in enumerate(images):
                distance = [np.abs(image - other).mean() for other in truth]
                assert distance[step] <= min(distance) + 1.0


def test_ranges_of_columns_are_shown(lerobot: Path, raw: list[Any]) -> None:
    rows = np.concatenate([steps["observation"]["state"] for steps in raw])
    for said in map(inspect, (lerobot / version for version in VERSIONS)):
        for end in (rows.min(0), rows.max(0)):
            assert "".join(f" {number:>9.4g}" for number in end) in said


def change_rows(file: Path, change: Any) -> None:
    pq.write_table(change(pq.read_table(file)), file)


def test_bad_episodes_are_skipped_by_name(lerobot: Path, tmp_path: Path) -> None:
    folder = copy_dataset(lerobot / "v2.1_video", tmp_path / "set")
    data, videos = folder / "data/chunk-000", folder / "videos/chunk-000/observation.images.image_0"
    listed = folder / "meta/episodes.jsonl"
    listed.write_text("\n".join(listed.read_text().splitlines()[::-1]))  # in whatever order
    change_rows(data / "episode_000002.parquet", lambda t: t.slice(0, 9))
    (data / "episode_000003.parquet").write_bytes(
        (data / "episode_000003.parquet").read_bytes()[:900]
    )
    (videos / "episode_000004.mp4").unlink()
    video = (videos / "episode_000005.mp4").read_bytes()
    (videos / "episode_000005.mp4").write_bytes(video[: len(video) // 2])
    change_rows(data / "episode_000006.parquet", lambda t: t.drop_columns(["observation.state"]))
    for other in (["a"] * 10, [["a"]] * 10, [None] * 10, [[1.0]] * 9 + [[]], [{"x": 1.0}] * 10):
        added = lambda t, row=other: t.append_column(f"words{len(t.columns)}", pa.array(row))  # noqa: E731
        change_rows(data / "episode_000000.parquet", added)
    assert describe(folder)["position"] == "observation/state[0:3]" and "words" in inspect(folder)
    reasons: list[str] = []
    good = list(read_episodes(folder, on_error=lambda error: reasons.append(str(error))))
    assert [e.source for e in good] == [f"set/train#{i}" for i in (0, 1, 7)]
    named = ("set#2", "episode_000003.parquet", "episode_000004.mp4", "episode_000005.mp4", "state")
    assert all(
        name in reason and "\n" not in reason for reason, name in zip(reasons, named, strict=True)
    )


def test_rows_that_are_lost_are_noticed_by_their_times(tmp_path: Path) -> None:
    """Where there are no videos nothing else tells: a second of motion would become one step of it."""
    write_lerobot([make_episode(0), make_episode(1)], folder := tmp_path / "set")
    (data,) = folder.glob("data/*/*.parquet")
    for rate, gap, good in ((5, 0.0, 2), (5, 0.05, 2), (5, 1.0, 1), (10, 0.0, 0), (6, 0.0, 0)):
        copy = shutil.copytree(folder, tmp_path / f"{rate}-{gap}" / "set")
        times = np.tile(np.arange(6) / 5, 2) + gap * (np.arange(12) > 8)
        place, column = (
            pq.read_schema(data).get_field_index("timestamp"),
            pa.array(times, pa.float32()),
        )
        changed = pq.read_table(data).set_column(place, "timestamp", column)
        pq.write_table(changed, copy / data.relative_to(folder))
        edit_json(copy / "meta/info.json", lambda info, fps=rate: info.update(fps=fps))
        reasons: list[SpearError] = []
        assert len(list(read_episodes(copy, on_error=reasons.append))) == good
        assert len(reasons) == 2 - good and all("in time" in str(reason) for reason in reasons)
        assert good == 2 or ("fps" if rate != 5 else "set#1: rows 2 and 3") in str(reasons[0])


def test_other_metadata_are_other_data(lerobot: Path, tmp_path: Path) -> None:
    folder = copy_dataset(lerobot / "v2.1_video", tmp_path / "set")
    prepare(folder, tmp_path / "out", "train[:2]")
    for file, old, new in (("tasks.jsonl", "cup", "mug"), ("info.json", '"fps": 5', '"fps": 10')):
        text = (folder / "meta" / file).read_text()
        (folder / "meta" / file).write_text(text.replace(old, new))
        refuses(r"in another way \(data is", prepare, folder, tmp_path / "out", "train[:2]")
        (folder / "meta" / file).write_text(text)
    assert prepare(folder, tmp_path / "out", "train[:2]")[0] == 2


def test_metadata_that_are_not_in_order(lerobot: Path, tmp_path: Path) -> None:
    folder = copy_dataset(lerobot / "v3.0_image", tmp_path / "set")
    info = json.loads((folder / "meta/info.json").read_text())
    for change, message in (
        ({"codebase_version": "v1.6"}, "info.json: codebase_version "),
        ({"total_episodes": 9}, "info.json says 9, 8 are listed"),
        ({"fps": 0}, "unreadable: .*info.json: fps "),
        ({"features": None}, "unreadable: .*info.json: features "),
    ):
        (folder / "meta/info.json").write_text(json.dumps({**info, **change}))
        refuses(message, open_lerobot, folder)
    (folder / "meta/info.json").write_text(json.dumps(info))
    (folder / "meta/tasks.parquet").unlink()
    refuses(r"unreadable: .*meta: .*tasks\.parquet", open_lerobot, folder)


def test_metadata_that_contradict_themselves(lerobot: Path, tmp_path: Path) -> None:
    folder = copy_dataset(lerobot / "v2.1_video", tmp_path / "set")
    for splits in ({"train": "0:6"}, {"train": "0:8", "val": "6:8"}):  # left out, or taken twice
        edit_json(folder / "meta/info.json", lambda info, splits=splits: info.update(splits=splits))
        with pytest.warns(Notice, match="splits"):
            assert open_lerobot(folder).split_lengths["train"] == int(splits["train"][2:])
    for name, key in (
        ("tasks", "task_index"),
        ("episodes", "episode_index"),
        ("episodes", "length"),
    ):
        file = copy_dataset(lerobot / "v2.1_video", tmp_path / key) / f"meta/{name}.jsonl"
        lines = file.read_text().splitlines()
        file.write_text("\n".join([lines[1], *lines[1:]]).replace('"length": 10', '"length": -1'))
        refuses(key, open_lerobot, tmp_path / key)
    folder = copy_dataset(lerobot / "v3.0_image", tmp_path / "columns")
    change_rows(
        folder / "meta/tasks.parquet", lambda t: t.add_column(0, "split", pa.array(["a"] * len(t)))
    )
    assert open_lerobot(folder).tasks == open_lerobot(lerobot / "v3.0_image").tasks
    (folder / "spear.json").write_text(json.dumps({**LAYOUT, "rate_hz": 30.0}))
    refuses("rate_hz", lambda: next(read_episodes(folder)))
    write_lerobot([make_episode(0)], folder := tmp_path / "quaternions")
    edit_json(folder / "spear.json", lambda layout: layout.update(rotation_format="quat_xyzw"))
    refuses("rotation_format", lambda: next(read_episodes(folder)))
    state = [*"xyz", "qx", "qy", "qz", "qw", "gripper"]
    edit_json(
        folder / "meta/info.json",
        lambda info: info["features"]["observation.state"].update(names=state),
    )
    assert next(read_episodes(folder)) and describe(folder)["rotation_format"] == "quat_xyzw"
    image, depth = "observation.images.external", {"is_depth_map": True}
    edit_json(folder / "meta/info.json", lambda info: info["features"][image].update(info=depth))
    refuses("observation/images/external", lambda: next(read_episodes(folder)))
    assert "80 x 3, depth: not read" in inspect(folder)


def test_files_that_do_not_fit_their_rows_are_named(lerobot: Path, tmp_path: Path) -> None:
    folder = copy_dataset(lerobot / "v3.0_video", tmp_path / "set")
    file = folder / "videos/observation.images.image_0/chunk-000/file-000.mp4"
    with av.open(str(file)) as source:
        frames = [f.to_ndarray(format="rgb24") for f in source.decode(video=0)][:75]
    with av.open(str(file), "w", format="mp4") as out:
        stream: Any = out.add_stream("libx264", rate=5)
        stream.width = stream.height = 64
        for image in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())
    reasons: list[str] = []
    good = list(read_episodes(folder, on_error=lambda error: reasons.append(str(error))))
    assert (
        len(good) == 7
        and "frames and rows differ: set#7" in reasons[0]
        and "5 frames" in reasons[0]
    )
    assert "skipped" not in inspect(lerobot / "v3.0_video") and f"broken video: {file}" in inspect(
        folder
    )
    for broken in (file, folder / "data/chunk-000/file-000.parquet"):
        broken.write_bytes(broken.read_bytes()[:-2000])
        refuses(rf"no good episode.*{broken}", inspect, folder)
        refuses(
            "bad episodes: 8 of 8|no good episode", audit, folder
        )  # the numbers alone are consistent
    folder = copy_dataset(lerobot / "v3.0_image", tmp_path / "unnumbered")
    change_rows(
        folder / "data/chunk-000/file-000.parquet", lambda t: t.drop_columns(["episode_index"])
    )
    refuses(r"file-000\.parquet: .*episode_index", next, read_episodes(folder))
