"""From images to actions: ours, Transformers' π0, openpi's, and the roofline, in one run on one machine.

    python benchmarks/models/policy_latency.py --presets nano small --dtypes float32 bfloat16
    python benchmarks/models/policy_latency.py --device cuda --presets spear1 --dtypes bfloat16 --compiled
    python benchmarks/models/policy_latency.py --openpi openpi-venv/bin/python

Everybody has the same geometry and random weights, 10 flow steps, square images, a prompt of 48 tokens; no
MoGe, which π0 has not (`--moge` adds SPEAR-1 as it is, with MoGe and its own image sizes). "plain" is our
network without the fast path, "ours" `sample_actions` (on a GPU a CUDA graph), "π0" Transformers' eager one,
"openpi" its PyTorch π0, in a process and a Python of its own (`--openpi`, see `openpi_pi0.py`), and with
`--compiled` both by `torch.compile`. The difference is that of our actions from π0's, and from openpi's where
it runs, the larger one.

The roofline is the sum over encoder, language model and each flow step of the larger of operations / peak and
bytes of weights and keys and values / bandwidth, both measured here in the same dtype. Times are medians
(least–most).
"""

from __future__ import annotations

import dataclasses
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from openpi_pi0 import OpenPi
from pi0_pair import SIZES, observation, pair, reduced, relative
from spear import flow
from spear.cli import run_reporting_errors
from spear.doctor import MachineSpeed, measure_machine
from spear.models.presets import build_spear1_config
from spear.models.spear1 import NUM_STATE_FEATURES, Spear1ForActionPrediction
from spear.types import Action
from timing import Times, race

STEPS, TEXT = 10, 48


def plain(model: Spear1ForActionPrediction, given: dict[str, Any]) -> Action:
    """Actions as `sample_actions` is checked against: the trained network, step by step."""
    with torch.no_grad():
        prefix = model.encode_prefix(
            given["pixel_values"], given["input_ids"], given["attention_mask"]
        )
        return flow.integrate(
            lambda noisy, time: model.predict(prefix, given["state"], noisy, time),
            given["noise"],
            STEPS,
            model.flow,
        )


def compile_pi0(theirs: Any, given: dict[str, Any]) -> Any:
    """π0 with its VLM and its flow step compiled, as its `sample_actions` calls them."""
    theirs.forward = torch.compile(theirs.forward)
    theirs.model.vlm.forward = torch.compile(theirs.model.vlm.forward)
    return lambda: theirs.sample_actions(num_steps=STEPS, **given)


def roofline(
    model: Spear1ForActionPrediction,
    tokens: list[int],
    batch: int,
    horizon: int,
    limit: MachineSpeed,
) -> float:
    """Milliseconds that nobody can do without. tokens: of each view."""
    config, wide = model.config, model.action_out_proj.weight.element_size()
    text, vision = config.vlm_config.text_config, config.vlm_config.vision_config

    def phase(
        weights: float, rows: float, seen: float, width: float, layers: int
    ) -> tuple[float, float]:
        attention = 4 * layers * rows * seen * width
        return batch * (2 * weights * rows + attention), weights * wide

    phases = []
    encoders: list[tuple[Any, Any, Any, int]] = [
        (model.vlm.vision_tower, model.vlm.multi_modal_projector, vision, 0)
    ]
    if model.vlm.moge is not None:
        encoders.append(
            (model.vlm.moge, model.vlm.moge_projector, config.vlm_config.moge_config, 1)
        )
    for encoder, projector, shape, extra in encoders:
        weights = sum(
            p.numel() for part in (encoder, projector) for p in part.parameters() if p.dim() > 1
        )
        each = [
            phase(weights, t, t + extra, shape.hidden_size, shape.num_hidden_layers) for t in tokens
        ]
        phases.append((sum(f for f, _ in each), each[0][1]))
    length, width = sum(tokens) + TEXT, text.num_attention_heads * text.head_dim
    layers: Any = model.vlm.language_model.layers
    of_layers = [sum(p.numel() for p in layer.parameters() if p.dim() > 1) for layer in layers]
    keys = sum(m.weight.numel() for m in (layers[-1].self_attn.k_proj, layers[-1].self_attn.v_proj))
    phases.append(phase(sum(of_layers[:-1]) + keys, length, length, width, len(layers) - 1))
    expert = sum(p.numel() for p in model.expert.parameters() if p.dim() > 1)
    flops, moved = phase(expert, horizon, length + 1 + horizon, width, len(layers))
    memory = 2 * len(layers) * batch * length * text.num_key_value_heads * text.head_dim * wide
    phases += [(flops, moved + memory)] * STEPS
    return 1000 * limit.least_seconds(*phases)


def whole(
    name: str, batch: int, dtype: torch.dtype, device: str
) -> tuple[Spear1ForActionPrediction, Any, list[int]]:
    """SPEAR-1 as the preset has it, an observation of all its views, and their tokens."""
    size = dataclasses.replace(SIZES[name], vocabulary=2048)
    with torch.device(device):
        model = Spear1ForActionPrediction(build_spear1_config(size)).eval().to(dtype)
    patch = size.vision["patch_size"]
    given = {
        "pixel_values": {
            view: torch.randint(0, 256, (batch, 3, h, w), dtype=torch.uint8, device=device)
            for view, (w, h) in size.image_sizes.items()
        },
        "input_ids": torch.randint(3, 1000, (batch, TEXT), device=device),
        "attention_mask": None,
        "state": torch.randn(batch, NUM_STATE_FEATURES, device=device),
        "noise": flow.sample_noise((batch, size.horizon), model.flow, device=device),
    }
    return model, given, [w // patch * (h // patch) for w, h in size.image_sizes.values()]


def ours_alone(model: Spear1ForActionPrediction, given: dict[str, Any]) -> dict[str, Any]:
    """Our network, plain and fast."""
    return {
        "plain": lambda: plain(model, given),
        "ours": lambda: model.sample_actions(steps=STEPS, **given),
    }


def contenders(
    ours: Any, theirs: Any, mine: dict[str, Any], given: dict[str, Any]
) -> tuple[dict[str, Any], float]:
    """What is to be timed, and how far our actions are from π0's."""
    runs = {**ours_alone(ours, mine), "π0": lambda: theirs.sample_actions(num_steps=STEPS, **given)}
    return runs, relative(runs["ours"]().translation, runs["π0"]()[..., :3])


def openpi_runs(
    python: Path, compiled: bool, until: ExitStack, build: tuple[Any, Any, dict[str, Any], int, int]
) -> dict[str, OpenPi]:
    """openpi's π0, and that compiled if asked for, until `until` closes; what does not start is said and left
    out."""
    found = {}
    for name, by_compiler in (("openpi", False), ("openpi compiled", True))[: 1 + compiled]:
        try:
            found[name] = until.enter_context(OpenPi(python, *build, compiled=by_compiler))
        except RuntimeError as error:
            print(error)
    return found


COLUMNS = ("plain", "ours", "π0", "π0 compiled", "openpi", "openpi compiled")


def row(
    name: str,
    kind: str,
    views: int,
    batch: int,
    found: dict[str, Times | str],
    least: float,
    gap: str,
) -> str:
    """One line of the table."""

    def over(a: Times | str | None, b: Times | str | float | None) -> str:
        bottom = b.median if isinstance(b, Times) else b
        return (
            f"{a.median / bottom:.2f}"
            if isinstance(a, Times) and isinstance(bottom, float)
            else "–"
        )

    times = [str(found.get(column, "–")) for column in COLUMNS]
    ours = found["ours"]
    ratios = [over(found.get("π0"), ours), over(found.get("openpi"), ours), over(ours, least)]
    return (
        "| "
        + " | ".join([name, kind, str(views), str(batch), *times, f"{least:.1f}", *ratios, gap])
        + " |"
    )


def main(
    presets: tuple[Literal["nano", "small", "mid", "spear1"], ...] = ("nano", "small"),
    views: tuple[int, ...] = (1, 2, 3),
    batches: tuple[int, ...] = (1, 8),
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16"),
    device: Literal["cpu", "cuda"] = "cpu",
    layers: int | None = None,
    repeats: int = 7,
    threads: int | None = None,
    compiled: bool = False,
    openpi: Path | None = None,
    moge: bool = False,
    processor_time: bool = False,
) -> None:
    """Measure, and print a table.

    Args:
        presets: geometries; mid is a billion parameters. layers: at most so many per network.
        views: numbers of cameras. batches: observations at once.
        device: where. repeats: of every contender. threads: of PyTorch on a CPU.
        compiled: also π0 under torch.compile (minutes per row on a CPU).
        openpi: the Python of an environment with openpi, which then takes part (and compiled by itself, too).
        moge: also SPEAR-1 whole, with MoGe, its own views and sizes.
        processor_time: processor time instead of the clock's, for a busy machine (CPU).
    """
    if threads:
        torch.set_num_threads(threads)
    limits = {}
    for kind in dtypes:
        limits[kind] = measure_machine(device, getattr(torch, kind), processor_time)
        print(
            f"{kind}: {limits[kind].bytes_per_s / 1e9:.0f} GB/s, "
            f"{limits[kind].flops_per_s / 1e12:.3f} T operations/s"
        )
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; milliseconds\n")
    ratios = ["π0 / ours", "openpi / ours", "ours / roofline", "difference"]
    names = ["preset", "dtype", "views", "batch", *COLUMNS, "roofline", *ratios]
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for name in presets:
        label = name + (f" ({layers} layers)" if layers else "")
        size = reduced(name, layers)
        for kind in dtypes:
            dtype = getattr(torch, kind)
            models = pair(size, dtype, device)
            for count in views:
                for batch in batches:
                    mine, given = observation(size, count, batch, TEXT, dtype, device)
                    runs, gap = contenders(*models, mine, given)
                    if compiled:
                        runs["π0 compiled"] = compile_pi0(pair(size, dtype, device)[1], given)
                    with ExitStack() as until:
                        if openpi:
                            build = (size, models[0], given, TEXT, STEPS)
                            others = openpi_runs(openpi, compiled, until, build)
                            same = runs["ours"]().translation
                            for other in others.values():
                                gap = max(gap, relative(same, other.actions[..., :3]))
                            runs.update(others)
                        found = race(runs, device, repeats, processor_time)
                    tokens = [(size.vision["image_size"] // size.vision["patch_size"]) ** 2] * count
                    least = roofline(models[0], tokens, batch, size.horizon, limits[kind])
                    print(row(label, kind, count, batch, found, least, f"{gap:.1e}"), flush=True)
            del models
            for batch in batches if moge else ():
                model, given, tokens = whole(name, batch, dtype, device)
                found = race(ours_alone(model, given), device, repeats, processor_time)
                least = roofline(model, tokens, batch, model.config.horizon, limits[kind])
                print(
                    row(f"{name}, with MoGe", kind, len(tokens), batch, found, least, "–"),
                    flush=True,
                )


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
