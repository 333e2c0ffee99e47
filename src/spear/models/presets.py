"""The presets, which are named model sizes. A preset changes numbers, never code."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spear.errors import check_known

if TYPE_CHECKING:
    from spear.models.spear1 import Spear1Config
    from spear.models.vlm import SpearVLMConfig


@dataclass(frozen=True)
class Preset:
    """The numbers of one model size.

    name             The name by which commands know the size.
    image_sizes      View -> (width, height) in pixels, in the order of the views' tokens.
    vision           Fields of SigLIP's Transformers config.
    moge             Fields of the Transformers config of MoGe's encoder, which is a DINOv2; or None
                     for a plain PaliGemma.
    text             Fields of the VLM's Gemma; its vocabulary comes from the tokenizer.
    expert           Fields of the action expert's Gemma.
    stem             "patch" (one convolution per patch, as published) or "conv"
                     (`spear.models.vision.ConvStem`).
    vocabulary_size  Number of text tokens of the base tokenizer, without 3D tokens.
    bins             Number of 3D tokens.
    horizon          Actions per chunk, at the control rate of the data (`types.CONTROL_RATE_HZ`).
    coordinate_smoothing  Standard deviation, in bins, of the Gaussian over neighboring bins that
                     is the target of a 3D token; see `SpearVLMConfig`.
    flow             Fields of `spear.types.FlowConfig`.
    prompt_tokens    The longest text prompt accepted, in tokens.
    """

    name: str
    image_sizes: Mapping[str, tuple[int, int]]
    vision: Mapping[str, Any]
    moge: Mapping[str, Any] | None
    text: Mapping[str, Any]
    expert: Mapping[str, Any]
    stem: str = "patch"
    vocabulary_size: int = 257152
    bins: int = 1024
    horizon: int = 5
    coordinate_smoothing: float = 0.0
    flow: Mapping[str, Any] = field(default_factory=dict)
    prompt_tokens: int = 64


SPECIAL_TOKEN_IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
"""The ids of special tokens, in Gemma's tokenizer and in a tokenizer trained for small models."""

_PAPER_IMAGE_SIZES = {"external": (280, 210), "wrist": (112, 112)}


def make_image_encoder_fields(
    width: int, num_layers: int, num_heads: int, **fields: Any
) -> dict[str, Any]:
    """Fields of SigLIP's or DINOv2's config, by the names that Transformers gives them.

    `patch_size` and `image_size` among the further `fields` are pixels per side.
    """
    return {
        "hidden_size": width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        **fields,
    }


def make_gemma_fields(width: int, num_layers: int, num_heads: int, **fields: Any) -> dict[str, Any]:
    """Make fields of Gemma's config with one key-value head, which all query heads share."""
    return make_image_encoder_fields(width, num_layers, num_heads, num_key_value_heads=1, **fields)


# nano can be trained on two CPU cores. It has fewer than 10M parameters and 6 × 4 + 3 × 3 visual
# tokens. The numbers are ours.
NANO = Preset(
    name="nano",
    image_sizes={"external": (192, 128), "wrist": (96, 96)},
    stem="conv",
    vision=make_image_encoder_fields(
        width=192, num_layers=3, num_heads=3, intermediate_size=512, patch_size=32, image_size=192
    ),
    moge=make_image_encoder_fields(
        width=128,
        num_layers=4,
        num_heads=2,
        mlp_ratio=4,
        patch_size=32,
        image_size=192,
        initializer_range=0.08,
    ),
    text=make_gemma_fields(
        width=192,
        num_layers=5,
        num_heads=3,
        intermediate_size=576,
        head_dim=64,
        initializer_range=0.05,
    ),
    expert=make_gemma_fields(
        width=160,
        num_layers=5,
        num_heads=3,
        intermediate_size=384,
        head_dim=64,
        initializer_range=0.05,
    ),
    vocabulary_size=2048,
    coordinate_smoothing=2.0,
    # The rotation has a squared error, with a weight that makes it as large as the losses of
    # translation and gripper. With the geodesic loss alone, the expert learned never to rotate,
    # which is right for most steps.
    flow=dict(
        prediction="clean",
        rotation_loss="mse",
        geodesic_weight=0.0,
        rotation_weight=50.0,
        steps=5,
    ),
)

# small has a third of a billion parameters, for one consumer GPU. The numbers are ours.
SMALL = Preset(
    name="small",
    image_sizes=_PAPER_IMAGE_SIZES,
    vision=make_image_encoder_fields(
        width=768,
        num_layers=12,
        num_heads=12,
        intermediate_size=3072,
        patch_size=14,
        image_size=224,
    ),
    moge=make_image_encoder_fields(
        width=384, num_layers=12, num_heads=6, mlp_ratio=4, patch_size=14, image_size=224
    ),
    text=make_gemma_fields(
        width=1024, num_layers=12, num_heads=8, intermediate_size=4096, head_dim=128
    ),
    expert=make_gemma_fields(
        width=512, num_layers=12, num_heads=8, intermediate_size=2048, head_dim=128
    ),
    vocabulary_size=32768,
)

# spear1 is the paper's model: PaliGemma-3B, MoGe ViT-L/14 and π0's action expert of 300M.
SPEAR1 = Preset(
    name="spear1",
    image_sizes=_PAPER_IMAGE_SIZES,
    vision=make_image_encoder_fields(
        width=1152,
        num_layers=27,
        num_heads=16,
        intermediate_size=4304,
        patch_size=14,
        image_size=224,
    ),
    # With this `image_size` and `position_offset` MoGe's weights were trained.
    moge=make_image_encoder_fields(
        width=1024,
        num_layers=24,
        num_heads=16,
        mlp_ratio=4,
        patch_size=14,
        image_size=518,
        position_offset=0.1,
    ),
    text=make_gemma_fields(
        width=2048, num_layers=18, num_heads=8, intermediate_size=16384, head_dim=256
    ),
    expert=make_gemma_fields(
        width=1024, num_layers=18, num_heads=8, intermediate_size=4096, head_dim=256
    ),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in (NANO, SMALL, SPEAR1)}


def get_preset(name: str) -> Preset:
    """The preset of that name.

    Raises SpearError if there is none, and suggests the nearest name.
    """
    check_known("preset", PRESETS, name)
    return PRESETS[name]


def build_vlm_config(
    preset: Preset,
    vocabulary_size: int | None = None,
    coordinate_start: int | None = None,
    network_configs: Mapping[str, Any] | None = None,
) -> "SpearVLMConfig":
    """Build the SPEAR-VLM config of a preset.

    Args:
        preset: The preset.
        vocabulary_size: Number of tokens of the tokenizer, 3D tokens included.
        coordinate_start: The id of `<3d0000>`. By default the 3D tokens follow the preset's text
            vocabulary.
        network_configs: `vision_config`, `text_config` and `moge_config` of existing networks, such
            as published ones. By default they are the preset's.
    """
    # Imported here, so that a preset can be looked up without importing PyTorch.
    from spear.models.vlm import SpearVLMConfig

    if network_configs is None:
        moge = None
        if preset.moge is not None:
            moge = {**preset.moge, "stem": preset.stem, "use_mask_token": False}
        if not vocabulary_size:
            vocabulary_size = preset.vocabulary_size + preset.bins
        network_configs = {
            "vision_config": {**preset.vision, "stem": preset.stem, "vision_use_head": False},
            "moge_config": moge,
            "text_config": {**preset.text, "vocab_size": vocabulary_size, **SPECIAL_TOKEN_IDS},
        }
    if coordinate_start is None:
        coordinate_start = preset.vocabulary_size
    return SpearVLMConfig(
        **network_configs,
        views=list(preset.image_sizes),
        coordinate_start=coordinate_start,
        coordinate_bins=preset.bins,
        coordinate_smoothing=preset.coordinate_smoothing,
    )


def build_spear1_config(
    preset: Preset,
    vlm_config: "SpearVLMConfig | None" = None,
    all_expert_fields: Mapping[str, Any] | None = None,
) -> "Spear1Config":
    """Build the SPEAR-1 config of a preset.

    Args:
        preset: The preset.
        vlm_config: The config of the VLM inside SPEAR-1. By default it is the preset's.
        all_expert_fields: Config fields of an existing action expert, which replace all of the
            preset's. By default the action expert is as wide as the preset's, and as deep as the
            VLM.
    """
    from spear.models.spear1 import SHARED_WITH_VLM, Spear1Config

    if all_expert_fields is None:
        all_expert_fields = dict(preset.expert)
        if vlm_config is not None:
            for name in SHARED_WITH_VLM:
                all_expert_fields[name] = getattr(vlm_config.text_config, name)
    # The expert gets no text, so it has no special tokens and the smallest vocabulary.
    no_special_tokens = dict.fromkeys(SPECIAL_TOKEN_IDS)  # the id of each is None
    return Spear1Config(
        vlm_config=vlm_config or build_vlm_config(preset),
        expert_config={**all_expert_fields, "vocab_size": 1, **no_special_tokens},
        horizon=preset.horizon,
        flow=dict(preset.flow),
    )
