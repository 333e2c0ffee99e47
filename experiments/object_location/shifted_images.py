"""Do SPEAR-VLM's errors come from where objects happen to lie in the image?

    python -m experiments.object_location.shifted_images [--model nano] [--images 100] [--pixels 8]

Each held-out scene is asked about as it is, and shifted by some pixels left, right, up and down
(with edges repeated). Answers are moved back along the image at their depth. If the errors came
from what the image shows, the mean of the five answers would be off as far as one. What the mean
takes away depends on where objects lie in the network's patches. Printed are errors of box centers,
in total, along the ray, and across it: medians, resampled by image.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
import tyro

from spear.cli import run_reporting_errors
from spear.evaluate.stats import bootstrap
from spear.evaluate.vqa.ask import load_or_render_labeled_images
from spear.evaluate.vqa.calibration import group_by_image
from spear.evaluate.vqa.run import generate_questions_by_type
from spear.labels.questions.measures import extract_numbers
from spear.policy import VlmBundle, load_vlm
from spear.types import Array, LabeledImage, Question
from spear.util.images import decode_image

BATCH_SIZE = 32
QUESTIONS_PER_IMAGE = 2

BoxQuestions = list[tuple[int, Question]]
"""(index of the image, question)."""


def shift_image(image: Array, right: int, down: int) -> Array:
    """The image [h, w, 3] with its contents moved by some pixels and its edges repeated."""
    height, width = image.shape[:2]
    rows = (np.arange(height) - down).clip(0, height - 1)
    columns = (np.arange(width) - right).clip(0, width - 1)
    return image[np.ix_(rows, columns)]


def answer_box_centers(
    model: VlmBundle,
    labels: Sequence[LabeledImage],
    questions: BoxQuestions,
    right: int = 0,
    down: int = 0,
) -> Array:
    """The centers [n, 3] of the answered boxes in shifted images, moved back."""
    centers = []
    for start in range(0, len(questions), BATCH_SIZE):
        batch = questions[start : start + BATCH_SIZE]
        images = []
        for index, _ in batch:
            images.append(shift_image(decode_image(labels[index].image), right, down))
        answers = model.answer(images, [question.prompt for _, question in batch], "box_vertices")
        for (index, _), answer in zip(batch, answers, strict=True):
            intrinsics = labels[index].intrinsics
            vertices = np.array(answer.values).reshape(8, 3)
            depth = vertices[:, 2:]
            pixels = vertices @ intrinsics.T / depth - [right, down, 0]
            centers.append((depth * np.linalg.solve(intrinsics, pixels.T).T).mean(0))
    return np.stack(centers)


def true_box_centers(questions: BoxQuestions) -> Array:
    """[n, 3]."""
    centers = []
    for _, question in questions:
        centers.append(extract_numbers(question.segments).reshape(8, 3).mean(0))
    return np.stack(centers)


def print_errors(name: str, centers: Array, truth: Array, images: Sequence[int]) -> None:
    """Print the errors of centers [n, 3] in millimeters, resampled by the image of each."""
    offset_mm = 1000 * (centers - truth)
    ray = truth / np.linalg.norm(truth, axis=1, keepdims=True)
    along = (offset_mm * ray).sum(1, keepdims=True)
    errors_mm = {
        "all": np.linalg.norm(offset_mm, axis=1),
        "along": np.abs(along[:, 0]),
        "across": np.linalg.norm(offset_mm - along * ray, axis=1),
    }
    texts = []
    for direction, values in errors_mm.items():
        estimate = bootstrap(group_by_image(images, values))
        texts.append(f"{direction} {estimate.to_text('.1f')}")
    print(f"{name:13}", ", ".join(texts))


def main(model: str = "nano", images: int = 100, pixels: int = 8) -> None:
    """Measure, and print a table.

    Args:
        model: a SPEAR-VLM.
        images: held-out scenes.
        pixels: of the shift.
    """
    torch.set_num_threads(1)
    bundle = load_vlm(model)
    labels = load_or_render_labeled_images("sim", images, "external", bundle.processor)
    questions = generate_questions_by_type(labels, ("box_vertices",), QUESTIONS_PER_IMAGE, 0)
    box_questions = questions["box_vertices"]
    truth = true_box_centers(box_questions)
    image_indices = [index for index, _ in box_questions]

    answers = []
    for right, down in ((0, 0), (pixels, 0), (-pixels, 0), (0, pixels), (0, -pixels)):
        answers.append(answer_box_centers(bundle, labels, box_questions, right, down))
    print(f"{len(box_questions)} questions about {images} scenes, shifts of {pixels} pixels; mm")
    print_errors("as it is", answers[0], truth, image_indices)
    print_errors("mean of five", np.mean(answers, axis=0), truth, image_indices)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
