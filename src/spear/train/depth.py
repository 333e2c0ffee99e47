"""Stage 0, encoder: relative depth from single images, standing in for MoGe's own pretraining (nano only)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from spear.data.images import decode_image
from spear.errors import SpearError
from spear.models.moge import MogeForRelativeDepth
from spear.train.optimize import Batch
from spear.types import Array

STRIDE = 4
"""Depth is kept at every fourth pixel: the head predicts cells of four pixels at nano's patch size."""


def write_depth(rows: Iterable[tuple[bytes, Array]], path: Path) -> int:
    """Write (encoded image, depth [h, w] metres, 0 where unknown) pairs to one Parquet file, atomically."""
    images, depths, heights, widths = [], [], [], []
    for image, depth in rows:
        small = np.ascontiguousarray(depth[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE], np.float16)
        images.append(image)
        depths.append(small.tobytes())
        heights.append(small.shape[0])
        widths.append(small.shape[1])
    table = pa.table({"image": images, "depth": depths, "height": heights, "width": widths})
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")
    pq.write_table(table, part, compression="zstd")
    part.replace(path)
    return len(images)


class DepthTask:
    """Batches of images with depth, and the loss of `MogeForRelativeDepth`."""

    def __init__(self, model: MogeForRelativeDepth, folder: Path, batch_size: int, seed: int) -> None:
        files = sorted(Path(folder).glob("*.parquet"))
        if not files:
            raise SpearError(
                f"no depth images in {folder}: make some with `spear label --source sim --out …`"
            )
        self.model = model
        self.batch_size = batch_size
        self.seed = seed
        self.table = pa.concat_tables([pq.read_table(f) for f in files]).combine_chunks()

    def batch(self, step: int) -> Batch:
        """uint8 pixels [B, 3, h, w] and float depth [B, h/4, w/4]."""
        rng = np.random.default_rng((self.seed, step))
        pixels, depths = [], []
        for row in rng.integers(len(self.table), size=self.batch_size):
            image = decode_image(self.table["image"][row].as_py())
            shape = (self.table["height"][row].as_py(), self.table["width"][row].as_py())
            depth = np.frombuffer(self.table["depth"][row].as_py(), np.float16).reshape(shape)
            pixels.append(torch.from_numpy(image).permute(2, 0, 1))
            depths.append(torch.from_numpy(depth.astype(np.float32)))
        return {"pixels": torch.stack(pixels), "depth": torch.stack(depths)}

    def loss(
        self, batch: Batch, generator: torch.Generator
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """Mean absolute error of relative log depth."""
        loss = self.model(batch["pixels"], batch["depth"]).loss
        return loss, {}
