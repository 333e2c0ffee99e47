"""How much GPU memory a recipe needs, measured by one training step of the real code without data.

A forward and a backward pass run on PyTorch's fake tensors, which have shapes and storage sizes but
no contents. After every operation the sizes of all live tensors are added up, and the maximum is
the estimate. The estimate does not include the CUDA context, memory that kernels use internally,
and memory that is lost between the allocator's blocks. `estimate_usable_bytes` leaves room for
these.
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
from spear.models.meter import MemoryMeter, replace_meta_by_fake_tensors
from spear.models.presets import Preset, build_spear1_config, build_vlm_config, get_preset
from spear.models.quantize import Quantization, quantize_model
from spear.models.spear1 import NUM_STATE_FEATURES
from spear.train import parallel
from spear.train.build import build_empty_model
from spear.train.options import Optimization, Recipe
from spear.types import ACTION_DIM, Action
from spear.util.progress import ProgressBar, track_progress

GIB = 2**30  # bytes
CONTEXT_BYTES = 0.6 * GIB  # left free for the CUDA context and its libraries (our choice)
FRAGMENTATION = 0.04  # fraction left free for what the allocator loses between blocks (our choice)
MAX_GPU_BYTES = 1e15  # a larger size is taken for a mistake
# Tokens of the longest answer, the eight vertices of a 3D box. All answers are counted as so long.
MAX_ANSWER_TOKENS = 24


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory in one training step, or one inference, at the moment when most memory is in use.

    weights, gradients, moments, ema and activations are in bytes.

    weights         all parameters and buffers, in the precision in which they are stored.
    gradients       the gradients of the parameters that learn.
    moments         AdamW's two running averages per parameter that learns.
    ema             the EMA weights.
    activations     everything else that is in memory at that moment: tensors for the backward pass,
                    temporary tensors, and bfloat16 copies of weights.
    num_parameters  number of all parameters.
    num_trainable   number of the parameters that learn.
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


def estimate_usable_bytes(gpu_memory: str) -> float:
    """Return the bytes that a training step may use on a GPU.

    Args:
        gpu_memory: the GPU's memory as the GPU is sold, for example "24GB".

    Raises:
        SpearError: for a text that is no size of memory.

    >>> round(estimate_usable_bytes("24GB") / GIB, 1)
    22.4
    """
    match = re.fullmatch(r"(\d+(\.\d+)?) ?(G(i?B)?)?", gpu_memory.strip(), re.IGNORECASE)
    gpu_bytes = float(match[1]) * GIB if match else 0.0  # "GB" on a GPU's box means GiB
    if not CONTEXT_BYTES < gpu_bytes < MAX_GPU_BYTES:
        raise SpearError(f"{gpu_memory!r} is no size of a GPU. Write it like 24GB.")
    return gpu_bytes * (1 - FRAGMENTATION) - CONTEXT_BYTES


def measure_training_memory(recipe: Recipe, with_gpu_layers: bool = True) -> MemoryEstimate:
    """Measure what one process needs to train a "vla" or "vlm" recipe with the whole batch.

    The estimate assumes that no image is missing, and that prompts and answers are as long as they
    may be.

    Args:
        recipe: what to train.
        with_gpu_layers: whether to run the attention and the norms that run on a GPU. With False
            those of a CPU run, so that the estimate can be checked against a real step on a CPU.

    Raises:
        SpearError: for another kind of recipe, or a batch that does not divide into `accumulate`
            pieces.
    """
    if recipe.kind not in ("vla", "vlm"):
        raise SpearError(
            f"recipe {recipe.name} trains a small encoder alone. Give a vla or vlm recipe."
        )
    preset = get_preset(recipe.preset)
    opt = recipe.optimization
    piece_size = parallel.compute_piece_size(recipe.batch_size, "batch_size", opt.accumulate)
    model = _build_model(recipe, preset, with_gpu_layers)
    set_gradient_checkpointing(model, opt.gradient_checkpointing)

    with FakeTensorMode(), MemoryMeter() as meter:
        replace_meta_by_fake_tensors(model.train())
        weights = meter.live
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if opt.accumulate > 1:
            # From the second piece on, the earlier pieces' gradients are in memory, too.
            for parameter in trainable:
                parameter.grad = torch.empty_like(parameter)

        with torch.autocast(
            "cpu",
            torch.bfloat16,
            enabled=opt.precision == "bf16",
            # As in `spear.train.optimize`: the cache keeps bfloat16 copies of the weights.
            cache_enabled=not opt.gradient_checkpointing,
        ):
            loss = _compute_loss_of_zeros(model, recipe, preset, piece_size)
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


def measure_inference_memory(
    preset: Preset,
    dtype: torch.dtype,
    batch_size: int = 1,
    quantize: Quantization | None = None,
) -> MemoryEstimate:
    """Measure what SPEAR-1 needs on a GPU for one inference on `batch_size` observations.

    With `quantize` the weights of linear layers are quantized, and the others are of type `dtype`.
    """
    no_steps = Optimization(steps=1, lr=0.0)
    recipe = Recipe(
        name="inference",
        kind="vla",
        preset=preset.name,
        description="",
        optimization=no_steps,
        batch_size=batch_size,
    )
    model: Any = _build_model(recipe, preset).to(dtype).eval()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if quantize is not None:
        quantize_model(model, quantize)

    # The step runs on CPU tensors. oneDNN, which a GPU does not use, would add repacked copies of
    # the weights there.
    without_onednn = torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)
    with without_onednn, FakeTensorMode(), MemoryMeter() as meter, torch.no_grad():
        replace_meta_by_fake_tensors(model)
        weights = meter.live
        noise = Action.from_vector(torch.zeros(batch_size, preset.horizon, ACTION_DIM))
        # Further steps of the flow would need no more memory than two.
        model.sample_actions(**_make_zero_observations(preset, batch_size), noise=noise, steps=2)

    return MemoryEstimate(
        weights=weights,
        gradients=0,
        moments=0,
        ema=0,
        activations=meter.peak - weights,
        num_parameters=num_parameters,
        num_trainable=0,
    )


def _build_model(recipe: Recipe, preset: Preset, with_gpu_layers: bool = True) -> torch.nn.Module:
    """Build the recipe's model without memory for weights.

    With `with_gpu_layers` the model has the attention and the norms that run on a GPU.
    """
    vlm = build_vlm_config(preset)
    if not recipe.moge:
        vlm.moge_config = None
    config: Any = vlm if recipe.kind == "vlm" else build_spear1_config(preset, vlm)
    if with_gpu_layers:
        config._attn_implementation = "sdpa"

    model = build_empty_model(recipe, config)
    if with_gpu_layers:
        for module in model.modules():
            if isinstance(module, FastRMSNorm):
                module.forward = partial(GemmaRMSNorm.forward, module)  # type: ignore[method-assign]
    return model


def _compute_loss_of_zeros(
    model: Any, recipe: Recipe, preset: Preset, piece_size: int
) -> torch.Tensor:
    """Return the training loss on a piece of a batch whose tensors contain only zeros.

    The piece has `piece_size` robot steps, or images if the recipe trains a VLM.
    """
    if recipe.kind == "vlm":
        return _compute_question_loss_of_zeros(model, recipe, preset, piece_size)

    actions = Action.from_vector(torch.zeros(piece_size, preset.horizon, ACTION_DIM))
    observation = _make_zero_observations(preset, piece_size)
    total = model(**observation, actions=actions, flow_samples=recipe.flow_samples).loss
    if recipe.question_images:
        num_images = parallel.compute_piece_size(
            recipe.question_images, "question_images", recipe.optimization.accumulate
        )
        question_loss = _compute_question_loss_of_zeros(model.vlm, recipe, preset, num_images)
        total = total + recipe.question_weight * question_loss
    return total


def _make_zero_observations(preset: Preset, batch_size: int) -> dict[str, Any]:
    """Return a batch of observations that contain only zeros, with prompts of full length."""
    pixels = {}
    for view, (width, height) in preset.image_sizes.items():
        pixels[view] = torch.zeros(batch_size, 3, height, width, dtype=torch.uint8)
    return {
        "pixel_values": pixels,
        "input_ids": torch.zeros(batch_size, preset.prompt_tokens, dtype=torch.long),
        "attention_mask": torch.ones(batch_size, preset.prompt_tokens, dtype=torch.long),
        "state": torch.zeros(batch_size, NUM_STATE_FEATURES),
    }


def _compute_question_loss_of_zeros(
    vlm: Any, recipe: Recipe, preset: Preset, num_images: int
) -> torch.Tensor:
    """Return the loss of the largest batch of questions about `num_images` external images.

    Each image has as many questions as the recipe allows, with prompts and answers of full length.
    The function repeats what `SpearVLMForConditionalGeneration.forward` does, because that method
    reads values of its batch, and fake tensors have no values.
    """
    view = next(iter(preset.image_sizes))
    width, height = preset.image_sizes[view]
    pixels = torch.zeros(num_images, 3, height, width, dtype=torch.uint8)
    features, valid = vlm.encode_images({view: pixels})

    # The image of each question; every image has `max_pairs` questions.
    _, max_pairs = recipe.questions.pairs
    image_index = torch.arange(num_images).repeat_interleave(max_pairs)
    ids = torch.zeros(len(image_index), preset.prompt_tokens, dtype=torch.long)
    prefix = vlm.run_language_model(
        features[image_index], valid[image_index], ids, keep_cache=False
    )
    hidden = prefix.hidden[:, -MAX_ANSWER_TOKENS:].flatten(0, 1)
    labels = torch.zeros(len(hidden), dtype=torch.long)
    return vlm.compute_aligned_token_loss(hidden, labels)[0]


def plan_memory_savings(recipe: Recipe) -> Iterator[tuple[dict[str, Any], MemoryEstimate]]:
    """Yield sets of changes to a recipe that save memory, and the estimate with these changes.

    The first set is empty. Each further set has one change more, in the order of what the changes
    cost in time or quality, the cheapest first. A set is measured only when the caller asks for it.
    """
    changes = _list_memory_saving_changes(recipe)
    numbers_of_changes = range(len(changes) + 1)
    bar = ProgressBar(f"planning {recipe.name}", len(numbers_of_changes), "settings")
    for num_changes in track_progress(numbers_of_changes, bar):
        first_changes = dict(changes[:num_changes])
        yield first_changes, measure_training_memory(recipe.with_changes(**first_changes))


def _list_memory_saving_changes(recipe: Recipe) -> list[tuple[str, Any]]:
    """Return recipe keys and values that save memory and that the recipe does not have yet.

    The cheapest change in time or quality comes first.
    """
    opt = recipe.optimization
    changes: list[tuple[str, Any]] = []
    if opt.precision == "bf16" and opt.frozen_precision != "bf16":
        changes.append(("frozen_precision", "bf16"))
    if not opt.gradient_checkpointing:
        changes.append(("gradient_checkpointing", True))
    # Split the batch into pieces of eight samples, or of one sample.
    for num_pieces in (recipe.batch_size // 8, recipe.batch_size):
        if num_pieces <= opt.accumulate:
            continue
        if recipe.batch_size % num_pieces == 0 and recipe.question_images % num_pieces == 0:
            changes.append(("accumulate", num_pieces))
    if opt.ema > 0:
        changes.append(("ema", 0))
    return changes


def format_set_option(changes: Mapping[str, Any]) -> str:
    """Format changes to a recipe as the option of `spear train` that makes these changes.

    >>> format_set_option({"ema": 0, "gradient_checkpointing": True})
    '--set ema=0 gradient_checkpointing=true'
    """
    words = []
    for key, value in changes.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        words.append(f"{key}={text}")
    return f"--set {' '.join(words)}" if words else ""
