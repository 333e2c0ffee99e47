"""Stage 0, the two encoders (nano only): depth from single images, standing in for MoGe's pretraining, and
what each patch shows (`spear.models.patch_classification`), standing in for SigLIP's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from spear.data.mixture import JITTER_DRAWS, jitter
from spear.errors import SpearError
from spear.labels.fit.masks import decode_mask
from spear.labels.store import DepthImages
from spear.models.moge.encoder import MogeForDepth
from spear.models.patch_classification import CELLS, PatchClassification
from spear.models.processing import Processor, fit_image, window
from spear.train.optimize import Batch, Loss
from spear.types import Array, LabeledImage
from spear.util.images import decode_image

LEAST = 0.01
"""Share of a patch that an object must cover to be shown by it."""


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


class PatchTask:
    """Batches of labelled images with what each patch shows, and the loss of `PatchClassification`.

    labels  view -> labelled images with their masks, of any size: they are fitted as their pixels are. Every
            fourth batch is of the wrist camera when there is one.
    """

    def __init__(
        self,
        model: PatchClassification,
        processor: Processor,
        names: Sequence[str],
        labels: Mapping[str, Sequence[LabeledImage]],
        images: int,
        seed: int,
    ) -> None:
        self.model, self.processor, self.images, self.seed = model, processor, images, seed
        patch = model.vlm.config.vision_config.patch_size
        self.views = {
            view: [_targets(label, names, patch, processor.image_sizes[view]) for label in found]
            for view, found in labels.items()
        }

    def batch(self, step: int) -> Batch:
        """Arguments of `PatchClassification.forward`."""
        rng = np.random.default_rng((self.seed, 2, step))
        view = "wrist" if "wrist" in self.views and rng.random() < 0.25 else "external"
        rows = [self.views[view][int(i)] for i in rng.integers(len(self.views[view]), size=self.images)]
        images, *targets = zip(*rows, strict=True)
        jittered = (jitter(decode_image(image), rng.random(JITTER_DRAWS), 0.5) for image in images)
        pixels = torch.stack([self.processor.image(image, view) for image in jittered])
        columns = (torch.from_numpy(np.stack(column)) for column in targets)
        named = zip(("shown", "cells", "centre", "largest"), columns, strict=True)
        return {"view": view, "pixels": pixels, **dict(named)}

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Names and centres."""
        output = self.model(**batch)
        return output.loss, output.parts


def _targets(
    label: LabeledImage, names: Sequence[str], patch: int, size: tuple[int, int]
) -> tuple[bytes, Array, Array, Array, Array]:
    """The encoded image, and shown [P, C] bool, cells [P, CELLS · CELLS, C] uint8, centre [P, 2] float32 and
    largest [P] bool of `PatchClassification.forward`, for the image fitted to `size` (width, height)."""
    rows, columns = size[1] // patch, size[0] // patch
    left, top, across, _ = window((label.width, label.height), size)
    side = patch // CELLS
    shown = np.zeros((rows, columns, len(names)), bool)
    cells = np.zeros((rows, columns, CELLS, CELLS, len(names)), np.uint8)
    centre = np.zeros((rows, columns, 2), np.float32)
    most = np.full((rows, columns), LEAST, np.float32)
    grid = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1) + 0.5
    for o in label.objects:
        mask = decode_mask(o.mask, label.height, label.width)
        if mask.shape != (size[1], size[0]):  # what share of each pixel it covers
            grey = np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * 255
            mask = fit_image(grey, size[1], size[0])[..., 0] / np.float32(255)
        mask = mask[: rows * patch, : columns * patch]
        fine = mask.reshape(rows, CELLS, side, columns, CELLS, side).mean((2, 5)).transpose(0, 2, 1, 3)
        share = fine.mean((2, 3))
        if o.name in names:
            name = names.index(o.name)
            shown[..., name] |= share > LEAST
            cells[..., name] = np.maximum(cells[..., name], np.rint(255 * fine).astype(np.uint8))
        x0, y0, x1, y1 = o.box2d
        place = np.array([(x0 + x1) / 2 - left, (y0 + y1) / 2 - top]) * (size[0] / across) / patch
        larger = share > most
        centre[larger] = (place - grid)[larger]
        most = np.maximum(most, share)
    flat = rows * columns
    return (
        label.image,
        shown.reshape(flat, -1),
        cells.reshape(flat, CELLS * CELLS, -1),
        centre.reshape(flat, 2),
        (most > LEAST).reshape(flat),
    )
