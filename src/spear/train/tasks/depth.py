"""Stage 0, encoder: depth from single images, standing in for MoGe's own pretraining (nano only)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from spear.errors import SpearError
from spear.labels.store import DepthImages
from spear.models.moge.encoder import MogeForDepth
from spear.train.optimize import Batch, Loss
from spear.util.images import decode_image


class DepthTask:
    """Batches of images with depth, and the loss of `MogeForDepth`.

    folder  has a sub-folder per view; every fourth batch is of the wrist camera when there is one.
    """

    def __init__(self, model: MogeForDepth, folder: Path, batch_size: int, seed: int) -> None:
        self.model, self.batch_size, self.seed = model, batch_size, seed
        self.views = {path.name: DepthImages(path) for path in sorted(folder.glob("*/"))}
        if not self.views:
            raise SpearError(f"no images with depth in {folder}: make some with `spear label`")

    def batch(self, step: int) -> Batch:
        """uint8 pixels [B, 3, h, w] and float depth [B, h/4, w/4]."""
        rng = np.random.default_rng((self.seed, step))
        images = self.views["wrist" if "wrist" in self.views and rng.random() < 0.25 else "external"]
        rows = [images[int(row)] for row in rng.integers(len(images), size=self.batch_size)]
        pixels = [torch.from_numpy(decode_image(image)).permute(2, 0, 1) for image, _ in rows]
        return {"pixels": torch.stack(pixels), "depth": torch.stack([torch.from_numpy(d) for _, d in rows])}

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Mean absolute error of log depth, shape and scale apart."""
        return self.model(batch["pixels"], batch["depth"]).loss, {}
