"""Every training stage as data: what learns, on what, for how long. `spear train NAME` runs one.

The recipes of the paper (`vlm-stage1`, `vlm-stage2`, `vla-pretrain`, `post-train-*`) carry its numbers where
it states them; learning rates, schedules, AdamW's settings, the averages' decay and the batch of
post-training are not stated there and are our choice, as are `finetune-*`. The `nano-*` recipes are ours,
sized for two CPU cores. docs/train.md has all of them as tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from spear.data.normalize import Mode
from spear.errors import unknown_name
from spear.labels.questions.generate import FAMILIES
from spear.tokens import Spacing
from spear.train.optimize import Optimization
from spear.train.values import check_value

Kind = Literal["depth", "naming", "vlm", "vla"]


@dataclass(frozen=True)
class QuestionMix:
    """Which questions a batch asks.

    families             of `spear.labels.questions.generate`, drawn with equal chance; a name given twice
                         counts twice.
    pairs                fewest and most question/answer pairs per image (paper: 1 to 4).
    wrist                fraction of batches drawn from wrist-camera images (our choice; 0 when there are
                         none).
    coordinate_weight    the paper's λ: factor on the loss of 3D tokens.
    coordinate_smoothing standard deviation, in bins, of the Gaussian that replaces the one-hot target of a
                         3D token; 0 is the paper's one-hot target.
    most_images          ask about so many of the labelled images of each view, the first ones (0: about all).
    """

    families: tuple[str, ...] = FAMILIES
    pairs: tuple[int, int] = (1, 4)
    wrist: float = 0.0
    coordinate_weight: float = 2.0
    coordinate_smoothing: float = 0.0
    most_images: int = 0


@dataclass(frozen=True)
class Recipe:
    """One stage of training.

    kind          "depth" (the MoGe-style encoder alone), "naming" (the SigLIP-style one), "vlm" or "vla".
    preset        the model's size (`spear.models.presets`).
    moge          False leaves the MoGe branch out (stage 0: a plain PaliGemma).
    coordinate_rows_only  of the token embeddings only the 3D tokens' rows learn (the paper's VLM stage 1).
    smooth_tokens  new 3D tokens start out alike where their bins are alike (our choice for nano; see
                  `spear.tokens.init_new_embeddings`).
    bins, spacing  so many 3D tokens, and where the edges of their bins lie, fitted to the labels; a stage
                   that starts
                  from another's result then gives up that one's 3D tokens and learns new ones. None: those of
                  the result it starts from; without one, as many as the preset has, at quantiles (the paper).
    starts_from   the stage whose result `--init` takes; None starts from random weights.
    batch_size    images per step ("vlm", "depth") or robot steps per step ("vla").
    flow_samples  draws of (noise, τ) per robot step; the prefix is computed once for all of them (our
                  choice).
    question_images  images with 3D questions trained alongside each action batch (our choice; 0 is none).
    question_weight  weight of their loss.
    augment       strength of photometric augmentation, 0 to 1.
    normalization  of translations: "quantile" (the paper's choice), "minmax" or "meanstd" (its ablation);
                   positions in
                  the state follow it (our choice).
    normalize_each  each dataset by its own statistics, instead of all by those of the mixture (for ablation).
    flow          fields of `spear.flow.FlowConfig` that differ from the preset's ("vla" from a SPEAR-VLM).
    lora_rank     if not 0, the language model learns through LoRA matrices of this rank (`spear.train.lora`);
                  which of its own weights learn beside them is the freeze schedule's matter, as ever.
    lora_alpha    they count alpha / rank.
    """

    name: str
    kind: Kind
    preset: str
    description: str
    optimization: Optimization
    batch_size: int
    moge: bool = True
    coordinate_rows_only: bool = False
    smooth_tokens: bool = False
    bins: int | None = None
    spacing: Spacing | None = None
    starts_from: str | None = None
    questions: QuestionMix = QuestionMix()
    flow_samples: int = 1
    question_images: int = 0
    question_weight: float = 1.0
    augment: float = 0.0
    normalization: Mode = "quantile"
    normalize_each: bool = False
    flow: Mapping[str, Any] = field(default_factory=dict)
    lora_rank: int = 0
    lora_alpha: float = 16.0

    def changed(self, **changes: Any) -> Recipe:
        """With some of its own fields, its optimisation's or its question mix's replaced (None: kept).

        Raises `SpearError`, suggesting the nearest name, for a key that none of them has, and for a value
        that is not one of the key's.
        """
        parts: dict[str, Any] = {"optimization": self.optimization, "questions": self.questions}
        own: dict[str, Any] = {}
        for key, value in changes.items():
            holder = next((n for n, part in parts.items() if key in _fields(part)), None)
            if value is None:
                continue
            if key in _fields(self) and key not in parts:
                check_value(self, key, value)
                own[key] = value
            elif holder is not None:
                check_value(parts[holder], key, value)
                parts[holder] = dataclasses.replace(parts[holder], **{key: value})
            else:
                known = {*_fields(self), *(f for part in parts.values() for f in _fields(part))} - set(parts)
                raise unknown_name("recipe key", key, known)
        return dataclasses.replace(self, **own, **parts)


def _fields(part: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(part)]


VLM_1 = ("moge_projector", "multi_modal_projector", "language_model.embed_tokens")
"""What learns in the paper's VLM stage 1 (of the embeddings, only the rows of the 3D tokens)."""
ENCODERS = ("vision_tower", "moge")
# Single points are asked most: they teach to find things, with few tokens that are not about finding (our
# choice).
_NANO_MIX = QuestionMix(
    (*FAMILIES, "keypoint", "keypoint", "keypoint", "what_at", "what_at", "centre_2d", "centre_2d"),
    pairs=(4, 4),
    wrist=0.25,
    coordinate_smoothing=2.0,
)
_NANO_VLA = Recipe(
    name="nano-vla",
    kind="vla",
    preset="nano",
    description="SPEAR-1: demonstrations of four task families, MoGe and stem frozen, 3D questions beside.",
    optimization=Optimization(
        steps=12_000,
        lr=2.5e-4,
        lr_scale={"vlm.vision_tower": 0.3},
        warmup=100,
        frozen=("vlm.moge", "vlm.vision_tower.embeddings"),
        weight_decay=0.02,
        ema=0.998,
    ),
    batch_size=32,
    starts_from="nano-vlm-2",
    questions=_NANO_MIX,
    flow_samples=4,
    question_images=2,
    question_weight=0.5,
    augment=0.5,
)

_POST_TRAIN = Recipe(
    name="post-train-bridge",
    kind="vla",
    preset="spear1",
    description="The paper's post-training for the WidowX: 50k steps on BridgeData V2.",
    optimization=Optimization(steps=50_000, lr=2.5e-5, frozen=("vlm.moge",), warmup=1000, ema=0.999),
    batch_size=256,
    starts_from="vla-pretrain",
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="nano-depth",
            kind="depth",
            preset="nano",
            description="Stage 0, encoder: depth on renders, standing in for MoGe's pretraining.",
            optimization=Optimization(steps=10_000, lr=1e-3, weight_decay=0.02),
            batch_size=32,
        ),
        Recipe(
            name="nano-siglip",
            kind="naming",
            preset="nano",
            description="Stage 0, image encoder: what each patch shows, standing in for SigLIP's pretraining.",
            optimization=Optimization(steps=5000, lr=1e-3, weight_decay=0.02),
            batch_size=64,
            moge=False,
        ),
        Recipe(
            name="nano-vlm-0",
            kind="vlm",
            preset="nano",
            description="Stage 0, VLM: 2D questions, standing in for PaliGemma's pretraining (no MoGe yet).",
            # It finds what it is asked about from some 1,500 steps on (docs/ablations.md).
            optimization=Optimization(
                steps=6000,
                lr=4e-4,
                warmup=50,
                frozen=("vision_tower", "multi_modal_projector"),
                weight_decay=0.02,
                ema=0.99,
            ),
            batch_size=16,
            moge=False,
            starts_from="nano-siglip",
            questions=QuestionMix(("what_at", "centre_2d", "centre_2d", "where_2d"), pairs=(4, 4)),
        ),
        Recipe(
            name="nano-vlm-1",
            kind="vlm",
            preset="nano",
            description="SPEAR-VLM stage 1: only both projections and the 3D-token embeddings learn.",
            optimization=Optimization(
                steps=200, lr=1e-3, warmup=20, trained=VLM_1, weight_decay=0.0, ema=0.98
            ),
            batch_size=16,
            coordinate_rows_only=True,
            smooth_tokens=True,
            starts_from="nano-vlm-0",
            questions=dataclasses.replace(
                _NANO_MIX, families=("keypoint", "keypoint", "distance", "centre_2d", "what_at")
            ),
        ),
        Recipe(
            name="nano-vlm-2",
            kind="vlm",
            preset="nano",
            description="SPEAR-VLM stage 2: everything learns, the two encoders slowly.",
            optimization=Optimization(
                steps=6500,
                lr=4e-4,
                lr_scale=dict.fromkeys(ENCODERS, 0.3),
                warmup=50,
                weight_decay=0.02,
                ema=0.995,
            ),
            batch_size=16,
            starts_from="nano-vlm-1",
            questions=_NANO_MIX,
        ),
        _NANO_VLA,
        dataclasses.replace(
            _NANO_VLA,
            name="nano-vla-no-3d",
            description="The comparison: as nano-vla, without 3D before it or beside it, at equal compute.",
            # As many operations as everything that has 3D takes (benchmarks/train/flops.py).
            optimization=dataclasses.replace(
                _NANO_VLA.optimization, steps=14_000, frozen=("vlm.vision_tower.embeddings",)
            ),
            batch_size=64,
            moge=False,
            starts_from="nano-vlm-0",
            question_images=0,
        ),
        Recipe(
            name="nano-post",
            kind="vla",
            preset="nano",
            description="Post-training: fit the nano policy to your own robot's episodes, a few minutes on a CPU.",
            optimization=Optimization(
                steps=600, lr=3e-4, warmup=50, frozen=("vlm.moge",), weight_decay=0.02, ema=0.99
            ),
            batch_size=32,
            starts_from="nano-vla",
            flow_samples=4,
            augment=1.0,
        ),
        Recipe(
            name="vlm-stage1",
            kind="vlm",
            preset="spear1",
            description="The paper's SPEAR-VLM stage 1: 2k steps, projections and 3D-token embeddings.",
            optimization=Optimization(steps=2000, lr=1e-3, trained=VLM_1, weight_decay=0.0),
            batch_size=512,
            coordinate_rows_only=True,
            starts_from="PaliGemma-3B and MoGe",
        ),
        Recipe(
            name="vlm-stage2",
            kind="vlm",
            preset="spear1",
            description="The paper's SPEAR-VLM stage 2: 10k steps, both encoders trained (its best row).",
            optimization=Optimization(steps=10000, lr=2e-5),
            batch_size=512,
            starts_from="vlm-stage1",
        ),
        Recipe(
            name="vla-pretrain",
            kind="vla",
            preset="spear1",
            description="The paper's pre-training: 300k steps at batch 2048, MoGe frozen, SigLIP trained.",
            optimization=Optimization(steps=300_000, lr=5e-5, frozen=("vlm.moge",), warmup=1000, ema=0.999),
            batch_size=2048,
            starts_from="vlm-stage2",
        ),
        _POST_TRAIN,
        dataclasses.replace(
            _POST_TRAIN,
            name="post-train-droid",
            description="The paper's post-training for DROID's Franka: 50k steps on DROID.",
        ),
        Recipe(
            name="finetune-lora",
            kind="vla",
            preset="spear1",
            description="Fine-tuning on one GPU: expert and projections learn, the language model by LoRA.",
            optimization=Optimization(
                steps=20_000,
                lr=5e-5,
                frozen=("vlm.language_model", *(f"vlm.{encoder}" for encoder in ENCODERS)),
                warmup=500,
                ema=0.999,
                frozen_precision="bf16",
                accumulate=8,
                gradient_checkpointing=True,
            ),
            batch_size=64,
            starts_from="vla-pretrain",
            lora_rank=16,
        ),
        Recipe(
            name="finetune-expert",
            kind="vla",
            preset="spear1",
            description="Fine-tuning on one GPU: the action expert alone learns.",
            optimization=Optimization(
                steps=20_000,
                lr=5e-5,
                frozen=("vlm",),
                warmup=500,
                ema=0.999,
                frozen_precision="bf16",
                accumulate=8,
                gradient_checkpointing=True,
            ),
            batch_size=64,
            starts_from="vla-pretrain",
        ),
    )
}


def recipe(name: str) -> Recipe:
    """The recipe of that name; `SpearError` with the nearest name when there is none."""
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    return RECIPES[name]
