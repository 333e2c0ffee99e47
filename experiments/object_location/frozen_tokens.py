"""How much of the objects' location do SPEAR-VLM's visual tokens contain, and how much its answers?

    python -m experiments.object_location.frozen_tokens --labels runs/labels [--images 300]

A small transformer (the probe) learns to read box centers off the frozen visual tokens: it sees all
tokens of an image and the name of one object. It learns from the labeled images of a folder. The
probe and the model's own answers are then measured on the same objects of held-out scenes. Where
the probe is no better, the tokens limit the answers. Printed are errors of box centers, in total,
along the ray, and across it: medians, resampled by image.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tyro.conf import arg

from experiments.object_location.shifted_images import (
    QUESTIONS_PER_IMAGE,
    answer_box_centers,
    print_errors,
    true_box_centers,
)
from spear.cli import run_reporting_errors
from spear.evaluate.vqa.ask import load_or_render_labeled_images
from spear.evaluate.vqa.run import generate_questions_by_type
from spear.labels.questions.generate import find_askable_objects
from spear.labels.store import read_evenly_spread_labels
from spear.policy import VlmBundle, load_vlm
from spear.types import LabeledImage
from spear.util.images import decode_image
from spear.util.progress import ProgressBar

PROBE_WIDTH = 192
NUM_PROBE_LAYERS = 2
NUM_PROBE_HEADS = 4
BATCH_SIZE = 96
LEARNING_RATE = 1e-3
ENCODING_BATCH_SIZE = 64


class Probe(nn.Module):
    """Visual tokens [B, T, D] and names [B] → box centers [B, 3]."""

    def __init__(self, num_tokens: int, token_width: int, num_names: int) -> None:
        super().__init__()
        self.input_projection = nn.Linear(token_width, PROBE_WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(num_tokens, PROBE_WIDTH))
        self.names = nn.Embedding(num_names, PROBE_WIDTH)
        layer = nn.TransformerEncoderLayer(
            PROBE_WIDTH,
            NUM_PROBE_HEADS,
            4 * PROBE_WIDTH,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(
            layer, NUM_PROBE_LAYERS, nn.LayerNorm(PROBE_WIDTH), enable_nested_tensor=False
        )
        self.output_projection = nn.Linear(PROBE_WIDTH, 3)

    def forward(self, tokens: Tensor, names: Tensor) -> Tensor:
        image = self.input_projection(tokens) + self.positions
        x = torch.cat([self.names(names)[:, None], image], dim=1)
        return self.output_projection(self.layers(x)[:, 0])


@torch.no_grad()
def encode_images(model: VlmBundle, labels: Sequence[LabeledImage]) -> Tensor:
    """The visual tokens [n, T, D] of the external camera."""
    batches = []
    for start in range(0, len(labels), ENCODING_BATCH_SIZE):
        images = []
        for label in labels[start : start + ENCODING_BATCH_SIZE]:
            images.append(model.processor.prepare_image(decode_image(label.image), "external"))
        batches.append(model.model.encode_views(torch.stack(images))[0])
    return torch.cat(batches)


def train_probe(tokens: Tensor, objects: Tensor, centers: Tensor, steps: int) -> nn.Module:
    """Train a probe.

    Args:
        tokens: of images, [n, T, D].
        objects: [m, 2], the index of the image and of the name of each object.
        centers: [m, 3], where they are.
        steps: of the training.
    """
    images, names = objects.unbind(1)
    probe = Probe(tokens.shape[1], tokens.shape[2], int(names.max()) + 1)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.05)
    with ProgressBar("probe", steps) as bar:
        for step in range(steps):
            rows = torch.randint(len(images), (BATCH_SIZE,))
            prediction = probe(tokens[images[rows]], names[rows])
            loss = (prediction - centers[rows]).norm(dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_num_done(step + 1, f"{1000 * loss.item():.1f} mm")
    return probe.eval()


def main(
    labels: Path,
    model: str = "nano",
    images: int = 300,
    max_images: Annotated[int, arg(name="most")] = 13056,
    steps: int = 8000,
) -> None:
    """Train the probe, measure both, and print a table.

    Args:
        labels: folder of `spear label`.
        model: a SPEAR-VLM.
        images: held-out scenes.
        max_images: images to learn from.
        steps: of the probe's training.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bundle = load_vlm(model)

    # The objects that the probe learns from.
    training_labels = read_evenly_spread_labels(labels / "external", max_images)
    training_objects = []
    for index, label in enumerate(training_labels):
        training_objects += [(index, object_) for object_ in find_askable_objects(label)]
    names = sorted({object_.name for _, object_ in training_objects})

    # The objects that both are measured on.
    held_out = load_or_render_labeled_images("sim", images, "external", bundle.processor)
    questions = generate_questions_by_type(held_out, ("box_vertices",), QUESTIONS_PER_IMAGE, 0)
    box_questions = [(i, q) for i, q in questions["box_vertices"] if q.objects[0] in names]
    truth = true_box_centers(box_questions)

    # Train the probe on normalized tokens.
    tokens = encode_images(bundle, training_labels)
    held_out_tokens = encode_images(bundle, held_out)
    mean = tokens.mean((0, 1))
    scale = tokens.std((0, 1)) + 1e-5
    rows = [[index, names.index(object_.name)] for index, object_ in training_objects]
    centers = np.stack([o.box3d.center for _, o in training_objects if o.box3d is not None])
    probe = train_probe(
        (tokens - mean) / scale, torch.tensor(rows), torch.from_numpy(centers).float(), steps
    )

    # Read the held-out objects.
    image_indices = [index for index, _ in box_questions]
    name_indices = [names.index(question.objects[0]) for _, question in box_questions]
    question_tokens = ((held_out_tokens - mean) / scale)[torch.tensor(image_indices)]
    with torch.no_grad():
        probe_centers = probe(question_tokens, torch.tensor(name_indices)).double().numpy()

    print(
        f"{len(box_questions)} objects in {images} held-out scenes; "
        f"the probe learned from {len(training_labels)} images; mm"
    )
    print_errors("probe", probe_centers, truth, image_indices)
    answers = answer_box_centers(bundle, held_out, box_questions)
    print_errors("answers", answers, truth, image_indices)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
