"""Copies a trained folder into the package, as float16.

    python -m experiments.nano.ship runs/nano-vla nano

The name is what commands take: "nano", the policy; "nano-vlm", the SPEAR-VLM that `spear ask` asks;
"nano-vlm-0" and "nano-depth", from which SPEAR-VLM is trained. Results are written into the model
card by hand, from the outputs of `spear evaluate vqa` and `spear evaluate`.
"""

from __future__ import annotations

import shutil
import sys

import torch
from safetensors.torch import load_file, save_file

from spear.models.weights.folders import (
    BUNDLED_WEIGHTS,
    locate_checkpoint,
    read_provenance,
    write_provenance,
)

MAX_SIZE_MB = 20


def main(trained: str, name: str) -> None:
    """Copy the folder, with weights rounded to float16 (bfloat16 loses eight times as much).

    A model card that is in the package stays.
    """
    source = locate_checkpoint(trained)
    destination = BUNDLED_WEIGHTS / name
    temporary = BUNDLED_WEIGHTS / f".part-{name}"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)

    weights = load_file(source / "model.safetensors")
    rounded_weights = {key: weight.to(torch.float16) for key, weight in weights.items()}
    save_file(rounded_weights, temporary / "model.safetensors", {"format": "pt"})
    write_provenance(temporary, read_provenance(temporary))
    card = destination / "README.md"
    if card.is_file():
        shutil.copy(card, temporary)

    size_mb = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file()) / 1e6
    if size_mb > MAX_SIZE_MB:
        shutil.rmtree(temporary)
        sys.exit(f"{source}: {size_mb:.1f} MB is more than the {MAX_SIZE_MB} MB that may ship")
    shutil.rmtree(destination, ignore_errors=True)
    temporary.replace(destination)
    print(f"{destination}: {size_mb:.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m experiments.nano.ship TRAINED_FOLDER NAME")
    _, trained_folder, shipped_name = sys.argv
    main(trained_folder, shipped_name)
