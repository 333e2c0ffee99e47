"""Stage 0, encoder: relative depth from single images, standing in for MoGe's own pretraining (nano only)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from spear.images import decode_image
from spear.labels.depth import DepthImages
from spear.models.moge import MogeForRelativeDepth
from spear.train.optimize import Batch


class DepthTask:
    """Batches of images with depth, and the loss of `MogeForRelativeDepth`."""

    def __init__(self, model: MogeForRelativeDepth, folder: Path, batch_size: int, seed: int) -> None:
        self.model = model
        self.batch_size = batch_size
        self.seed = seed
        self.images = DepthImages(folder)

    def batch(self, step: int) -> Batch:
        """uint8 pixels [B, 3, h, w] and float depth [B, h/4, w/4]."""
        rng = np.random.default_rng((self.seed, step))
        rows = [self.images[int(row)] for row in rng.integers(len(self.images), size=self.batch_size)]
        pixels = [torch.from_numpy(decode_image(image)).permute(2, 0, 1) for image, _ in rows]
        return {"pixels": torch.stack(pixels), "depth": torch.stack([torch.from_numpy(d) for _, d in rows])}

    def loss(
        self, batch: Batch, generator: torch.Generator
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """Mean absolute error of relative log depth."""
        loss = self.model(batch["pixels"], batch["depth"]).loss
        return loss, {}
