"""The rows of an episode are found in Parquet files of any structure, at the same cost."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spear.data.readers import parquet_rows
from spear.data.readers.parquet_rows import EpisodeFile, read_episode_rows

NUM_EPISODES = 12
ROWS_PER_EPISODE = 5
STRUCTURES: dict[str, dict[str, Any]] = {
    "one row group": {},
    "one row group per episode": {"row_group_size": ROWS_PER_EPISODE},
    "row groups that end within an episode": {"row_group_size": 7},
    "no statistics": {"row_group_size": 7, "write_statistics": False},
}


def make_table() -> pa.Table:
    num_rows = NUM_EPISODES * ROWS_PER_EPISODE
    images = [{"bytes": bytes([row]) * 50, "path": None} for row in range(num_rows)]
    state = np.arange(2.0 * num_rows)
    return pa.table(
        {
            "episode_index": np.repeat(np.arange(NUM_EPISODES), ROWS_PER_EPISODE),
            "observation.state": pa.FixedSizeListArray.from_arrays(state, 2),
            "observation.images.front": images,
        }
    )


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("order", ["ascending", "random"])
def test_each_episode_has_its_rows(tmp_path: Path, structure: str, order: str) -> None:
    table = make_table()
    file = tmp_path / "rows.parquet"
    pq.write_table(table, file, **STRUCTURES[structure])
    episodes = np.arange(NUM_EPISODES)
    if order == "random":
        np.random.default_rng(0).shuffle(episodes)

    for episode in episodes.tolist():
        rows = read_episode_rows(file, episode, ROWS_PER_EPISODE, ())
        assert rows == table.slice(episode * ROWS_PER_EPISODE, ROWS_PER_EPISODE)


def test_rows_of_two_episodes_may_alternate(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"episode_index": [1, 0, 1, 0], "row": [0, 1, 2, 3]}), file)

    rows = read_episode_rows(file, 1, 2, ())

    assert rows.column("row").to_pylist() == [0, 2]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_an_unknown_episode_has_no_rows(tmp_path: Path, structure: str) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(make_table(), file, **STRUCTURES[structure])

    assert len(read_episode_rows(file, 99, 5, ())) == 0


def test_skipped_columns_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(make_table(), file)

    rows = read_episode_rows(file, 3, 5, ["observation.images.front"])

    assert rows.column_names == ["episode_index", "observation.state"]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(make_table(), file)
    read_episode_rows(file, 0, 5, ())

    pq.write_table(pa.table({"episode_index": [0], "row": [7]}), file)

    assert read_episode_rows(file, 0, 5, ()).column("row").to_pylist() == [7]


def test_the_rows_do_not_keep_the_row_group_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(make_table(), file)

    rows = read_episode_rows(file, 4, 5, ())

    assert rows.get_total_buffer_size() < make_table().get_total_buffer_size() / 2


@pytest.mark.parametrize("structure", ["one row group", "one row group per episode"])
@pytest.mark.parametrize("order", ["ascending", "random"])
def test_no_row_is_decoded_twice_while_a_row_group_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, structure: str, order: str
) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(make_table(), path, **STRUCTURES[structure])
    file = EpisodeFile(path)
    opened_groups: list[int] = []
    iter_batches = pq.ParquetFile.iter_batches

    def count_groups(
        self: pq.ParquetFile, *args: Any, row_groups: list[int], **options: Any
    ) -> Any:
        opened_groups.extend(row_groups)
        return iter_batches(self, *args, row_groups=row_groups, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", count_groups)
    episodes = np.arange(NUM_EPISODES)
    if order == "random":
        np.random.default_rng(1).shuffle(episodes)
    for episode in episodes.tolist():
        file.read_episode(episode, ROWS_PER_EPISODE, ())

    assert sorted(opened_groups) == list(range(pq.ParquetFile(path).num_row_groups))


def test_rows_behind_the_episode_are_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_rows, "ROWS_PER_BATCH", 8)
    path = tmp_path / "rows.parquet"
    pq.write_table(make_table(), path)
    num_batches = 0
    iter_batches = pq.ParquetFile.iter_batches

    def count_batches(self: pq.ParquetFile, *args: Any, **options: Any) -> Any:
        nonlocal num_batches
        for batch in iter_batches(self, *args, **options):
            num_batches += 1
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", count_batches)
    EpisodeFile(path).read_episode(1, ROWS_PER_EPISODE, ())

    assert num_batches == 2
