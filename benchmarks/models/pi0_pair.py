"""SPEAR-1 and Transformers' π0 of the same geometry and with the same random weights, for comparisons.

π0 has no MoGe, square images of one size, linear rotations: so has the SPEAR-1 here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import GemmaConfig, PaliGemmaConfig, PI0Config
from transformers import PI0ForConditionalGeneration as Pi0

from spear.models.presets import PRESETS, Preset, build_spear1_config
from spear.models.spear1 import NUM_STATE_FEATURES, Spear1ForActionPrediction
from spear.types import ACTION_DIM, Action

VOCABULARY, IMAGE_TOKEN = 2048, 2047
VIEWS = ("external", "wrist", "third")

_SMALL = PRESETS["small"]
SIZES = {
    **PRESETS,
    # Between small and spear1: a billion parameters.
    "mid": dataclasses.replace(
        _SMALL,
        name="mid",
        text={
            **_SMALL.text,
            "hidden_size": 1536,
            "intermediate_size": 8192,
            "num_hidden_layers": 18,
        },
        expert={
            **_SMALL.expert,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 18,
        },
    ),
}


def reduced(name: str, layers: int | None = None, side: int | None = None) -> Preset:
    """A preset as π0 can have it: no MoGe, patch convolutions, three square views, linear rotations.

    layers  at most so many per network. side: of the images, in patches; by default the preset's for its
            positions.
    """
    size = SIZES[name]
    parts: dict[str, Any] = {}
    for part in ("vision", "text", "expert"):
        fields = dict(getattr(size, part))
        most = fields["num_hidden_layers"]
        parts[part] = {**fields, "num_hidden_layers": most if layers is None else min(most, layers)}
    patch = parts["vision"]["patch_size"]
    pixels = parts["vision"]["image_size"] if side is None else side * patch
    parts["vision"]["image_size"] = pixels
    parts["expert"]["num_hidden_layers"] = parts["text"]["num_hidden_layers"]
    return dataclasses.replace(
        size,
        **parts,
        image_sizes=dict.fromkeys(VIEWS, (pixels, pixels)),
        moge=None,
        stem="patch",
        vocabulary=VOCABULARY,
        flow={"rotation": "linear"},
    )


def one(size: Preset, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """SPEAR-1 with random weights."""
    torch.manual_seed(0)
    with torch.device(device):  # a GPU draws three billion random numbers in no time
        return Spear1ForActionPrediction(build_spear1_config(size)).eval().to(dtype)


def pair(size: Preset, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Any, Any]:
    """SPEAR-1 and π0 with the same random weights; π0's velocity points from the data to the noise."""
    # In the wanted precision before π0 is made: at full size there is no room for both in float32.
    ours = one(size, dtype, device)
    text = {
        **size.text,
        "model_type": "gemma",
        "vocab_size": VOCABULARY + size.bins,
        "pad_token_id": 0,
    }
    vlm = PaliGemmaConfig(
        vision_config={
            **size.vision,
            "model_type": "siglip_vision_model",
            "vision_use_head": False,
        },
        text_config=text,
        projection_dim=size.text["hidden_size"],
        hidden_size=size.text["hidden_size"],
        image_token_index=IMAGE_TOKEN,
    )
    dit = GemmaConfig(**{**size.expert, "pad_token_id": 0})
    config = PI0Config(
        vlm_config=vlm,
        dit_config=dit,
        chunk_size=size.horizon,
        max_state_dim=NUM_STATE_FEATURES,
        max_action_dim=ACTION_DIM,
    )
    with torch.device(device):
        theirs = Pi0(config).eval()
    theirs.model.vlm.load_state_dict(ours.vlm.state_dict())
    theirs.model.dit.load_state_dict(ours.expert.state_dict(), strict=False)
    for name in ("state_proj", "action_in_proj", "action_time_mlp_in", "action_time_mlp_out"):
        getattr(theirs.embed_action_time, name).load_state_dict(getattr(ours, name).state_dict())
    theirs.action_out_proj.load_state_dict(
        {k: -v for k, v in ours.action_out_proj.state_dict().items()}
    )
    return ours, theirs.to(dtype)


def observation(
    size: Preset, views: int, batch: int, text: int, dtype: torch.dtype, device: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same random observation as the arguments of ours and of π0's `sample_actions`, without padding."""
    generator = torch.Generator().manual_seed(1)
    side, patch = size.vision["image_size"], size.vision["patch_size"]
    images = torch.randint(
        0, 256, (batch, views, 3, side, side), generator=generator, dtype=torch.uint8
    )
    ids = torch.randint(3, 1000, (batch, text), generator=generator)
    state = torch.randn(batch, NUM_STATE_FEATURES, generator=generator)
    noise = torch.randn(batch, size.horizon, ACTION_DIM, generator=generator)
    before = torch.full((batch, views * (side // patch) ** 2), IMAGE_TOKEN)
    ours = {
        "pixel_values": {name: images[:, i].to(device) for i, name in enumerate(VIEWS[:views])},
        "input_ids": ids.to(device),
        "attention_mask": None,
        "state": state.to(device),
        "noise": Action.from_vector(noise.to(device)),
    }
    whole = torch.cat([before, ids], dim=1)
    theirs = {
        "pixel_values": (images / 127.5 - 1).to(device, dtype),
        "pixel_attention_mask": torch.ones(batch, views, dtype=torch.bool, device=device),
        "input_ids": whole.to(device),
        "attention_mask": torch.ones_like(whole).to(device),
        "state": state.to(device, dtype),
        "noise": noise.to(device, dtype),
    }
    return ours, theirs


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference over the largest value of `b`."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())
