"""The sizes SPEAR comes in: a preset changes numbers, never code."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spear.errors import check_known

if TYPE_CHECKING:
    from spear.models.spear1 import Spear1Config
    from spear.models.vlm import SpearVLMConfig


@dataclass(frozen=True)
class Preset:
    """The numbers of one size.

    image_sizes  view -> (width, height) in pixels, in the order of the views' tokens.
    vision, moge, text, expert  fields of SigLIP's, DINOv2's and the two Gemma's Transformers configs; the
                 vocabulary comes from the tokenizer.
    stem         "patch": one convolution per patch, as published; "conv": `spear.models.vision.ConvStem`.
    vocabulary   text tokens of the base tokenizer, without 3D tokens.
    bins         3D tokens. horizon: actions per chunk, at the steps per second of the data
                 (`types.CONTROL_RATE_HZ`).
    coordinate_smoothing  see `SpearVLMConfig`. flow: fields of `spear.flow.FlowConfig`.
    prompt_tokens  the longest text prompt accepted.
    """

    name: str
    image_sizes: Mapping[str, tuple[int, int]]
    vision: Mapping[str, Any]
    moge: Mapping[str, Any] | None
    text: Mapping[str, Any]
    expert: Mapping[str, Any]
    stem: str = "patch"
    vocabulary: int = 257152
    bins: int = 1024
    horizon: int = 5
    coordinate_smoothing: float = 0.0
    flow: Mapping[str, Any] = field(default_factory=dict)
    prompt_tokens: int = 64


SPECIAL_TOKEN_IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
"""Gemma's, and the nano tokenizer's."""

_PAPER_IMAGES = {"external": (280, 210), "wrist": (112, 112)}


def _sizes(width: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    """Fields of a network's config, SigLIP's, DINOv2's or Gemma's; patches and images in pixels a side."""
    return {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, **more}


def _gemma(width: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return _sizes(width, layers, heads, num_key_value_heads=1, **more)


_ALL = (
    Preset(
        # Our choice of sizes: trains on two CPU cores, 6 × 4 + 3 × 3 visual tokens, under 10M parameters.
        name="nano",
        image_sizes={"external": (192, 128), "wrist": (96, 96)},
        stem="conv",
        vision=_sizes(192, 3, 3, intermediate_size=512, patch_size=32, image_size=192),
        moge=_sizes(128, 4, 2, mlp_ratio=4, patch_size=32, image_size=192, initializer_range=0.08),
        text=_gemma(192, 5, 3, intermediate_size=576, head_dim=64, initializer_range=0.05),
        expert=_gemma(160, 5, 3, intermediate_size=384, head_dim=64, initializer_range=0.05),
        vocabulary=2048,
        coordinate_smoothing=2.0,
        # Squared errors on the scale of the other parts: under the chord of the geodesic term alone the
        # expert learned never to turn, which is right for most steps.
        flow=dict(
            prediction="clean",
            rotation_loss="mse",
            geodesic_weight=0.0,
            rotation_weight=50.0,
            steps=5,
        ),
    ),
    Preset(
        # Our choice of sizes: a third of a billion parameters, for one consumer GPU.
        name="small",
        image_sizes=_PAPER_IMAGES,
        vision=_sizes(768, 12, 12, intermediate_size=3072, patch_size=14, image_size=224),
        moge=_sizes(384, 12, 6, mlp_ratio=4, patch_size=14, image_size=224),
        text=_gemma(1024, 12, 8, intermediate_size=4096, head_dim=128),
        expert=_gemma(512, 12, 8, intermediate_size=2048, head_dim=128),
        vocabulary=32768,
    ),
    Preset(
        # The paper: PaliGemma-3B + MoGe ViT-L/14 + π0's 300M action expert.
        name="spear1",
        image_sizes=_PAPER_IMAGES,
        vision=_sizes(1152, 27, 16, intermediate_size=4304, patch_size=14, image_size=224),
        # As MoGe's weights were trained.
        moge=_sizes(1024, 24, 16, mlp_ratio=4, patch_size=14, image_size=518, position_offset=0.1),
        text=_gemma(2048, 18, 8, intermediate_size=16384, head_dim=256),
        expert=_gemma(1024, 18, 8, intermediate_size=4096, head_dim=256),
    ),
)
PRESETS: dict[str, Preset] = {size.name: size for size in _ALL}


def get_preset(name: str) -> Preset:
    """The preset of that name; raises SpearError, suggesting the nearest name, when there is none."""
    check_known("preset", PRESETS, name)
    return PRESETS[name]


def build_vlm_config(
    size: Preset,
    vocabulary: int | None = None,
    coordinate_start: int | None = None,
    networks: Mapping[str, Any] | None = None,
) -> "SpearVLMConfig":
    """The SPEAR-VLM config of a preset.

    vocabulary: of the tokenizer, 3D tokens included; coordinate_start: the id of `<3d0000>`. By default the
    3D tokens follow the preset's text vocabulary. networks: the configs `vision_config`, `text_config` and
    `moge_config` to take instead of the preset's.
    """
    from spear.models.vlm import (
        SpearVLMConfig,
    )  # here: presets are looked up before networks are needed

    stem = {"stem": size.stem}
    own = {
        "vision_config": {**size.vision, **stem, "vision_use_head": False},
        "moge_config": None
        if size.moge is None
        else {**size.moge, **stem, "use_mask_token": False},
        "text_config": {
            **size.text,
            "vocab_size": vocabulary or size.vocabulary + size.bins,
            **SPECIAL_TOKEN_IDS,
        },
    }
    return SpearVLMConfig(
        **(networks or own),
        views=list(size.image_sizes),
        coordinate_start=size.vocabulary if coordinate_start is None else coordinate_start,
        coordinate_bins=size.bins,
        coordinate_smoothing=size.coordinate_smoothing,
    )


def build_spear1_config(
    size: Preset, vlm: "SpearVLMConfig | None" = None, expert: Mapping[str, Any] | None = None
) -> "Spear1Config":
    """The SPEAR-1 config of a preset, around a VLM config (the preset's own by default). expert: the fields
    of one that exists; a new one is as wide as the preset's and as deep as the VLM that it is around."""
    from spear.models.spear1 import SHARED_WITH_VLM, Spear1Config

    if expert is None:
        expert = {
            **size.expert,
            **({name: getattr(vlm.text_config, name) for name in SHARED_WITH_VLM} if vlm else {}),
        }
    return Spear1Config(
        vlm_config=vlm or build_vlm_config(size),
        expert_config={**expert, "vocab_size": 1, **dict.fromkeys(SPECIAL_TOKEN_IDS)},
        horizon=size.horizon,
        flow=dict(size.flow),
    )
