"""Gives a model a part of another model, which has the same shapes.

    python -m experiments.nano.exchange MODEL PART SOURCE SOURCE_PART OUT

MODEL and SOURCE are folders, or names of shipped models. PART is the prefix of the weights that are
replaced, and SOURCE_PART the prefix of those that replace them; "." is the whole source. All other
files are those of MODEL. For example, this gives a policy another SPEAR-VLM:

    python -m experiments.nano.exchange nano vlm runs/vlm-varied/final . runs/nano-exchanged

The other parts of the model were trained to read the old part, so the result has to be trained
further.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from spear.models.weights.folders import locate_checkpoint, read_provenance, write_provenance

WEIGHTS_FILE = "model.safetensors"


def select_part(weights: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The weights whose names begin with a part's name, by the rest of their names."""
    prefix = "" if part == "." else f"{part}."
    return {
        name.removeprefix(prefix): weight
        for name, weight in weights.items()
        if name.startswith(prefix)
    }


def main(model: str, part: str, source: str, source_part: str, out: str) -> None:
    """Write the model with the other part to a new folder."""
    model_folder = locate_checkpoint(model)
    weights = load_file(model_folder / WEIGHTS_FILE)
    old_part = select_part(weights, part)
    new_part = select_part(load_file(locate_checkpoint(source) / WEIGHTS_FILE), source_part)

    if old_part.keys() != new_part.keys():
        sys.exit(f"{part} of {model} has other layers than {source_part} of {source}.")
    for name, weight in new_part.items():
        if old_part[name].shape != weight.shape:
            sys.exit(f"{part}.{name} has another shape in {model} than in {source}.")
        weights[f"{part}.{name}"] = weight

    out_folder = Path(out)
    shutil.copytree(model_folder, out_folder)
    float32_weights = {name: weight.float() for name, weight in weights.items()}
    save_file(float32_weights, out_folder / WEIGHTS_FILE, {"format": "pt"})
    write_provenance(out_folder, read_provenance(model_folder))
    print(out_folder)


if __name__ == "__main__":
    if len(sys.argv) != 6:
        sys.exit("usage: python -m experiments.nano.exchange MODEL PART SOURCE SOURCE_PART OUT")
    main(*sys.argv[1:])
