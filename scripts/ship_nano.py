"""Puts a trained nano policy into the package, as bfloat16: `python scripts/ship_nano.py runs/nano-vla/final`.

The policy holds its whole SPEAR-VLM, so one folder serves `spear ask` and `spear evaluate`. Results are written
into the model card by hand from the outputs of `spear evaluate vqa` and `spear evaluate`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SHIPPED = Path(__file__).parents[1] / "src" / "spear" / "weights" / "nano"
LIMIT_MB = 20


def main(final: Path) -> None:
    """Copy the folder, weights rounded to bfloat16."""
    part = SHIPPED.with_name(".part-nano")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(final, part)
    weights = load_file(final / "model.safetensors")
    save_file(
        {k: v.to(torch.bfloat16) for k, v in weights.items()}, part / "model.safetensors", {"format": "pt"}
    )
    card = SHIPPED / "README.md"
    if card.is_file():
        shutil.copy(card, part)
    size = sum(f.stat().st_size for f in part.rglob("*") if f.is_file()) / 1e6
    if size > LIMIT_MB:
        shutil.rmtree(part)
        sys.exit(f"{final}: {size:.1f} MB is more than the {LIMIT_MB} MB that may ship")
    shutil.rmtree(SHIPPED, ignore_errors=True)
    part.replace(SHIPPED)
    print(f"{SHIPPED}: {size:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
