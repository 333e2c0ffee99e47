"""One bad episode is skipped by name, whatever is wrong with it, and the run goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tiny import make, png
from refusals import refuses
from spear.data.readers.formats import read_episodes
from spear.data.store.lerobot_write import write_lerobot
from spear.data.store.prepare import prepare

IMAGES, STATE = "observation.images.external", "observation.state"
OVER = {3: [0.33, 0, 0.2, 0, 1, 0, 0, 0]}


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A LeRobot dataset of three episodes of 6 steps; the tests break the second."""
    write_lerobot([make(0), make(1), make(2)], tmp_path / "set")
    return tmp_path / "set"


def set_cells(folder: Path, column: str, values: dict[int, Any]) -> None:
    """Replace some of the second episode's cells in a column of the rows."""
    (file,) = (folder / "data").rglob("*.parquet")
    table = pq.read_table(file)
    at, cells = table.column_names.index(column), table[column].to_pylist()
    for step, value in values.items():
        cells[6 + step] = value
    pq.write_table(table.set_column(at, column, pa.array(cells, table.schema.field(at).type)), file)


def break_image(folder: Path) -> None:
    (file,) = (folder / "data").rglob("*.parquet")
    whole = pq.read_table(file)[IMAGES].to_pylist()[6 + 2]["bytes"]
    set_cells(folder, IMAGES, {2: {"bytes": whole[:-200], "path": None}})


def no_steps(folder: Path) -> None:
    (file,) = (folder / "data").rglob("*.parquet")
    table = pq.read_table(file)
    pq.write_table(
        table.filter(pa.array([i != 1 for i in table["episode_index"].to_pylist()])), file
    )
    (meta,) = (folder / "meta/episodes").rglob("*.parquet")
    rows = pq.read_table(meta).to_pylist()
    rows[1]["length"] = 0
    pq.write_table(pa.Table.from_pylist(rows), meta)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_image, "set/train#1 step 2 camera 'external'"),
        (lambda f: set_cells(f, IMAGES, {4: None}), "missing image: "),
        (lambda f: set_cells(f, IMAGES, {4: {"bytes": b""}}), "empty image: set/train#1 step 4"),
        (
            lambda f: set_cells(f, STATE, {4: None}),
            "no column 'observation/state[0:3]': set/train#1",
        ),
        (lambda f: set_cells(f, "timestamp", {4: None}), "broken rows: set#1"),
        (lambda f: set_cells(f, "task_index", {0: None}), "broken rows: set#1"),
        (
            lambda f: set_cells(f, "task_index", dict.fromkeys(range(6), 7)),
            "empty instruction: set/train#1",
        ),
        (lambda f: set_cells(f, "task_index", dict.fromkeys(range(6), 0)), "set#1: by task_index"),
        (
            lambda f: set_cells(f, STATE, OVER),
            "jump: set/train#1 step 3: the end-effector is turned by",
        ),
        (no_steps, "empty episode: set#1"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
def test_a_bad_episode_is_skipped_by_name(
    three: Path, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(three)
    reasons: list[str] = []
    good = list(read_episodes(three, on_error=lambda error: reasons.append(str(error))))
    assert [e.source for e in good] == ["made#0", "made#2"]
    assert len(reasons) == 1 and words in reasons[0] and "\n" not in reasons[0], reasons
    written, aside = prepare(three, tmp_path / "store")
    assert written == 2 and aside == reasons


def test_an_image_file_that_came_is_other_data(three: Path, tmp_path: Path) -> None:
    set_cells(three, IMAGES, {4: {"bytes": None, "path": "images/4.png"}})
    assert prepare(three, tmp_path / "store")[0] == 2
    (three / "images").mkdir()
    (three / "images/4.png").write_bytes(png(9))
    refuses("data is", prepare, three, tmp_path / "store")
