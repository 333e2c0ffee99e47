"""How much GPU memory a recipe needs, found by running one training step of the real code on empty tensors.

A forward and a backward pass run on PyTorch's fake tensors, which have shapes and storage sizes but no
contents; what is alive is added up after every operation, and the most is kept. Not counted are the CUDA
context, what kernels use inside themselves, and memory lost between blocks; `usable` leaves room for these.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from spear.errors import SpearError
from spear.models.layers import FastRMSNorm, set_gradient_checkpointing
from spear.models.meter import MemoryMeter, allocate_storage
from spear.models.presets import Preset, build_spear1_config, build_vlm_config, get_preset
from spear.models.spear1 import NUM_STATE_FEATURES
from spear.train import parallel
from spear.train.build import empty_model
from spear.train.options import Optimization, Recipe
from spear.types import ACTION_DIM, Action
from spear.util.progress import ProgressBar, track_progress

GIB = 2**30
CONTEXT = 0.6 * GIB
"""Left free for the CUDA context and its libraries (our choice)."""
FRAGMENTS = 0.04
"""Share of the memory that is left free for what the allocator loses between blocks (our choice)."""
ANSWER = 24
"""Tokens of the longest answer, a 3D box; every question is counted with an answer of this length."""


@dataclass(frozen=True)
class Memory:
    """Bytes in one training step, or one inference, at its fullest moment.

    weights      all parameters and buffers, in the precision that they are kept in.
    gradients, moments, averaged  of what learns: its gradients, AdamW's two averages, the EMA weights.
    activations  whatever else is alive then: kept for the backward pass, temporary, bfloat16 copies.
    parameters, learning  counts, not bytes: all parameters, and those that learn.
    """

    weights: int
    gradients: int
    moments: int
    averaged: int
    activations: int
    parameters: int
    learning: int

    @property
    def total(self) -> int:
        """All bytes together."""
        return self.weights + self.gradients + self.moments + self.averaged + self.activations


def usable(gpu: str) -> float:
    """Bytes that a training step may take of a GPU sold as "24GB", which is GiB; `SpearError` for no size."""
    said = re.fullmatch(r"(\d+(\.\d+)?) ?(G(i?B)?)?", gpu.strip(), re.IGNORECASE)
    size = float(said[1]) * GIB if said else 0.0
    if not CONTEXT < size < 1e15:
        raise SpearError(f"no size of a GPU: {gpu!r}: write it like 24GB")
    return size * (1 - FRAGMENTS) - CONTEXT


def training(stage: Recipe, as_on_gpu: bool = True) -> Memory:
    """What one process needs to train `stage`, a "vla" or "vlm" recipe; the whole batch is its own.

    as_on_gpu: with the attention and norms that run on a GPU. False: with those for CPUs, for checking.
    Every image, prompt and answer is counted as present and as long as it may be. Raises `SpearError` for
    another kind of recipe, or a batch that does not divide into `accumulate` pieces.
    """
    if stage.kind not in ("vla", "vlm"):
        raise SpearError(
            f"recipe {stage.name} trains a small encoder alone: plan a vla or vlm recipe"
        )
    size, opt = get_preset(stage.preset), stage.optimization
    pieces = parallel.divide_into_pieces(stage.batch_size, "batch_size", opt.accumulate)
    model = _empty_model(stage, size, as_on_gpu)
    set_gradient_checkpointing(model, opt.gradient_checkpointing)
    with FakeTensorMode(), MemoryMeter() as meter:
        allocate_storage(model.train())
        weights = meter.live
        learning = [p for p in model.parameters() if p.requires_grad]
        learned = sum(p.nbytes for p in learning)
        if opt.accumulate > 1:  # the gradients of the earlier pieces are there
            for p in learning:
                p.grad = torch.empty_like(p)
        lower, cache = opt.precision == "bf16", not opt.gradient_checkpointing
        with torch.autocast("cpu", torch.bfloat16, enabled=lower, cache_enabled=cache):
            loss = _loss(model, stage, size, pieces)
        loss.backward()
        del loss
        gradients = sum(p.grad.untyped_storage().nbytes() for p in learning if p.grad is not None)
    averaged, activations = learned * (opt.ema > 0), meter.peak - weights - gradients
    numbers = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in learning)
    return Memory(weights, gradients, 2 * learned, averaged, activations, *numbers)


def inference(size: Preset, dtype: torch.dtype, batch: int = 1) -> Memory:
    """What SPEAR-1 needs on a GPU to act, with all weights in `dtype`, for so many observations at once."""
    stage = Recipe("inference", "vla", size.name, "", Optimization(steps=1, lr=0.0), batch)
    model: Any = _empty_model(stage, size).to(dtype).eval()
    # Without oneDNN, which a GPU does not have: it would pack weights a second time.
    without = torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)
    with without, FakeTensorMode(), MemoryMeter() as meter, torch.no_grad():
        allocate_storage(model)
        weights = meter.live
        noise = Action.from_vector(torch.zeros(batch, size.horizon, ACTION_DIM))
        model.sample_actions(**_observation(size, batch), noise=noise, steps=2)
    return Memory(
        weights, 0, 0, 0, meter.peak - weights, sum(p.numel() for p in model.parameters()), 0
    )


def _empty_model(stage: Recipe, size: Preset, as_on_gpu: bool = True) -> torch.nn.Module:
    """`build.empty_model`, with the attention and norms of a GPU or those for CPUs."""
    inner = build_vlm_config(size)
    if not stage.moge:
        inner.moge_config = None
    config: Any = inner if stage.kind == "vlm" else build_spear1_config(size, inner)
    if as_on_gpu:
        config._attn_implementation = "sdpa"
    model = empty_model(stage, config)
    if as_on_gpu:
        for module in model.modules():
            if isinstance(module, FastRMSNorm):
                module.forward = partial(GemmaRMSNorm.forward, module)  # type: ignore[method-assign]
    return model


def _loss(model: Any, stage: Recipe, size: Preset, pieces: int) -> torch.Tensor:
    """The task's loss on a batch of zeros."""
    if stage.kind == "vlm":
        return _question_loss(model, stage, size, pieces)
    actions = Action.from_vector(torch.zeros(pieces, size.horizon, ACTION_DIM))
    total = model(
        **_observation(size, pieces), actions=actions, flow_samples=stage.flow_samples
    ).loss
    if stage.question_images:
        images = parallel.divide_into_pieces(
            stage.question_images, "question_images", stage.optimization.accumulate
        )
        total = total + stage.question_weight * _question_loss(model.vlm, stage, size, images)
    return total


def _observation(size: Preset, batch: int) -> dict[str, Any]:
    return {
        "pixel_values": {
            view: torch.zeros(batch, 3, height, width, dtype=torch.uint8)
            for view, (width, height) in size.image_sizes.items()
        },
        "input_ids": torch.zeros(batch, size.prompt_tokens, dtype=torch.long),
        "attention_mask": torch.ones(batch, size.prompt_tokens, dtype=torch.long),
        "state": torch.zeros(batch, NUM_STATE_FEATURES),
    }


def _question_loss(vlm: Any, stage: Recipe, size: Preset, images: int) -> torch.Tensor:
    """The loss of as many questions about external images as the mix may ask, of the greatest length.

    `SpearVLMForConditionalGeneration.forward` looks into its batch, and fake tensors have no contents.
    """
    view, (width, height) = next(iter(size.image_sizes.items()))
    features, valid = vlm.encode_images(
        {view: torch.zeros(images, 3, height, width, dtype=torch.uint8)}
    )
    owners = torch.arange(images).repeat_interleave(stage.questions.pairs[1])
    ids = torch.zeros(len(owners), size.prompt_tokens, dtype=torch.long)
    hidden = vlm.run_language_model(features[owners], valid[owners], ids, keep_cache=False).hidden
    hidden = hidden[:, -ANSWER:].flatten(0, 1)
    labels = torch.zeros(len(hidden), dtype=torch.long)
    return vlm.compute_token_loss(hidden, labels)[0]


def plans(stage: Recipe) -> Iterator[tuple[dict[str, Any], Memory]]:
    """Changes to a recipe that save memory, and what it needs with them; measured when asked for.

    First no changes, then one more each time, and what costs least comes first.
    """
    opt, batch, asked = stage.optimization, stage.batch_size, stage.question_images
    pieces = [p for p in (batch // 8, batch) if p > opt.accumulate and batch % p == asked % p == 0]
    savers: list[tuple[bool, str, Any]] = [
        (opt.precision == "bf16" and opt.frozen_precision != "bf16", "frozen_precision", "bf16"),
        (not opt.gradient_checkpointing, "gradient_checkpointing", True),
        *((True, "accumulate", p) for p in pieces),
        (opt.ema > 0, "ema", 0),
    ]
    choices = [(name, value) for useful, name, value in savers if useful]
    counts = range(len(choices) + 1)
    for count in track_progress(
        counts, ProgressBar(f"planning {stage.name}", len(counts), "settings")
    ):
        changes = dict(choices[:count])
        yield changes, training(stage.with_changes(**changes))


def flags(changes: Mapping[str, Any]) -> str:
    """Changes to a recipe as `spear train` takes them."""
    words = [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in changes.items()]
    return " ".join(["--set", *words]) if words else ""
