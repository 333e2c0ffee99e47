"""Puts a trained folder into the package, as float16: `python -m experiments.nano.ship runs/nano-vla nano`.

The name is what commands take: "nano", the policy; "nano-vlm", the SPEAR-VLM that `spear ask` asks;
"nano-vlm-0" and "nano-depth", from which SPEAR-VLM is trained. Results are written into the model card by
hand, from the outputs of `spear evaluate vqa` and `spear evaluate`.
"""

from __future__ import annotations

import shutil
import sys

import torch
from safetensors.torch import load_file, save_file

from spear.models.weights.folders import BUNDLED_WEIGHTS, locate, read_provenance, write_provenance

LIMIT_MB = 20


def main(trained: str, name: str) -> None:
    """Copy the folder, weights rounded to float16 (bfloat16 loses eight times as much); a card that is there
    stays."""
    final, shipped = locate(trained), BUNDLED_WEIGHTS / name
    part = BUNDLED_WEIGHTS / f".part-{name}"
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(final, part)
    weights = load_file(final / "model.safetensors")
    save_file(
        {k: v.to(torch.float16) for k, v in weights.items()},
        part / "model.safetensors",
        {"format": "pt"},
    )
    write_provenance(part, read_provenance(part))
    card = shipped / "README.md"
    if card.is_file():
        shutil.copy(card, part)
    size = sum(f.stat().st_size for f in part.rglob("*") if f.is_file()) / 1e6
    if size > LIMIT_MB:
        shutil.rmtree(part)
        sys.exit(f"{final}: {size:.1f} MB is more than the {LIMIT_MB} MB that may ship")
    shutil.rmtree(shipped, ignore_errors=True)
    part.replace(shipped)
    print(f"{shipped}: {size:.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m experiments.nano.ship TRAINED_FOLDER NAME")
    main(*sys.argv[1:])
