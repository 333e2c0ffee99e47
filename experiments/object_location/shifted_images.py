"""Where SPEAR-VLM's errors come from: the same questions about pictures that are shifted by a few pixels.

    python -m experiments.object_location.shifted_images [--model nano] [--images 100] [--pixels 8]

Each held-out scene is asked about as it is, and shifted by so many pixels left, right, up and down (edges
repeated); answers are moved back along the image at their depth. If the error came from what is seen, the
mean of the five would be off as far as one. What it takes away depends on where things happen to lie in the
network's patches. Errors of box centres: in all, along the ray, and across it; medians, resampled by image.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
import tyro

from spear.cli import run_reporting_errors
from spear.evaluate.stats import bootstrap
from spear.evaluate.vqa.ask import load_labeled_images
from spear.evaluate.vqa.calibration import group_by_image
from spear.evaluate.vqa.measures import extract_numbers
from spear.evaluate.vqa.run import generate_questions_by_family
from spear.policy import VlmBundle, load_vlm
from spear.types import Array, LabeledImage, Question
from spear.util.images import decode_image

Asked = list[tuple[int, Question]]


def shifted(image: Array, right: int, down: int) -> Array:
    """The picture [h, w, 3] with its contents moved, its edges repeated."""
    rows, columns = (
        np.arange(size) - by for size, by in zip(image.shape[:2], (down, right), strict=True)
    )
    return image[np.ix_(rows.clip(0, len(rows) - 1), columns.clip(0, len(columns) - 1))]


def centres(
    model: VlmBundle, labels: list[LabeledImage], asked: Asked, right: int, down: int
) -> Array:
    """[n, 3] of the boxes that are answered about shifted pictures, moved back."""
    found = []
    for start in range(0, len(asked), 32):
        part = asked[start : start + 32]
        images = [shifted(decode_image(labels[i].image), right, down) for i, _ in part]
        answers = model.answer(images, [q.prompt for _, q in part], "box_vertices")
        for (i, _), answer in zip(part, answers, strict=True):
            camera = labels[i].intrinsics
            points = np.array(answer.values).reshape(8, 3)
            depth = points[:, 2:]
            pixels = points @ camera.T / depth - [right, down, 0]
            found.append((depth * np.linalg.solve(camera, pixels.T).T).mean(0))
    return np.stack(found)


def errors(said: Array, truth: Array) -> Array:
    """[n, 3] mm: in all, along the ray and across it."""
    off = 1000 * (said - truth)
    ray = truth / np.linalg.norm(truth, axis=1, keepdims=True)
    along = (off * ray).sum(1, keepdims=True)
    across = np.linalg.norm(off - along * ray, axis=1)
    return np.stack([np.linalg.norm(off, axis=1), np.abs(along[:, 0]), across], axis=1)


def report(name: str, said: Array, truth: Array, owners: list[int]) -> None:
    """Print the errors, resampled by the image that owns each."""
    off = dict(zip(("all", "along", "across"), errors(said, truth).T, strict=True))
    found = {k: bootstrap(group_by_image(owners, column)) for k, column in off.items()}
    print(
        f"{name:13}", ", ".join(f"{k} {estimate.to_text('.1f')}" for k, estimate in found.items())
    )


def main(model: str = "nano", images: int = 100, pixels: int = 8) -> None:
    """Measure, and print a table.

    Args:
        model: a SPEAR-VLM. images: held-out scenes. pixels: of the shift.
    """
    torch.set_num_threads(1)
    bundle = load_vlm(model)
    labels = list(load_labeled_images("sim", images, "external", bundle.processor))
    asked = generate_questions_by_family(labels, ("box_vertices",), 2, 0)["box_vertices"]
    owners = [image for image, _ in asked]
    truth = np.stack([extract_numbers(q.segments).reshape(8, 3).mean(0) for _, q in asked])
    ways = [(0, 0), (pixels, 0), (-pixels, 0), (0, pixels), (0, -pixels)]
    said = [centres(bundle, labels, asked, *way) for way in ways]
    print(f"{len(asked)} questions about {images} scenes, shifts of {pixels} pixels; mm")
    report("as it is", said[0], truth, owners)
    report("mean of five", np.mean(said, axis=0), truth, owners)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
