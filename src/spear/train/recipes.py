"""Every training stage as data: what learns, on what, for how long. `spear train NAME` runs one.

The recipes of the paper (`vlm-stage1`, `vlm-stage2`, `vla-pretrain`, `post-train-*`) carry its numbers where
it states them; learning rates, schedules, AdamW's settings, the averages' decay and the batch of
post-training are not stated there and are our choice, as are `finetune-*`. The `nano-*` recipes are ours,
sized for two CPU cores. docs/train.md has all of them as tables.
"""

import dataclasses
import functools

from spear.errors import check_known
from spear.labels.questions.templates import FAMILIES
from spear.train.options import Optimization, QuestionMix, Recipe

VLM_1 = ("moge_projector", "multi_modal_projector", "language_model.embed_tokens")
"""What learns in the paper's VLM stage 1 (of the embeddings, only the rows of the 3D tokens)."""
ENCODERS = ("vision_tower", "moge")
_nano, _whole = (functools.partial(Recipe, preset=size) for size in ("nano", "spear1"))
# Single points are asked most (our choice): they teach to find things, with few other tokens.
_NANO_MIX = QuestionMix(
    (*FAMILIES, "keypoint", "keypoint", "keypoint", "what_at", "what_at", "centre_2d", "centre_2d"),
    pairs=(4, 4),
    wrist=0.25,
    coordinate_smoothing=2.0,
)
# As docs/ablations.md found: better than squared angles, and means and standard deviations than quantiles.
_COSINE: dict[str, bool | float | str] = {"rotation_loss": "cosine", "rotation_weight": 200.0}
_NANO_VLA = _nano(
    name="nano-vla",
    kind="vla",
    description="SPEAR-1: demonstrations of four task families, MoGe and stem frozen, 3D questions beside.",
    optimization=Optimization(
        steps=12_000,
        lr=2.5e-4,
        lr_scale={"vlm.vision_tower": 0.3},
        frozen=("vlm.moge", "vlm.vision_tower.embeddings"),
        weight_decay=0.02,
        ema=0.998,
    ),
    batch_size=32,
    questions=_NANO_MIX,
    flow_samples=4,
    question_images=2,
    question_weight=0.5,
    augment=0.5,
    normalization="meanstd",
    flow=_COSINE,
)

_POST_TRAIN = _whole(
    name="post-train-bridge",
    kind="vla",
    description="The paper's post-training for the WidowX: 50k steps on BridgeData V2.",
    optimization=Optimization(steps=50_000, lr=2.5e-5, frozen=("vlm.moge",), warmup=1000),
    batch_size=256,
)

_FINETUNE = _whole(
    name="finetune-lora",
    kind="vla",
    description="Fine-tuning on one GPU: expert and projections learn, the language model by LoRA.",
    optimization=Optimization(
        steps=20_000,
        lr=5e-5,
        frozen=("vlm.language_model", *(f"vlm.{encoder}" for encoder in ENCODERS)),
        warmup=500,
        frozen_precision="bf16",
        accumulate=8,
        gradient_checkpointing=True,
    ),
    batch_size=64,
    lora_rank=16,
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _nano(
            name="nano-depth",
            kind="depth",
            description="Stage 0, encoder: depth on renders, standing in for MoGe's pretraining.",
            optimization=Optimization(steps=10_000, lr=1e-3, weight_decay=0.02),
            batch_size=32,
        ),
        _nano(
            name="nano-siglip",
            kind="naming",
            description="Stage 0, image encoder: what patches show, standing in for SigLIP's pretraining.",
            optimization=Optimization(steps=5000, lr=1e-3, weight_decay=0.02),
            batch_size=64,
            moge=False,
        ),
        _nano(
            name="nano-vlm-0",
            kind="vlm",
            description="Stage 0, VLM: 2D questions, standing in for PaliGemma's pretraining (no MoGe yet).",
            # It finds what it is asked about from some 2,000 steps on (docs/nano.md).
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
            questions=QuestionMix(("what_at", "centre_2d", "centre_2d", "where_2d"), pairs=(4, 4)),
        ),
        _nano(
            name="nano-vlm-1",
            kind="vlm",
            description="SPEAR-VLM stage 1: only both projections and the 3D-token embeddings learn.",
            optimization=Optimization(
                steps=200, lr=1e-3, warmup=20, trained=VLM_1, weight_decay=0.0, ema=0.98
            ),
            batch_size=16,
            coordinate_rows_only=True,
            smooth_tokens=True,
            questions=dataclasses.replace(
                _NANO_MIX, families=("keypoint", "keypoint", "distance", "centre_2d", "what_at")
            ),
        ),
        _nano(
            name="nano-vlm-2",
            kind="vlm",
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
            question_images=0,
        ),
        _nano(
            name="nano-post",
            kind="vla",
            description="Post-training: fit the nano policy to your own robot's episodes, minutes on a CPU.",
            optimization=Optimization(
                steps=600, lr=3e-4, warmup=50, frozen=("vlm.moge",), weight_decay=0.02, ema=0.99
            ),
            batch_size=32,
            flow_samples=4,
            augment=1.0,
        ),
        _nano(
            name="nano-simpler",
            kind="vla",
            description="Post-training for SIMPLER's tasks, with demonstrations of spear record simpler.",
            optimization=Optimization(
                steps=2600, lr=4e-4, lr_scale={"vlm": 0.5}, frozen=("vlm.moge",), weight_decay=0.02, ema=0.998
            ),
            batch_size=32,
            flow_samples=4,
            augment=0.5,
            normalization="meanstd",
            flow={**_COSINE, "steps": 10},
        ),
        _whole(
            name="vlm-stage1",
            kind="vlm",
            description="The paper's SPEAR-VLM stage 1: 2k steps, projections and 3D-token embeddings.",
            optimization=Optimization(steps=2000, lr=1e-3, trained=VLM_1, weight_decay=0.0),
            batch_size=512,
            coordinate_rows_only=True,
        ),
        _whole(
            name="vlm-stage2",
            kind="vlm",
            description="The paper's SPEAR-VLM stage 2: 10k steps, both encoders trained (its best row).",
            optimization=Optimization(steps=10000, lr=2e-5),
            batch_size=512,
        ),
        _whole(
            name="vla-pretrain",
            kind="vla",
            description="The paper's pre-training: 300k steps at batch 2048, MoGe frozen, SigLIP trained.",
            optimization=Optimization(steps=300_000, lr=5e-5, frozen=("vlm.moge",), warmup=1000),
            batch_size=2048,
        ),
        _POST_TRAIN,
        dataclasses.replace(
            _POST_TRAIN,
            name="post-train-droid",
            description="The paper's post-training for DROID's Franka: 50k steps on DROID.",
        ),
        _FINETUNE,
        dataclasses.replace(
            _FINETUNE,
            name="finetune-expert",
            description="Fine-tuning on one GPU: the action expert alone learns.",
            optimization=dataclasses.replace(_FINETUNE.optimization, frozen=("vlm",)),
            lora_rank=0,
        ),
    )
}


def recipe(name: str) -> Recipe:
    """The recipe of that name; `SpearError` with the nearest name when there is none."""
    check_known("recipe", RECIPES, name)
    return RECIPES[name]
