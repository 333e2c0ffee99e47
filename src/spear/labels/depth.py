"""Images with the depth of their pixels, in Parquet files: what a small depth encoder is pretrained on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spear.errors import SpearError
from spear.types import Array
from spear.util.files import writing

STRIDE = 4
"""Depth is kept at every fourth pixel: the head predicts cells of four pixels at nano's patch size."""


def write_depth(rows: Iterable[tuple[bytes, Array]], path: Path) -> int:
    """Write (encoded image, depth [h, w] metres, 0 where unknown) pairs to one Parquet file, atomically.

    Raises `SpearError` when it cannot be written.
    """
    images, depths, heights, widths = [], [], [], []
    for image, depth in rows:
        small = np.ascontiguousarray(depth[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE], np.float16)
        images.append(image)
        depths.append(small.tobytes())
        heights.append(small.shape[0])
        widths.append(small.shape[1])
    table = pa.table({"image": images, "depth": depths, "height": heights, "width": widths})
    part = path.with_name(f".part-{path.name}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            pq.write_table(table, part, compression="zstd")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return len(images)


class DepthImages:
    """All images of a folder of such files, in memory: `len(images)`, `images[i]`.

    Raises `SpearError` when there are none, or a file is broken.
    """

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("*.parquet"))
        if not files:
            raise SpearError(f"no images with depth in {folder}: make some with `spear label`")
        try:
            self.table = pa.concat_tables([pq.read_table(f) for f in files]).combine_chunks()
        except (OSError, pa.ArrowInvalid) as error:
            raise SpearError(
                f"images with depth in {folder} cannot be read ({error}): label again"
            ) from error

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> tuple[bytes, Array]:
        """The encoded image and its depth [h / STRIDE, w / STRIDE] float32, metres."""
        shape = (self.table["height"][row].as_py(), self.table["width"][row].as_py())
        depth = np.frombuffer(self.table["depth"][row].as_py(), np.float16).reshape(shape)
        return self.table["image"][row].as_py(), depth.astype(np.float32)
