"""What the training stages learn: their batches and losses, one class per kind of recipe.

DepthTask  stage 0 (nano only): depth from single images. It stands in for MoGe's pretraining.
PatchTask  stage 0 (nano only): which objects each image patch shows. It stands in for SigLIP's
           pretraining. A patch is divided into `CELLS_PER_SIDE` × `CELLS_PER_SIDE` cells.
VlmTask    questions about labeled images.
VlaTask    demonstrations, and 3D questions in addition.

The classes follow the protocol `spear.train.optimize.Task`: `batch(piece_number)` returns a
piece of a batch that depends only on the task and this number, and `loss` its loss. A *view* is a
camera by name, "external" or "wrist". A batch of images has one view, because views differ in size.
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
from spear.labels.store import (
    DepthImages,
    list_label_shards,
    read_images_with_coarse_depth,
    read_labels,
)
from spear.models.processing import Processor, compute_visible_window
from spear.models.spear1 import Spear1ForActionPrediction
from spear.models.stage0 import CELLS_PER_SIDE, MogeForDepth, PatchClassification
from spear.models.vlm import SpearVLMForConditionalGeneration
from spear.question_types import QUESTION_TYPES
from spear.tokens import BinSpacing, CoordinateTokenizer
from spear.train.optimize import Batch, Loss
from spear.train.options import QuestionMix, Recipe
from spear.train.parallel import is_sharded
from spear.types import Action, Array, LabeledImage, LabeledObject, Question, WidthAndHeight
from spear.util.files import notice_missing_shards
from spear.util.held_out import is_held_out_scene
from spear.util.images import decode_image, fit_image

# Fraction of stage 0's batches that consist of wrist images, if there are any (our choice).
WRIST_FRACTION = 0.25
# Parts of the seeds of random generators, so that different kinds of batches draw other numbers.
QUESTION_STREAM = 1
PATCH_STREAM = 2
PATCH_JITTER = 0.5  # strength of the photometric augmentation of `PatchTask` (our choice)
# A patch shows an object if the object covers more than this fraction of the patch.
MIN_COVERAGE = 0.01


def _sample_view(views: Mapping[str, Any], rng: np.random.Generator) -> str:
    """Draw the view of a batch of stage 0.

    It is the wrist camera, with the probability `WRIST_FRACTION`, or else the view whose name comes
    first in the alphabet: the external camera, if there is one.
    """
    if "wrist" in views and rng.random() < WRIST_FRACTION:
        return "wrist"
    return min(views)


@dataclass(frozen=True)
class DepthTask:
    """Batches of images with depth, from one view each, and the loss of `MogeForDepth`.

    `views` has the images of each view; an image is a pair of the encoded image and its depth.
    """

    model: MogeForDepth
    views: Mapping[str, DepthImages]
    batch_size: int
    seed: int

    def batch(self, piece_number: int) -> Batch:
        """Return uint8 pixels [B, 3, h, w] and float depth [B, h/4, w/4].

        Labels store only every fourth row and column of the depth.
        """
        rng = np.random.default_rng((self.seed, piece_number))
        images = self.views[_sample_view(self.views, rng)]
        samples = [images[int(row)] for row in rng.integers(len(images), size=self.batch_size)]
        pixels = [torch.from_numpy(decode_image(image)).permute(2, 0, 1) for image, _ in samples]
        depth = np.stack([depth for _, depth in samples])
        return {"pixels": torch.stack(pixels), "depth": torch.from_numpy(depth).float()}

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Return the mean absolute error of log depth: of the shape plus of the scale."""
        return self.model(batch["pixels"], batch["depth"]).loss, {}


class PatchTargets(NamedTuple):
    """An image with P patches, and which of C object names they show.

    These are the targets of `PatchClassification.forward`.

    image     the encoded image.
    is_shown  [P, C] bool: whether the patch shows an object of this name.
    cell_coverage  [P, CELLS_PER_SIDE², C] uint8: the fraction of each cell of the patch that
              objects of this name cover, from 0 to 255 (all of the cell).
    center    [P, 2] float32: x and y from the patch's center to the center of the patch's largest
              object, in units of patches.
    has_object  [P] bool: whether the patch shows any object, so that `center` is known.
    """

    image: bytes
    is_shown: Array
    cell_coverage: Array
    center: Array
    has_object: Array


@dataclass(frozen=True)
class PatchTask:
    """Batches of labeled images, from one view each, and the loss of `PatchClassification`."""

    model: PatchClassification
    processor: Processor
    views: Mapping[str, Sequence[PatchTargets]]
    batch_size: int
    seed: int

    def batch(self, piece_number: int) -> Batch:
        """Return the arguments of `PatchClassification.forward`."""
        rng = np.random.default_rng((self.seed, PATCH_STREAM, piece_number))
        view = _sample_view(self.views, rng)
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
            "is_shown": torch.from_numpy(np.stack([sample.is_shown for sample in samples])),
            "cell_coverage": torch.from_numpy(
                np.stack([sample.cell_coverage for sample in samples])
            ),
            "center": torch.from_numpy(np.stack([sample.center for sample in samples])),
            "has_object": torch.from_numpy(np.stack([sample.has_object for sample in samples])),
        }

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Return the loss of names, cells and centers, and its parts."""
        output = self.model(**batch)
        return output.loss, output.parts


def compute_patch_targets(
    label: LabeledImage, object_names: Sequence[str], patch_side_px: int, size: WidthAndHeight
) -> PatchTargets:
    """Return what the patches of a labeled image show.

    Args:
        label: the image and its objects.
        object_names: the C names to learn.
        patch_side_px: the side of a square patch.
        size: (width, height) in pixels to which the image is fitted.
    """
    width, height = size
    rows = height // patch_side_px
    columns = width // patch_side_px
    is_shown = np.zeros((rows, columns, len(object_names)), bool)
    cells = np.zeros((rows, columns, CELLS_PER_SIDE, CELLS_PER_SIDE, len(object_names)), np.uint8)
    center = np.zeros((rows, columns, 2), np.float32)
    # The largest coverage of a patch by any object so far.
    max_coverage = np.full((rows, columns), MIN_COVERAGE, np.float32)
    # x and y of the patches' centers, in units of patches, [rows, columns, 2].
    patch_centers = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1) + 0.5

    # The window of the original image, in its pixels, that the fitted image shows.
    left, top, *window_size = compute_visible_window((label.width, label.height), size)
    for labeled_object in label.objects:
        cell_coverage = _compute_coverage_of_patch_cells(labeled_object, label, patch_side_px, size)
        coverage = cell_coverage.mean((2, 3))  # [rows, columns], averaged over a patch's cells
        if labeled_object.name in object_names:
            name_index = object_names.index(labeled_object.name)
            object_cells = np.rint(255 * cell_coverage).astype(np.uint8)
            is_shown[..., name_index] |= coverage > MIN_COVERAGE
            cells[..., name_index] = np.maximum(cells[..., name_index], object_cells)

        # A patch learns the center of the object that covers most of the patch. The center of the
        # object's 2D box is converted from original pixels to units of patches.
        x0, y0, x1, y1 = labeled_object.box2d
        window_center_px = np.array([(x0 + x1) / 2 - left, (y0 + y1) / 2 - top])
        object_center = window_center_px * size / window_size / patch_side_px
        is_largest = coverage > max_coverage  # [rows, columns]
        center[is_largest] = (object_center - patch_centers)[is_largest]
        max_coverage = np.maximum(max_coverage, coverage)

    num_patches = rows * columns
    return PatchTargets(
        image=label.image,
        is_shown=is_shown.reshape(num_patches, -1),
        cell_coverage=cells.reshape(num_patches, CELLS_PER_SIDE * CELLS_PER_SIDE, -1),
        center=center.reshape(num_patches, 2),
        has_object=(max_coverage > MIN_COVERAGE).reshape(num_patches),
    )


def _compute_coverage_of_patch_cells(
    labeled_object: LabeledObject, label: LabeledImage, patch_side_px: int, size: WidthAndHeight
) -> Array:
    """Return the fraction of each cell of the fitted image that an object of `label` covers.

    The other arguments are those of `compute_patch_targets`.

    Returns:
        [rows, columns, CELLS_PER_SIDE, CELLS_PER_SIDE]: rows and columns of patches, and of cells
        in a patch.
    """
    width, height = size
    mask = decode_mask(labeled_object.mask_runs, label.height, label.width)
    if mask.shape != (height, width):
        # Fitted like an image, the mask has the fraction of each pixel that the object covers.
        gray = np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * 255
        mask = fit_image(gray, height, width)[..., 0] / np.float32(255)

    rows = height // patch_side_px
    columns = width // patch_side_px
    cell_side_px = patch_side_px // CELLS_PER_SIDE
    mask = mask[: rows * patch_side_px, : columns * patch_side_px]
    # Split each axis into patches, cells and pixels; average over the pixels of a cell.
    pixels = mask.reshape(rows, CELLS_PER_SIDE, cell_side_px, columns, CELLS_PER_SIDE, cell_side_px)
    cells = pixels.mean((2, 5))  # [rows, cell rows, columns, cell columns]
    return cells.transpose(0, 2, 1, 3)


# A batch draws images at random until enough of them can be asked about. It is given up after more
# draws than this number times (images that the batch needs + questions that it has so far).
MAX_TRIES_PER_IMAGE = 1000
# At the start, the numbers in the answers about this many labels are compared with the range of the
# 3D tokens. A notice is printed if a larger fraction than MAX_OUTSIDE lies outside.
NUM_CHECKED_LABELS = 100
MAX_OUTSIDE = 0.1
# Answers differ in length (a point 3 tokens, a box 24). Running texts of similar length together
# saves up to a quarter of the work, if there are enough texts in each group.
MAX_LENGTH_GROUPS = 4
MIN_TEXTS_PER_GROUP = 32


def compute_num_length_groups(model: torch.nn.Module, batch: Batch) -> int:
    """Return the number of groups of similar length in which the texts of a batch are run."""
    if is_sharded(model):
        # FSDP needs the same number of forward passes in all processes, whatever their batches.
        return 1
    num_groups = max(1, len(batch["input_ids"]) // MIN_TEXTS_PER_GROUP)
    return min(MAX_LENGTH_GROUPS, num_groups)


def find_view_folders_or_single_folder(folder: Path, views: Sequence[str]) -> dict[str, Path]:
    """Return the folders with the shards of labels in `folder`, by view.

    Without a sub-folder of a view, `folder` itself has the shards of the first view; see
    `load_labels`.
    """
    folders = {view: folder / view for view in views if (folder / view).is_dir()}
    return folders or {views[0]: folder}


def load_labels(folders: Sequence[Path], views: Sequence[str]) -> dict[str, list[LabeledImage]]:
    """Load all labels of `folders`, by view.

    A folder has either a sub-folder per view (`spear label --num-scenes` writes them), or shards of
    labels, which then belong to the first of `views`. Raises `SpearError` if the labels have
    different units.
    """
    labels_by_view: dict[str, list[LabeledImage]] = {}
    for folder in folders:
        for view, path in find_view_folders_or_single_folder(folder, views).items():
            notice_missing_shards(path, list_label_shards(path), "run its command again")
            labels = labels_by_view.setdefault(view, [])
            labels.extend(_with_compact_masks(label) for label in read_labels(path))

    all_labels: list[LabeledImage] = []
    for labels in labels_by_view.values():
        all_labels.extend(labels)
    _check_units_and_notice_doubtful_images(all_labels)
    return {view: labels_by_view[view] for view in views if view in labels_by_view}


def _with_compact_masks(label: LabeledImage) -> LabeledImage:
    """Return the label with its masks' run lengths in arrays instead of lists.

    Arrays take a tenth of the memory.
    """
    objects = []
    for labeled_object in label.objects:
        compact_runs = array("i", labeled_object.mask_runs)
        objects.append(dataclasses.replace(labeled_object, mask_runs=compact_runs))
    return dataclasses.replace(label, objects=tuple(objects))


def _check_units_and_notice_doubtful_images(labels: Sequence[LabeledImage]) -> None:
    """Check that all labels have the same unit.

    Also print notices about images of test scenes, and about images that occur more than once.
    """
    units = {label.unit for label in labels}
    if len(units) > 1:
        raise SpearError(
            f"labels mix units ({', '.join(sorted(units))}). Train on one unit at a time."
        )

    total = format_count(len(labels), "labeled images")
    num_test_scenes = sum(is_held_out_scene(label.source) for label in labels)
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

    Item i of a view's depth images belongs to item i of the view's labels. Raises `SpearError` for
    a folder without depth, or with the depth of other images.
    """
    depth_by_view: dict[str, DepthImages] = {}
    for view, labels_of_view in labels.items():
        folders_of_view: list[Path] = []
        for folder in folders:
            if view in find_view_folders_or_single_folder(folder, list(labels)):
                folders_of_view.append(folder)
        depth_images: Any = []
        for folder in folders_of_view:
            depth_images.extend(read_images_with_coarse_depth(folder / "depth" / view))

        images = [image for image, _ in depth_images]
        if images != [label.image for label in labels_of_view]:
            raise SpearError(
                f"depth/{view} of {', '.join(str(folder) for folder in folders_of_view)} is "
                "of other images than the labels. Run `spear label --num-scenes` again."
            )
        depth_by_view[view] = depth_images
    return depth_by_view


@dataclass(frozen=True)
class QuestionSamples:
    """Batches of images with questions. A batch depends only on the seed and its number.

    labels      view -> labeled images. A batch has the wrist's view with probability
                `wrist_batch_fraction`, otherwise the first view.
    processor   makes the network's inputs from images and questions.
    mix         which questions are asked.
    num_images  number of images per batch.
    seed        the seed of the batches.
    augment     strength of the photometric augmentation, 0 to 1.
    depth       view -> the depth of the labeled images (`load_depth`); needed only if `mix` has
                questions about pixels.
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
        self._notice_numbers_outside_of_tokens()

    def _notice_numbers_outside_of_tokens(self) -> None:
        """Print a notice if many numbers in a view's answers exceed the range of the 3D tokens."""
        tokens = self.processor.coordinates
        low = tokens.bin_edges[0]
        high = tokens.bin_edges[-1]
        for view, labels in self.labels.items():
            answers = collect_answer_numbers(
                labels, self.seed, NUM_CHECKED_LABELS, self.mix.families
            )
            is_outside = (answers < low) | (answers > high)
            fraction_outside = is_outside.sum() / max(1, len(answers))
            if fraction_outside > MAX_OUTSIDE:
                notice(
                    f"{fraction_outside:.0%} of the numbers in the {view} labels lie outside of "
                    f"the 3D tokens, {low:.2g} … {high:.2g} {tokens.unit}, and are clipped to this "
                    f"range. Train a VLM with --set bins={tokens.num_bins} to fit new 3D tokens."
                )

    @functools.cached_property
    def wrist_batch_fraction(self) -> float:
        """The fraction of batches with images of the wrist camera.

        It is the one that `mix` gives, or else the wrist images' fraction of all images; 0 if there
        are no wrist images.
        """
        num_labels = sum(len(labels) for labels in self.labels.values())
        fraction_of_labels = len(self.labels.get("wrist", ())) / num_labels
        if self.mix.wrist is None or not fraction_of_labels:
            return fraction_of_labels
        return self.mix.wrist

    def batch(self, piece_number: int) -> Batch:
        """Return the arguments of `SpearVLMForConditionalGeneration.forward` for one piece.

        The batch has `num_images` images of one view with their questions. Raises `SpearError` if
        hardly any image can be asked about.
        """
        rng = np.random.default_rng((self.seed, QUESTION_STREAM, piece_number))
        view = "wrist" if rng.random() < self.wrist_batch_fraction else next(iter(self.labels))
        labels = self._select_asked_labels(view)

        pixels: list[torch.Tensor] = []
        questions: list[Question] = []
        image_index: list[int] = []  # which image of the batch each question is about
        num_tries = 0
        while len(pixels) < self.num_images:
            num_tries += 1
            num_questions = len(image_index)
            if num_tries > MAX_TRIES_PER_IMAGE * (self.num_images + num_questions):
                question_types = ", ".join(dict.fromkeys(self.mix.families))
                raise SpearError(
                    f"hardly any of these images can be asked about {question_types}. "
                    "Add other question types with --set families."
                )
            label_index = int(rng.integers(len(labels)))
            label = labels[label_index]
            depth = None
            if self.depth is not None:
                _, depth = self.depth[view][label_index]
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
            # Locations in questions and answers are mapped to the fitted image.
            image_size = image.shape[1::-1]  # (width, height)
            for question in image_questions:
                questions.append(self.processor.map_question_pixels(question, image_size, view))

        return {
            "pixel_values": {view: torch.stack(pixels)},
            "image_index": torch.tensor(image_index),
            **self.processor.encode_questions(questions),
        }

    def list_image_fingerprints(self) -> list[str]:
        """Return a fingerprint of each image that is asked about.

        The fingerprint depends on the image's content only, not on its folder.
        """
        fingerprints: list[str] = []
        # The first view, and the second, which is the wrist's, if its images are asked about.
        num_views = 2 if self.wrist_batch_fraction else 1
        for view in list(self.labels)[:num_views]:
            fingerprints.extend(
                hash_content(label.image) for label in self._select_asked_labels(view)
            )
        return fingerprints

    def _select_asked_labels(self, view: str) -> Sequence[LabeledImage]:
        """The labeled images of a view that questions are asked about."""
        end = self.mix.most_images or None  # 0 stands for all images
        return self.labels[view][:end]


NUM_FITTED_LABELS = 20_000  # the largest number of labels that 3D tokens are fitted to
# (fewest, most) questions about each label, for `collect_answer_numbers`. There are fewer than 4
# only if the image does not allow more.
QUESTIONS_PER_FITTED_LABEL = (4, 4)


def fit_coordinates(
    labels: Sequence[LabeledImage], bins: int, seed: int, spacing: BinSpacing = "quantile"
) -> CoordinateTokenizer:
    """Fit `bins` 3D tokens to the numbers in answers of questions about labels.

    All labels have the same unit.
    """
    answers = collect_answer_numbers(labels, seed, NUM_FITTED_LABELS, QUESTION_TYPES)
    return CoordinateTokenizer.fit(answers, bins, labels[0].unit, spacing)


def collect_answer_numbers(
    labels: Sequence[LabeledImage], seed: int, max_labels: int, question_types: Sequence[str]
) -> Array:
    """Return the numbers in answers of questions, as a vector.

    The questions are about at most `max_labels` labels, drawn at random, and have the given types.
    """
    rng = np.random.default_rng(seed)
    answer_numbers: list[float] = []
    for index in rng.permutation(len(labels))[:max_labels]:
        for question in generate_questions(
            labels[index], rng, QUESTIONS_PER_FITTED_LABEL, question_types
        ):
            answer_numbers.extend(question.values)
    return np.array(answer_numbers)


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

    def batch(self, piece_number: int) -> Batch:
        """Return a batch of questions."""
        return self.questions.batch(piece_number)

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Return the cross-entropy, in which 3D tokens have the weight λ, and its parts."""
        output = self.model(**batch, length_groups=compute_num_length_groups(self.model, batch))
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

    def batch(self, piece_number: int) -> Batch:
        """Return the network's inputs of one piece.

        The piece is what `encode_robot_batch` returns. If there are questions, it also has the
        entry "questions", a batch of `QuestionSamples`.
        """
        robot_samples = self.samples.batch(piece_number, self.recipe.batch_size)
        batch = encode_robot_batch(self.processor, self.normalizer, robot_samples)
        if self.questions is not None:
            batch["questions"] = self.questions.batch(piece_number)
        return batch

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Return flow loss + `question_weight` · question loss, and the parts of both."""
        robot_batch = {key: value for key, value in batch.items() if key != "questions"}
        robot_batch["actions"] = Action.from_vector(batch["actions"])
        output = self.model(
            **robot_batch, flow_samples=self.recipe.flow_samples, generator=generator
        )
        total = output.loss
        parts = dict(output.parts)

        if self.questions is not None:
            questions = batch["questions"]
            num_groups = compute_num_length_groups(self.model, questions)
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
        normalizer: normalizes states and actions; if each dataset has its own statistics, a row of
            the batch is normalized with those of its dataset.
        raw: a batch of `TrainingSamples`: arrays by name, in meters.

    Returns:
        Tensors by name: pixels, which views are present, states, actions and action mask, and the
        encoded prompts.
    """
    position = torch.from_numpy(np.ascontiguousarray(raw["position"]))
    rotation = torch.from_numpy(np.ascontiguousarray(raw["rotation"]))
    gripper = torch.from_numpy(np.ascontiguousarray(raw["gripper"]))[..., None]  # [B, 1]
    raw_actions = torch.from_numpy(raw["action"])  # [B, H, 8]

    actions = torch.empty_like(raw_actions)
    states = torch.empty(len(raw_actions), STATE_VECTOR_DIM)
    for dataset_normalizer, is_of_dataset in _make_row_masks_by_normalizer(normalizer, raw):
        action = Action.from_vector(raw_actions[is_of_dataset])
        actions[is_of_dataset] = dataset_normalizer.normalize_action(action).to_vector()
        states[is_of_dataset] = dataset_normalizer.encode_state(
            position[is_of_dataset], rotation[is_of_dataset], gripper[is_of_dataset]
        )

    # `permute` only changes the strides. The network itself reorders the pixels in memory; here on
    # the CPU that would take half as long as decoding the images.
    pixels = {}
    for view, images in raw["images"].items():
        pixels[view] = torch.from_numpy(images).permute(0, 3, 1, 2)  # [B, 3, h, w]
    return {
        "pixel_values": pixels,
        "view_mask": {view: torch.from_numpy(mask) for view, mask in raw["views"].items()},
        "state": states,
        "actions": actions,
        "action_mask": torch.from_numpy(raw["action_mask"]),
        **processor.encode_instructions(raw["instruction"], cut=True),
    }


def _make_row_masks_by_normalizer(
    normalizer: Normalizer, raw: Mapping[str, Any]
) -> list[tuple[Normalizer, torch.Tensor]]:
    """Pair each dataset's normalizer with a mask [B] of the rows that belong to the dataset."""
    if not normalizer.datasets:
        return [(normalizer, torch.ones(len(raw["action"]), dtype=torch.bool))]
    pairs = []
    for index, dataset_normalizer in enumerate(normalizer.datasets.values()):
        pairs.append((dataset_normalizer, torch.from_numpy(raw["dataset"] == index)))
    return pairs
