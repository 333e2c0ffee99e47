"""Parquet files of labeled images (shards), and of images with depth.

Files are written under a temporary name, so that an interruption never leaves half a file.

A shard has one row per image. Its column `image` is {bytes, path}, which the file's metadata mark
as an image for Hugging Face `datasets`. A row group, the smallest unit that can be read alone, has
`ROWS_PER_GROUP` rows.
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
from spear.util.files import convert_write_errors, refuse_lfs_pointer
from spear.util.json_text import parse_json

SKIPPED_FILE = "skipped.parquet"  # in the folder of the shards
QUESTIONS_FILE = "questions.parquet"  # in the folder of the shards
ROWS_PER_GROUP = 16
DEPTH_STRIDE_PX = 4
"""Depth is stored for every fourth pixel of every fourth row, because the depth head that is
pretrained with it predicts one value for each 4 × 4 pixels at the patch size of the preset nano."""

_VECTOR = pa.list_(pa.float32())
_BOX_SHAPES = {"vertices": (8, 3), "center": (3,), "size": (3,), "rotation": (3, 3)}
_BOX = pa.struct(dict.fromkeys(_BOX_SHAPES, _VECTOR))
_KEYPOINTS = pa.struct(dict.fromkeys(("closest", "furthest", "centre"), _VECTOR))
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
"""The columns of a shard. Matrices are stored row by row; scores and provenance as JSON."""


def _list_columns_without_pixels() -> list[str]:
    """All columns but those of images and masks, which take most of a shard's space."""
    columns = [name for name in SCHEMA.names if name not in ("image", "objects")]
    for field in _OBJECT:
        if field.name != "mask":
            columns.append(f"objects.list.element.{field.name}")
    return columns


_COLUMNS_WITHOUT_PIXELS = _list_columns_without_pixels()


class ParquetWriter:
    """Writes a Parquet file under a temporary name in the folder of `path`.

    `commit` renames the temporary file to `path`. At the end of a `with` block the writer removes
    the temporary file if `commit` was not called. The bytes of the file depend only on its rows,
    not on how many rows each call of `write` passes.

    Args:
        path: The file.
        schema: Schema of the rows.
        rows_per_group: Rows per row group.

    Raises:
        SpearError: The disk is full, or the file cannot be written.

    Example:
        >>> with ParquetWriter(path, table.schema) as writer:  # doctest: +SKIP
        ...     writer.write(table)
        ...     writer.commit()
    """

    def __init__(self, path: Path, schema: pa.Schema, rows_per_group: int = ROWS_PER_GROUP) -> None:
        self.path = path
        self.rows_per_group = rows_per_group
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._buffer = schema.empty_table()
        with convert_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._parquet = pq.ParquetWriter(self._temporary, schema, compression="zstd")

    def write(self, table: pa.Table) -> None:
        """Add rows."""
        self._buffer = pa.concat_tables([self._buffer, table])
        while len(self._buffer) >= self.rows_per_group:
            self._write_group(self.rows_per_group)

    def _write_group(self, num_rows: int) -> None:
        with convert_write_errors(self.path):
            self._parquet.write_table(self._buffer.slice(0, num_rows).combine_chunks())
        self._buffer = self._buffer.slice(num_rows)

    def commit(self, metadata: Mapping[str, str] | None = None) -> None:
        """Write the remaining rows, and `metadata` into the footer; then rename the file to `path`.

        Afterwards the file is complete on the disk.
        """
        if len(self._buffer):
            self._write_group(len(self._buffer))
        with convert_write_errors(self.path):
            if metadata:
                self._parquet.add_key_value_metadata(dict(metadata))
            self._parquet.close()
            with self._temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(self._temporary, self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # closing fails on a full disk, but the file is removed anyway
            self._parquet.close()
        self._temporary.unlink(missing_ok=True)


def remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files that writers left in a folder when they were killed."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def remove_questions(folder: Path) -> None:
    """Remove the questions of a folder, which is about to get new labels, with a notice."""
    questions = folder / QUESTIONS_FILE
    if questions.is_file():
        questions.unlink()
        notice(
            f"{questions} was removed, because it lacks questions about what is labeled now. "
            "Run `spear questions` to write it again."
        )


def write_labels(labels: Iterable[LabeledImage], shard: Path) -> None:
    """Write labels to one shard. No file is left when `labels` raises.

    Args:
        labels: The labels.
        shard: The file to write, such as FOLDER/labels-00000.parquet.

    Raises:
        SpearError: The disk is full, or the file cannot be written.

    Example:
        >>> labels = list(read_labels("runs/labels"))  # doctest: +SKIP
        >>> write_labels(labels[:100], Path("runs/few/labels-00000.parquet"))  # doctest: +SKIP
    """
    with ParquetWriter(shard, SCHEMA) as writer:
        for label in labels:
            writer.write(to_table([label]))
        writer.commit()


def to_table(labels: Iterable[LabeledImage]) -> pa.Table:
    """Labels as rows of `SCHEMA`."""
    return pa.Table.from_pylist([_label_to_row(label) for label in labels], SCHEMA)


def read_labels(path: str | Path, pixels: bool = True) -> Iterator[LabeledImage]:
    """Read the labels of a shard, or of all shards of a folder, in order.

    One row group is in memory at a time.

    Args:
        path: The shard or folder.
        pixels: Whether to read images and masks. Without them, reading is faster.

    Yields:
        The labeled images.

    Raises:
        SpearError: The folder contains no shard, or a shard is broken.

    Example:
        >>> for label in read_labels("runs/labels"):  # doctest: +SKIP
        ...     print(label.source, [o.name for o in label.objects])
    """
    for shard in list_label_shards(path):
        file = _open_shard(shard)
        for group in range(file.num_row_groups):
            yield from _read_group(shard, file, group, pixels=pixels)


def count_labeled_images(path: str | Path) -> int:
    """The number of labeled images in a shard, or in all shards of a folder.

    Raises:
        SpearError: The folder contains no shard, or a shard is broken.
    """
    return sum(_open_shard(shard).metadata.num_rows for shard in list_label_shards(path))


def read_evenly_spread_labels(path: str | Path, max_images: int) -> list[LabeledImage]:
    """Read at most `max_images` labels, spread evenly over a shard or folder.

    Only the row groups that contain these labels are read.

    Args:
        path: The shard or folder.
        max_images: The largest number of labels to read.

    Raises:
        SpearError: The folder contains no shard, or a shard is broken.
    """
    num_labels = count_labeled_images(path)
    num_selected = min(max_images, num_labels)
    selected_rows = [i * num_labels // num_selected for i in range(num_selected)]
    labels: list[LabeledImage] = []
    # Rows are counted through all shards. A group contains the rows from `first_row` to
    # `end_row` - 1.
    first_row = 0
    for shard in list_label_shards(path):
        file = _open_shard(shard)
        for group in range(file.num_row_groups):
            end_row = first_row + file.metadata.row_group(group).num_rows
            rows_in_group = [row - first_row for row in selected_rows if first_row <= row < end_row]
            if rows_in_group:
                labels += _read_group(shard, file, group, rows_in_group)
            first_row = end_row
    return labels


def list_label_shards(path: str | Path) -> list[Path]:
    """Find the shards of a folder, in order. If `path` is a file, it is the only shard.

    Raises:
        SpearError: The path does not exist, or the folder contains no shard.
    """
    path = Path(path)
    shards = []
    if path.is_dir():
        shards = sorted(path.glob("labels*.parquet"))
    elif path.is_file():
        shards = [path]
    if not shards:
        raise SpearError(
            f"{path} contains no label shards (labels*.parquet). Give a folder that `spear label` "
            "wrote."
        )
    return shards


def read_shard_footer(path: Path, key: str) -> bytes | None:
    """What a shard's footer contains under `key`."""
    metadata = _open_shard(path).metadata.metadata or {}
    return metadata.get(key.encode())


@contextmanager
def translate_read_errors(
    path: Path, advice: str = "Delete it and label it again."
) -> Iterator[None]:
    """In the `with` block, turn errors of reading a Parquet file into a `SpearError`.

    Args:
        path: The file, which the error names.
        advice: The last sentence of the error.
    """
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
        refuse_lfs_pointer(path, path)
        raise SpearError(f"{path} is broken ({summarize_error(error)}). {advice}") from error


def _open_shard(path: Path) -> pq.ParquetFile:
    """Open a shard; `SpearError` if the file is broken or lacks columns of a shard."""
    with translate_read_errors(path):
        file = pq.ParquetFile(path)
    missing_columns = sorted(set(SCHEMA.names) - set(file.schema_arrow.names))
    if missing_columns:
        raise SpearError(
            f"{path} is not a label shard, because it has no {', '.join(missing_columns[:6])}. "
            "Give another file."
        )
    return file


def _read_group(
    shard: Path,
    file: pq.ParquetFile,
    group: int,
    rows: Sequence[int] | None = None,
    pixels: bool = True,
) -> list[LabeledImage]:
    """Read the labels of a row group.

    Args:
        shard: The path of the shard, for error messages.
        file: The opened shard.
        group: The index of the row group.
        rows: The indices, within the group, of the rows to read; None reads all rows.
        pixels: Whether to read images and masks.
    """
    columns = SCHEMA.names if pixels else _COLUMNS_WITHOUT_PIXELS
    with translate_read_errors(shard):
        table = file.read_row_group(group, columns=columns, use_threads=False)
        if rows is not None:
            table = table.take(rows)
        return [_label_from_row(row) for row in table.to_pylist()]


def _flatten(values: Any) -> Array:
    """Make a flat float32 array of an array, row by row."""
    return np.array(values, np.float32).ravel()


def _unflatten_finite(values: Any, *shape: int) -> Array:
    """Make a float32 array of this shape from a flat list; `ValueError` if a number is missing."""
    array = np.array(values, np.float32).reshape(shape)
    if not np.isfinite(array).all():
        raise ValueError("a number is missing")
    return array


def _label_to_row(label: LabeledImage) -> dict[str, Any]:
    return vars(label) | {
        "image": {"bytes": label.image, "path": None},
        "intrinsics": np.asarray(label.intrinsics, np.float64).ravel(),
        "objects": [_object_to_row(o) for o in label.objects],
        "provenance": json.dumps(dict(label.provenance), sort_keys=True),
    }


def _object_to_row(o: LabeledObject) -> dict[str, Any]:
    box = None
    if o.box3d is not None:
        box = {name: _flatten(getattr(o.box3d, name)) for name in _BOX_SHAPES}
    keypoints = {name: _flatten(point) for name, point in o.keypoints.items()}
    return {
        "name": o.name,
        "box2d": _flatten(o.box2d),
        "mask": list(o.mask_runs),
        "box3d": box,
        "keypoints": keypoints or None,
        "scores": json.dumps(dict(o.scores), sort_keys=True),
    }


def _label_from_row(row: dict[str, Any]) -> LabeledImage:
    """Make a label from a row of a shard.

    Raises:
        ValueError: A part of the label is missing or makes no sense.
    """
    values = {
        "image": row["image"]["bytes"] if "image" in row else b"",
        "intrinsics": np.array(row["intrinsics"], np.float64).reshape(3, 3),
        "objects": [_object_from_row(o) for o in row["objects"]],
        "provenance": parse_json(row["provenance"]),
    }
    label = LabeledImage(**row | values)
    names = [o.name for o in label.objects]
    is_complete = None not in (label.image, label.source, *names)
    is_positive = min(label.width, label.height, *label.intrinsics.diagonal()) > 0
    is_finite = np.isfinite(label.intrinsics).all()
    if not (is_complete and is_positive and is_finite and label.unit in get_args(Unit)):
        raise ValueError(f"image, source, name, size, intrinsics or unit of {label.source}")
    return label


def _object_from_row(row: dict[str, Any]) -> LabeledObject:
    box = None
    if row["box3d"]:
        arrays = {}
        for name, values in row["box3d"].items():
            arrays[name] = _unflatten_finite(values, *_BOX_SHAPES[name])
        box = Box3D(**arrays)
    keypoints = row["keypoints"] or {}
    return LabeledObject(
        name=row["name"],
        box2d=_unflatten_finite(row["box2d"], 4),
        mask_runs=row.get("mask", ()),
        box3d=box,
        keypoints={name: _unflatten_finite(point, 3) for name, point in keypoints.items()},
        scores=parse_json(row["scores"]),
    )


DepthImages = list[tuple[bytes, Array]]
"""Pairs of an encoded image and its depth [h / DEPTH_STRIDE_PX, w / DEPTH_STRIDE_PX] float16,
meters."""


def write_images_with_coarse_depth(images: Iterable[tuple[bytes, Array]], path: Path) -> None:
    """Write images with depth to a Parquet file. A small depth encoder is pretrained on such files.

    Of the depth, only every `DEPTH_STRIDE_PX`-th row and column is written.

    Args:
        images: Pairs of an encoded image and its depth [h, w] in meters, 0 where unknown.
        path: The file.

    Raises:
        SpearError: The file cannot be written.
    """
    rows = []
    middle = DEPTH_STRIDE_PX // 2
    for image, depth in images:
        # The middle pixel of each square of DEPTH_STRIDE_PX × DEPTH_STRIDE_PX pixels
        coarse = depth[middle::DEPTH_STRIDE_PX, middle::DEPTH_STRIDE_PX]
        coarse = np.ascontiguousarray(coarse, np.float16)
        height, width = coarse.shape
        rows.append({"image": image, "depth": coarse.tobytes(), "height": height, "width": width})
    table = pa.Table.from_pylist(rows)
    with ParquetWriter(path, table.schema, rows_per_group=max(1, len(table))) as writer:
        writer.write(table)
        writer.commit()


def read_images_with_coarse_depth(folder: Path) -> DepthImages:
    """Read all images of a folder, from files that `write_images_with_coarse_depth` wrote.

    Raises:
        SpearError: The folder contains no such file, or a file is broken.
    """
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise SpearError(f"{folder} contains no images with depth. Make some with `spear label`.")
    images = []
    with translate_read_errors(folder):
        table = pa.concat_tables([pq.read_table(file) for file in files])
        for row in table.to_pylist():
            depth = np.frombuffer(row["depth"], np.float16).reshape(row["height"], row["width"])
            images.append((row["image"], depth))
    return images
