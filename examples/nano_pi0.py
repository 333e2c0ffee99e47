"""Writes `nano` as a π0, so that you can try `spear convert pi0` with weights that have learned.

    python examples/nano_pi0.py runs/nano-pi0

Its weights have the names that Transformers gives them. Like a π0 it has no MoGe, no 3D tokens, and
32 numbers for states and actions, in place of 10 and 8. Unlike a π0 it has nano's convolutions in
place of patches. The folder also has what `spear convert pi0` needs beside a π0: a tokenizer, and
what the 3D tokens mean (coordinates.json).
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from spear.policy import locate_checkpoint

NUM_PI0_FEATURES = 32  # numbers of a π0's state, and of its action

TRANSFORMERS_NAMES = [
    ("vlm.", "model.vlm."),
    ("expert.", "model.dit."),
    ("action_time_mlp_", "embed_action_time.action_time_mlp_"),
    ("state_proj.", "embed_action_time.state_proj."),
    ("action_in_proj.", "embed_action_time.action_in_proj."),
]
"""Beginning of a name in SPEAR-1 -> in Transformers' π0. The first that fits is replaced."""

LAYERS_OF_ROBOT = {"state_proj.weight": 1, "action_in_proj.weight": 1, "action_out_proj.weight": 0}
"""Weight of a layer for states or actions -> the axis with their numbers."""


def make_pi0_weights(nano: dict[str, torch.Tensor], num_tokens: int) -> dict[str, torch.Tensor]:
    """Return nano's weights as those of a π0 with `num_tokens` text tokens, in float32."""
    weights = {}
    for name, weight in nano.items():
        if name.startswith("vlm.moge"):
            continue
        if name == "vlm.language_model.embed_tokens.weight":
            weight = weight[:num_tokens]  # the 3D tokens come after the text tokens
        if name.startswith("vlm.multi_modal_projector."):
            weight = weight / 2  # nano's visual token is the average with MoGe's projection
        if name in LAYERS_OF_ROBOT:
            weight = pad_with_zeros(weight, axis=LAYERS_OF_ROBOT[name])
        if name == "action_out_proj.bias":
            weight = pad_with_zeros(weight, axis=0)
        weights[rename_for_transformers(name)] = weight.float().contiguous().clone()
    return weights


def pad_with_zeros(weight: torch.Tensor, axis: int) -> torch.Tensor:
    """Return a weight that has `NUM_PI0_FEATURES` entries along an axis."""
    shape = list(weight.shape)
    shape[axis] = NUM_PI0_FEATURES - weight.shape[axis]
    return torch.cat([weight, weight.new_zeros(shape)], dim=axis)


def rename_for_transformers(name: str) -> str:
    """Return the name of a weight of SPEAR-1 in Transformers' π0."""
    for our_prefix, their_prefix in TRANSFORMERS_NAMES:
        if name.startswith(our_prefix):
            return their_prefix + name.removeprefix(our_prefix)
    return name


def make_pi0_config(nano: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """Return the config of the π0, from nano's."""
    vlm = nano["vlm_config"]
    return {
        "model_type": "pi0",
        "vlm_config": {
            "model_type": "paligemma",
            "vision_config": vlm["vision_config"],  # with nano's convolutions for patches
            "text_config": {**vlm["text_config"], "vocab_size": num_tokens},
            "projection_dim": vlm["text_config"]["hidden_size"],
        },
        "dit_config": nano["expert_config"],
        "min_period": nano["min_period"],
        "max_period": nano["max_period"],
    }


def write_tokenizer(nano: Path, folder: Path, num_tokens: int) -> None:
    """Write nano's tokenizer without its 3D tokens, which a π0 does not have."""
    AutoTokenizer.from_pretrained(nano).save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    text_tokens = [token for token in content["added_tokens"] if token["id"] < num_tokens]
    content["added_tokens"] = text_tokens
    file.write_text(json.dumps(content), "utf-8")


def main(folder: Path) -> None:
    """Write the π0, a tokenizer, and what the 3D tokens mean."""
    nano = locate_checkpoint("nano")
    nano_config = json.loads((nano / "config.json").read_text("utf-8"))
    num_tokens = nano_config["vlm_config"]["coordinate_start"]  # 3D tokens begin after the text's

    folder.mkdir(parents=True)
    weights = make_pi0_weights(load_file(nano / "model.safetensors"), num_tokens)
    save_file(weights, folder / "model.safetensors")
    config = make_pi0_config(nano_config, num_tokens)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    write_tokenizer(nano, folder, num_tokens)
    shutil.copy(nano / "coordinates.json", folder)
    print(f"written: {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
