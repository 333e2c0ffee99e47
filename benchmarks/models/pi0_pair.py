"""SPEAR-1 and Transformers' π0 of the same geometry and with the same random weights, for
comparisons.

π0 has no MoGe, square images of one size and linear rotations, and so has the SPEAR-1 here.
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

VOCABULARY = 2048
IMAGE_TOKEN = 2047
VIEWS = ("external", "wrist", "third")

_SMALL = PRESETS["small"]
_MID = dataclasses.replace(
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
)
"""Between small and spear1: a billion parameters."""
SIZES = {**PRESETS, "mid": _MID}


def reduce_preset(
    name: str, max_layers: int | None = None, side_patches: int | None = None
) -> Preset:
    """Return a preset as π0 can have it: no MoGe, patch convolutions, square views, linear
    rotations.

    max_layers: at most so many per network.
    side_patches: side of the images; None takes the preset's for its position embeddings.
    """
    size = SIZES[name]
    fields_of_part: dict[str, Any] = {}
    for model_part in ("vision", "text", "expert"):
        fields = dict(getattr(size, model_part))
        if max_layers is not None:
            fields["num_hidden_layers"] = min(max_layers, fields["num_hidden_layers"])
        fields_of_part[model_part] = fields
    fields_of_part["expert"]["num_hidden_layers"] = fields_of_part["text"]["num_hidden_layers"]

    if side_patches is not None:
        fields_of_part["vision"]["image_size"] = (
            side_patches * fields_of_part["vision"]["patch_size"]
        )
    side_px = fields_of_part["vision"]["image_size"]
    return dataclasses.replace(
        size,
        **fields_of_part,
        image_sizes=dict.fromkeys(VIEWS, (side_px, side_px)),
        moge=None,
        stem="patch",
        vocabulary_size=VOCABULARY,
        flow={"rotation": "linear"},
    )


def count_image_tokens(size: Preset) -> int:
    """Return the visual tokens of one square image."""
    return (size.vision["image_size"] // size.vision["patch_size"]) ** 2


def make_policy(size: Preset, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """Return a SPEAR-1 with random weights."""
    torch.manual_seed(0)
    with torch.device(device):  # a GPU draws three billion random numbers in no time
        return Spear1ForActionPrediction(build_spear1_config(size)).eval().to(dtype)


def make_paligemma_config(
    size: Preset, num_rows: int, image_token: int, **options: Any
) -> PaliGemmaConfig:
    """Return Transformers' config of a PaliGemma of this geometry."""
    width = size.text["hidden_size"]
    return PaliGemmaConfig(
        vision_config={
            **size.vision,
            "model_type": "siglip_vision_model",
            "vision_use_head": False,
        },
        text_config={
            **size.text,
            "model_type": "gemma",
            "vocab_size": num_rows,
            "pad_token_id": 0,
        },
        projection_dim=width,
        hidden_size=width,
        image_token_index=image_token,
        **options,
    )


def make_pair(
    size: Preset, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Any, Any]:
    """Return a SPEAR-1 and a π0 with the same random weights.

    π0's velocity points from the data to the noise, so its last layer is negated.
    """
    # In the wanted precision before π0 is made: at full size there is no room for both in float32.
    our_model = make_policy(size, dtype, device)
    config = PI0Config(
        vlm_config=make_paligemma_config(size, VOCABULARY + size.bins, IMAGE_TOKEN),
        dit_config=GemmaConfig(**{**size.expert, "pad_token_id": 0}),
        chunk_size=size.horizon,
        max_state_dim=NUM_STATE_FEATURES,
        max_action_dim=ACTION_DIM,
    )
    with torch.device(device):
        their_model = Pi0(config).eval()
    their_model.model.vlm.load_state_dict(our_model.vlm.state_dict())
    their_model.model.dit.load_state_dict(our_model.expert.state_dict(), strict=False)
    for name in ("state_proj", "action_in_proj", "action_time_mlp_in", "action_time_mlp_out"):
        layer = getattr(their_model.embed_action_time, name)
        layer.load_state_dict(getattr(our_model, name).state_dict())
    negated = {name: -weight for name, weight in our_model.action_out_proj.state_dict().items()}
    their_model.action_out_proj.load_state_dict(negated)
    return our_model, their_model.to(dtype)


def make_observation(
    size: Preset,
    num_views: int,
    batch: int,
    num_text_tokens: int,
    dtype: torch.dtype,
    device: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the same random observation as arguments of our `sample_actions` and of π0's, without
    padding."""
    generator = torch.Generator().manual_seed(1)
    side_px = size.vision["image_size"]
    image_shape = (batch, num_views, 3, side_px, side_px)
    images = torch.randint(0, 256, image_shape, generator=generator, dtype=torch.uint8)
    ids = torch.randint(3, 1000, (batch, num_text_tokens), generator=generator)
    state = torch.randn(batch, NUM_STATE_FEATURES, generator=generator)
    noise = torch.randn(batch, size.horizon, ACTION_DIM, generator=generator)

    views = {}
    for index, name in enumerate(VIEWS[:num_views]):
        views[name] = images[:, index].to(device)
    our_inputs = {
        "pixel_values": views,
        "input_ids": ids.to(device),
        "attention_mask": None,
        "state": state.to(device),
        "noise": Action.from_vector(noise.to(device)),
    }

    # π0 takes image tokens and text as one sequence.
    image_ids = torch.full((batch, num_views * count_image_tokens(size)), IMAGE_TOKEN)
    whole_ids = torch.cat([image_ids, ids], dim=1)
    their_inputs = {
        "pixel_values": (images / 127.5 - 1).to(device, dtype),
        "pixel_attention_mask": torch.ones(batch, num_views, dtype=torch.bool, device=device),
        "input_ids": whole_ids.to(device),
        "attention_mask": torch.ones_like(whole_ids).to(device),
        "state": state.to(device, dtype),
        "noise": noise.to(device, dtype),
    }
    return our_inputs, their_inputs


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference divided by the largest expected value."""
    difference = (actual.float() - expected.float()).abs().max()
    return float(difference / expected.float().abs().max())
