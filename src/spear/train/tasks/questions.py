"""Labelled images → batches of questions with answers, for SPEAR-VLM."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from spear.data.mixture import JITTER_DRAWS, jitter
from spear.errors import SpearError
from spear.labels.questions.generate import generate
from spear.labels.store import DepthImages, read
from spear.models.processing import Processor
from spear.models.vlm import SpearVLMForConditionalGeneration
from spear.tokens import CoordinateTokenizer, Spacing
from spear.train.optimize import Batch, Loss
from spear.train.options import QuestionMix
from spear.train.parallel import is_sharded
from spear.types import LabeledImage, Question
from spear.util.images import decode_image

LENGTH_GROUPS, GROUP_ROWS = 4, 32
"""Answers differ in length (a point 3 tokens, a box 24): running texts of like length together, in at most so
many groups, saves up to a quarter of the work. With fewer texts per group another pass over the layers costs
more: for the 8 texts beside a nano policy's actions 1 group takes 0.6 of the time of 4, for the 64 of a
SPEAR-VLM step 2 take 0.9 of that."""


def length_groups(model: torch.nn.Module, batch: Batch) -> int:
    """How many groups the texts of a batch run in: 1 to `LENGTH_GROUPS`.

    Always 1 for a sharded model, whose processes must run every layer equally often.
    """
    rows = len(batch["input_ids"])
    return 1 if is_sharded(model) else min(LENGTH_GROUPS, max(1, rows // GROUP_ROWS))


def load_labels(folder: Path, views: Sequence[str], masks: bool = False) -> dict[str, list[LabeledImage]]:
    """All labels of a folder, by view; without their masks unless asked for (questions do not need them).

    The folder has a sub-folder per view, as `spear label --scenes` writes, or shards of the first view.
    """
    folder = Path(folder)
    found = {view: folder / view for view in views if (folder / view).is_dir()} or {views[0]: folder}

    def compact(label: LabeledImage) -> LabeledImage:
        kept = (dataclasses.replace(o, mask=array("i", o.mask) if masks else ()) for o in label.objects)
        return dataclasses.replace(label, objects=tuple(kept))

    return {view: [compact(label) for label in read(path)] for view, path in found.items()}


def load_depth(folder: Path, labels: Mapping[str, Sequence[LabeledImage]]) -> dict[str, DepthImages]:
    """The depth of the images that `load_labels` gave, by view: row i belongs to label i.

    Raises `SpearError` for a folder without depth, or with that of other images.
    """
    found = {view: DepthImages(Path(folder) / "depth" / view) for view in labels}
    for view, images in found.items():
        if len(images) != len(labels[view]) or images[0][0] != labels[view][0].image:
            raise SpearError(
                f"{folder}: depth/{view} is of other images than the labels: run `spear label --scenes` again"
            )
    return found


class QuestionSamples:
    """Batches of images with questions: a pure function of (seed, step).

    labels   view -> labelled images. A batch is of one view: "wrist" with probability `mix.wrist`.
    augment  strength of photometric jitter.
    depth    view -> the depth of these images (`load_depth`), needed where the mix asks about pixels.
    """

    def __init__(
        self,
        labels: Mapping[str, Sequence[LabeledImage]],
        processor: Processor,
        mix: QuestionMix,
        images: int,
        seed: int,
        augment: float = 0.0,
        depth: Mapping[str, DepthImages] | None = None,
    ) -> None:
        if not labels or not all(labels.values()):
            raise SpearError("no labelled images: make some with `spear label --out …`")
        self.labels = {view: images[: mix.most_images or None] for view, images in labels.items()}
        self.depth, self.processor, self.mix = depth, processor, mix
        self.images, self.seed, self.augment = images, seed, augment

    def batch(self, step: int) -> Batch:
        """Arguments of `SpearVLMForConditionalGeneration.forward`, `images` images with their questions."""
        rng = np.random.default_rng((self.seed, 1, step))
        wrist = rng.random() < self.mix.wrist and "wrist" in self.labels
        view = "wrist" if wrist else next(iter(self.labels))
        labels = self.labels[view]
        pixels: list[torch.Tensor] = []
        questions: list[Question] = []
        owners: list[int] = []
        while len(pixels) < self.images:
            row = int(rng.integers(len(labels)))
            label = labels[row]
            depth = None if self.depth is None else self.depth[view][row][1]
            asked = generate(label, rng, self.mix.pairs, self.mix.families, depth=depth)
            if not asked:
                continue
            image = decode_image(label.image, label.source)
            if self.augment > 0:
                image = jitter(image, rng.random(JITTER_DRAWS), self.augment)
            owners += [len(pixels)] * len(asked)
            pixels.append(self.processor.image(image, view))
            questions += asked
        return {
            "pixel_values": {view: torch.stack(pixels)},
            "image_index": torch.tensor(owners),
            **self.processor.questions(questions),
        }


def fit_coordinates(
    labels: Sequence[LabeledImage],
    bins: int,
    seed: int,
    spacing: Spacing = "quantile",
    most: int = 20_000,
) -> CoordinateTokenizer:
    """3D tokens whose bins are fitted to the numbers that questions about `labels` have as answers.

    Raises SpearError for labels of several units.
    """
    rng = np.random.default_rng(seed)
    values: list[float] = []
    for index in rng.permutation(len(labels))[:most]:
        for question in generate(labels[index], rng, (4, 4)):
            values += question.values
    units = {label.unit for label in labels}
    if len(units) != 1:
        raise SpearError(f"labels mix units ({', '.join(sorted(units))}): train on one unit at a time")
    return CoordinateTokenizer.fit(np.array(values), bins, units.pop(), spacing)


class VlmTask:
    """The questions' loss; with `coordinate_rows_only` only the 3D tokens' rows of the embeddings learn."""

    def __init__(
        self, model: SpearVLMForConditionalGeneration, samples: QuestionSamples, coordinate_rows_only: bool
    ) -> None:
        self.model, self.batch = model, samples.batch
        self.learning_rows: dict[str, tuple[int, int]] = {}
        if coordinate_rows_only:
            first = model.config.coordinate_start
            last = first + model.config.coordinate_bins
            self.learning_rows = {"language_model.embed_tokens.weight": (first, last)}

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """λ-weighted cross-entropy and its parts."""
        output = self.model(**batch, length_groups=length_groups(self.model, batch))
        return output.loss, output.parts
