"""The rows of an episode are found in Parquet files of any structure, without decoding many others.

Parquet files consist of row groups, and reading decodes a row group in batches.
"""

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
"""Name of a structure -> options of `pq.write_table`, which give a file this structure."""


def make_table() -> pa.Table:
    """A table of 12 episodes of 5 rows each, in order."""
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
        rows = read_episode_rows(file, episode, ROWS_PER_EPISODE, skipped_columns=())
        first_row = episode * ROWS_PER_EPISODE
        assert rows == table.slice(first_row, ROWS_PER_EPISODE)


def test_rows_of_two_episodes_may_alternate(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"episode_index": [1, 0, 1, 0], "row": [0, 1, 2, 3]}), file)

    rows = read_episode_rows(file, episode_index=1, num_expected_rows=2, skipped_columns=())

    assert rows.column("row").to_pylist() == [0, 2]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_an_unknown_episode_has_no_rows(tmp_path: Path, structure: str) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(make_table(), file, **STRUCTURES[structure])

    rows = read_episode_rows(file, episode_index=99, num_expected_rows=5, skipped_columns=())

    assert len(rows) == 0


def test_skipped_columns_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(make_table(), file)

    skipped_columns = ["observation.images.front"]
    rows = read_episode_rows(
        file, episode_index=3, num_expected_rows=5, skipped_columns=skipped_columns
    )

    assert rows.column_names == ["episode_index", "observation.state"]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(make_table(), file)
    read_episode_rows(file, episode_index=0, num_expected_rows=5, skipped_columns=())

    pq.write_table(pa.table({"episode_index": [0], "row": [7]}), file)

    rows = read_episode_rows(file, episode_index=0, num_expected_rows=5, skipped_columns=())
    assert rows.column("row").to_pylist() == [7]


def test_the_rows_do_not_keep_the_row_group_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(make_table(), file)

    rows = read_episode_rows(file, episode_index=4, num_expected_rows=5, skipped_columns=())

    # The rows are a twelfth of the table, so half of it leaves room for overhead.
    assert rows.get_total_buffer_size() < make_table().get_total_buffer_size() / 2


@pytest.mark.parametrize("structure", ["one row group", "one row group per episode"])
@pytest.mark.parametrize("order", ["ascending", "random"])
def test_no_row_is_decoded_twice_while_a_row_group_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, structure: str, order: str
) -> None:
    """Reading all episodes opens each row group once, in any order in which groups do not
    alternate.

    With one row group per episode, or one for all, no order makes them alternate.
    """
    path = tmp_path / "rows.parquet"
    pq.write_table(make_table(), path, **STRUCTURES[structure])
    file = EpisodeFile(path)
    opened_groups: list[int] = []
    iter_batches = pq.ParquetFile.iter_batches

    def record_groups(
        self: pq.ParquetFile, *args: Any, row_groups: list[int], **options: Any
    ) -> Any:
        opened_groups.extend(row_groups)
        return iter_batches(self, *args, row_groups=row_groups, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", record_groups)
    episodes = np.arange(NUM_EPISODES)
    if order == "random":
        np.random.default_rng(1).shuffle(episodes)

    for episode in episodes.tolist():
        file.read_episode(episode, ROWS_PER_EPISODE, skipped_columns=())

    num_row_groups = pq.ParquetFile(path).num_row_groups
    assert sorted(opened_groups) == list(range(num_row_groups))


def test_rows_behind_the_episode_are_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With batches of 8 rows, rows 5 to 9 of episode 1 are in the first two batches."""
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

    EpisodeFile(path).read_episode(1, ROWS_PER_EPISODE, skipped_columns=())

    assert num_batches == 2
