"""Reading a dataset skips a bad episode, names it, and goes on, whatever is wrong with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tiny import make_episode, make_png
from refusals import refuses
from spear.data.readers.formats import read_episodes
from spear.data.store.episode_store import EpisodeStore
from spear.data.store.lerobot_write import write_lerobot
from spear.data.store.prepare import prepare
from spear.errors import Notice

IMAGE_FEATURE = "observation.images.external"
STATE_FEATURE = "observation.state"
STEPS_PER_EPISODE = 6  # of an episode of `make_episode`
BAD_EPISODE = 1  # the tests damage the second of three episodes
UPSIDE_DOWN_STATE = [0.33, 0, 0.2, 0, 1, 0, 0, 0]  # position, half a turn about x, closed


@pytest.fixture
def three_episodes(tmp_path: Path) -> Path:
    """A LeRobot dataset of three episodes of 6 steps, which are "set/train#0" to "set/train#2"."""
    write_lerobot([make_episode(0), make_episode(1), make_episode(2)], tmp_path / "set")
    return tmp_path / "set"


def find_data_file(folder: Path) -> Path:
    """The one Parquet file with the rows of all episodes."""
    (file,) = (folder / "data").rglob("*.parquet")
    return file


def set_cells(folder: Path, feature: str, values: dict[int, Any]) -> None:
    """Replace cells of the bad episode in a column. `values` is step -> new value."""
    file = find_data_file(folder)
    table = pq.read_table(file)
    index = table.column_names.index(feature)
    cells = table[feature].to_pylist()
    first_row = BAD_EPISODE * STEPS_PER_EPISODE
    for step, value in values.items():
        cells[first_row + step] = value
    column = pa.array(cells, table.schema.field(index).type)
    pq.write_table(table.set_column(index, feature, column), file)


def break_image(folder: Path) -> None:
    """Cut 200 bytes off the end of the image of step 2."""
    cells = pq.read_table(find_data_file(folder))[IMAGE_FEATURE].to_pylist()
    encoded = cells[BAD_EPISODE * STEPS_PER_EPISODE + 2]["bytes"]
    set_cells(folder, IMAGE_FEATURE, {2: {"bytes": encoded[:-200], "path": None}})


def remove_image(folder: Path) -> None:
    set_cells(folder, IMAGE_FEATURE, {4: None})


def empty_image(folder: Path) -> None:
    set_cells(folder, IMAGE_FEATURE, {4: {"bytes": b""}})


def remove_state(folder: Path) -> None:
    set_cells(folder, STATE_FEATURE, {4: None})


def remove_timestamp(folder: Path) -> None:
    set_cells(folder, "timestamp", {4: None})


def remove_task_index(folder: Path) -> None:
    set_cells(folder, "task_index", {0: None})


def set_unknown_task_index(folder: Path) -> None:
    """Refer all rows to task 7, which the dataset does not have."""
    set_cells(folder, "task_index", dict.fromkeys(range(STEPS_PER_EPISODE), 7))


def set_other_task_index(folder: Path) -> None:
    """Refer all rows to task 0, whereas the episode's metadata list the instruction of task 1."""
    set_cells(folder, "task_index", dict.fromkeys(range(STEPS_PER_EPISODE), 0))


def turn_upside_down(folder: Path) -> None:
    set_cells(folder, STATE_FEATURE, {3: UPSIDE_DOWN_STATE})


def remove_steps(folder: Path) -> None:
    """Remove all rows of the bad episode, and set its length to 0."""
    file = find_data_file(folder)
    table = pq.read_table(file)
    is_good_episode = [index != BAD_EPISODE for index in table["episode_index"].to_pylist()]
    pq.write_table(table.filter(pa.array(is_good_episode)), file)

    (episodes_file,) = (folder / "meta/episodes").rglob("*.parquet")
    rows = pq.read_table(episodes_file).to_pylist()
    rows[BAD_EPISODE]["length"] = 0
    pq.write_table(pa.Table.from_pylist(rows), episodes_file)


@pytest.mark.parametrize(
    ("damage", "words"),  # words of the reason why the episode is skipped
    [
        (break_image, "set/train#1 step 2 camera 'external'"),
        (remove_image, "the image "),
        (empty_image, "set/train#1 has an empty image at step 4"),
        (remove_state, "column 'observation/state[0:3]' of set/train#1 cannot be read"),
        (remove_timestamp, "rows of set#1 are broken (a timestamp is missing)"),
        (remove_task_index, "rows of set#1 are broken"),
        (set_unknown_task_index, "set/train#1 has an empty instruction"),
        (set_other_task_index, "set#1 are broken (by task_index"),
        (turn_upside_down, "end-effector of set/train#1 turns by 3.14 rad in one step, at step 3"),
        (remove_steps, "set#1 has no steps"),
    ],
)
def test_a_bad_episode_is_skipped_by_name(
    three_episodes: Path, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    """Reading and preparing give the same reason."""
    damage(three_episodes)
    reasons: list[str] = []

    episodes = read_episodes(three_episodes, on_error=lambda error: reasons.append(str(error)))
    sources = [episode.source for episode in episodes]
    num_prepared, prepare_reasons = prepare(three_episodes, tmp_path / "store")

    assert sources == ["made#0", "made#2"]
    assert len(reasons) == 1
    assert words in reasons[0]
    assert "\n" not in reasons[0]
    assert num_prepared == 2
    assert prepare_reasons == reasons


def test_an_image_file_that_came_is_other_data(three_episodes: Path, tmp_path: Path) -> None:
    """A missing image file skips its episode. Once it exists, an earlier result is out of date."""
    set_cells(three_episodes, IMAGE_FEATURE, {4: {"bytes": None, "path": "images/4.png"}})
    num_prepared, _ = prepare(three_episodes, tmp_path / "store")
    assert num_prepared == 2

    (three_episodes / "images").mkdir()
    (three_episodes / "images/4.png").write_bytes(make_png(9))

    refuses("data is", prepare, three_episodes, tmp_path / "store")


def test_a_row_without_a_rotation_costs_a_row_and_is_noticed(
    three_episodes: Path, tmp_path: Path
) -> None:
    set_cells(three_episodes, STATE_FEATURE, {3: [0] * 8})  # its quaternion is zero

    with pytest.warns(Notice, match="set, spear dropped 1 row without a pose"):
        num_prepared, reasons = prepare(three_episodes, tmp_path / "store")

    assert num_prepared == 3
    assert reasons == []
    assert [len(episode) for episode in EpisodeStore(tmp_path / "store")] == [6, 5, 6]
