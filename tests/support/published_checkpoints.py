"""Writes tiny checkpoints with random weights, in the layouts of the published PaliGemma, MoGe and
π0."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, PI0Config
from transformers import PI0ForConditionalGeneration as Pi0

from models_tiny import TEXT_SIZES, TINY
from spear.models import presets
from spear.models.moge import checkpoint as moge_checkpoint
from spear.models.moge.networks import ENCODERS, MogeV1
from spear.models.processing import train_tokenizer
from spear.models.spear1 import NUM_STATE_FEATURES
from spear.types import ACTION_DIM

NUM_PUBLISHED_TOKENS = 1312  # to which our conversion adds the 3D tokens
IMAGE_TOKEN = 1311  # id of the token that stands for a patch of the image
PALIGEMMA_LAYOUTS = ("2024", "2025", "now")
"""The Hub's layout of 2024, that of Transformers 4.52 (2025), and that of Transformers now."""
PI0_LAYOUTS = ("lerobot", "lerobot-2025", "openpi", "transformers", "saved")
"""The names of weights in LeRobot now, in LeRobot when it first had π0 (early in 2025), in openpi's
PyTorch port, inside Transformers' π0, and in the files that Transformers saves."""
MOGE_ENCODER = (16, 5, 2)  # width, layers, heads
TOKENIZER_TEXTS = ["estimate the distance between the mug and the spoon"] * 2

VISION_SIZES = {
    **TINY.vision,
    # openpi's and LeRobot's files do not say the number of heads, which is always 16.
    "hidden_size": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
}

TINY14 = dataclasses.replace(
    TINY,
    name="tiny14",
    stem="patch",
    vision=VISION_SIZES,
    moge={**(TINY.moge or {}), "patch_size": 14},
    image_sizes={"external": (56, 42), "wrist": (28, 28)},
    vocabulary_size=NUM_PUBLISHED_TOKENS,
)
"""The preset "tiny14": patches of 14 pixels, as published encoders have."""
LINEAR14 = dataclasses.replace(TINY14, flow={**TINY14.flow, "rotation": "linear"})
"""The preset "linear14": "tiny14" with π0's flow, which treats rotations as vectors."""


def register_tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the presets "tiny14" and "linear14", and a MoGe encoder of width 16."""
    monkeypatch.setitem(presets.PRESETS, "tiny14", TINY14)
    monkeypatch.setitem(presets.PRESETS, "linear14", LINEAR14)
    monkeypatch.setitem(ENCODERS, "dinov2_tiny14", MOGE_ENCODER)


# --- PaliGemma ---


def make_paligemma_config(
    text_type: str = "gemma", num_rows: int = NUM_PUBLISHED_TOKENS
) -> PaliGemmaConfig:
    """Make PaliGemma's config, or PaliGemma 2's if the text model is "gemma2".

    PaliGemma 2 limits its logits by soft caps, which are so low here that they change the results.
    """
    text_config: dict[str, Any] = {
        **TEXT_SIZES,
        "model_type": text_type,
        "vocab_size": num_rows,
        "pad_token_id": 0,
    }
    if text_type == "gemma2":
        text_config["query_pre_attn_scalar"] = 6  # differs from the width of a head, 8
        text_config["attn_logit_softcapping"] = 2.0
        text_config["final_logit_softcapping"] = 3.0
    vision_config = {
        **VISION_SIZES,
        "model_type": "siglip_vision_model",
        "vision_use_head": False,
    }
    return PaliGemmaConfig(
        vision_config=vision_config,
        text_config=text_config,
        projection_dim=TEXT_SIZES["hidden_size"],
        hidden_size=TEXT_SIZES["hidden_size"],
        image_token_index=IMAGE_TOKEN,
    )


def make_paligemma(
    text_type: str = "gemma", seed: int = 0, num_rows: int = NUM_PUBLISHED_TOKENS
) -> PaliGemmaForConditionalGeneration:
    """Make a PaliGemma whose weights are random, including those of norms and biases."""
    torch.manual_seed(seed)
    config = make_paligemma_config(text_type, num_rows)
    return _perturb_norms_and_biases(PaliGemmaForConditionalGeneration(config))


def _perturb_norms_and_biases(model: Any) -> Any:
    """Add noise to norms and biases, whose initial ones and zeros would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def publish_paligemma(
    model: PaliGemmaForConditionalGeneration,
    folder: Path,
    layout: str = "2024",
    with_tokenizer: bool = True,
) -> Path:
    """Write a folder of a PaliGemma in one of `PALIGEMMA_LAYOUTS`.

    The weights of the layouts "2024" and "2025" are in two shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "now":
        model.save_pretrained(folder)
    else:
        weights = {}
        for name, weight in model.state_dict().items():
            if layout == "2025" or "lm_head" not in name:
                published_name = _to_published_paligemma_name(name, layout)
                weights[published_name] = weight.contiguous().clone()
        total_bytes = sum(weight.nbytes for weight in weights.values())
        two_thirds = total_bytes * 2 // 3
        sorted_weights = dict(sorted(weights.items()))
        save_torch_state_dict(sorted_weights, folder, max_shard_size=two_thirds)
        model.config.save_pretrained(folder)
    if with_tokenizer:
        tokenizer = train_tokenizer(TOKENIZER_TEXTS, IMAGE_TOKEN)
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        tokenizer.save_pretrained(folder)
    return folder


def _to_published_paligemma_name(name: str, layout: str) -> str:
    """Return the name in a published layout of a weight that is named as in Transformers now."""
    name = name.replace("model.vision_tower.", "model.vision_tower.vision_model.")
    if layout == "2025":
        return name
    return name.removeprefix("model.").replace("language_model.", "language_model.model.", 1)


# --- MoGe ---


def publish_moge(path: Path, seed: int = 0) -> Path:
    """Write a MoGe v1 with random weights, under the names of the published model.pt.

    In the published file, the weights of queries, keys and values are one tensor.
    """
    torch.manual_seed(seed)
    config = {
        "encoder": "dinov2_tiny14",
        "remap_output": "exp",
        "intermediate_layers": 4,
        "dim_proj": 8,
        "dim_upsample": [32, 32, 32],
        "dim_times_res_block_hidden": 1,
        "num_res_blocks": 1,
        "last_conv_channels": 32,
    }
    # Noise, because the initial ones and zeros of norms and biases would hide mistakes.
    our_weights = {
        name: weight + 0.1 * torch.randn_like(weight)
        for name, weight in MogeV1(config).state_dict().items()
    }
    weights = moge_checkpoint.to_published_weights(our_weights, version=1)
    # A weight of the published file that MoGe does not use, and that a conversion leaves out.
    width, _, _ = MOGE_ENCODER
    weights["backbone.mask_token"] = torch.zeros(1, width)
    torch.save({"model_config": config, "model": weights}, path)
    return path


# --- π0 ---


def make_pi0(
    state_dim: int = NUM_STATE_FEATURES, action_dim: int = ACTION_DIM, seed: int = 1
) -> Pi0:
    """Make a π0 with random weights and SPEAR-1's horizon.

    By default its states and actions have as many numbers as SPEAR-1's; a published π0 has 32.
    """
    torch.manual_seed(seed)
    config = PI0Config(
        vlm_config=make_paligemma_config(),
        dit_config=GemmaConfig(**TINY.expert),
        chunk_size=TINY.horizon,
        max_state_dim=state_dim,
        max_action_dim=action_dim,
    )
    return _perturb_norms_and_biases(Pi0(config))


def publish_pi0(model: Pi0, folder: Path, layout: str = "lerobot") -> Path:
    """Write a folder of a π0 in one of `PI0_LAYOUTS`."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "saved":
        model.save_pretrained(folder)
    elif layout == "transformers":
        weights = {name: w.contiguous().clone() for name, w in model.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(folder)
    else:
        weights = rename_pi0_weights(model)
        _write_openpi_weights(weights, folder, layout, {"type": "pi0", "chunk_size": TINY.horizon})
    return folder


def publish_pi05(folder: Path, layout: str = "lerobot", seed: int = 1) -> Path:
    """Write a folder of a π0.5 with the names of weights of "lerobot" or "openpi".

    Its VLM, and the attention and MLPs of its expert, are those of `make_pi0` with states and
    actions of 32 numbers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = make_pi0(state_dim=32, action_dim=32, seed=seed)
    width = model.config.dit_config.hidden_size
    weights: dict[str, torch.Tensor] = {}
    for name, weight in rename_pi0_weights(model).items():
        is_norm_of_expert = "gemma_expert" in name and "norm.weight" in name
        if is_norm_of_expert:
            # Scale, shift and gate are linear in an embedding of the flow time (adaRMS).
            layer = name.removesuffix(".weight")
            weights[f"{layer}.dense.weight"] = torch.randn(3 * width, width)
            weights[f"{layer}.dense.bias"] = torch.randn(3 * width)
        elif not name.startswith(("state_proj", "action_time_mlp")):
            weights[name] = weight
    for layer in ("time_mlp_in", "time_mlp_out"):
        weights[f"{layer}.weight"] = torch.randn(width, width)
        weights[f"{layer}.bias"] = torch.randn(width)
    _write_openpi_weights(weights, folder, layout, {"type": "pi05", "chunk_size": TINY.horizon})
    return folder


def rename_pi0_weights(model: Pi0) -> dict[str, torch.Tensor]:
    """Return the weights of a π0 by the names of openpi's PyTorch port.

    A tied head and its embeddings are one tensor there, which is saved as the head.
    """
    paligemma = "paligemma_with_expert.paligemma."
    expert = "paligemma_with_expert.gemma_expert."
    weights = {}
    for name, weight in model.state_dict().items():
        name = name.replace(
            "model.vlm.vision_tower.", f"{paligemma}model.vision_tower.vision_model."
        )
        name = name.replace("model.vlm.language_model.embed_tokens.", f"{paligemma}lm_head.")
        name = name.replace("model.vlm.", f"{paligemma}model.")
        name = name.replace("model.dit.embed_tokens.", f"{expert}lm_head.")
        name = name.replace("model.dit.", f"{expert}model.")
        weights[name.removeprefix("embed_action_time.")] = weight.contiguous().clone()
    return weights


def _write_openpi_weights(
    weights: dict[str, torch.Tensor], folder: Path, layout: str, config: dict[str, Any]
) -> None:
    """Write weights with openpi's names, or as LeRobot does, with its config and statistics."""
    if layout == "lerobot-2025":
        weights = {_to_first_lerobot_name(name): weight for name, weight in weights.items()}
    if layout != "openpi":
        weights = {f"model.{name}": weight for name, weight in weights.items()}
        # LeRobot's files also contain normalization statistics.
        statistics_name = "normalize_inputs.buffer_observation_state.mean"
        weights[statistics_name] = torch.zeros(32)
        (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")


def _to_first_lerobot_name(name: str) -> str:
    """Return the name that LeRobot first gave a weight, which is openpi's `name`."""
    paligemma = "paligemma_with_expert.paligemma."
    name = name.replace(f"{paligemma}lm_head.", f"{paligemma}language_model.lm_head.")
    name = name.replace(f"{paligemma}model.language_model.", f"{paligemma}language_model.model.")
    return name.replace(f"{paligemma}model.", paligemma)
