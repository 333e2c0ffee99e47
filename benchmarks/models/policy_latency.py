"""From images to actions: ours, Transformers' π0, openpi's, and the roofline, in one run on one
machine.

    python benchmarks/models/policy_latency.py --presets nano small --dtypes float32 bfloat16
    python benchmarks/models/policy_latency.py --device cuda --presets spear1 --dtypes bfloat16 \\
        --compiled
    python benchmarks/models/policy_latency.py --openpi openpi-venv/bin/python

All have the same geometry and random weights, 10 flow steps, square images, a prompt of 48 tokens,
and no MoGe, because π0 has none (`--moge` adds SPEAR-1 whole, with MoGe and its own image sizes).
"plain" is our network without the fast path, "ours" `sample_actions` (on a GPU a CUDA graph), "π0"
Transformers' eager one, "openpi" its PyTorch π0, in a process and a Python of its own (`--openpi`,
see `openpi_pi0.py`), and with `--compiled` both by `torch.compile`. The difference is that of our
actions from π0's, and from openpi's where it runs, the larger one.

The roofline is the sum over encoder, language model and each flow step of the larger of operations
/ peak and bytes of weights and keys and values / bandwidth, both measured here in the same dtype.
Times are medians (least–most).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import nn

from openpi_pi0 import OpenPi
from pi0_pair import (
    SIZES,
    count_image_tokens,
    make_observation,
    make_pair,
    reduce_preset,
    relative_difference,
)
from spear import flow
from spear.cli import run_reporting_errors
from spear.doctor import MachineSpeed, Phase, measure_machine
from spear.models.presets import Preset, build_spear1_config
from spear.models.spear1 import NUM_STATE_FEATURES, Spear1ForActionPrediction
from spear.types import Action
from timing import Times, format_header, format_ratio, format_row, race

NUM_FLOW_STEPS = 10
NUM_TEXT_TOKENS = 48
CONTENDERS = ["plain", "ours", "π0", "π0 compiled", "openpi", "openpi compiled"]
COLUMNS = [
    *("preset", "dtype", "views", "batch"),
    *CONTENDERS,
    *("roofline", "π0 / ours", "openpi / ours", "ours / roofline", "difference"),
]

Run = Callable[[], Any]


# --- Contenders ---


def run_plain(model: Spear1ForActionPrediction, inputs: dict[str, Any]) -> Action:
    """Actions as `sample_actions` is checked against: the trained network, step by step."""
    with torch.no_grad():
        prefix = model.encode_prefix(
            inputs["pixel_values"], inputs["input_ids"], inputs["attention_mask"]
        )

        def predict(noisy: Action, tau: torch.Tensor) -> Action:
            return model.predict(prefix, inputs["state"], noisy, tau)

        return flow.integrate(predict, inputs["noise"], NUM_FLOW_STEPS, model.flow_config)


def list_ours(model: Spear1ForActionPrediction, inputs: dict[str, Any]) -> dict[str, Run]:
    """Our network, plain and fast."""
    return {
        "plain": lambda: run_plain(model, inputs),
        "ours": lambda: model.sample_actions(steps=NUM_FLOW_STEPS, **inputs),
    }


def make_pi0_run(model: Any, inputs: dict[str, Any], is_compiled: bool = False) -> Run:
    """π0; compiled, its VLM and its flow step are, as its `sample_actions` calls them."""
    if is_compiled:
        model.forward = torch.compile(model.forward)
        model.model.vlm.forward = torch.compile(model.model.vlm.forward)
    return lambda: model.sample_actions(num_steps=NUM_FLOW_STEPS, **inputs)


def start_openpi(
    options: Options, size: Preset, our_model: Any, inputs: dict[str, Any], stack: ExitStack
) -> dict[str, OpenPi]:
    """Start openpi's π0 until `stack` closes. What does not start is printed and left out."""
    if options.openpi is None:
        return {}
    kinds = {"openpi": False}
    if options.compiled:
        kinds["openpi compiled"] = True
    contenders = {}
    for name, is_compiled in kinds.items():
        try:
            contender = OpenPi(
                options.openpi,
                size,
                our_model,
                inputs,
                num_text_tokens=NUM_TEXT_TOKENS,
                num_flow_steps=NUM_FLOW_STEPS,
                is_compiled=is_compiled,
            )
        except RuntimeError as error:
            print(error)
        else:
            contenders[name] = stack.enter_context(contender)
    return contenders


# --- Roofline ---


def count_weights(modules: Iterable[nn.Module]) -> int:
    """Return the numbers in the modules' matrices."""
    count = 0
    for module in modules:
        count += sum(p.numel() for p in module.parameters() if p.dim() > 1)
    return count


def estimate_phase(
    num_weights: int, num_rows: int, num_keys: int, width: int, num_layers: int
) -> float:
    """Return the operations of rows through layers: matrix products, and attention to keys."""
    attention = 4 * num_layers * num_rows * num_keys * width
    return 2 * num_weights * num_rows + attention


def compute_roofline_ms(
    model: Spear1ForActionPrediction,
    view_tokens: list[int],
    batch: int,
    horizon: int,
    machine: MachineSpeed,
) -> float:
    """Return the milliseconds that nobody can do without; view_tokens: of each view."""
    bytes_per_number = model.action_out_proj.weight.element_size()
    config = model.config.vlm_config
    phases: list[Phase] = []

    # Encoders, whose views do not see each other.
    vlm = model.vlm
    # Encoder, projector, config, and the number of tokens besides those of the image's patches
    encoders: list[tuple[nn.Module, nn.Module, Any, int]] = [
        (vlm.vision_tower, vlm.multi_modal_projector, config.vision_config, 0)
    ]
    if vlm.moge is not None:
        assert vlm.moge_projector is not None
        encoders.append((vlm.moge, vlm.moge_projector, config.moge_config, 1))
    for encoder, projector, encoder_config, num_extra_tokens in encoders:
        num_weights = count_weights([encoder, projector])
        flops = 0.0
        for num_tokens in view_tokens:
            flops += estimate_phase(
                num_weights,
                num_tokens,
                num_tokens + num_extra_tokens,
                encoder_config.hidden_size,
                encoder_config.num_hidden_layers,
            )
        phases.append((batch * flops, num_weights * bytes_per_number))

    # The prefix; of its last layer only keys and values are needed.
    text_config = config.text_config
    length = sum(view_tokens) + NUM_TEXT_TOKENS
    width = text_config.num_attention_heads * text_config.head_dim
    layers: Any = vlm.language_model.layers
    last_attention = layers[-1].self_attn
    num_weights = count_weights([*layers[:-1], last_attention.k_proj, last_attention.v_proj])
    flops = estimate_phase(num_weights, length, length, width, len(layers) - 1)
    phases.append((batch * flops, num_weights * bytes_per_number))

    # Flow steps, which also read the prefix's keys and values.
    num_weights = count_weights([model.expert])
    flops = estimate_phase(num_weights, horizon, length + 1 + horizon, width, len(layers))
    cache_numbers = 2 * len(layers) * batch * length
    cache_numbers *= text_config.num_key_value_heads * text_config.head_dim
    moved_bytes = (num_weights + cache_numbers) * bytes_per_number
    phases += [(batch * flops, moved_bytes)] * NUM_FLOW_STEPS
    return 1000 * machine.compute_least_seconds(*phases)


# --- The table ---


@dataclass(frozen=True)
class Options:
    """Measure, and print a table."""

    presets: tuple[Literal["nano", "small", "mid", "spear1"], ...] = ("nano", "small")
    """Geometries; mid is a billion parameters."""
    views: tuple[int, ...] = (1, 2, 3)
    """Numbers of cameras."""
    batches: tuple[int, ...] = (1, 8)
    """Observations at once."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Precisions."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    layers: int | None = None
    """At most so many per network."""
    repeats: int = 7
    """Runs of every contender."""
    threads: int | None = None
    """Threads of PyTorch on a CPU."""
    compiled: bool = False
    """Also measure π0 under torch.compile (minutes per row on a CPU)."""
    openpi: Path | None = None
    """The Python of an environment with openpi, which is then measured, too."""
    moge: bool = False
    """Also measure SPEAR-1 whole, with MoGe, its own views and sizes."""
    processor_time: bool = False
    """Measure processor time instead of the clock's, for a busy machine (CPU)."""


def measure_with_pi0(
    options: Options, size: Preset, models: tuple[Any, Any], num_views: int, batch: int
) -> tuple[dict[str, Times | str], float]:
    """Return all contenders' times, and the largest difference of our actions from others'."""
    our_model, pi0 = models
    our_inputs, their_inputs = make_observation(
        size, num_views, batch, NUM_TEXT_TOKENS, our_model.dtype, options.device
    )
    contenders = list_ours(our_model, our_inputs)
    contenders["π0"] = make_pi0_run(pi0, their_inputs)
    our_translation = contenders["ours"]().translation
    difference = relative_difference(our_translation, contenders["π0"]()[..., :3])
    if options.compiled:
        _, other_pi0 = make_pair(size, our_model.dtype, options.device)
        contenders["π0 compiled"] = make_pi0_run(other_pi0, their_inputs, is_compiled=True)

    with ExitStack() as stack:
        openpi_contenders = start_openpi(options, size, our_model, their_inputs, stack)
        for contender in openpi_contenders.values():
            openpi_difference = relative_difference(our_translation, contender.actions[..., :3])
            difference = max(difference, openpi_difference)
        contenders.update(openpi_contenders)
        times = race(contenders, options.device, options.repeats, options.processor_time)
    return times, difference


def make_whole_policy(
    name: str, batch: int, dtype: torch.dtype, device: str
) -> tuple[Spear1ForActionPrediction, dict[str, Any], list[int]]:
    """Return SPEAR-1 as the preset has it, an observation of all its views, and their tokens."""
    size = dataclasses.replace(SIZES[name], vocabulary_size=2048)
    with torch.device(device):
        model = Spear1ForActionPrediction(build_spear1_config(size)).eval().to(dtype)
    patch = size.vision["patch_size"]
    images = {}
    view_tokens = []
    for view, (width, height) in size.image_sizes.items():
        shape = (batch, 3, height, width)
        images[view] = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        view_tokens.append(width // patch * (height // patch))
    inputs = {
        "pixel_values": images,
        "input_ids": torch.randint(3, 1000, (batch, NUM_TEXT_TOKENS), device=device),
        "attention_mask": None,
        "state": torch.randn(batch, NUM_STATE_FEATURES, device=device),
        "noise": flow.sample_noise((batch, size.horizon), model.flow_config, device=device),
    }
    return model, inputs, view_tokens


def print_row(
    name: str,
    dtype_name: str,
    num_views: int,
    batch: int,
    times: dict[str, Times | str],
    roofline_ms: float,
    difference: str,
) -> None:
    our_times = times["ours"]
    cells = [name, dtype_name, str(num_views), str(batch)]
    cells += [str(times.get(contender, "–")) for contender in CONTENDERS]
    cells.append(f"{roofline_ms:.1f}")
    cells.append(format_ratio(times.get("π0"), our_times))
    cells.append(format_ratio(times.get("openpi"), our_times))
    cells.append(format_ratio(our_times, roofline_ms))
    cells.append(difference)
    print(format_row(cells), flush=True)


def print_rows(options: Options, name: str, dtype_name: str, machine: MachineSpeed) -> None:
    """Print the rows of a preset in one precision."""
    dtype = getattr(torch, dtype_name)
    size = reduce_preset(name, options.layers)
    label = f"{name} ({options.layers} layers)" if options.layers else name
    models = make_pair(size, dtype, options.device)
    for num_views in options.views:
        for batch in options.batches:
            times, difference = measure_with_pi0(options, size, models, num_views, batch)
            view_tokens = [count_image_tokens(size)] * num_views
            roofline_ms = compute_roofline_ms(models[0], view_tokens, batch, size.horizon, machine)
            print_row(label, dtype_name, num_views, batch, times, roofline_ms, f"{difference:.1e}")
    del models
    if not options.moge:
        return
    for batch in options.batches:
        model, inputs, view_tokens = make_whole_policy(name, batch, dtype, options.device)
        times = race(
            list_ours(model, inputs), options.device, options.repeats, options.processor_time
        )
        roofline_ms = compute_roofline_ms(model, view_tokens, batch, model.config.horizon, machine)
        whole_label = f"{name}, with MoGe"
        print_row(whole_label, dtype_name, len(view_tokens), batch, times, roofline_ms, "–")


def main(options: Options) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    machines = {}
    for dtype_name in options.dtypes:
        dtype = getattr(torch, dtype_name)
        machine = measure_machine(options.device, dtype, options.processor_time)
        machines[dtype_name] = machine
        bandwidth = f"{machine.bytes_per_s / 1e9:.0f} GB/s"
        print(f"{dtype_name}: {bandwidth}, {machine.flops_per_s / 1e12:.3f} T operations/s")
    print(
        f"{options.device}, {torch.get_num_threads()} threads, torch {torch.__version__};"
        " milliseconds\n"
    )
    print(format_header(COLUMNS))
    for name in options.presets:
        for dtype_name in options.dtypes:
            print_rows(options, name, dtype_name, machines[dtype_name])


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: main(tyro.cli(Options))))
