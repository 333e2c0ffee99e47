"""How much GPU memory a recipe needs, measured by one training step of the real code without data.

A forward and a backward pass run on PyTorch's fake tensors, which have shapes and storage sizes but
no contents. After every operation the sizes of all live tensors are added up, and the maximum is
the estimate. It does not count the CUDA context, what kernels use internally, and memory lost
between blocks; `usable_bytes` leaves room for these.
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
from spear.train.build import build_empty_model
from spear.train.options import Optimization, Recipe
from spear.types import ACTION_DIM, Action
from spear.util.progress import ProgressBar, track_progress

GIB = 2**30  # bytes
CONTEXT_BYTES = 0.6 * GIB  # left free for the CUDA context and its libraries (our choice)
FRAGMENTATION = 0.04  # fraction left free for what the allocator loses between blocks (our choice)
MAX_GPU_BYTES = 1e15
MAX_ANSWER_TOKENS = 24  # of the longest answer, a 3D box; every question is format_count with it


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes in one training step, or one inference, at the moment when the most are in use.

    weights         all parameters and buffers, in the precision that they are stored in.
    gradients       of the parameters that learn.
    moments         AdamW's two averages of the gradients.
    ema             the EMA weights.
    activations     everything else that is live then: kept for the backward pass, temporary, and
                    bfloat16 copies.
    num_parameters  all parameters; a count, no bytes.
    num_trainable   the parameters that learn; a count, no bytes.
    """

    weights: int
    gradients: int
    moments: int
    ema: int
    activations: int
    num_parameters: int
    num_trainable: int

    @property
    def total(self) -> int:
        """All bytes together."""
        return self.weights + self.gradients + self.moments + self.ema + self.activations


def usable_bytes(gpu: str) -> float:
    """Return the bytes that a training step may use on a GPU of this size, as it is sold.

    Raises `SpearError` for text that is no size.

    >>> round(usable_bytes("24GB") / GIB, 1)
    22.4
    """
    match = re.fullmatch(r"(\d+(\.\d+)?) ?(G(i?B)?)?", gpu.strip(), re.IGNORECASE)
    size = float(match[1]) * GIB if match else 0.0  # GPUs are sold in GiB
    if not CONTEXT_BYTES < size < MAX_GPU_BYTES:
        raise SpearError(f"{gpu!r} is no size of a GPU. Write it like 24GB.")
    return size * (1 - FRAGMENTATION) - CONTEXT_BYTES


def measure_training(recipe: Recipe, as_on_gpu: bool = True) -> MemoryEstimate:
    """Measure what one process needs to train a "vla" or "vlm" recipe with the whole batch.

    Every image, prompt and answer is format_count as present and as long as it may be.

    Args:
        recipe: what to train.
        as_on_gpu: use the attention and the norms of a GPU; False: those of a CPU, for checking.

    Raises:
        SpearError: for another kind of recipe, or a batch that does not divide into `accumulate`
            pieces.
    """
    if recipe.kind not in ("vla", "vlm"):
        raise SpearError(
            f"recipe {recipe.name} trains a small encoder alone. Give a vla or vlm recipe."
        )
    size = get_preset(recipe.preset)
    opt = recipe.optimization
    piece_size = parallel.divide_into_pieces(recipe.batch_size, "batch_size", opt.accumulate)
    model = _build_model(recipe, size, as_on_gpu)
    set_gradient_checkpointing(model, opt.gradient_checkpointing)

    with FakeTensorMode(), MemoryMeter() as meter:
        allocate_storage(model.train())
        weights = meter.live
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if opt.accumulate > 1:  # the gradients of the earlier pieces
            for parameter in trainable:
                parameter.grad = torch.empty_like(parameter)

        with torch.autocast(
            "cpu",
            torch.bfloat16,
            enabled=opt.precision == "bf16",
            cache_enabled=not opt.gradient_checkpointing,
        ):
            loss = _loss(model, recipe, size, piece_size)
        loss.backward()
        del loss
        gradients = 0
        for parameter in trainable:
            if parameter.grad is not None:
                gradients += parameter.grad.untyped_storage().nbytes()

    trainable_bytes = sum(parameter.nbytes for parameter in trainable)
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        moments=2 * trainable_bytes,
        ema=trainable_bytes if opt.ema > 0 else 0,
        activations=meter.peak - weights - gradients,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_trainable=sum(parameter.numel() for parameter in trainable),
    )


def measure_inference(size: Preset, dtype: torch.dtype, batch_size: int = 1) -> MemoryEstimate:
    """Measure what SPEAR-1 needs on a GPU to act on so many observations at once."""
    no_steps = Optimization(steps=1, lr=0.0)
    recipe = Recipe("inference", "vla", size.name, "", no_steps, batch_size)
    model: Any = _build_model(recipe, size).to(dtype).eval()

    # Without oneDNN, which a GPU does not have: it would pack the weights a second time.
    without_onednn = torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)
    with without_onednn, FakeTensorMode(), MemoryMeter() as meter, torch.no_grad():
        allocate_storage(model)
        weights = meter.live
        noise = Action.from_vector(torch.zeros(batch_size, size.horizon, ACTION_DIM))
        model.sample_actions(**_observation(size, batch_size), noise=noise, steps=2)

    return MemoryEstimate(
        weights=weights,
        gradients=0,
        moments=0,
        ema=0,
        activations=meter.peak - weights,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_trainable=0,
    )


def _build_model(recipe: Recipe, size: Preset, as_on_gpu: bool = True) -> torch.nn.Module:
    """Build the recipe's model without contents, with the attention and norms of a GPU or a CPU."""
    vlm = build_vlm_config(size)
    if not recipe.moge:
        vlm.moge_config = None
    config: Any = vlm if recipe.kind == "vlm" else build_spear1_config(size, vlm)
    if as_on_gpu:
        config._attn_implementation = "sdpa"

    model = build_empty_model(recipe, config)
    if as_on_gpu:
        for module in model.modules():
            if isinstance(module, FastRMSNorm):
                module.forward = partial(GemmaRMSNorm.forward, module)  # type: ignore[method-assign]
    return model


def _loss(model: Any, recipe: Recipe, size: Preset, piece_size: int) -> torch.Tensor:
    """Return the task's loss on a piece of zeros."""
    if recipe.kind == "vlm":
        return _question_loss(model, recipe, size, piece_size)

    actions = Action.from_vector(torch.zeros(piece_size, size.horizon, ACTION_DIM))
    observation = _observation(size, piece_size)
    total = model(**observation, actions=actions, flow_samples=recipe.flow_samples).loss
    if recipe.question_images:
        num_images = parallel.divide_into_pieces(
            recipe.question_images, "question_images", recipe.optimization.accumulate
        )
        question_loss = _question_loss(model.vlm, recipe, size, num_images)
        total = total + recipe.question_weight * question_loss
    return total


def _observation(size: Preset, batch_size: int) -> dict[str, Any]:
    """Return a batch of observations of zeros."""
    pixels = {}
    for view, (width, height) in size.image_sizes.items():
        pixels[view] = torch.zeros(batch_size, 3, height, width, dtype=torch.uint8)
    return {
        "pixel_values": pixels,
        "input_ids": torch.zeros(batch_size, size.prompt_tokens, dtype=torch.long),
        "attention_mask": torch.ones(batch_size, size.prompt_tokens, dtype=torch.long),
        "state": torch.zeros(batch_size, NUM_STATE_FEATURES),
    }


def _question_loss(vlm: Any, recipe: Recipe, size: Preset, num_images: int) -> torch.Tensor:
    """Return the loss of the most and longest questions that a batch of external images may have.

    This does what `SpearVLMForConditionalGeneration.forward` does. That method looks at values in
    its batch, and fake tensors have none.
    """
    view = next(iter(size.image_sizes))
    width, height = size.image_sizes[view]
    pixels = torch.zeros(num_images, 3, height, width, dtype=torch.uint8)
    features, valid = vlm.encode_images({view: pixels})

    _, max_pairs = recipe.questions.pairs
    image_index = torch.arange(num_images).repeat_interleave(max_pairs)
    ids = torch.zeros(len(image_index), size.prompt_tokens, dtype=torch.long)
    prefix = vlm.run_language_model(
        features[image_index], valid[image_index], ids, keep_cache=False
    )
    hidden = prefix.hidden[:, -MAX_ANSWER_TOKENS:].flatten(0, 1)
    labels = torch.zeros(len(hidden), dtype=torch.long)
    return vlm.compute_token_loss(hidden, labels)[0]


def plan_memory_savings(recipe: Recipe) -> Iterator[tuple[dict[str, Any], MemoryEstimate]]:
    """Yield changes to a recipe that save memory, and what it needs with them.

    First no changes, then one more change each time; those that cost the least time or quality come
    first. Each recipe is measured when its turn comes.
    """
    changes = _memory_saving_changes(recipe)
    counts = range(len(changes) + 1)
    bar = ProgressBar(f"planning {recipe.name}", len(counts), "settings")
    for count in track_progress(counts, bar):
        first_changes = dict(changes[:count])
        yield first_changes, measure_training(recipe.with_changes(**first_changes))


def _memory_saving_changes(recipe: Recipe) -> list[tuple[str, Any]]:
    opt = recipe.optimization
    changes: list[tuple[str, Any]] = []
    if opt.precision == "bf16" and opt.frozen_precision != "bf16":
        changes.append(("frozen_precision", "bf16"))
    if not opt.gradient_checkpointing:
        changes.append(("gradient_checkpointing", True))
    for num_pieces in (recipe.batch_size // 8, recipe.batch_size):
        if num_pieces <= opt.accumulate:
            continue
        if recipe.batch_size % num_pieces == 0 and recipe.question_images % num_pieces == 0:
            changes.append(("accumulate", num_pieces))
    if opt.ema > 0:
        changes.append(("ema", 0))
    return changes


def format_set_option(changes: Mapping[str, Any]) -> str:
    """Return changes to a recipe as `spear train` takes them.

    >>> format_set_option({"ema": 0, "gradient_checkpointing": True})
    '--set ema=0 gradient_checkpointing=true'
    """
    words = []
    for key, value in changes.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        words.append(f"{key}={text}")
    return f"--set {' '.join(words)}" if words else ""
