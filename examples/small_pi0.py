"""Writes a small π0 with random weights, and what `spear convert pi0` needs beside it.

    python examples/small_pi0.py runs/small-pi0

The π0 has LeRobot's names of weights, and the layers of a published π0, but few and narrow ones.
With it you can try a conversion and what follows it, without downloads. Its actions are random.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import GemmaConfig, PaliGemmaConfig, PI0Config, PI0ForConditionalGeneration

from spear.models.moge.checkpoint import to_published_weights
from spear.models.moge.networks import MogeV1
from spear.models.processing import train_tokenizer
from spear.tokens import CoordinateTokenizer

TEXTS = ["put the carrot on the plate", "move the spoon to the left of the pot"]
VOCABULARY_SIZE = 1311
NUM_EMBEDDINGS = VOCABULARY_SIZE + 1  # the last one is the image token, which no tokenizer has

VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,  # as in every published π0; recipes know the preset spear1 by it
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,  # as in every published π0
    "patch_size": 14,
    "image_size": 224,
    "vision_use_head": False,
}
TEXT = {
    "model_type": "gemma",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,  # as in every published π0
    "head_dim": 16,
    "vocab_size": NUM_EMBEDDINGS,
}
EXPERT = {**TEXT, "hidden_size": 32, "intermediate_size": 64}

LEROBOT_NAMES = [
    ("model.vlm.vision_tower.", "paligemma_with_expert.paligemma.model.vision_tower.vision_model."),
    (
        "model.vlm.language_model.embed_tokens.",
        "paligemma_with_expert.paligemma.lm_head.",  # the embeddings are stored as the head
    ),
    ("model.vlm.", "paligemma_with_expert.paligemma.model."),
    ("model.dit.embed_tokens.", "paligemma_with_expert.gemma_expert.lm_head."),
    ("model.dit.", "paligemma_with_expert.gemma_expert.model."),
    ("embed_action_time.", ""),
]
"""Beginning of a name in Transformers' π0 -> in LeRobot's. The first that fits is replaced."""


def make_pi0() -> PI0ForConditionalGeneration:
    """Make a π0 of random weights, with 32 numbers for states and actions, as the published one."""
    vlm_config = PaliGemmaConfig(
        vision_config=VISION,
        text_config=TEXT,
        projection_dim=TEXT["hidden_size"],
        hidden_size=TEXT["hidden_size"],
        image_token_index=NUM_EMBEDDINGS - 1,
    )
    config = PI0Config(
        vlm_config=vlm_config, dit_config=GemmaConfig(**EXPERT), max_state_dim=32, max_action_dim=32
    )
    return PI0ForConditionalGeneration(config)


def write_pi0(folder: Path) -> None:
    """Write the π0 as LeRobot does."""
    weights = {}
    for name, weight in make_pi0().state_dict().items():
        weights[f"model.{rename_for_lerobot(name)}"] = weight.contiguous().clone()
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"type": "pi0"}))


def rename_for_lerobot(name: str) -> str:
    """Return LeRobot's name of a weight of Transformers' π0."""
    for their_prefix, lerobot_prefix in LEROBOT_NAMES:
        if name.startswith(their_prefix):
            return lerobot_prefix + name.removeprefix(their_prefix)
    return name


def write_moge(file: Path) -> None:
    """Write a MoGe v1 with the smallest published encoder (ViT-S) and random weights."""
    config = {"encoder": "dinov2_vits14", "remap_output": "exp"}
    weights = to_published_weights(MogeV1(config).state_dict(), version=1)
    torch.save({"model_config": config, "model": weights}, file)


def main(folder: Path) -> None:
    """Write the π0, the MoGe, a tokenizer, and what the 3D tokens mean."""
    torch.manual_seed(0)
    write_pi0(folder / "pi0")
    write_moge(folder / "moge.pt")
    train_tokenizer(TEXTS, VOCABULARY_SIZE).save_pretrained(folder / "tokenizer")
    coordinates_m = np.random.default_rng(0).normal(0, 0.3, 10_000)
    CoordinateTokenizer.fit(coordinates_m, unit="metre").save(folder / "coordinates.json")
    print(f"written: {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
