"""Acting with quantized weights: how near the actions are, how much memory and time it takes.

    python benchmarks/models/quantized.py --processor-time
    python benchmarks/models/quantized.py --preset spear1 --layers 2 --dtype bfloat16

Compares a SPEAR-1 in float32 or bfloat16 with its quantized copies (`spear.models.quantize`), on
random observations with the same noise. nano has the weights that come with the package, other
presets random ones. The cosine is that of all actions of an observation, in the model's units; the
smallest over the observations counts. Times are medians (least–most) for one observation.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from torch.nn.functional import cosine_similarity

from spear import flow
from spear.cli import run_reporting_errors
from spear.doctor import list_machine_facts
from spear.models.presets import Preset, build_spear1_config, get_preset
from spear.models.quantize import QUANTIZATIONS, quantize_model
from spear.models.spear1 import NUM_STATE_FEATURES, Spear1ForActionPrediction
from spear.models.weights.folders import BUNDLED_WEIGHTS
from spear.models.weights.load import load
from timing import Times, format_header, format_row, race

COLUMNS = ["weights", "MB", "cosine", "ms", "time ÷ unquantized"]
NUM_TEXT_TOKENS = 12


@dataclass(frozen=True)
class Options:
    """What is compared."""

    preset: Literal["nano", "small", "spear1"] = "nano"
    layers: int | None = None
    """Use at most so many layers per network."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    num_observations: int = 8
    """Number of random observations whose actions are compared."""
    repeats: int = 5
    threads: int = 1
    processor_time: bool = False
    """Measure the processor time of all threads, which other work on the machine changes less."""


def make_model(options: Options) -> Any:
    """Return the shipped nano, or a model with random weights."""
    dtype = getattr(torch, options.dtype)
    if options.preset == "nano" and options.layers is None:
        return load(Spear1ForActionPrediction, BUNDLED_WEIGHTS / "nano", dtype)
    size = _limit_layers(get_preset(options.preset), options.layers)
    torch.manual_seed(0)
    return Spear1ForActionPrediction(build_spear1_config(size)).eval().to(dtype)


def _limit_layers(size: Preset, max_layers: int | None) -> Preset:
    """Return a preset with at most so many layers per network (MoGe needs its last four)."""
    if max_layers is None:
        return size
    parts: dict[str, Any] = {}
    for name in ("vision", "text", "expert"):
        parts[name] = {**getattr(size, name), "num_hidden_layers": max_layers}
    parts["moge"] = {**(size.moge or {}), "num_hidden_layers": max(4, max_layers)}
    return dataclasses.replace(size, vocabulary_size=2048, **parts)


def draw_observation(size: Preset, model: Any, seed: int) -> dict[str, Any]:
    """Draw the inputs of `sample_actions` for one observation."""
    generator = torch.Generator().manual_seed(seed)
    pixels = {}
    for view, (width, height) in size.image_sizes.items():
        # Patches of one color, because noise in every pixel would be averaged to gray.
        patches = torch.rand(1, 3, 8, 8, generator=generator) * 255
        image = torch.nn.functional.interpolate(patches, (height, width), mode="nearest")
        pixels[view] = image.to(torch.uint8)
    ids = torch.randint(3, 1000, (1, NUM_TEXT_TOKENS), generator=generator)
    return {
        "pixel_values": pixels,
        "input_ids": ids,
        "attention_mask": None,
        "state": torch.randn(1, NUM_STATE_FEATURES, generator=generator),
        "noise": flow.sample_noise((1, size.horizon), model.flow_config, generator),
    }


def sample_all(model: Any, observations: list[dict[str, Any]]) -> Tensor:
    """Return the actions of all observations, [N, H · 8] float32."""
    actions = [model.sample_actions(**observation).to_vector() for observation in observations]
    return torch.cat(actions).flatten(1).float()


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    size = get_preset(options.preset)
    for name, description in list_machine_facts(size, torch.device("cpu"))[:2]:
        print(f"{name}: {description}")
    unquantized = make_model(options)
    models: dict[str, Any] = {options.dtype: unquantized}
    for quantization in QUANTIZATIONS:
        models[quantization] = copy.deepcopy(unquantized)
        quantize_model(models[quantization], quantization)

    observations = [
        draw_observation(size, unquantized, seed) for seed in range(options.num_observations)
    ]
    expected = sample_all(unquantized, observations)
    cosines = {}
    for name, model in models.items():
        actions = sample_all(model, observations)
        cosines[name] = cosine_similarity(actions, expected, dim=1).min()
    runs = {
        name: partial(model.sample_actions, **observations[0]) for name, model in models.items()
    }
    times = race(runs, "cpu", options.repeats, options.processor_time)

    layers = f" ({options.layers} layers)" if options.layers else ""
    print(f"\n{options.preset}{layers}, {options.dtype}, threads: {options.threads}\n")
    print(format_header(COLUMNS))
    reference = times[options.dtype]
    assert isinstance(reference, Times)
    for name, model in models.items():
        num_bytes = sum(parameter.nbytes for parameter in model.parameters())
        model_times = times[name]
        ratio = "–"
        if isinstance(model_times, Times):
            ratio = f"{model_times.median_ms / reference.median_ms:.2f}"
        cells = [name, f"{num_bytes / 1e6:.1f}", f"{cosines[name]:.5f}", str(model_times), ratio]
        print(format_row(cells))


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: main(tyro.cli(Options))))
