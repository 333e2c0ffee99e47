"""Tiny checkpoints with random weights, in the layouts that PaliGemma, MoGe and π0 are published
in."""

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

from models_tiny import TEXT, TINY
from spear.models import presets
from spear.models.moge import checkpoint as moge_checkpoint
from spear.models.moge.networks import ENCODERS, MogeV1
from spear.models.processing import train_tokenizer

ROWS, IMAGE_TOKEN = 1312, 1311
TINY14 = dataclasses.replace(
    TINY,
    name="tiny14",
    stem="patch",
    image_sizes={"external": (56, 42), "wrist": (28, 28)},
    vocabulary=ROWS,
)
MOGE = (16, 5, 2)
LAYOUTS = ("2024", "2025", "now")


def know_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let "tiny14", the same with π0's flow and a MoGe encoder of width 16 be known."""
    monkeypatch.setitem(presets.PRESETS, "tiny14", TINY14)
    linear = dataclasses.replace(TINY14, flow={**TINY14.flow, "rotation": "linear"})
    monkeypatch.setitem(presets.PRESETS, "linear14", linear)
    monkeypatch.setitem(ENCODERS, "dinov2_tiny14", MOGE)


def paligemma_config(text: str = "gemma", rows: int = ROWS) -> PaliGemmaConfig:
    """PaliGemma's; with a text model "gemma2" PaliGemma 2's, its soft caps low enough to matter."""
    more: dict[str, Any] = {}
    if text == "gemma2":
        more = {
            "query_pre_attn_scalar": 6,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        }
    vision = {**TINY.vision, "patch_size": 14, "image_size": 224, "vision_use_head": False}
    return PaliGemmaConfig(
        vision_config={**vision, "model_type": "siglip_vision_model"},
        text_config={**TEXT, **more, "model_type": text, "vocab_size": rows, "pad_token_id": 0},
        projection_dim=TEXT["hidden_size"],
        hidden_size=TEXT["hidden_size"],
        image_token_index=IMAGE_TOKEN,
    )


def paligemma(
    text: str = "gemma", seed: int = 0, rows: int = ROWS
) -> PaliGemmaForConditionalGeneration:
    """A random one, whose norms and biases are not those of an untrained one."""
    torch.manual_seed(seed)
    return _moved(PaliGemmaForConditionalGeneration(paligemma_config(text, rows)))


def _moved(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def publish_paligemma(
    model: PaliGemmaForConditionalGeneration,
    folder: Path,
    layout: str = "2024",
    tokenizer: bool = True,
) -> Path:
    """Write a PaliGemma folder: as on the Hub in 2024 (two shards), as Transformers 4.52, or
    now."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "now":
        model.save_pretrained(folder)
    else:
        state = {name: weight.contiguous().clone() for name, weight in model.state_dict().items()}
        kept = {name: w for name, w in state.items() if layout == "2025" or "lm_head" not in name}
        renamed = {_published(name, layout): weight for name, weight in kept.items()}
        most = sum(weight.nbytes for weight in renamed.values()) * 2 // 3
        save_torch_state_dict(dict(sorted(renamed.items())), folder, max_shard_size=most)
        model.config.save_pretrained(folder)
    if tokenizer:
        words = train_tokenizer(
            ["estimate the distance between the mug and the spoon"] * 2, IMAGE_TOKEN
        )
        words.add_tokens(["<image>"], special_tokens=True)
        words.save_pretrained(folder)
    return folder


def _published(name: str, layout: str) -> str:
    name = name.replace("model.vision_tower.", "model.vision_tower.vision_model.")
    if layout == "2025":
        return name
    return name.removeprefix("model.").replace("language_model.", "language_model.model.", 1)


def publish_moge(path: Path, seed: int = 0) -> Path:
    """Write a MoGe v1 as `model.pt`, under DINOv2's own names, queries, keys and values in one."""
    torch.manual_seed(seed)
    config = {
        "encoder": "dinov2_tiny14",
        "remap_output": "exp",
        "intermediate_layers": 4,
        "dim_proj": 8,
    }
    config |= {"dim_upsample": [32, 32, 32], "dim_times_res_block_hidden": 1, "num_res_blocks": 1}
    config |= {"last_conv_channels": 32}
    weights: dict[str, torch.Tensor] = {}
    for ours, weight in MogeV1(config).state_dict().items():
        value = weight + 0.1 * torch.randn_like(weight)
        name = moge_checkpoint.to_published_name(ours, moge_checkpoint.NAME_PREFIXES[1])
        weights[name] = torch.cat([weights[name], value]) if name in weights else value
    for name, values in moge_checkpoint.IMAGE_STATISTICS.items():
        weights[name] = torch.tensor(values).view(1, 3, 1, 1)
    weights["backbone.mask_token"] = torch.zeros(1, MOGE[0])
    torch.save({"model_config": config, "model": weights}, path)
    return path


def pi0(state: int = 10, action: int = 8, seed: int = 1) -> Pi0:
    """A random π0 whose chunks are SPEAR-1's; its states and actions may be of other sizes."""
    torch.manual_seed(seed)
    networks = {"vlm_config": paligemma_config(), "dit_config": GemmaConfig(**TINY.expert)}
    sizes = {"chunk_size": TINY.horizon, "max_state_dim": state, "max_action_dim": action}
    return _moved(Pi0(PI0Config(**networks, **sizes)))


def publish_pi0(model: Pi0, folder: Path, layout: str = "lerobot") -> Path:
    """Write a π0 folder: "lerobot" and "openpi" names, or "transformers"."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "transformers":
        state = {k: v.contiguous().clone() for k, v in model.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(folder)
        return folder
    weights = {}
    for name, weight in model.state_dict().items():
        name = name.replace("model.vlm.", "paligemma_with_expert.paligemma.model.")
        name = name.replace("model.dit.", "paligemma_with_expert.gemma_expert.model.")
        weights[name.removeprefix("embed_action_time.")] = weight.contiguous().clone()
    expert = "paligemma_with_expert.gemma_expert."
    weights[f"{expert}lm_head.weight"] = weights.pop(f"{expert}model.embed_tokens.weight")
    if layout == "lerobot":
        weights = {f"model.{name}": weight for name, weight in weights.items()}
        weights["normalize_inputs.buffer_observation_state.mean"] = torch.zeros(
            model.config.max_state_dim
        )
        (folder / "config.json").write_text(json.dumps({"type": "pi0", "chunk_size": TINY.horizon}))
    save_file(weights, folder / "model.safetensors")
    return folder
