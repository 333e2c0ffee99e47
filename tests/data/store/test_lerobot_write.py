"""Datasets of our LeRobot v3.0 writer are like those of LeRobot's library, and are read back equal.

The shared folder has a dataset of 8 episodes that the library wrote (`their_folder`), once with
images and once with videos. Our writer copies the one with images (`our_folder`). The library's
dataset names the camera "image_0", and ours "external".
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from spear.data.store.prepare import open_or_prepare_store
from spear.types import Episode
from spear.util.images import decode_image

OWN_COLUMNS = ("action_mask", "success", "source")
"""Columns that only our datasets have."""
ROTATION_COLUMNS = ("observation.state", "action")
"""Columns with a rotation, which is Euler angles in their dataset (7 numbers) and a quaternion in
ours (8 numbers)."""
DATA_FILE = "data/chunk-000/file-000.parquet"
EPISODES_FILE = "meta/episodes/chunk-000/file-000.parquet"
TASKS_FILE = "meta/tasks.parquet"


def to_our_name(name: str) -> str:
    """Replace, in the name of a file or column, their name of the camera by ours."""
    return name.replace("image_0", "external")


def is_own_column(name: str) -> bool:
    """Whether a column is one of `OWN_COLUMNS`, or a statistic of one ("stats/source/count")."""
    is_statistic = name.startswith("stats/") and name.split("/")[1] in OWN_COLUMNS
    return name in OWN_COLUMNS or is_statistic


@pytest.fixture(scope="module")
def layout_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of their dataset, whose episodes are of BridgeData."""
    file = tmp_path_factory.mktemp("layout") / "bridge.json"
    cameras = {"external": "observation/images/image_0"}
    file.write_text(json.dumps({"like": "bridge_dataset", "images": cameras}))
    return file


@pytest.fixture(scope="module")
def our_folders(
    shared: Path, layout_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Our copies of their dataset: "image" or "video" -> folder."""
    source = shared / "data/lerobot/v3.0_image"
    folders: dict[str, Path] = {}
    for kind in ("image", "video"):
        folders[kind] = tmp_path_factory.mktemp("ours") / f"v3.0_{kind}"
        episodes = read_episodes(source, layout_file=layout_file)
        num_written = write_lerobot(episodes, folders[kind], images=kind)
        assert num_written == 8  # all episodes of their dataset
    return folders


@pytest.fixture(params=["image", "video"])
def kind(request: pytest.FixtureRequest) -> str:
    """How the dataset has its images: a test with this fixture runs for both kinds."""
    return request.param


@pytest.fixture
def their_folder(shared: Path, kind: str) -> Path:
    """The dataset that the library wrote."""
    return shared / f"data/lerobot/v3.0_{kind}"


@pytest.fixture
def our_folder(our_folders: dict[str, Path], kind: str) -> Path:
    """The copy that our writer wrote."""
    return our_folders[kind]


def read_json_file(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def list_files(folder: Path) -> list[str]:
    """List all files below a folder, under our name of the camera."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(to_our_name(str(path.relative_to(folder))) for path in paths)


def test_our_files_are_those_of_the_library_and_the_layout(
    their_folder: Path, our_folder: Path
) -> None:
    assert list_files(our_folder) == sorted([*list_files(their_folder), "spear.json"])


def test_info_has_the_same_keys_and_values(their_folder: Path, our_folder: Path) -> None:
    their_info = read_json_file(their_folder / "meta/info.json")
    our_info = read_json_file(our_folder / "meta/info.json")

    compared_keys = set(their_info) - {"features", "robot_type"}  # the next test compares features
    assert list(our_info) == list(their_info)
    for key in compared_keys:
        assert our_info[key] == their_info[key], key


def test_info_describes_features_in_the_same_way(their_folder: Path, our_folder: Path) -> None:
    their_features = read_json_file(their_folder / "meta/info.json")["features"]
    our_features = read_json_file(our_folder / "meta/info.json")["features"]

    common_names = [name for name in our_features if name not in OWN_COLUMNS]
    assert common_names == [to_our_name(name) for name in their_features]
    for name, feature in their_features.items():
        our_feature = our_features[to_our_name(name)]
        if name in ROTATION_COLUMNS:  # they differ in their number of values
            assert list(our_feature) == list(feature)
        else:
            assert our_feature == feature


@pytest.mark.parametrize("file", [DATA_FILE, EPISODES_FILE, TASKS_FILE])
def test_parquet_schemas_are_those_of_lerobot(
    their_folder: Path, our_folder: Path, file: str
) -> None:
    their_types = {
        to_our_name(field.name): field.type for field in pq.read_schema(their_folder / file)
    }
    our_types = {field.name: field.type for field in pq.read_schema(our_folder / file)}

    assert [name for name in our_types if not is_own_column(name)] == list(their_types)
    for name, their_type in their_types.items():
        # With a quaternion, a state has one number more than with Euler angles.
        our_type = str(our_types[name]).replace("[8]", "[7]")
        assert our_type == str(their_type), name


def test_each_episode_is_a_row_group(their_folder: Path, our_folder: Path) -> None:
    assert pq.ParquetFile(their_folder / DATA_FILE).num_row_groups == 8
    assert pq.ParquetFile(our_folder / DATA_FILE).num_row_groups == 8


def test_tasks_are_the_index_of_a_pandas_table(their_folder: Path, our_folder: Path) -> None:
    for folder in (their_folder, our_folder):
        table = pandas.read_parquet(folder / TASKS_FILE)
        assert list(table.columns) == ["task_index"]
        assert table.loc["put carrot on plate"].task_index == 3


def test_statistics_are_those_of_lerobot(their_folder: Path, our_folder: Path) -> None:
    their_stats = read_json_file(their_folder / "meta/stats.json")
    our_stats = read_json_file(our_folder / "meta/stats.json")

    assert set(our_stats) - set(OWN_COLUMNS) == {to_our_name(name) for name in their_stats}
    for name, their_feature_stats in their_stats.items():
        our_feature_stats = our_stats[to_our_name(name)]
        assert list(our_feature_stats) == list(their_feature_stats)
        if name in ROTATION_COLUMNS:  # statistics of angles are not those of quaternions
            continue
        compared_statistics = ["min", "max", "mean", "count"]
        # Our standard deviation of images is that of their pixels. The library's is another one.
        if "images" not in name:
            compared_statistics.append("std")
        for statistic in compared_statistics:
            np.testing.assert_allclose(
                our_feature_stats[statistic],
                their_feature_stats[statistic],
                atol=1e-6,
                err_msg=f"{name} {statistic}",
            )


def test_the_rows_of_episodes_are_those_of_lerobot(their_folder: Path, our_folder: Path) -> None:
    their_rows = pq.read_table(their_folder / EPISODES_FILE).to_pylist()
    our_rows = pq.read_table(our_folder / EPISODES_FILE).to_pylist()

    for their_row, our_row in zip(their_rows, our_rows, strict=True):
        for name, value in their_row.items():
            if not name.startswith("stats/"):
                assert our_row[to_our_name(name)] == value, name


def test_the_datasets_library_opens_the_rows(our_folders: dict[str, Path], tmp_path: Path) -> None:
    """The 8 episodes have 10 steps each, so row 10 is the first of episode 1."""
    rows = datasets.Dataset.from_parquet(
        str(our_folders["image"] / DATA_FILE), cache_dir=str(tmp_path)
    )

    assert isinstance(rows.features["observation.images.external"], datasets.Image)
    assert len(rows) == 80
    assert rows[10]["observation.images.external"].size == (64, 64)
    assert len(rows[10]["observation.state"]) == 8
    assert rows[10]["episode_index"] == 1


def assert_similar_images(
    images: list[bytes], expected_images: list[bytes], max_difference: float
) -> None:
    """Assert that the mean difference of images is less than `max_difference` gray levels.

    Videos change images a little.
    """
    for encoded, expected in zip(images, expected_images, strict=True):
        difference = decode_image(encoded).astype(float) - decode_image(expected)
        assert np.abs(difference).mean() < max_difference


@pytest.fixture
def source_episodes(shared: Path, layout_file: Path) -> list[Episode]:
    """The episodes of their dataset, which our writer copied."""
    return list(read_episodes(shared / "data/lerobot/v3.0_image", layout_file=layout_file))


def test_states_and_actions_are_read_back(source_episodes: list[Episode], our_folder: Path) -> None:
    for source, episode in zip(source_episodes, read_episodes(our_folder), strict=True):
        assert_same(replace(episode, images={}), replace(source, images={}), atol=1e-7)


def test_images_are_read_back(source_episodes: list[Episode], our_folder: Path, kind: str) -> None:
    for source, episode in zip(source_episodes, read_episodes(our_folder), strict=True):
        images = list(episode.images["external"])
        source_images = list(source.images["external"])
        if kind == "image":
            assert images == source_images
        else:
            assert_similar_images(images, source_images, max_difference=12)


def test_an_export_is_prepared_for_training(
    source_episodes: list[Episode], our_folder: Path, tmp_path: Path, kind: str
) -> None:
    store, skip_reasons = open_or_prepare_store(our_folder, tmp_path)

    assert len(store) == 8
    assert not skip_reasons
    assert store.source(3) == source_episodes[3].source
    (prepared,) = tmp_path.glob(f"v3.0_{kind}-*")
    assert len(EpisodeStore(prepared)) == 8


SMALL_ACTION = np.tile(np.array([0.01, 0, 0, 1, 0, 0, 0, 1], np.float32), (5, 1))
"""Actions of five steps: 1 cm along x, with an open gripper."""


@pytest.fixture
def varied_episodes() -> list[Episode]:
    """Episodes of different lengths and outcomes, with and without actions and masks."""
    mask = np.array([1, 0, 1, 1, 0], bool)
    return [
        make_episode(0, success=True),
        make_episode(1, num_steps=5, action=SMALL_ACTION, success=False),
        make_episode(2, num_steps=1),
        make_episode(3, num_steps=5, action=SMALL_ACTION, action_mask=mask),
    ]


@pytest.fixture
def folder_of_small_files(
    varied_episodes: list[Episode], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A dataset of four episodes in which every episode begins a new file of each kind.

    Only the files of `meta/episodes` have two episodes. A folder has two files.
    """
    monkeypatch.setattr(lerobot_write, "MAX_DATA_FILE_MIB", 0)
    # Below 0, because a video counts as 0 bytes until the encoder returns its first data.
    monkeypatch.setattr(lerobot_write, "MAX_VIDEO_FILE_MIB", -1)
    monkeypatch.setattr(lerobot_write, "EPISODES_PER_FILE", 2)
    monkeypatch.setattr(lerobot_write, "FILES_PER_CHUNK", 2)
    assert write_lerobot(varied_episodes, tmp_path / kind, images=kind) == 4
    return tmp_path / kind


def test_large_files_are_split(folder_of_small_files: Path) -> None:
    assert (folder_of_small_files / "data/chunk-001/file-001.parquet").is_file()
    assert (folder_of_small_files / "meta/episodes/chunk-000/file-001.parquet").is_file()


def test_every_part_survives_in_split_files(
    varied_episodes: list[Episode], folder_of_small_files: Path
) -> None:
    episodes = list(read_episodes(folder_of_small_files))

    # These are the values in `varied_episodes`.
    assert [episode.success for episode in episodes] == [True, False, None, None]
    assert [len(episode) for episode in episodes] == [6, 5, 1, 5]
    np.testing.assert_array_equal(episodes[1].action, SMALL_ACTION)
    np.testing.assert_array_equal(episodes[3].action_mask, [1, 0, 1, 1, 0])
    for episode, source in zip(episodes, varied_episodes, strict=True):
        images = list(episode.images["external"])
        assert_similar_images(images, list(source.images["external"]), max_difference=3)


def test_equal_instructions_are_one_task(folder_of_small_files: Path) -> None:
    """`make_episode` alternates between two instructions."""
    tasks = open_lerobot(folder_of_small_files).tasks

    assert tasks == {0: "push the block 0", 1: "push the block 1"}


IMAGES = make_episode(1).images["external"]
TWO_CAMERAS = {"external": IMAGES, "wrist": IMAGES}


@pytest.mark.parametrize(
    ("other_episode", "message"),
    [
        (make_episode(1, rate_hz=10.0), "made#1 is at 10 Hz"),
        (make_episode(1, images=TWO_CAMERAS), "made#1 has the cameras external, wrist"),
        (make_episode(1, size=(48, 48)), "made#1 step 0 camera 'external' has 48 x 48"),
        (make_episode(1, instruction=" "), "made#1 has an empty instruction"),
    ],
)
def test_episodes_that_differ_in_form_are_refused_and_leave_nothing(
    tmp_path: Path, other_episode: Episode, message: str
) -> None:
    refuses(message, write_lerobot, [make_episode(0), other_episode], tmp_path / "set")

    assert list(tmp_path.iterdir()) == []


def test_a_video_of_small_images_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    small = make_episode(1, size=(48, 48))

    message = "AV1 needs even sides of at least 64"
    refuses(message, write_lerobot, [small], tmp_path / "set", images="video")
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_without_episodes_is_refused(tmp_path: Path) -> None:
    refuses("there are no episodes", write_lerobot, [], tmp_path / "set")

    assert list(tmp_path.iterdir()) == []


def test_an_export_into_a_folder_with_files_is_refused_and_leaves_them(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/mine.txt").write_text("do not touch")

    refuses("not empty", write_lerobot, [make_episode(0)], tmp_path / "set")
    assert (tmp_path / "set/mine.txt").read_text() == "do not touch"


def test_one_export_into_a_folder_at_a_time(tmp_path: Path) -> None:
    """While one export waits for its second episode, another export is refused."""

    def export_meanwhile() -> Iterator[Episode]:
        yield make_episode(0)
        message = r"another process is exporting in the folder .*\.set\.part"
        refuses(message, write_lerobot, [make_episode(1)], tmp_path / "set")
        yield make_episode(2)

    assert write_lerobot(export_meanwhile(), tmp_path / "set") == 2

    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    instructions = [episode.instruction for episode in read_episodes(tmp_path / "set")]
    assert instructions == [make_episode(0).instruction, make_episode(2).instruction]


def list_schedulers() -> set[int]:
    """The scheduling policies of all threads of this process."""
    schedulers: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError):  # the thread has ended
            schedulers.add(os.sched_getscheduler(int(thread)))
    return schedulers


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the scheduling of threads")
def test_no_thread_becomes_a_real_time_one(tmp_path: Path) -> None:
    """If root starts SVT-AV1, it makes the calling thread a real-time thread.

    No other process of the machine could run then.
    """
    schedulers_before = list_schedulers()

    writer = VideoWriter(tmp_path / "video.mp4", height=64, width=64, rate_hz=10)
    with closing(writer) as video:
        for _ in range(3):
            video.write(np.zeros((64, 64, 3), np.uint8))
            assert list_schedulers() <= schedulers_before
