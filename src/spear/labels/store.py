"""Labelled images in Parquet shards: written atomically, read in order or at random with little memory.

One row per image. The column `image` is {bytes, path}, as Hugging Face `datasets` has it, and marked as such.
Rows are grouped by `ROWS_PER_GROUP`, which is what a random access reads.
"""

from __future__ import annotations

import bisect
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spear.errors import SpearError
from spear.labels.parquet import ParquetWriter
from spear.types import Box3D, LabeledImage, LabeledObject

REJECTED = "rejected.parquet"
QUESTIONS = "questions.parquet"
"""Files that may lie beside the shards in their folder."""

_VECTOR = pa.list_(pa.float32())
_BOX = pa.struct({"vertices": _VECTOR, "center": _VECTOR, "size": _VECTOR, "rotation": _VECTOR})
_KEYPOINTS = pa.struct({"closest": _VECTOR, "furthest": _VECTOR, "centre": _VECTOR})
_OBJECT = pa.struct(
    {
        "name": pa.string(),
        "box2d": _VECTOR,
        "mask": pa.list_(pa.int32()),
        "box3d": _BOX,
        "keypoints": _KEYPOINTS,
        "scores": pa.string(),
    }
)
SCHEMA = pa.schema(
    {
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "width": pa.int32(),
        "height": pa.int32(),
        "intrinsics": pa.list_(pa.float64()),
        "objects": pa.list_(_OBJECT),
        "unit": pa.string(),
        "source": pa.string(),
        "provenance": pa.string(),
    },
    metadata={"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})},
)
"""Matrices are stored row by row; scores and provenance as JSON."""


_WITHOUT_PIXELS = [name for name in SCHEMA.names if name not in ("image", "objects")] + [
    f"objects.list.element.{field.name}" for field in _OBJECT if field.name != "mask"
]


def write_shards(labels: Iterable[LabeledImage], out_dir: str | Path, shard_size: int = 1024) -> list[Path]:
    """Write labels to `out_dir`/labels-00000.parquet, … of `shard_size` images each (zstd).

    A shard appears under its name only when it is whole: it is written to a temporary name, then renamed.
    When `labels` raises, the finished shards stay and the unfinished one is removed.

    Raises:
        SpearError: `out_dir` already holds shards.
    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.parquet")):
        raise SpearError(f"{folder}: holds labels already: choose another folder, or delete these")
    source = iter(labels)
    paths: list[Path] = []
    for first in source:
        path = folder / f"labels-{len(paths):05d}.parquet"
        with ParquetWriter(path, SCHEMA) as writer:
            for label in chain([first], islice(source, shard_size - 1)):
                writer.write(to_table([label]))
            writer.commit()
        paths.append(path)
    return paths


def to_table(labels: Iterable[LabeledImage]) -> pa.Table:
    """Labels as rows of `SCHEMA`."""
    return pa.Table.from_pylist([_to_row(label) for label in labels], SCHEMA)


def read(path: str | Path, pixels: bool = True) -> Iterator[LabeledImage]:
    """The labels of a shard, or of all shards of a folder, in order; one row group in memory at a time.

    pixels  False leaves images and masks empty, which is quicker.

    Raises:
        SpearError: no shard there, or a broken one.
    """
    for shard in shards_in(path):
        for table in tables(shard, pixels):
            yield from map(_from_row, table.to_pylist())


def tables(shard: Path, pixels: bool = True) -> Iterator[pa.Table]:
    """The rows of one shard, as `to_table` gives them, a row group at a time; `pixels` and errors as in
    `read`."""
    file = _open(shard)
    for group in range(file.num_row_groups):
        yield _read_group(file, group, shard, pixels)


class LabelStore:
    """Random access to the labels of a shard or folder: `len(store)`, `store[i]`.

    Keeps the row groups last used, at most `cache_groups` of them, in memory. Safe to hand to worker
    processes.

    Raises:
        SpearError: no shard there, or a broken one.
    """

    def __init__(self, path: str | Path, cache_groups: int = 64) -> None:
        self.cache_groups = cache_groups
        self._groups: list[tuple[Path, int]] = []
        sizes = []
        for shard in shards_in(path):
            metadata = _open(shard).metadata
            self._groups += [(shard, group) for group in range(metadata.num_row_groups)]
            sizes += [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._ends = list(accumulate(sizes))
        self._files: dict[Path, pq.ParquetFile] = {}
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> LabeledImage:
        if not -len(self) <= index < len(self):
            raise IndexError(f"label {index} of {len(self)}")
        index %= len(self)
        group = bisect.bisect_right(self._ends, index)
        table = self._group(group)
        row = index - self._ends[group] + len(table)
        return _from_row(table.slice(row, 1).to_pylist()[0])

    def _group(self, group: int) -> pa.Table:
        if group not in self._cache:
            shard, number = self._groups[group]
            if shard not in self._files:
                self._files[shard] = _open(shard)
            self._cache[group] = _read_group(self._files[shard], number, shard)
            if len(self._cache) > self.cache_groups:
                self._cache.popitem(last=False)
        self._cache.move_to_end(group)
        return self._cache[group]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_cache": OrderedDict()}


def choose(store: LabelStore, images: int) -> list[LabeledImage]:
    """At most `images` labels, spread evenly over a store."""
    shown = min(images, len(store))
    return [store[i * len(store) // shown] for i in range(shown)]


def shards_in(path: str | Path) -> list[Path]:
    """The shards of a folder in order, or the one shard given."""
    path = Path(path)
    found = sorted(path.glob("*.parquet")) if path.is_dir() else [path] if path.is_file() else []
    shards = [shard for shard in found if shard.name not in (REJECTED, QUESTIONS)]
    if not shards:
        raise SpearError(f"{path}: no label shards (*.parquet) here: give a folder that `spear label` wrote")
    return shards


def footer(path: Path, key: str) -> str | None:
    """The text that a shard's footer holds under `key`."""
    value = (_open(path).metadata.metadata or {}).get(key.encode())
    return None if value is None else value.decode()


def _broken(path: Path, error: Exception) -> SpearError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return SpearError(f"{path}: broken label shard ({reason}): delete it and label its images again")


def _open(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _broken(path, error) from error
    missing = set(SCHEMA.names) - set(file.schema_arrow.names)
    if missing:
        raise SpearError(
            f"{path}: not a label shard, it lacks {', '.join(sorted(missing))}: give another file"
        )
    return file


def _read_group(file: pq.ParquetFile, group: int, path: Path, pixels: bool = True) -> pa.Table:
    columns = SCHEMA.names if pixels else _WITHOUT_PIXELS
    try:
        return file.read_row_group(group, columns=columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise _broken(path, error) from error


def _flat(array: Any) -> Any:
    return np.asarray(array, np.float32).ravel()


def _to_row(label: LabeledImage) -> dict[str, Any]:
    return {
        "image": {"bytes": label.image, "path": None},
        "width": label.width,
        "height": label.height,
        "intrinsics": np.asarray(label.intrinsics, np.float64).ravel(),
        "objects": [_object_to_row(o) for o in label.objects],
        "unit": label.unit,
        "source": label.source,
        "provenance": json.dumps(dict(label.provenance), sort_keys=True),
    }


def _object_to_row(o: LabeledObject) -> dict[str, Any]:
    box = o.box3d
    return {
        "name": o.name,
        "box2d": _flat(o.box2d),
        "mask": list(o.mask),
        "box3d": box
        and {name: _flat(getattr(box, name)) for name in ("vertices", "center", "size", "rotation")},
        "keypoints": {k: _flat(v) for k, v in o.keypoints.items()} or None,
        "scores": json.dumps(dict(o.scores), sort_keys=True),
    }


def _from_row(row: dict[str, Any]) -> LabeledImage:
    return LabeledImage(
        image=row["image"]["bytes"] if "image" in row else b"",
        width=row["width"],
        height=row["height"],
        intrinsics=np.array(row["intrinsics"]).reshape(3, 3),
        objects=[_object_from_row(o) for o in row["objects"]],
        unit=row["unit"],
        source=row["source"],
        provenance=json.loads(row["provenance"]),
    )


def _object_from_row(row: dict[str, Any]) -> LabeledObject:
    box = row["box3d"]
    return LabeledObject(
        name=row["name"],
        box2d=np.array(row["box2d"], np.float32),
        mask=row.get("mask", ()),
        box3d=box
        and Box3D(
            vertices=np.array(box["vertices"], np.float32).reshape(8, 3),
            center=np.array(box["center"], np.float32),
            size=np.array(box["size"], np.float32),
            rotation=np.array(box["rotation"], np.float32).reshape(3, 3),
        ),
        keypoints={k: np.array(v, np.float32) for k, v in (row["keypoints"] or {}).items()},
        scores=json.loads(row["scores"]),
    )
