"""One bad episode is skipped by name, whatever is wrong with it, and the run goes on; a full disk leaves
nothing."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.data.readers.test_tfrecord import write_records

from data_tiny import make
from spear.data.readers.formats import read_episodes
from spear.data.readers.layout import episode_from
from spear.data.readers.spec import DatasetSpec
from spear.data.readers.tfrecord import example_class
from spear.data.store import episode_store
from spear.data.store.episode_store import EpisodeStore, write_episodes
from spear.data.store.lerobot_write import write_lerobot
from spear.data.store.prepare import prepare
from spear.errors import SpearError

IMAGES = "observation.images.external"
LAYOUT: dict[str, Any] = {
    "images": {"external": "image"},
    "position": "state[0:3]",
    "rotation": "state[3:7]",
    "rotation_format": "quat_wxyz",
    "gripper": "state[7]",
    "gripper_range": [0.0, 1.0],
    "rate_hz": 5.0,
}


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A LeRobot dataset of three episodes of 6 steps; the tests break the second."""
    write_lerobot([make(0), make(1), make(2)], tmp_path / "set")
    return tmp_path / "set"


def set_cells(folder: Path, column: str, values: dict[int, Any], kind: pa.DataType | None = None) -> None:
    """Replace some of the second episode's cells in a column of the rows."""
    (file,) = (folder / "data").rglob("*.parquet")
    table = pq.read_table(file)
    at = table.column_names.index(column)
    cells = table[column].to_pylist()
    for step, value in values.items():
        cells[6 + step] = value
    pq.write_table(table.set_column(at, column, pa.array(cells, kind or table.schema.field(at).type)), file)


def image(folder: Path, step: int) -> bytes:
    (file,) = (folder / "data").rglob("*.parquet")
    return bytes(pq.read_table(file)[IMAGES].to_pylist()[6 + step]["bytes"])


def break_image(folder: Path) -> None:
    set_cells(folder, IMAGES, {2: {"bytes": image(folder, 2)[:-200], "path": None}})


def no_steps(folder: Path) -> None:
    (file,) = (folder / "data").rglob("*.parquet")
    table = pq.read_table(file)
    pq.write_table(table.filter(pa.array([i != 1 for i in table["episode_index"].to_pylist()])), file)
    (meta,) = (folder / "meta/episodes").rglob("*.parquet")
    rows = pq.read_table(meta).to_pylist()
    rows[1]["length"] = 0
    pq.write_table(pa.Table.from_pylist(rows), meta)


def turn_over(folder: Path) -> None:
    """For one step, upside down."""
    set_cells(folder, "observation.state", {3: [0.33, 0, 0.2, 0, 1, 0, 0, 0]})


def lengthen(folder: Path) -> None:
    set_cells(folder, "observation.state", {3: [0.3] * 8}, pa.list_(pa.float32()))
    set_cells(folder, "observation.state", {4: [0.3] * 5}, pa.list_(pa.float32()))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_image, "broken image: set/train#1 step 2 camera 'external'"),
        (lambda f: set_cells(f, IMAGES, {4: None}), "missing image: "),
        (
            lambda f: set_cells(f, IMAGES, {4: {"bytes": b"", "path": None}}),
            "empty image: set/train#1 step 4",
        ),
        (lambda f: set_cells(f, "observation.state", {4: None}), "set"),
        (lambda f: set_cells(f, "timestamp", {4: None}), "broken rows: set#1"),
        (lambda f: set_cells(f, "task_index", {0: None}), "broken rows: set#1"),
        (lambda f: set_cells(f, "task_index", dict.fromkeys(range(6), 7)), "empty instruction: set/train#1"),
        (lengthen, "broken rows: set#1"),
        (turn_over, "jump: set/train#1 step 3: the end-effector is turned by"),
        (no_steps, "empty episode: set/train#1"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
def test_a_bad_episode_is_skipped_by_name(
    three: Path, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(three)
    reasons: list[str] = []
    good = list(read_episodes(three, on_bad=lambda error: reasons.append(str(error))))
    assert [e.source for e in good] == ["made#0", "made#2"]
    assert len(reasons) == 1 and words in reasons[0] and "\n" not in reasons[0], reasons
    written, aside = prepare(three, tmp_path / "store")
    assert written == 2 and aside == reasons


def test_a_column_that_is_no_image_is_named(three: Path) -> None:
    layout = json.loads((three / "spear.json").read_text())
    (three / "spear.json").write_text(json.dumps({**layout, "images": {"external": "observation/state"}}))
    with pytest.raises(SpearError, match=r"no images in column 'observation/state': set/train#0"):
        next(read_episodes(three))


def test_an_image_with_bytes_after_its_end_is_whole() -> None:
    good = make(0)
    images = [encoded + b"\0\0" for encoded in good.images["external"]]
    state = np.hstack([good.position, good.rotation, good.gripper[:, None]])
    spec = DatasetSpec("mine", **{k: tuple(v) if isinstance(v, list) else v for k, v in LAYOUT.items()})
    steps = {"image": images, "state": state, "language_instruction": [b"push"] * len(state)}
    assert list(episode_from(steps, spec, "mine#0").images["external"]) == images


def test_an_rlds_episode_without_steps_is_skipped(tmp_path: Path) -> None:
    def tensor(*shape: int) -> dict[str, Any]:
        return {"tensor": {"dtype": "float32", "shape": {"dimensions": [str(n) for n in shape]}}}

    def group(**features: Any) -> dict[str, Any]:
        return {"featuresDict": {"features": features}}

    step = group(state=tensor(8), image={"image": {}}, language_instruction={"text": {}})
    features = group(steps={"sequence": {"feature": step}})
    info = {"name": "mine", "splits": [{"name": "train", "shardLengths": ["3"]}]}
    for name, content in (("features", features), ("dataset_info", info), ("spear", LAYOUT)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    records = []
    for number, steps in enumerate((6, 0, 6)):
        example, made = example_class()(), make(number)
        values = example.features.feature
        state = np.hstack([made.position, made.rotation, made.gripper[:, None]])
        values["steps/state"].float_list.value.extend(state[:steps].reshape(-1))
        values["steps/image"].bytes_list.value.extend(list(made.images["external"])[:steps])
        values["steps/language_instruction"].bytes_list.value.extend([b"push"] * steps)
        records.append(example.SerializeToString())
    write_records(tmp_path / "mine-train.tfrecord-00000-of-00001", records)
    reasons: list[str] = []
    good = list(read_episodes(tmp_path, on_bad=lambda error: reasons.append(str(error))))
    assert [e.source for e in good] == ["mine/train#0", "mine/train#2"]
    assert reasons == ["empty episode: mine/train#1: it has no steps; leave it out"]


def full(*arguments: Any, **named: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("function", ["fsync", "mkstemp"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    owner = os if function == "fsync" else episode_store.tempfile
    monkeypatch.setattr(owner, function, full)
    with pytest.raises(SpearError, match=r"cannot write: .*No space left on device"):
        write_episodes([make(0)], tmp_path / "store")
    assert not list(tmp_path.glob("store/*"))
    monkeypatch.undo()
    assert write_episodes([make(0)], tmp_path / "store") == len(EpisodeStore(tmp_path / "store")) == 1

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(SpearError, match=r"cannot write: .*No space left on device"):
        write_lerobot([make(0)], tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
