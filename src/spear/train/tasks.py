"""What the training stages learn: their batches and losses (`Task`).

Stage 0, for nano only: depth from single images, which stands in for MoGe's pretraining, and the
objects in each patch, which stands in for SigLIP's. Then questions about labeled images, and
demonstrations with 3D questions in addition.
"""

import dataclasses
import functools
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from spear.data.mixture import NUM_JITTER_DRAWS, TrainingSamples, jitter_colors
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
from spear.types import Action, Array, LabeledImage, LabeledObject, Question
from spear.util.files import notice_missing_shards
from spear.util.held_out import is_held_out
from spear.util.images import decode_image, fit_image

WRIST_FRACTION = 0.25  # of stage 0's batches, where there are wrist images (our choice)
PATCH_JITTER = 0.5  # strength of the photometric augmentation of `PatchTask` (our choice)
MIN_COVERAGE = 0.01  # part of a patch that an object must cover for the patch to show it


def _draw_view(views: Mapping[str, Any], rng: np.random.Generator) -> str:
    """Draw the view of a batch of stage 0: the wrist camera, or the first by name."""
    if "wrist" in views and rng.random() < WRIST_FRACTION:
        return "wrist"
    return min(views)


@dataclass(frozen=True)
class DepthTask:
    """Batches of images with depth, from one view each, and the loss of `MogeForDepth`."""

    model: MogeForDepth
    views: Mapping[str, DepthImages]
    batch_size: int
    seed: int

    def batch(self, step: int) -> Batch:
        """Return uint8 pixels [B, 3, h, w] and float depth [B, h/4, w/4]."""
        rng = np.random.default_rng((self.seed, step))
        images = self.views[_draw_view(self.views, rng)]
        samples = [images[int(row)] for row in rng.integers(len(images), size=self.batch_size)]
        pixels = [torch.from_numpy(decode_image(image)).permute(2, 0, 1) for image, _ in samples]
        depth = np.stack([depth for _, depth in samples])
        return {"pixels": torch.stack(pixels), "depth": torch.from_numpy(depth).float()}

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Return the mean absolute error of log depth, of shape and of scale."""
        return self.model(batch["pixels"], batch["depth"]).loss, {}


class PatchTargets(NamedTuple):
    """An encoded image with P patches and what they show, for `PatchClassification.forward`.

    image    the encoded image.
    is_shown [P, C] bool: the patch shows an object of this name.
    cells    [P, CELLS_PER_SIDE², C] uint8: the part of each cell that such an object covers, 255
             for all of it.
    center   [P, 2] float32: x, y of the center of the patch's largest object, in the patch's frame,
             in patches.
    largest  [P] bool: the patch has such an object.
    """

    image: bytes
    is_shown: Array
    cells: Array
    center: Array
    largest: Array


@dataclass(frozen=True)
class PatchTask:
    """Batches of labeled images, from one view each, and the loss of `PatchClassification`."""

    model: PatchClassification
    processor: Processor
    views: Mapping[str, Sequence[PatchTargets]]
    batch_size: int
    seed: int

    def batch(self, step: int) -> Batch:
        """Return the arguments of `PatchClassification.forward`."""
        rng = np.random.default_rng((self.seed, 2, step))
        view = _draw_view(self.views, rng)
        rows = rng.integers(len(self.views[view]), size=self.batch_size)
        samples = [self.views[view][int(row)] for row in rows]

        pixels = []
        for sample in samples:
            image = jitter_colors(
                decode_image(sample.image), rng.random(NUM_JITTER_DRAWS), PATCH_JITTER
            )
            pixels.append(self.processor.prepare_image(image, view))
        return {
            "pixels": torch.stack(pixels),
            "shown": torch.from_numpy(np.stack([sample.is_shown for sample in samples])),
            "cells": torch.from_numpy(np.stack([sample.cells for sample in samples])),
            "centre": torch.from_numpy(np.stack([sample.center for sample in samples])),
            "largest": torch.from_numpy(np.stack([sample.largest for sample in samples])),
        }

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Return the loss of names, cells and centers, and its parts."""
        output = self.model(**batch)
        return output.loss, output.parts


def patch_targets(
    label: LabeledImage, names: Sequence[str], patch: int, size: tuple[int, int]
) -> PatchTargets:
    """Return what the patches of a labeled image show.

    Args:
        label: the image and its objects.
        names: the object names to learn, C of them.
        patch: side of a patch in pixels.
        size: (width, height) in pixels to which the image is fitted.
    """
    rows = size[1] // patch
    columns = size[0] // patch
    is_shown = np.zeros((rows, columns, len(names)), bool)
    cells = np.zeros((rows, columns, CELLS_PER_SIDE, CELLS_PER_SIDE, len(names)), np.uint8)
    center = np.zeros((rows, columns, 2), np.float32)
    max_coverage = np.full((rows, columns), MIN_COVERAGE, np.float32)
    patch_centers = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1) + 0.5

    left, top, *window_size = visible_window((label.width, label.height), size)
    for item in label.objects:
        cell_coverage = _cell_coverage(item, label, patch, size)
        coverage = cell_coverage.mean((2, 3))
        if item.name in names:
            name = names.index(item.name)
            item_cells = np.rint(255 * cell_coverage).astype(np.uint8)
            is_shown[..., name] |= coverage > MIN_COVERAGE
            cells[..., name] = np.maximum(cells[..., name], item_cells)

        # The largest object of a patch is the one whose center it learns.
        x0, y0, x1, y1 = item.box2d
        item_center_px = np.array([(x0 + x1) / 2 - left, (y0 + y1) / 2 - top])
        item_center = item_center_px * size / window_size / patch
        is_largest = coverage > max_coverage
        center[is_largest] = (item_center - patch_centers)[is_largest]
        max_coverage = np.maximum(max_coverage, coverage)

    num_patches = rows * columns
    return PatchTargets(
        image=label.image,
        is_shown=is_shown.reshape(num_patches, -1),
        cells=cells.reshape(num_patches, CELLS_PER_SIDE * CELLS_PER_SIDE, -1),
        center=center.reshape(num_patches, 2),
        largest=(max_coverage > MIN_COVERAGE).reshape(num_patches),
    )


def _cell_coverage(
    item: LabeledObject, label: LabeledImage, patch: int, size: tuple[int, int]
) -> Array:
    """Return the part of each cell that an object covers.

    The shape is [rows, columns, CELLS_PER_SIDE, CELLS_PER_SIDE].
    """
    width, height = size
    mask = decode_mask(item.mask_runs, label.height, label.width)
    if mask.shape != (height, width):
        # The part of each pixel of the fitted image that the object covers.
        gray = np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * 255
        mask = fit_image(gray, width, height)[..., 0] / np.float32(255)

    rows = height // patch
    columns = width // patch
    cell_side = patch // CELLS_PER_SIDE
    mask = mask[: rows * patch, : columns * patch]
    cells = mask.reshape(rows, CELLS_PER_SIDE, cell_side, columns, CELLS_PER_SIDE, cell_side)
    return cells.mean((2, 5)).transpose(0, 2, 1, 3)


MAX_TRIES_PER_IMAGE = 1000  # images that are drawn to find one that can be asked about
NUM_CHECKED_LABELS = 100  # labels whose answers are compared with the 3D tokens
MAX_OUTSIDE = 0.1  # a notice is given if more of their numbers lie outside of the 3D tokens
# Answers differ in length (a point 3 tokens, a box 24). Running texts of similar length together
# saves up to a quarter of the work, if there are enough texts in each group.
MAX_LENGTH_GROUPS = 4
MIN_TEXTS_PER_GROUP = 32


def count_length_groups(model: torch.nn.Module, batch: Batch) -> int:
    """Return in how many groups of similar length the texts of a batch run."""
    if is_sharded(model):
        return 1  # because all processes must run the same number of layers
    num_groups = max(1, len(batch["input_ids"]) // MIN_TEXTS_PER_GROUP)
    return min(MAX_LENGTH_GROUPS, num_groups)


def view_folders(folder: Path, views: Sequence[str]) -> dict[str, Path]:
    """Return the folders of labels by view; see `load_labels`."""
    folders = {view: folder / view for view in views if (folder / view).is_dir()}
    return folders or {views[0]: folder}


def load_labels(folders: Sequence[Path], views: Sequence[str]) -> dict[str, list[LabeledImage]]:
    """Load all labels of some folders, by view.

    A folder has a sub-folder per view, as `spear label --num-scenes` writes, or shards of the first
    view. Raises `SpearError` for mixed units.
    """
    labels_by_view: dict[str, list[LabeledImage]] = {}
    for folder in folders:
        for view, path in view_folders(folder, views).items():
            notice_missing_shards(path, find_shards(path), "run its command again")
            labels = labels_by_view.setdefault(view, [])
            labels.extend(_with_compact_masks(label) for label in read_labels(path))

    all_labels: list[LabeledImage] = []
    for labels in labels_by_view.values():
        all_labels.extend(labels)
    _check_labels(all_labels)
    return {view: labels_by_view[view] for view in views if view in labels_by_view}


def _with_compact_masks(label: LabeledImage) -> LabeledImage:
    """Return the label with masks as arrays, which take a tenth of the memory of lists."""
    objects = []
    for labeled_object in label.objects:
        compact_runs = array("i", labeled_object.mask_runs)
        objects.append(dataclasses.replace(labeled_object, mask_runs=compact_runs))
    return dataclasses.replace(label, objects=tuple(objects))


def _check_labels(labels: Sequence[LabeledImage]) -> None:
    """Check that labels have one unit; note test scenes and images that are there twice."""
    units = {label.unit for label in labels}
    if len(units) > 1:
        raise SpearError(
            f"labels mix units ({', '.join(sorted(units))}). Train on one unit at a time."
        )

    total = format_count(len(labels), "labeled images")
    num_test_scenes = sum(is_held_out(label.source) for label in labels)
    if num_test_scenes:
        notice(f"{num_test_scenes:,} of {total} are from scenes that are kept for testing.")
    num_repeated = len(labels) - len({(label.source, label.image) for label in labels})
    if num_repeated:
        notice(
            f"{num_repeated:,} of {total} are the same as others and count twice. Give each "
            "folder once."
        )


def load_depth(
    folders: Sequence[Path], labels: Mapping[str, Sequence[LabeledImage]]
) -> dict[str, DepthImages]:
    """Load the depth of the images that `load_labels` returned, by view.

    Row i of a view belongs to its label i. Raises `SpearError` for a folder without depth, or with
    the depth of other images.
    """
    depth_by_view: dict[str, DepthImages] = {}
    for view, labels_of_view in labels.items():
        folders_of_view = [
            folder for folder in folders if view in view_folders(folder, list(labels))
        ]
        depth_images: Any = []
        for folder in folders_of_view:
            depth_images.extend(read_depth(folder / "depth" / view))

        images = [image for image, _ in depth_images]
        if images != [label.image for label in labels_of_view]:
            raise SpearError(
                f"{', '.join(str(folder) for folder in folders_of_view)}: depth/{view} is of other "
                "images than the labels. Run `spear label --num-scenes` again."
            )
        depth_by_view[view] = depth_images
    return depth_by_view


@dataclass(frozen=True)
class QuestionSamples:
    """Batches of images with questions: a pure function of (seed, step).

    labels      view -> labeled images. A batch is of one view, the wrist's with probability
                `wrist_fraction`.
    processor   makes the network's inputs from images and questions.
    mix         which questions are asked.
    num_images  images per batch.
    augment     strength of the photometric augmentation.
    depth       view -> the depth of these images (`load_depth`), needed where the mix asks about
                pixels.
    """

    labels: Mapping[str, Sequence[LabeledImage]]
    processor: Processor
    mix: QuestionMix
    num_images: int
    seed: int
    augment: float = 0.0
    depth: Mapping[str, DepthImages] | None = None

    def __post_init__(self) -> None:
        if not self.labels or not all(self.labels.values()):
            raise SpearError("there are no labeled images. Make some with `spear label --out …`.")
        self._note_numbers_outside_of_tokens()

    def _note_numbers_outside_of_tokens(self) -> None:
        """Give a notice if many answers of a view lie outside of what the 3D tokens can say."""
        tokens = self.processor.coordinates
        low, high = tokens.bin_edges[[0, -1]]
        for view, labels in self.labels.items():
            answers = collect_answers(labels, self.seed, NUM_CHECKED_LABELS, self.mix.families)
            is_outside = (answers < low) | (answers > high)
            outside = is_outside.sum() / max(1, len(answers))
            if outside > MAX_OUTSIDE:
                notice(
                    f"{outside:.0%} of the numbers in the {view} labels lie outside of the 3D "
                    f"tokens, {low:.2g} … {high:.2g} {tokens.unit}, and are clipped to this range. "
                    f"Train a VLM with --set bins={tokens.num_bins} to fit new 3D tokens."
                )

    @functools.cached_property
    def wrist_fraction(self) -> float:
        """Fraction of batches from the wrist camera."""
        num_labels = sum(len(labels) for labels in self.labels.values())
        fraction_of_labels = len(self.labels.get("wrist", ())) / num_labels
        if self.mix.wrist is None or not fraction_of_labels:
            return fraction_of_labels
        return self.mix.wrist

    def batch(self, step: int) -> Batch:
        """Return the arguments of `SpearVLMForConditionalGeneration.forward`.

        They are `num_images` images of one view, with their questions. Raises `SpearError` if
        hardly any image can be asked about.
        """
        rng = np.random.default_rng((self.seed, 1, step))
        view = "wrist" if rng.random() < self.wrist_fraction else next(iter(self.labels))
        labels = self._asked_labels(view)

        pixels: list[torch.Tensor] = []
        questions: list[Question] = []
        image_index: list[int] = []  # of each question
        num_tries = 0
        while len(pixels) < self.num_images:
            num_tries += 1
            if num_tries > MAX_TRIES_PER_IMAGE * (self.num_images + len(image_index)):
                question_types = ", ".join(dict.fromkeys(self.mix.families))
                raise SpearError(
                    f"hardly any of these images can be asked about {question_types}. "
                    "Add other question types with --set families."
                )
            row = int(rng.integers(len(labels)))
            label = labels[row]
            depth = None if self.depth is None else self.depth[view][row][1]
            image_questions = generate_questions(
                label, rng, self.mix.pairs, self.mix.families, depth=depth
            )
            if not image_questions:
                continue

            image = decode_image(label.image, label.source)
            if self.augment > 0:
                image = jitter_colors(image, rng.random(NUM_JITTER_DRAWS), self.augment)
            image_index += [len(pixels)] * len(image_questions)
            pixels.append(self.processor.prepare_image(image, view))
            size = image.shape[1::-1]
            for question in image_questions:
                questions.append(self.processor.map_question_pixels(question, size, view))

        return {
            "pixel_values": {view: torch.stack(pixels)},
            "image_index": torch.tensor(image_index),
            **self.processor.encode_questions(questions),
        }

    def fingerprints(self) -> list[str]:
        """Return a fingerprint of each image that is asked about, wherever its folder is."""
        fingerprints: list[str] = []
        views = list(self.labels)[: 2 if self.wrist_fraction else 1]
        for view in views:
            fingerprints.extend(hash_content(label.image) for label in self._asked_labels(view))
        return fingerprints

    def _asked_labels(self, view: str) -> Sequence[LabeledImage]:
        return self.labels[view][: self.mix.most_images or None]


NUM_FITTED_LABELS = 20_000  # labels that 3D tokens are fitted to, at most
PAIRS_PER_FITTED_LABEL = (4, 4)  # fewest and most questions about each of them


def fit_coordinates(
    labels: Sequence[LabeledImage], bins: int, seed: int, spacing: BinSpacing = "quantile"
) -> CoordinateTokenizer:
    """Fit 3D tokens to the answers of questions about labels, which have one unit."""
    answers = collect_answers(labels, seed, NUM_FITTED_LABELS, QUESTION_TYPES)
    return CoordinateTokenizer.fit(answers, bins, labels[0].unit, spacing)


def collect_answers(
    labels: Sequence[LabeledImage], seed: int, max_labels: int, question_types: Sequence[str]
) -> Array:
    """Return the numbers in the answers of questions about randomly drawn labels."""
    rng = np.random.default_rng(seed)
    numbers: list[float] = []
    for index in rng.permutation(len(labels))[:max_labels]:
        for question in generate_questions(
            labels[index], rng, PAIRS_PER_FITTED_LABEL, question_types
        ):
            numbers.extend(question.values)
    return np.array(numbers)


class VlmTask:
    """Batches of questions and their loss.

    With `coordinate_rows_only`, only the 3D tokens' rows of the token embeddings learn.
    """

    def __init__(
        self,
        model: SpearVLMForConditionalGeneration,
        questions: QuestionSamples,
        coordinate_rows_only: bool,
    ) -> None:
        self.model = model
        self.questions = questions
        self.trainable_rows: dict[str, tuple[int, int]] = {}
        if coordinate_rows_only:
            ids = model.config.coordinate_ids
            self.trainable_rows["language_model.embed_tokens.weight"] = (ids.start, ids.stop)

    def batch(self, step: int) -> Batch:
        """Return a batch of questions."""
        return self.questions.batch(step)

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Return the λ-weighted cross-entropy and its parts."""
        output = self.model(**batch, length_groups=count_length_groups(self.model, batch))
        return output.loss, output.parts


@dataclass(frozen=True)
class VlaTask:
    """Batches of robot steps, and of questions if the recipe asks any, and their loss."""

    model: Spear1ForActionPrediction
    processor: Processor
    normalizer: Normalizer
    samples: TrainingSamples
    recipe: Recipe
    questions: QuestionSamples | None = None

    def batch(self, step: int) -> Batch:
        """Return the network's inputs of one step.

        They are pixels, prompt, state, action chunk and action mask, and "questions".
        """
        robot_samples = self.samples.batch(step, self.recipe.batch_size)
        batch = encode_robot_batch(self.processor, self.normalizer, robot_samples)
        if self.questions is not None:
            batch["questions"] = self.questions.batch(step)
        return batch

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Return flow loss + weight · question loss, and the parts of both."""
        robot_batch = {key: value for key, value in batch.items() if key != "questions"}
        robot_batch["actions"] = Action.from_vector(batch["actions"])
        output = self.model(
            **robot_batch, flow_samples=self.recipe.flow_samples, generator=generator
        )
        total = output.loss
        parts = dict(output.parts)

        if self.questions is not None:
            questions = batch["questions"]
            num_groups = count_length_groups(self.model, questions)
            answers = self.model.vlm(**questions, length_groups=num_groups)
            total = total + self.recipe.question_weight * answers.loss
            for name, value in answers.parts.items():
                parts[f"question_{name}"] = value
        return total, parts


def encode_robot_batch(
    processor: Processor, normalizer: Normalizer, raw: Mapping[str, Any]
) -> Batch:
    """Encode a batch of robot steps as inputs of `Spear1ForActionPrediction.forward`.

    Args:
        processor: encodes the instructions.
        normalizer: of states and actions; each row is normalized as its dataset is.
        raw: a batch of `TrainingSamples`: arrays by name.

    Returns:
        Tensors by name: pixels, views, state, actions and action mask, and the prompts.
    """
    position = torch.from_numpy(np.ascontiguousarray(raw["position"]))
    rotation = torch.from_numpy(np.ascontiguousarray(raw["rotation"]))
    gripper = torch.from_numpy(np.ascontiguousarray(raw["gripper"]))[..., None]
    raw_actions = torch.from_numpy(raw["action"])

    actions = torch.empty_like(raw_actions)
    states = torch.empty(len(raw_actions), STATE_VECTOR_DIM)
    for dataset_normalizer, rows in _row_masks_by_normalizer(normalizer, raw):
        action = Action.from_vector(raw_actions[rows])
        actions[rows] = dataset_normalizer.normalize_action(action).to_vector()
        states[rows] = dataset_normalizer.state_vector(
            position[rows], rotation[rows], gripper[rows]
        )

    # The network reorders the pixels in memory: here it would take half as long as decoding them.
    pixels = {view: torch.from_numpy(v).permute(0, 3, 1, 2) for view, v in raw["images"].items()}
    return {
        "pixel_values": pixels,
        "view_mask": {view: torch.from_numpy(mask) for view, mask in raw["views"].items()},
        "state": states,
        "actions": actions,
        "action_mask": torch.from_numpy(raw["action_mask"]),
        **processor.encode_instructions(raw["instruction"], cut=True),
    }


def _row_masks_by_normalizer(
    normalizer: Normalizer, raw: Mapping[str, Any]
) -> list[tuple[Normalizer, torch.Tensor]]:
    """Pair each dataset's normalizer with a mask [B] of its rows."""
    if not normalizer.datasets:
        return [(normalizer, torch.ones(len(raw["action"]), dtype=torch.bool))]
    pairs = []
    for index, dataset_normalizer in enumerate(normalizer.datasets.values()):
        pairs.append((dataset_normalizer, torch.from_numpy(raw["dataset"] == index)))
    return pairs
