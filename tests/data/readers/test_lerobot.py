"""Datasets that LeRobot's own library wrote are read exactly, and what is broken is named.

The sample datasets are the first 8 episodes of the sample of BridgeData, 10 steps each, in three
versions of LeRobot's format. Datasets that a test writes itself have one or two episodes of
`make_episode`, 6 steps each at 5 Hz.
"""

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tiny import LAYOUT, copy_dataset, edit_json, make_episode
from refusals import refuses
from spear.audit.dataset_audit import audit_dataset
from spear.audit.describe import propose_layout
from spear.audit.inspect import describe_dataset
from spear.data.readers.formats import read_episodes
from spear.data.readers.lerobot import LeRobotFolder, open_lerobot
from spear.data.readers.rlds import open_rlds
from spear.data.store.lerobot_write import write_lerobot
from spear.data.store.prepare import prepare
from spear.errors import Notice
from spear.types import Episode
from spear.util.images import decode_image

VERSIONS = ("v2.1_video", "v3.0_image", "v3.0_video")
NUM_EPISODES = 8
STEPS_PER_EPISODE = 10
IMAGE_COLUMN = "observation/images/image_0"


@pytest.fixture(scope="session")
def lerobot(shared: Path) -> Path:
    """The folder with one sample dataset per version."""
    return shared / "data" / "lerobot"


@pytest.fixture(scope="session")
def rlds_steps(shared: Path) -> list[Any]:
    """The columns of the same episodes, read from the RLDS format."""
    folder = open_rlds(shared / "data/bridge_v2_sample")
    return [steps for _, steps in folder.read_steps("train[:8]")]


@pytest.fixture(scope="module", params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    """Each version in turn: a test that uses it runs for all of them."""
    return request.param


@pytest.fixture(scope="module")
def folder(lerobot: Path, version: str) -> LeRobotFolder:
    """The sample dataset of the version."""
    return open_lerobot(lerobot / version)


@pytest.fixture(scope="module")
def lerobot_steps(folder: LeRobotFolder) -> list[dict[str, Any]]:
    """The columns of all episodes of the version."""
    return [folder.read_episode_columns(episode.index) for episode in folder.episodes]


def test_the_metadata_are_read(folder: LeRobotFolder, version: str) -> None:
    assert folder.info.codebase_version == version[:4]  # "v2.1" or "v3.0"
    assert folder.info.fps == 5
    assert folder.split_lengths == {"train": NUM_EPISODES}
    assert folder.image_features == ["observation.images.image_0"]
    assert [episode.length for episode in folder.episodes] == [STEPS_PER_EPISODE] * NUM_EPISODES
    assert len(folder.tasks) == 4


def test_numbers_are_read_exactly(
    lerobot_steps: list[dict[str, Any]], rlds_steps: list[Any]
) -> None:
    for index, (columns, expected) in enumerate(zip(lerobot_steps, rlds_steps, strict=True)):
        steps = np.arange(STEPS_PER_EPISODE)
        first_row = STEPS_PER_EPISODE * index
        times_s = (steps / 5).astype(np.float32)
        state = columns["observation/state"]
        np.testing.assert_array_equal(state, expected["observation"]["state"])
        np.testing.assert_array_equal(columns["action"], expected["action"])
        np.testing.assert_array_equal(columns["frame_index"], steps)
        np.testing.assert_array_equal(columns["index"], first_row + steps)
        np.testing.assert_array_equal(columns["timestamp"], times_s)


def test_instructions_are_read_exactly(
    lerobot_steps: list[dict[str, Any]], rlds_steps: list[Any]
) -> None:
    for columns, expected in zip(lerobot_steps, rlds_steps, strict=True):
        assert set(columns["task"]) == {expected["language_instruction"][0]}


def decode_images(encoded_images: list[bytes]) -> np.ndarray:
    """Decode images to [T, h, w, 3], as floats."""
    return np.array([decode_image(encoded).astype(float) for encoded in encoded_images])


def test_images_are_read_up_to_their_compression(
    lerobot_steps: list[dict[str, Any]], rlds_steps: list[Any], version: str
) -> None:
    """Images differ by two JPEG decoders only. AV1 at 64 x 64 pixels costs a few gray levels."""
    max_difference = 1.5 if "image" in version else 12  # levels, mean over an image
    for columns, expected in zip(lerobot_steps, rlds_steps, strict=True):
        images = decode_images(columns[IMAGE_COLUMN])
        expected_images = decode_images(expected["observation"]["image_0"])
        assert len(images) == STEPS_PER_EPISODE
        differences = np.abs(images - expected_images).mean(axis=(1, 2, 3))  # [T]
        assert differences.max() < max_difference


def test_each_frame_is_the_one_of_its_row(
    lerobot_steps: list[dict[str, Any]], rlds_steps: list[Any]
) -> None:
    """An image is about as near to the image of its own step as to that of any step."""
    for columns, expected in zip(lerobot_steps, rlds_steps, strict=True):
        images = decode_images(columns[IMAGE_COLUMN])
        expected_images = decode_images(expected["observation"]["image_0"])
        for step, image in enumerate(images):
            distances = np.abs(image - expected_images).mean(axis=(1, 2, 3))  # [T]
            assert distances[step] <= distances.min() + 1.0


def test_ranges_of_columns_are_shown(lerobot: Path, rlds_steps: list[Any], version: str) -> None:
    rows = np.concatenate([steps["observation"]["state"] for steps in rlds_steps])

    overview = describe_dataset(lerobot / version)

    for bounds in (rows.min(0), rows.max(0)):
        line = "".join(f" {number:>9.4g}" for number in bounds)
        assert line in overview


def change_rows(file: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Replace the table of a Parquet file by what `change` makes of it."""
    pq.write_table(change(pq.read_table(file)), file)


def truncate(file: Path, num_bytes: int) -> None:
    """Keep only the first bytes of a file."""
    file.write_bytes(file.read_bytes()[:num_bytes])


def read_good(folder: Path) -> tuple[list[Episode], list[str]]:
    """Read the good episodes of a folder, and the reasons why the other ones are bad."""
    reasons: list[str] = []
    episodes = list(read_episodes(folder, on_error=lambda error: reasons.append(str(error))))
    return episodes, reasons


@pytest.fixture
def version_2_copy(lerobot: Path, tmp_path: Path) -> Path:
    """A copy of the version 2.1 that a test may change, with a `spear.json`."""
    return copy_dataset(lerobot / "v2.1_video", tmp_path / "set")


def test_bad_episodes_are_skipped_by_name(version_2_copy: Path) -> None:
    """Episodes 2 to 6 are damaged, each in another way."""
    data = version_2_copy / "data/chunk-000"
    videos = version_2_copy / "videos/chunk-000/observation.images.image_0"
    change_rows(data / "episode_000002.parquet", lambda table: table.slice(0, length=9))
    truncate(data / "episode_000003.parquet", 900)
    (videos / "episode_000004.mp4").unlink()
    truncate(videos / "episode_000005.mp4", (videos / "episode_000005.mp4").stat().st_size // 2)
    change_rows(
        data / "episode_000006.parquet", lambda table: table.drop_columns(["observation.state"])
    )

    episodes, reasons = read_good(version_2_copy)

    sources = [episode.source for episode in episodes]
    assert sources == [f"set/train#{index}" for index in (0, 1, 7)]
    assert len(reasons) == 5
    assert "set#2" in reasons[0]
    assert "episode_000003.parquet" in reasons[1]
    assert "episode_000004.mp4" in reasons[2]
    assert "episode_000005.mp4" in reasons[3]
    assert "state" in reasons[4]
    assert not any("\n" in reason for reason in reasons)


def test_episodes_may_be_listed_in_any_order(version_2_copy: Path) -> None:
    episodes_file = version_2_copy / "meta/episodes.jsonl"
    reversed_lines = episodes_file.read_text().splitlines()[::-1]
    episodes_file.write_text("\n".join(reversed_lines))

    indices = [episode.index for episode in open_lerobot(version_2_copy).episodes]

    assert indices == list(range(NUM_EPISODES))


TASKS = ["LiftCube", "lift the cube", "put the cube down"]
"""Tasks 0, 1 and 2, of which the first is only a name."""


def forget_own_format(folder: Path) -> None:
    """Remove the names by which `describe` recognizes a dataset of our own writer."""
    edit_json(folder / "meta/info.json", lambda info: info["features"]["action"].update(names=None))


def write_with_task_indices(folder: Path, column: str, cells: pa.Array) -> Path:
    """Write a dataset of two episodes, whose instructions are in a column of task indices.

    All rows have the `task_index` 0, which is only a name.

    Args:
        folder: The dataset's folder.
        column: The name of the column that the layout gives as instruction.
        cells: The 12 cells of this column: 6 of each episode.
    """
    write_lerobot([make_episode(0), make_episode(1)], folder)
    tasks = pa.table({"task_index": [0, 1, 2], "task": TASKS})
    pq.write_table(tasks, folder / "meta/tasks.parquet")
    (data,) = folder.glob("data/*/*.parquet")
    position = pq.read_schema(data).get_field_index("task_index")
    zeros = pa.array([0] * len(cells))
    change_rows(
        data,
        lambda table: table.set_column(position, "task_index", zeros).append_column(column, cells),
    )
    (episodes_file,) = folder.glob("meta/episodes/*/*.parquet")
    change_rows(episodes_file, lambda table: table.drop_columns(["tasks"]))
    forget_own_format(folder)
    column_path = column.replace(".", "/")
    edit_json(folder / "spear.json", lambda layout: layout.update(instruction=column_path))
    return folder


@pytest.mark.parametrize(
    ("column", "cells"),  # cells: task 1 in the first episode, task 2 in the second
    [
        ("language.instruction_id", pa.array([1] * 6 + [2] * 6, pa.int32())),
        ("subtask", pa.array([[1]] * 6 + [[2]] * 6, pa.list_(pa.int64(), 1))),
        ("annotation.coarse_action", pa.array([1] * 6 + [2] * 6, pa.uint8())),
    ],
)
def test_instructions_are_looked_up_by_an_index_column(
    tmp_path: Path, column: str, cells: pa.Array
) -> None:
    folder = write_with_task_indices(tmp_path / "set", column, cells)

    episodes, reasons = read_good(folder)

    assert reasons == []
    assert [episode.instruction for episode in episodes] == TASKS[1:]


def test_an_index_without_a_task_costs_its_episode(tmp_path: Path) -> None:
    cells = pa.array([1] * 6 + [9] * 6)
    folder = write_with_task_indices(tmp_path / "set", "subtask", cells)

    episodes, reasons = read_good(folder)

    assert len(episodes) == 1
    assert "subtask of set/train#1 names task 9" in reasons[0]


@pytest.mark.parametrize("column", ["language.instruction_id", "annotation.coarse_action"])
def test_a_column_of_indices_is_proposed_where_the_task_is_only_a_name(
    tmp_path: Path, column: str
) -> None:
    folder = write_with_task_indices(tmp_path / "set", column, pa.array([1] * 6 + [2] * 6))

    assert propose_layout(folder)["instruction"] == column.replace(".", "/")


def test_lerobot_s_own_task_needs_no_proposal(exported: Path) -> None:
    forget_own_format(exported)

    assert "instruction" not in propose_layout(exported)


@pytest.mark.parametrize("instruction", ["StackCube-v1", "open_drawer"])
def test_an_instruction_that_is_only_a_name_is_doubted(tmp_path: Path, instruction: str) -> None:
    write_lerobot([make_episode(0, instruction=instruction)], tmp_path / "set")

    with pytest.warns(Notice, match=f"{instruction}.*a name instead of a sentence"):
        prepare(tmp_path / "set", tmp_path / "out")


@pytest.mark.parametrize("images", ["image", "video"])
@pytest.mark.parametrize("cameras", [("external",), ("wrist", "external")])
def test_the_layout_of_our_own_export_is_proposed_exactly(
    tmp_path: Path, images: Literal["image", "video"], cameras: tuple[str, ...]
) -> None:
    """`describe` recognizes the columns of our own writer.

    For other datasets it proposes what explains the motions best. Injected disturbances, which
    `action_mask` masks, would mislead it.
    """
    pictures = make_episode(0).images["external"]
    episode = make_episode(0, images=dict.fromkeys(cameras, pictures))
    write_lerobot([episode], tmp_path / "set", images)

    proposal = propose_layout(tmp_path / "set")

    proposal.pop("facts")
    assert proposal == json.loads((tmp_path / "set/spear.json").read_text())


STRANGE_COLUMNS = {
    "texts": ["a"] * 10,
    "lists of texts": [["a"]] * 10,
    "empty cells": [None] * 10,
    "lists of different lengths": [[1.0]] * 9 + [[]],
    "structs": [{"x": 1.0}] * 10,
}


def test_columns_of_any_type_do_no_harm(version_2_copy: Path) -> None:
    file = version_2_copy / "data/chunk-000/episode_000000.parquet"
    table = pq.read_table(file)
    for name, cells in STRANGE_COLUMNS.items():
        table = table.append_column(name, pa.array(cells))
    pq.write_table(table, file)

    episodes, _ = read_good(version_2_copy)
    assert len(episodes) == NUM_EPISODES
    assert propose_layout(version_2_copy)["position"] == "observation/state[0:3]"
    assert "lists of texts" in describe_dataset(version_2_copy)


@pytest.mark.parametrize(
    ("fps", "gap_s", "num_good", "message"),
    [
        (5, 0.0, 2, ""),
        (5, 0.05, 2, ""),  # a quarter of a step is within the tolerance
        # Five steps are missing in the second episode.
        (5, 1.0, 1, "set#1 are broken (rows 2 and 3"),
        (10, 0.0, 0, "fps"),
        (6, 0.0, 0, "fps"),
    ],
)
def test_lost_rows_and_wrong_rates_are_noticed_by_their_times(
    tmp_path: Path, fps: int, gap_s: float, num_good: int, message: str
) -> None:
    """Two episodes at 5 Hz, of which the second has a gap before its step 3.

    `fps` is the rate that the metadata state. Without videos, only the timestamps show that rows
    are missing; unnoticed, the motion of a second would become one action.
    """
    folder = tmp_path / "set"
    write_lerobot([make_episode(0), make_episode(1)], folder)
    regular_times_s = np.tile(np.arange(6) / 5, 2)  # [12], of both episodes
    is_behind_gap = np.arange(12) > 8  # row 8 is step 2 of the second episode
    timestamps = pa.array(regular_times_s + gap_s * is_behind_gap, pa.float32())
    (data,) = folder.glob("data/*/*.parquet")
    index = pq.read_schema(data).get_field_index("timestamp")
    change_rows(data, lambda table: table.set_column(index, "timestamp", timestamps))
    edit_json(folder / "meta/info.json", lambda info: info.update(fps=fps))

    episodes, reasons = read_good(folder)

    assert len(episodes) == num_good
    assert len(reasons) == 2 - num_good
    for reason in reasons:
        assert "in time" in reason
        assert message in reason


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [("tasks.jsonl", "cup", "mug"), ("info.json", '"fps": 5', '"fps": 10')],
)
def test_other_metadata_are_other_data(
    version_2_copy: Path, tmp_path: Path, file: str, old: str, new: str
) -> None:
    """Preparing again is refused after a change of the metadata, until it is undone."""
    prepare(version_2_copy, tmp_path / "out", "train[:2]")
    metadata_file = version_2_copy / "meta" / file
    original_text = metadata_file.read_text()
    metadata_file.write_text(original_text.replace(old, new))

    message = r"in another way \(data is"
    refuses(message, prepare, version_2_copy, tmp_path / "out", "train[:2]")

    metadata_file.write_text(original_text)
    num_prepared, _ = prepare(version_2_copy, tmp_path / "out", "train[:2]")
    assert num_prepared == 2


@pytest.fixture
def version_3_copy(lerobot: Path, tmp_path: Path) -> Path:
    """A copy of the version 3.0 with images that a test may change, with a `spear.json`."""
    return copy_dataset(lerobot / "v3.0_image", tmp_path / "set")


@pytest.mark.parametrize(
    ("change", "message"),  # change: entries of info.json that replace its own
    [
        ({"codebase_version": "v1.6"}, r"info\.json cannot be read \(codebase_version "),
        ({"total_episodes": 9}, "info.json says 9, 8 are listed"),
        ({"fps": 0}, r"info\.json cannot be read \(fps "),
        ({"features": None}, r"info\.json cannot be read \(features "),
        ({"data_path": "../{chunk_index}.parquet"}, r"'\.\./0\.parquet'.* outside this folder"),
        ({"data_path": "{chunk_index:>9999999999}"}, "has a placeholder that is not known"),
        ({"data_path": "{chunk_index.__class__}"}, "has a placeholder that is not known"),
    ],
)
def test_broken_metadata_are_named(
    version_3_copy: Path, change: dict[str, Any], message: str
) -> None:
    edit_json(version_3_copy / "meta/info.json", lambda info: info.update(change))

    refuses(message, open_lerobot, version_3_copy)


def test_missing_info_file_is_refused_and_named(version_3_copy: Path) -> None:
    (version_3_copy / "meta" / "info.json").unlink()

    refuses(r"info\.json cannot be read", open_lerobot, version_3_copy)


@pytest.mark.parametrize("is_absolute", [True, False])
def test_pictures_outside_the_dataset_are_not_read(version_3_copy: Path, is_absolute: bool) -> None:
    """A cell may name the file of an image, but only in the dataset's folder."""
    private_photo = version_3_copy.parent / "private.png"
    Image.new("RGB", (64, 64)).save(private_photo)
    name = str(private_photo) if is_absolute else "../private.png"

    def point_outside(table: pa.Table) -> pa.Table:
        cells = table["observation.images.image_0"].to_pylist()
        cells[0] = {"bytes": None, "path": name}
        index = table.column_names.index("observation.images.image_0")
        return table.set_column(index, "observation.images.image_0", pa.array(cells))

    change_rows(version_3_copy / "data/chunk-000/file-000.parquet", point_outside)

    episodes, reasons = read_good(version_3_copy)

    assert len(episodes) == NUM_EPISODES - 1
    assert len(reasons) == 1
    assert "private.png" in reasons[0]
    assert "outside this folder" in reasons[0]


def test_missing_tasks_are_named(version_3_copy: Path) -> None:
    (version_3_copy / "meta/tasks.parquet").unlink()

    refuses(r"meta cannot be read \(.*tasks\.parquet", open_lerobot, version_3_copy)


@pytest.mark.parametrize(
    ("splits", "num_train"), [({"train": "0:6"}, 6), ({"train": "0:8", "val": "6:8"}, 8)]
)
def test_splits_that_lack_or_repeat_episodes_are_noticed(
    version_2_copy: Path, splits: dict[str, str], num_train: int
) -> None:
    edit_json(version_2_copy / "meta/info.json", lambda info: info.update(splits=splits))

    with pytest.warns(Notice, match="splits"):
        folder = open_lerobot(version_2_copy)

    assert folder.split_lengths["train"] == num_train


@pytest.mark.parametrize(
    ("file", "key"), [("tasks.jsonl", "task_index"), ("episodes.jsonl", "episode_index")]
)
def test_an_index_that_is_there_twice_is_refused(version_2_copy: Path, file: str, key: str) -> None:
    metadata_file = version_2_copy / "meta" / file
    lines = metadata_file.read_text().splitlines()
    lines[0] = lines[1]
    metadata_file.write_text("\n".join(lines))

    refuses(key, open_lerobot, version_2_copy)


def test_a_negative_length_is_refused(version_2_copy: Path) -> None:
    file = version_2_copy / "meta/episodes.jsonl"
    file.write_text(file.read_text().replace('"length": 10', '"length": -1'))

    refuses("length", open_lerobot, version_2_copy)


def test_the_table_of_tasks_may_have_other_columns(lerobot: Path, version_3_copy: Path) -> None:
    change_rows(
        version_3_copy / "meta/tasks.parquet",
        lambda table: table.add_column(0, "split", pa.array(["a"] * len(table))),
    )

    original_tasks = open_lerobot(lerobot / "v3.0_image").tasks
    assert open_lerobot(version_3_copy).tasks == original_tasks


def test_another_rate_in_the_layout_is_refused(version_3_copy: Path) -> None:
    """The metadata say 5 Hz."""
    (version_3_copy / "spear.json").write_text(json.dumps({**LAYOUT, "rate_hz": 30.0}))

    refuses("rate_hz", next, read_episodes(version_3_copy))


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A dataset of one episode that our own writer made."""
    write_lerobot([make_episode(0)], tmp_path / "exported")
    return tmp_path / "exported"


def test_another_order_of_quaternions_than_the_names_is_refused(exported: Path) -> None:
    edit_json(exported / "spear.json", lambda layout: layout.update(rotation_format="quat_xyzw"))

    refuses("rotation_format", next, read_episodes(exported))


def test_the_names_of_components_tell_the_order_of_quaternions(exported: Path) -> None:
    edit_json(exported / "spear.json", lambda layout: layout.update(rotation_format="quat_xyzw"))
    names = [*"xyz", "qx", "qy", "qz", "qw", "gripper"]
    edit_json(
        exported / "meta/info.json",
        lambda info: info["features"]["observation.state"].update(names=names),
    )

    next(read_episodes(exported))
    assert propose_layout(exported)["rotation_format"] == "quat_xyzw"


def test_depth_is_no_camera(exported: Path) -> None:
    edit_json(
        exported / "meta/info.json",
        lambda info: info["features"]["observation.images.external"].update(
            info={"is_depth_map": True}
        ),
    )

    refuses("observation/images/external", next, read_episodes(exported))
    assert "80 x 3, depth: not read" in describe_dataset(exported)


@pytest.fixture
def video_copy(lerobot: Path, tmp_path: Path) -> Path:
    """A copy of the version 3.0 with videos that a test may change, with a `spear.json`."""
    return copy_dataset(lerobot / "v3.0_video", tmp_path / "set")


EPISODES_FILE = "meta/episodes/chunk-000/file-000.parquet"


def empty_cells(folder: Path, columns: Collection[str], episode: int) -> None:
    """Empty the cells of one episode in columns of the metadata."""

    def change(table: pa.Table) -> pa.Table:
        for column in columns:
            cells = table.column(column).to_pylist()
            cells[episode] = None
            new_column = pa.array(cells, table.schema.field(column).type)
            table = table.set_column(table.column_names.index(column), column, new_column)
        return table

    change_rows(folder / EPISODES_FILE, change)


VIDEO_PREFIX = "videos/observation.images.image_0"  # of the columns that say where a video is


@pytest.mark.parametrize(
    ("column", "named_entry"),  # named_entry: words of the reason
    [
        ("length", "length"),
        ("data/chunk_index", "data/chunk_index"),
        ("data/file_index", "data/file_index"),
        (f"{VIDEO_PREFIX}/chunk_index", "camera observation.images.image_0"),
        (f"{VIDEO_PREFIX}/to_timestamp", "camera observation.images.image_0"),
    ],
)
def test_an_empty_cell_of_the_metadata_costs_one_episode(
    video_copy: Path, column: str, named_entry: str
) -> None:
    empty_cells(video_copy, [column], episode=5)

    episodes, reasons = read_good(video_copy)

    assert len(episodes) == NUM_EPISODES - 1
    assert len(reasons) == 1
    assert named_entry in reasons[0]
    assert "set#5" in reasons[0]


def test_numbers_that_pandas_made_fractions_are_read(video_copy: Path) -> None:
    """pandas turns a column of integers with an empty cell into floats: 0.0, 0.0, NaN, …"""
    file = video_copy / EPISODES_FILE
    empty_cells(video_copy, ["data/chunk_index", f"{VIDEO_PREFIX}/file_index"], episode=2)
    pq.read_table(file).to_pandas().to_parquet(file)

    episodes, reasons = read_good(video_copy)

    assert len(episodes) == NUM_EPISODES - 1
    assert "set#2" in reasons[0]


def test_a_video_that_the_layout_does_not_name_may_be_absent(video_copy: Path) -> None:
    """The metadata list a camera "wrist", but no episode has a video of it."""
    change_rows(
        video_copy / EPISODES_FILE,
        lambda table: table.append_column("videos/wrist/chunk_index", pa.array([None] * 8)),
    )
    feature = {"dtype": "video", "shape": [64, 64, 3], "names": None}
    edit_json(video_copy / "meta/info.json", lambda info: info["features"].update(wrist=feature))

    episodes, _ = read_good(video_copy)
    assert len(episodes) == NUM_EPISODES
    assert "skipped" not in describe_dataset(video_copy)


def test_a_null_length_in_version_2_costs_one_episode(version_2_copy: Path) -> None:
    episodes_file = version_2_copy / "meta/episodes.jsonl"
    lines = episodes_file.read_text().splitlines()
    lines[3] = lines[3].replace('"length": 10', '"length": null')  # of episode 3
    episodes_file.write_text("\n".join(lines))

    episodes, reasons = read_good(version_2_copy)

    assert len(episodes) == NUM_EPISODES - 1
    assert "set#3 has no length" in reasons[0]


def get_video_file(folder: Path) -> Path:
    return folder / "videos/observation.images.image_0/chunk-000/file-000.mp4"


def decode_frames(file: Path) -> Iterator[np.ndarray]:
    """Yield the frames of a video, [h, w, 3]."""
    with av.open(str(file)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


@pytest.fixture
def short_video_copy(video_copy: Path) -> Path:
    """A dataset whose video has only 75 of its 80 frames."""
    file = get_video_file(video_copy)
    images = list(decode_frames(file))[:75]
    with av.open(str(file), "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=5)
        stream.width = 64
        stream.height = 64
        for image in images:
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return video_copy


def test_a_video_with_too_few_frames_is_named(short_video_copy: Path) -> None:
    """All episodes are in one video, so the missing frames are those of the last episode."""
    episodes, reasons = read_good(short_video_copy)

    assert len(episodes) == NUM_EPISODES - 1
    assert "set#7 has 5 frames" in reasons[0]
    video_file = get_video_file(short_video_copy)
    assert f"the video {video_file} ends" in describe_dataset(short_video_copy)


def test_a_good_dataset_is_inspected_without_complaints(lerobot: Path) -> None:
    assert "skipped" not in describe_dataset(lerobot / "v3.0_video")


@pytest.mark.parametrize(
    "file",
    [
        "videos/observation.images.image_0/chunk-000/file-000.mp4",
        "data/chunk-000/file-000.parquet",
    ],
)
def test_a_truncated_file_of_all_episodes_is_named(short_video_copy: Path, file: str) -> None:
    """The audit refuses the dataset as well, although it compares numbers, not images."""
    path = short_video_copy / file
    # Both formats have their index at the end of the file, which is cut off here.
    truncate(path, path.stat().st_size - 2000)

    refuses(rf"no episode of .* can be read .*{path}", describe_dataset, short_video_copy)
    refuses("bad episodes, 8 of 8|no episode of", audit_dataset, short_video_copy)


def test_rows_without_the_number_of_their_episode_are_named(version_3_copy: Path) -> None:
    file = version_3_copy / "data/chunk-000/file-000.parquet"
    change_rows(file, lambda table: table.drop_columns(["episode_index"]))

    refuses(r"file-000\.parquet \(no column episode_index\)", next, read_episodes(version_3_copy))
