"""What the stages train on and how wrong a model is there: their batches and losses (`Task`).

Stage 0, nano only: depth from single images, standing in for MoGe's pretraining, and what each patch shows,
for SigLIP's. Then questions about labelled images, and demonstrations with 3D questions alongside.
"""

import dataclasses
import functools
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spear.data.mixture import JITTER_DRAWS, TrainingSamples, jitter
from spear.data.normalize import STATE_VECTOR_DIM, Normalizer
from spear.errors import SpearError, format_count, notice
from spear.labels.fit.masks import decode_mask
from spear.labels.inputs import hash_content
from spear.labels.questions.generate import generate_questions
from spear.labels.store import DepthImages, find_shards, read_depth, read_labels
from spear.models.processing import Processor, visible_window
from spear.models.spear1 import Spear1ForActionPrediction
from spear.models.stage0 import CELLS_PER_SIDE, MogeForDepth, PatchClassification
from spear.models.vlm import SpearVLMForConditionalGeneration
from spear.question_types import QUESTION_TYPES
from spear.tokens import BinSpacing, CoordinateTokenizer
from spear.train.optimize import Batch, Loss
from spear.train.options import QuestionMix, Recipe
from spear.train.parallel import is_sharded
from spear.types import Action, Array, LabeledImage, Question
from spear.util.files import notice_missing_shards
from spear.util.held_out import is_held_out
from spear.util.images import decode_image, fit_image

Targets = tuple[bytes, Array, Array, Array, Array]
"""An image and what its patches show, as `patch_targets` gives it."""
LEAST = 0.01
"""Share of a patch that an object must cover to be shown by it."""


@dataclass(frozen=True)
class DepthTask:
    """Batches of images with depth, by view, and their loss; every fourth of a wrist camera if there is."""

    model: MogeForDepth
    views: Mapping[str, DepthImages]
    batch_size: int
    seed: int

    def batch(self, step: int) -> Batch:
        """uint8 pixels [B, 3, h, w] and float depth [B, h/4, w/4]."""
        rng = np.random.default_rng((self.seed, step))
        images = self.views[
            "wrist" if "wrist" in self.views and rng.random() < 0.25 else min(self.views)
        ]
        rows = [images[int(row)] for row in rng.integers(len(images), size=self.batch_size)]
        pixels = [torch.from_numpy(decode_image(image)).permute(2, 0, 1) for image, _ in rows]
        depth = torch.from_numpy(np.stack([depth for _, depth in rows])).float()
        return {"pixels": torch.stack(pixels), "depth": depth}

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Mean absolute error of log depth, shape and scale apart."""
        return self.model(batch["pixels"], batch["depth"]).loss, {}


@dataclass(frozen=True)
class PatchTask:
    """Batches of labelled images with what each patch shows, by view, as `patch_targets` gives it, and the
    loss of `PatchClassification`. Every fourth batch is of the wrist camera when there is one."""

    model: PatchClassification
    processor: Processor
    views: Mapping[str, Sequence[Targets]]
    images: int
    seed: int

    def batch(self, step: int) -> Batch:
        """Arguments of `PatchClassification.forward`."""
        rng = np.random.default_rng((self.seed, 2, step))
        view = "wrist" if "wrist" in self.views and rng.random() < 0.25 else min(self.views)
        rows = [
            self.views[view][int(i)] for i in rng.integers(len(self.views[view]), size=self.images)
        ]
        images, *targets = zip(*rows, strict=True)
        jittered = (jitter(decode_image(image), rng.random(JITTER_DRAWS), 0.5) for image in images)
        pixels = torch.stack([self.processor.prepare_image(image, view) for image in jittered])
        columns = (torch.from_numpy(np.stack(column)) for column in targets)
        return {
            "pixels": pixels,
            **dict(zip(("shown", "cells", "centre", "largest"), columns, strict=True)),
        }

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Names and centres."""
        output = self.model(**batch)
        return output.loss, output.parts


def patch_targets(
    label: LabeledImage, names: Sequence[str], patch: int, size: tuple[int, int]
) -> Targets:
    """The encoded image, and shown [P, C] bool, cells [P, CELLS_PER_SIDE², C] uint8, centre [P, 2] float32
    and largest [P] bool of `PatchClassification.forward`, for the image fitted to `size` (width, height)."""
    rows, columns = size[1] // patch, size[0] // patch
    left, top, *shown_size = visible_window((label.width, label.height), size)
    side = patch // CELLS_PER_SIDE
    shown = np.zeros((rows, columns, len(names)), bool)
    cells = np.zeros((rows, columns, CELLS_PER_SIDE, CELLS_PER_SIDE, len(names)), np.uint8)
    centre = np.zeros((rows, columns, 2), np.float32)
    most = np.full((rows, columns), LEAST, np.float32)
    grid = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1) + 0.5
    for o in label.objects:
        mask = decode_mask(o.mask, label.height, label.width)
        if mask.shape != (size[1], size[0]):  # what share of each pixel it covers
            grey = np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * 255
            mask = fit_image(grey, size[1], size[0])[..., 0] / np.float32(255)
        mask = mask[: rows * patch, : columns * patch]
        fine = (
            mask.reshape(rows, CELLS_PER_SIDE, side, columns, CELLS_PER_SIDE, side)
            .mean((2, 5))
            .transpose(0, 2, 1, 3)
        )
        share = fine.mean((2, 3))
        if o.name in names:
            name = names.index(o.name)
            shown[..., name] |= share > LEAST
            cells[..., name] = np.maximum(cells[..., name], np.rint(255 * fine).astype(np.uint8))
        x0, y0, x1, y1 = o.box2d
        place = np.array([(x0 + x1) / 2 - left, (y0 + y1) / 2 - top]) * size / shown_size / patch
        larger = share > most
        centre[larger] = (place - grid)[larger]
        most = np.maximum(most, share)
    flat = rows * columns
    named, filled = (
        shown.reshape(flat, -1),
        cells.reshape(flat, CELLS_PER_SIDE * CELLS_PER_SIDE, -1),
    )
    return label.image, named, filled, centre.reshape(flat, 2), (most > LEAST).reshape(flat)


TRIES = 1000
"""Images looked at for each that can be asked about, at the most."""
LOOKED_AT, OUTSIDE = 100, 0.1
"""More than this share of the numbers of so many images outside of the 3D tokens is said (our choice)."""
LENGTH_GROUPS, GROUP_ROWS = 4, 32
"""Answers differ in length (a point 3 tokens, a box 24): running texts of like length together, in at most so
many groups, saves up to a quarter of the work, if there are so many texts in each."""


def length_groups(model: torch.nn.Module, batch: Batch) -> int:
    """How many groups the texts of a batch run in; 1 if sharded: all processes run as many layers."""
    return (
        1
        if is_sharded(model)
        else min(LENGTH_GROUPS, max(1, len(batch["input_ids"]) // GROUP_ROWS))
    )


def view_folders(folder: Path, views: Sequence[str]) -> dict[str, Path]:
    """The folders of labels by view; see `load_labels`."""
    return {view: folder / view for view in views if (folder / view).is_dir()} or {views[0]: folder}


def load_labels(folders: Sequence[Path], views: Sequence[str]) -> dict[str, list[LabeledImage]]:
    """All labels of some folders, by view.

    A folder has a sub-folder per view, as `spear label --scenes` writes, or shards of the first view. Raises
    `SpearError` for mixed units.
    """

    def compact(label: LabeledImage) -> LabeledImage:
        kept = (
            dataclasses.replace(o, mask=array("i", o.mask)) for o in label.objects
        )  # a tenth of a list
        return dataclasses.replace(label, objects=tuple(kept))

    found: dict[str, list[LabeledImage]] = {}
    for folder in folders:
        for view, path in view_folders(folder, views).items():
            notice_missing_shards(path, find_shards(path), "run its command again")
            found.setdefault(view, []).extend(compact(one) for one in read_labels(path))
    every = [one for labels in found.values() for one in labels]
    if len(units := {one.unit for one in every}) > 1:
        raise SpearError(
            f"labels mix units ({', '.join(sorted(units))}): train on one unit at a time"
        )
    of_all = f"of {format_count(len(every), 'labelled images')}"
    if tests := sum(is_held_out(one.source) for one in every):
        notice(f"{tests:,} {of_all} from scenes kept for testing")
    if twice := len(every) - len({(one.source, one.image) for one in every}):
        notice(f"{twice:,} {of_all} are the same as others, and count twice: give each folder once")
    return {view: found[view] for view in views if view in found}


def load_depth(
    folders: Sequence[Path], labels: Mapping[str, Sequence[LabeledImage]]
) -> dict[str, DepthImages]:
    """The depth of the images that `load_labels` gave, by view: row i belongs to label i. Raises `SpearError`
    for a folder without depth, or with that of other images."""
    found: dict[str, DepthImages] = {}
    for view, known in labels.items():
        having = [folder for folder in folders if view in view_folders(folder, list(labels))]
        found[view] = [image for folder in having for image in read_depth(folder / "depth" / view)]
        if [image for image, _ in found[view]] != [label.image for label in known]:
            what = f"depth/{view} is of other images than the labels"
            raise SpearError(
                f"{', '.join(map(str, having))}: {what}: run `spear label --scenes` again"
            )
    return found


@dataclass(frozen=True)
class QuestionSamples:
    """Batches of images with questions: a pure function of (seed, step).

    labels   view -> labelled images. A batch is of one view: "wrist" with probability `wrist`.
    augment  strength of photometric jitter.
    depth    view -> the depth of these images (`load_depth`), needed where the mix asks about pixels.
    """

    labels: Mapping[str, Sequence[LabeledImage]]
    processor: Processor
    mix: QuestionMix
    images: int
    seed: int
    augment: float = 0.0
    depth: Mapping[str, DepthImages] | None = None

    def __post_init__(self) -> None:
        if not self.labels or not all(self.labels.values()):
            raise SpearError("no labelled images: make some with `spear label --out …`")
        tokens = self.processor.coordinates
        low, high = tokens.bin_edges[[0, -1]]
        for view, labels in self.labels.items():
            values = answers(labels, self.seed, LOOKED_AT, self.mix.families)
            outside = ((values < low) | (values > high)).sum() / max(1, len(values))
            if outside > OUTSIDE:
                what = f"{outside:.0%} of the {view} labels' numbers lie outside of the 3D tokens"
                cure = f"a VLM's recipe fits new ones with --set bins={tokens.num_bins}"
                notice(
                    f"{what}, {low:.2g} … {high:.2g} {tokens.unit}, and are learned as their ends: {cure}"
                )

    @functools.cached_property
    def wrist(self) -> float:
        """Fraction of batches of the wrist camera."""
        there = len(self.labels.get("wrist", ())) / sum(map(len, self.labels.values()))
        return there if self.mix.wrist is None or not there else self.mix.wrist

    def batch(self, step: int) -> Batch:
        """Arguments of `SpearVLMForConditionalGeneration.forward`, `images` images with their questions."""
        rng = np.random.default_rng((self.seed, 1, step))
        view = "wrist" if rng.random() < self.wrist else next(iter(self.labels))
        labels = self.labels[view][: self.mix.most_images or None]
        pixels, questions, owners, tries = list[torch.Tensor](), list[Question](), list[int](), 0
        while len(pixels) < self.images:
            if (tries := tries + 1) > TRIES * (self.images + len(owners)):
                kinds = ", ".join(dict.fromkeys(self.mix.families))
                raise SpearError(
                    f"hardly any of these images can be asked about {kinds}: add families"
                )
            row = int(rng.integers(len(labels)))
            label = labels[row]
            depth = None if self.depth is None else self.depth[view][row][1]
            asked = generate_questions(label, rng, self.mix.pairs, self.mix.families, depth=depth)
            if not asked:
                continue
            image = decode_image(label.image, label.source)
            if self.augment > 0:
                image = jitter(image, rng.random(JITTER_DRAWS), self.augment)
            owners += [len(pixels)] * len(asked)
            pixels.append(self.processor.prepare_image(image, view))
            questions += [
                self.processor.map_question_pixels(one, image.shape[1::-1], view) for one in asked
            ]
        images = {"pixel_values": {view: torch.stack(pixels)}, "image_index": torch.tensor(owners)}
        return {**images, **self.processor.encode_questions(questions)}

    def marks(self) -> list[str]:
        """What tells each image that is asked about from others, wherever it lies."""
        drawn = [*self.labels.values()][: 2 if self.wrist else 1]
        return [
            hash_content(one.image)
            for some in drawn
            for one in some[: self.mix.most_images or None]
        ]


def fit_coordinates(
    labels: Sequence[LabeledImage], bins: int, seed: int, spacing: BinSpacing = "quantile"
) -> CoordinateTokenizer:
    """3D tokens fitted to the answers about `labels` (20,000 at most), which have one unit."""
    return CoordinateTokenizer.fit(
        answers(labels, seed, 20_000, QUESTION_TYPES), bins, labels[0].unit, spacing
    )


def answers(labels: Sequence[LabeledImage], seed: int, most: int, families: Sequence[str]) -> Array:
    """The numbers that questions about `most` of the labels at the most, drawn by chance, have as answers."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))[:most]
    questions = (
        one for index in order for one in generate_questions(labels[index], rng, (4, 4), families)
    )
    return np.array([value for one in questions for value in one.values])


class VlmTask:
    """The questions' loss; with `coordinate_rows_only` only the 3D tokens' rows of the embeddings learn."""

    def __init__(
        self,
        model: SpearVLMForConditionalGeneration,
        samples: QuestionSamples,
        coordinate_rows_only: bool,
    ) -> None:
        self.model, self.questions, self.batch = model, samples, samples.batch
        ids = model.config.coordinate_ids
        rows = {"language_model.embed_tokens.weight": (ids.start, ids.stop)}
        self.trainable_rows = rows if coordinate_rows_only else {}

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """λ-weighted cross-entropy and its parts."""
        output = self.model(**batch, length_groups=length_groups(self.model, batch))
        return output.loss, output.parts


@dataclass(frozen=True)
class VlaTask:
    """Batches of robot steps (and of questions) as in `stage`; the flow loss (plus the questions' loss)."""

    model: Spear1ForActionPrediction
    processor: Processor
    normalizer: Normalizer
    samples: TrainingSamples
    stage: Recipe
    questions: QuestionSamples | None = None

    def batch(self, step: int) -> Batch:
        """Network inputs of one step: pixels, prompt, state, action chunk and mask; and questions."""
        batch = encode_robot_batch(
            self.processor, self.normalizer, self.samples.batch(step, self.stage.batch_size)
        )
        if self.questions is not None:
            batch["questions"] = self.questions.batch(step)
        return batch

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Flow loss + weight · question loss, and the parts of both."""
        robot = {key: value for key, value in batch.items() if key != "questions"}
        robot["actions"] = Action.from_vector(batch["actions"])
        output = self.model(**robot, flow_samples=self.stage.flow_samples, generator=generator)
        total, parts = output.loss, dict(output.parts)
        if self.questions is not None:
            questions = batch["questions"]
            asked = self.model.vlm(**questions, length_groups=length_groups(self.model, questions))
            total = total + self.stage.question_weight * asked.loss
            parts |= {f"question_{k}": v for k, v in asked.parts.items()}
        return total, parts


def encode_robot_batch(
    processor: Processor, normalizer: Normalizer, raw: Mapping[str, Any]
) -> Batch:
    """A batch of `TrainingSamples` as network inputs, each row normalised as its dataset is."""
    tensors = {
        k: torch.from_numpy(np.ascontiguousarray(raw[k]))
        for k in ("position", "rotation", "gripper")
    }
    vectors = torch.from_numpy(raw["action"])
    action, state = torch.empty_like(vectors), torch.empty(len(vectors), STATE_VECTOR_DIM)
    kinds = list(normalizer.datasets.values())
    for index, own in enumerate(kinds or [normalizer]):
        rows = torch.from_numpy(raw["dataset"] == index if kinds else np.ones(len(vectors), bool))
        action[rows] = own.normalize_action(Action.from_vector(vectors[rows])).to_vector()
        position, rotation, gripper = (
            tensors[k][rows] for k in ("position", "rotation", "gripper")
        )
        state[rows] = own.state_vector(position, rotation, gripper[..., None])
    return {
        # The network turns them round in memory: here that would take half the time of decoding them.
        "pixel_values": {
            k: torch.from_numpy(v).permute(0, 3, 1, 2) for k, v in raw["images"].items()
        },
        "view_mask": {k: torch.from_numpy(v) for k, v in raw["views"].items()},
        "state": state,
        "actions": action,
        "action_mask": torch.from_numpy(raw["action_mask"]),
        **processor.encode_instructions(raw["instruction"], cut=True),
    }
