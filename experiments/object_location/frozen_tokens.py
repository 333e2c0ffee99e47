"""How much of where things are is in SPEAR-VLM's visual tokens, and how much of it its answers say.

    python -m experiments.object_location.frozen_tokens --labels runs/labels [--images 300] [--steps 8000]

A small transformer that is trained for nothing else reads box centres off the frozen visual tokens: it sees
all tokens of an image and the name of one object. It learns from the labelled images of the folder; it and
the model's own answers are then measured on the same objects of held-out scenes. Where the probe is no
better, the tokens are what limits the answers. Errors of box centres: in all, along the ray, and across it;
medians, resampled by image.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import nn

from experiments.object_location.shifted_images import centres, report
from spear.cli import run_reporting_errors
from spear.evaluate.vqa.ask import load_labeled_images
from spear.evaluate.vqa.measures import extract_numbers
from spear.evaluate.vqa.run import generate_questions_by_family
from spear.labels.questions.generate import find_askable_objects
from spear.labels.store import select_labels
from spear.policy import VlmBundle, load_vlm
from spear.types import LabeledImage
from spear.util.images import decode_image
from spear.util.progress import ProgressBar

WIDTH, BATCH, RATE = 192, 96, 1e-3


class Probe(nn.Module):
    """Tokens [B, T, D] and names [B] -> box centres [B, 3]."""

    def __init__(self, tokens: int, width: int, names: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(tokens, WIDTH))
        self.names = nn.Embedding(names, WIDTH)
        how: dict[str, Any] = {
            "dropout": 0.0,
            "activation": "gelu",
            "batch_first": True,
            "norm_first": True,
        }
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, **how)
        self.layers = nn.TransformerEncoder(
            layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False
        )
        self.outer = nn.Linear(WIDTH, 3)

    def forward(self, tokens: torch.Tensor, names: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.names(names)[:, None], self.inner(tokens) + self.places], dim=1)
        return self.outer(self.layers(x)[:, 0])


@torch.no_grad()
def visual_tokens(model: VlmBundle, labels: Sequence[LabeledImage]) -> torch.Tensor:
    """[n, T, D] of the external camera."""
    found = []
    for start in range(0, len(labels), 64):
        images = (decode_image(label.image) for label in labels[start : start + 64])
        pixels = torch.stack([model.processor.prepare_image(image, "external") for image in images])
        found.append(model.model.encode_views(pixels)[0])
    return torch.cat(found)


def train(
    tokens: torch.Tensor, objects: torch.Tensor, truth: torch.Tensor, steps: int
) -> nn.Module:
    """A probe of images [n, T, D]. objects [m, 2]: image and name of each; truth [m, 3]: its place."""
    owners, names = objects.unbind(1)
    probe = Probe(tokens.shape[1], tokens.shape[2], int(names.max()) + 1)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.05)
    with ProgressBar("probe", steps) as bar:
        for step in range(steps):
            rows = torch.randint(len(owners), (BATCH,))
            loss = (probe(tokens[owners[rows]], names[rows]) - truth[rows]).norm(dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update(step + 1, f"{1000 * loss.item():.1f} mm")
    return probe.eval()


def main(
    labels: Path, model: str = "nano", images: int = 300, most: int = 13056, steps: int = 8000
) -> None:
    """Train the probe, measure both, and print a table.

    Args:
        labels: folder of `spear label`. model: a SPEAR-VLM. images: held-out scenes.
        most: images to learn from. steps: of the probe's training.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bundle = load_vlm(model)
    known = select_labels(labels / "external", most)
    asked_of = [(i, o) for i, label in enumerate(known) for o in find_askable_objects(label)]
    names = sorted({o.name for _, o in asked_of})
    held_out = list(load_labeled_images("sim", images, "external", bundle.processor))
    asked = generate_questions_by_family(held_out, ("box_vertices",), 2, 0)["box_vertices"]
    asked = [(i, q) for i, q in asked if q.objects[0] in names]
    truth = np.stack([extract_numbers(q.segments).reshape(8, 3).mean(0) for _, q in asked])

    tokens, seen = visual_tokens(bundle, known), visual_tokens(bundle, held_out)
    mean, spread = tokens.mean((0, 1)), tokens.std((0, 1)) + 1e-5
    tokens, seen = (tokens - mean) / spread, (seen - mean) / spread
    rows = torch.tensor([[i, names.index(o.name)] for i, o in asked_of])
    places = np.stack([o.box3d.center for _, o in asked_of if o.box3d is not None])
    probe = train(tokens, rows, torch.from_numpy(places).float(), steps)
    owners = torch.tensor([i for i, _ in asked])
    with torch.no_grad():
        read = probe(seen[owners], torch.tensor([names.index(q.objects[0]) for _, q in asked]))

    print(
        f"{len(asked)} objects in {images} held-out scenes; the probe learned from {len(known)} images; mm"
    )
    report("probe", read.double().numpy(), truth, owners.tolist())
    report("answers", centres(bundle, held_out, asked, 0, 0), truth, owners.tolist())


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
