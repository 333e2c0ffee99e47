"""A training step of the policy: ours against Transformers' π0, same geometry, same weights, same
frozen parts.

    python benchmarks/models/train_step.py --presets nano small
    python benchmarks/models/train_step.py --device cuda --presets spear1 --batch-size 16 --alone

Forward, backward and a fused AdamW step on one batch in memory, in bfloat16 by autocast or in
float32, runs in turn. One flow sample per observation on both sides. MFU: 6 operations per learning
weight and token (4 through frozen ones that gradients pass, 2 elsewhere), and attention's, over the
measured peak.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

from pi0_pair import (
    count_image_tokens,
    make_observation,
    make_pair,
    make_policy,
    reduce_preset,
)
from spear.cli import run_reporting_errors
from spear.doctor import MachineSpeed, measure_machine
from spear.models.presets import Preset
from spear.types import Action
from timing import Times, format_header, format_ratio, format_row, race

NUM_TEXT_TOKENS = 48
COLUMNS = ["preset", "frozen", "ours", "π0", "π0 / ours", "MFU of ours", "MFU of π0"]

FrozenPart = Literal["none", "vision", "vlm"]


@dataclass(frozen=True)
class Options:
    """Measure, and print a table."""

    presets: tuple[Literal["nano", "small", "mid", "spear1"], ...] = ("nano", "small")
    """Geometries."""
    frozen: tuple[FrozenPart, ...] = ("none", "vision", "vlm")
    """The parts that do not learn."""
    batch_size: int = 4
    """Observations per step."""
    views: int = 2
    """Number of cameras."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision; bfloat16 is float32 weights under autocast."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    layers: int | None = None
    """At most so many per network."""
    repeats: int = 5
    """Runs of either side."""
    threads: int | None = None
    """Threads of PyTorch on a CPU."""
    processor_time: bool = False
    """Measure processor time instead of the clock's, for a busy machine (CPU)."""
    alone: bool = False
    """Without π0: both at full size need more memory than a GPU has."""


def freeze_parts(vlm: nn.Module, frozen: FrozenPart) -> None:
    """Freeze parts of a VLM, ours or π0's; their weights have the same names."""
    for name, parameter in vlm.named_parameters():
        is_vision = name.startswith("vision_tower")
        learns = frozen == "none" or (frozen == "vision" and not is_vision)
        parameter.requires_grad_(learns)


# --- Operations ---


def count_operations(
    module: nn.Module,
    *,
    num_rows: int,
    num_keys: int,
    width: int,
    num_layers: int,
    passes_gradients: bool,
) -> float:
    """Return the operations of a part in forward and backward: matrix products, and attention.

    passes_gradients: something before this part learns, so that gradients pass through it.
    """
    matrices = [p for p in module.parameters() if p.dim() > 1]
    num_weights = sum(p.numel() for p in matrices)
    num_learning = sum(p.numel() for p in matrices if p.requires_grad)
    has_backward = passes_gradients or num_learning > 0
    backward_weights = num_learning + (num_weights if has_backward else 0)
    attention = 4 * num_layers * num_rows * num_keys * width
    attention_passes = 3 if has_backward else 1
    return 2 * num_rows * (num_weights + backward_weights) + attention * attention_passes


def count_step_operations(
    our_model: Any, num_view_tokens: int, num_views: int, batch: int
) -> float:
    config = our_model.config.vlm_config
    text_config = config.text_config
    vision_tower = our_model.vlm.vision_tower
    num_image_tokens = num_views * num_view_tokens
    length = num_image_tokens + NUM_TEXT_TOKENS
    num_suffix = 1 + our_model.config.horizon  # the state and the actions
    width = text_config.num_attention_heads * text_config.head_dim

    vision = count_operations(
        vision_tower,
        num_rows=num_image_tokens,
        num_keys=num_view_tokens,
        width=config.vision_config.hidden_size,
        num_layers=config.vision_config.num_hidden_layers,
        passes_gradients=False,
    )
    language = count_operations(
        our_model.vlm.language_model.layers,
        num_rows=length,
        num_keys=length,
        width=width,
        num_layers=text_config.num_hidden_layers,
        passes_gradients=any(p.requires_grad for p in vision_tower.parameters()),
    )
    expert = count_operations(
        our_model.expert,
        num_rows=num_suffix,
        num_keys=length + num_suffix,
        width=width,
        num_layers=our_model.config.expert_config.num_hidden_layers,
        passes_gradients=True,
    )
    return batch * (vision + language + expert)


# --- Steps ---


@dataclass(frozen=True)
class Batch:
    """A batch as arguments of ours and of π0's, and what both learn from."""

    our_inputs: dict[str, Any]
    their_inputs: dict[str, Any]
    noise: Tensor
    tau: Tensor
    target: Tensor


def make_batch(options: Options, size: Preset) -> Batch:
    batch_size = options.batch_size
    device = options.device
    our_inputs, their_inputs = make_observation(
        size, options.views, batch_size, NUM_TEXT_TOKENS, torch.float32, device
    )
    noise = our_inputs.pop("noise").to_vector()
    tau = torch.rand(batch_size, 1, device=device)
    target = torch.randn(batch_size, size.horizon, 8, device=device)
    target[..., 3:7] = nn.functional.normalize(target[..., 3:7], dim=-1)
    return Batch(our_inputs, their_inputs, noise, tau, target)


def compute_our_loss(model: Any, batch: Batch) -> Tensor:
    return model(
        **batch.our_inputs,
        actions=Action.from_vector(batch.target),
        noise=Action.from_vector(batch.noise[:, None]),
        tau=batch.tau,
    ).loss


def compute_their_loss(model: Any, batch: Batch) -> Tensor:
    timestep = 1 - batch.tau[:, 0]
    output = model(**batch.their_inputs, actions=batch.target, timestep=timestep)
    return output.loss.mean()


def make_step(
    options: Options, model: Any, compute_loss: Callable[[Any, Batch], Tensor], batch: Batch
) -> Callable[[], None]:
    """Return a function that runs one training step."""
    learning = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-6, fused=True)
    is_bfloat16 = options.dtype == "bfloat16"

    def step() -> None:
        with torch.autocast(options.device, torch.bfloat16, enabled=is_bfloat16):
            loss = compute_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def format_mfu(times: Times | str, flops: float, machine: MachineSpeed) -> str:
    if not isinstance(times, Times):
        return "–"
    flops_per_s = flops / (times.median_ms / 1000)
    return f"{flops_per_s / machine.flops_per_s:.0%}"


def print_comparison(
    options: Options, name: str, frozen: FrozenPart, machine: MachineSpeed
) -> None:
    """Print one row of the table."""
    size = reduce_preset(name, options.layers)
    steps = {}
    if options.alone:
        our_model = make_policy(size, device=options.device)
        batch = make_batch(options, size)
    else:
        our_model, their_model = make_pair(size, device=options.device)
        batch = make_batch(options, size)
        freeze_parts(their_model.model.vlm, frozen)
        steps["π0"] = make_step(options, their_model, compute_their_loss, batch)
    freeze_parts(our_model.vlm, frozen)
    steps["ours"] = make_step(options, our_model, compute_our_loss, batch)

    times = race(steps, options.device, options.repeats, options.processor_time, num_warm_ups=1)
    flops = count_step_operations(
        our_model, count_image_tokens(size), options.views, options.batch_size
    )
    our_times = times["ours"]
    their_times = times.get("π0", "–")
    label = f"{name} ({options.layers} layers)" if options.layers else name
    cells = [
        label,
        frozen,
        str(our_times),
        str(their_times),
        format_ratio(their_times, our_times),
        format_mfu(our_times, flops, machine),
        format_mfu(their_times, flops, machine),
    ]
    print(format_row(cells), flush=True)


def main(options: Options) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    machine = measure_machine(options.device, dtype, options.processor_time)
    print(
        f"{options.device}, {torch.get_num_threads()} threads, torch {torch.__version__},"
        f" {options.dtype}, batch {options.batch_size};"
    )
    print(f"peak {machine.flops_per_s / 1e12:.3f} T operations/s; milliseconds\n")
    print(format_header(COLUMNS))
    for name in options.presets:
        for frozen in options.frozen:
            print_comparison(options, name, frozen, machine)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: main(tyro.cli(Options))))
