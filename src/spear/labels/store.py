"""Parquet files, each written whole or not at all: shards of labelled images, and images with
depth.

A shard has one row per image. Its column `image` is {bytes, path}, as Hugging Face `datasets` has
it, and is marked as such. Rows are grouped by `ROWS_PER_GROUP`, the unit of random access.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spear.errors import SpearError, notice, summarize_error
from spear.types import Array, Box3D, LabeledImage, LabeledObject, Unit
from spear.util.files import report_write_errors

SKIPPED_FILE = "skipped.parquet"
QUESTIONS_FILE = "questions.parquet"
"""Files that may lie beside the shards in their folder."""
ROWS_PER_GROUP = 16
DEPTH_STRIDE = 4
"""Depth is kept at every fourth pixel: the head predicts cells of four pixels at nano's patch
size."""

_VECTOR = pa.list_(pa.float32())
_SHAPES = {"vertices": (8, 3), "center": (3,), "size": (3,), "rotation": (3, 3)}
_BOX = pa.struct(dict.fromkeys(_SHAPES, _VECTOR))
_OBJECT = pa.struct(
    {
        "name": pa.string(),
        "box2d": _VECTOR,
        "mask": pa.list_(pa.int32()),
        "box3d": _BOX,
        "keypoints": pa.struct({"closest": _VECTOR, "furthest": _VECTOR, "centre": _VECTOR}),
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


class ParquetWriter:
    """Writes to a temporary name beside `path`; `commit` gives the file its name.

    Used as a context, it removes the temporary file when `commit` was not reached. The bytes of the
    file depend on its rows alone, not on how they were handed over.

    Raises `SpearError`: the disk is full, or the file cannot be written.
    """

    def __init__(self, path: Path, schema: pa.Schema, rows_per_group: int = ROWS_PER_GROUP) -> None:
        self.path, self.rows_per_group = path, rows_per_group
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._waiting = schema.empty_table()
        with report_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._parquet = pq.ParquetWriter(self._temporary, schema, compression="zstd")

    def write(self, table: pa.Table) -> None:
        """Add rows."""
        self._waiting = pa.concat_tables([self._waiting, table])
        while len(self._waiting) >= self.rows_per_group:
            self._write_group(self.rows_per_group)

    def _write_group(self, rows: int) -> None:
        with report_write_errors(self.path):
            self._parquet.write_table(self._waiting.slice(0, rows).combine_chunks())
        self._waiting = self._waiting.slice(rows)

    def commit(self, metadata: Mapping[str, str] | None = None) -> None:
        """Write the last rows, and `metadata` into the footer; then the file is there, on the
        disk."""
        if len(self._waiting):
            self._write_group(len(self._waiting))
        with report_write_errors(self.path):
            if metadata:
                self._parquet.add_key_value_metadata(dict(metadata))
            self._parquet.close()
            with self._temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(self._temporary, self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # on a full disk; the file is removed anyway
            self._parquet.close()
        self._temporary.unlink(missing_ok=True)


def remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files that killed writers have left in a folder."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def remove_outdated_questions(folder: Path) -> None:
    """Remove the questions of a folder to which labels are about to come that they do not ask
    about."""
    if (folder / QUESTIONS_FILE).is_file():
        (folder / QUESTIONS_FILE).unlink()
        notice(
            f"{folder / QUESTIONS_FILE}: removed, it lacks what is labelled now: `spear questions` asks again"
        )


def write_labels(labels: Iterable[LabeledImage], path: Path) -> None:
    """Write labels to one shard, such as FOLDER/labels-00000.parquet; nothing stays when `labels`
    raises."""
    with ParquetWriter(path, SCHEMA) as writer:
        for label in labels:
            writer.write(to_table([label]))
        writer.commit()


def to_table(labels: Iterable[LabeledImage]) -> pa.Table:
    """Labels as rows of `SCHEMA`."""
    return pa.Table.from_pylist([_to_row(label) for label in labels], SCHEMA)


def read_labels(path: str | Path, pixels: bool = True) -> Iterator[LabeledImage]:
    """The labels of a shard, or of all shards of a folder, in order; one row group in memory at a
    time.

    pixels: False leaves images and masks empty, which is quicker. `SpearError`: no shard, or a
    broken one.
    """
    for shard in find_shards(path):
        file = _open(shard)
        for group in range(file.num_row_groups):
            yield from _labels(shard, file, group, pixels=pixels)


def count_labels(path: str | Path) -> int:
    """How many labels a shard or folder holds; raises as `read`."""
    return sum(_open(shard).metadata.num_rows for shard in find_shards(path))


def select_labels(path: str | Path, images: int) -> list[LabeledImage]:
    """At most `images` labels, spread evenly over a shard or folder; only their row groups are
    read."""
    total, first, found = count_labels(path), 0, list[LabeledImage]()
    shown = min(images, total)
    wanted = [i * total // shown for i in range(shown)]
    for shard in find_shards(path):
        file = _open(shard)
        for group in range(file.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            if rows := [row - first for row in wanted if first <= row < end]:
                found += _labels(shard, file, group, rows)
            first = end
    return found


def find_shards(path: str | Path) -> list[Path]:
    """The shards of a folder in order, or the one shard given."""
    path = Path(path)
    shards = (
        sorted(path.glob("labels*.parquet")) if path.is_dir() else [path] if path.is_file() else []
    )
    if not shards:
        raise SpearError(
            f"{path}: no label shards (labels*.parquet): give a folder that `spear label` wrote"
        )
    return shards


def read_footer(path: Path, key: str) -> bytes | None:
    """What a shard's footer holds under `key`."""
    return (_open(path).metadata.metadata or {}).get(key.encode())


@contextmanager
def explain_read_errors(path: Path, advice: str = "delete it and label it again") -> Iterator[None]:
    """Turns the errors of reading a Parquet file into one line that says what to do."""
    try:
        yield
    except (
        pa.ArrowException,
        OSError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:
        raise SpearError(f"{path}: broken ({summarize_error(error)}): {advice}") from error


def _open(path: Path) -> pq.ParquetFile:
    with explain_read_errors(path):
        file = pq.ParquetFile(path)
    if missing := set(SCHEMA.names) - set(file.schema_arrow.names):
        lacks = ", ".join(sorted(missing))
        raise SpearError(f"{path}: not a label shard, it lacks {lacks}: give another file")
    return file


def _labels(
    shard: Path,
    file: pq.ParquetFile,
    group: int,
    rows: Sequence[int] | None = None,
    pixels: bool = True,
) -> list[LabeledImage]:
    with explain_read_errors(shard):
        columns = SCHEMA.names if pixels else _WITHOUT_PIXELS
        table = file.read_row_group(group, columns=columns, use_threads=False)
        return [_from_row(row) for row in (table if rows is None else table.take(rows)).to_pylist()]


def _flat(values: Any) -> Array:
    return np.array(values, np.float32).ravel()


def _floats(values: Any, *shape: int) -> Array:
    found = np.array(values, np.float32).reshape(shape)
    if not np.isfinite(found).all():
        raise ValueError("a number is missing")
    return found


def _to_row(label: LabeledImage) -> dict[str, Any]:
    return vars(label) | {
        "image": {"bytes": label.image, "path": None},
        "intrinsics": np.asarray(label.intrinsics, np.float64).ravel(),
        "objects": [_object_to_row(o) for o in label.objects],
        "provenance": json.dumps(dict(label.provenance), sort_keys=True),
    }


def _object_to_row(o: LabeledObject) -> dict[str, Any]:
    box = o.box3d
    return vars(o) | {
        "box2d": _flat(o.box2d),
        "mask": list(o.mask),
        "box3d": box and {name: _flat(getattr(box, name)) for name in _SHAPES},
        "keypoints": {k: _flat(v) for k, v in o.keypoints.items()} or None,
        "scores": json.dumps(dict(o.scores), sort_keys=True),
    }


def _from_row(row: dict[str, Any]) -> LabeledImage:
    made = {
        "image": row["image"]["bytes"] if "image" in row else b"",
        "intrinsics": np.array(row["intrinsics"], np.float64).reshape(3, 3),
        "objects": [_object_from_row(o) for o in row["objects"]],
        "provenance": json.loads(row["provenance"]),
    }
    label = LabeledImage(**row | made)
    given = None not in (label.image, label.source, *(o.name for o in label.objects))
    positive = min(label.width, label.height, *label.intrinsics.diagonal()) > 0
    if not (
        given and positive and np.isfinite(label.intrinsics).all() and label.unit in get_args(Unit)
    ):
        raise ValueError(f"image, source, name, size, intrinsics or unit of {label.source}")
    return label


def _object_from_row(row: dict[str, Any]) -> LabeledObject:
    made = {
        "box2d": _floats(row["box2d"], 4),
        "mask": row.get("mask", ()),
        "box3d": row["box3d"]
        and Box3D(**{k: _floats(v, *_SHAPES[k]) for k, v in row["box3d"].items()}),
        "keypoints": {k: _floats(v, 3) for k, v in (row["keypoints"] or {}).items()},
        "scores": json.loads(row["scores"]),
    }
    return LabeledObject(**row | made)


def write_depth(rows: Iterable[tuple[bytes, Array | None]], path: Path) -> None:
    """Write (encoded image, depth [h, w] metres, 0 where unknown) pairs to one Parquet file, on
    which a small depth encoder is pretrained. Raises `SpearError` when it cannot be written."""
    found = []
    for image, depth in rows:
        assert depth is not None
        small = np.ascontiguousarray(
            depth[DEPTH_STRIDE // 2 :: DEPTH_STRIDE, DEPTH_STRIDE // 2 :: DEPTH_STRIDE], np.float16
        )
        height, width = small.shape
        found.append({"image": image, "depth": small.tobytes(), "height": height, "width": width})
    table = pa.Table.from_pylist(found)
    with ParquetWriter(path, table.schema, rows_per_group=max(1, len(table))) as writer:
        writer.write(table)
        writer.commit()


DepthImages = list[tuple[bytes, Array]]
"""Encoded images, each with its depth [h / STRIDE, w / STRIDE] float16, metres."""


def read_depth(folder: Path) -> DepthImages:
    """All images of a folder of files of `write_depth`. `SpearError`: there are none, or a file is
    broken."""
    if not (files := sorted(folder.glob("*.parquet"))):
        raise SpearError(f"no images with depth in {folder}: make some with `spear label`")
    with explain_read_errors(folder):
        rows = pa.concat_tables([pq.read_table(f) for f in files]).to_pylist()
        depths = (
            np.frombuffer(r["depth"], np.float16).reshape(r["height"], r["width"]) for r in rows
        )
        return [(row["image"], depth) for row, depth in zip(rows, depths, strict=True)]
