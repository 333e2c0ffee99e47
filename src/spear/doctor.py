"""Whether SPEAR-1 is right and fast on this machine: `spear doctor`.

One observation goes through the plain network and through everything that replaces it: the fast way, its CUDA
graph, bfloat16. Each is compared with the plain network, and timed beside what the machine could do at most.
"""

import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

import spear
from spear.errors import SpearError, summarize_error
from spear.flow import FlowConfig, sample_noise
from spear.models.devices import is_bfloat16_fast
from spear.models.fast.cuda_graphs import Inputs
from spear.models.fast.linear import CPU_INFO, HAS_BFLOAT16, linear
from spear.models.presets import Preset, build_spear1_config
from spear.models.sampling import (
    MAX_RELATIVE_DIFFERENCE,
    get_sampler,
    relative_difference,
    sample_fast,
    sample_plain,
)
from spear.models.spear1 import NUM_STATE_FEATURES, Spear1ForActionPrediction
from spear.models.weights.folders import BUNDLED_WEIGHTS
from spear.models.weights.load import load
from spear.train.memory import GIB, measure_inference

TEXT = 12
"""Tokens of the instruction."""
MEMORY = Path("/proc/meminfo")


@dataclass(frozen=True)
class Way:
    """One way to compute actions.

    milliseconds  median of an observation. least: what the machine needs for its operations and weights.
    apart         `sampling.relative_difference` from the plain network in the first type that was tried.
    held, planned bytes of GPU memory that it took, and that `spear plan` says; held is None on a CPU.
    problem       why it did not run, or is too far from the plain network; else empty.
    """

    name: str
    dtype: str
    milliseconds: float = float("nan")
    least: float = float("nan")
    apart: float = float("nan")
    held: int | None = None
    planned: int = 0
    problem: str = ""

    def row(self) -> list[str]:
        """As a line of a table: `COLUMNS`."""
        if self.milliseconds != self.milliseconds:
            return [self.name, self.dtype, "–", "–", "–", "–", self.problem]
        memory = (
            "–" if self.held is None else f"{self.held / GIB:.2f} of {self.planned / GIB:.2f} GiB"
        )
        times = f"{self.milliseconds:.1f}", f"{self.milliseconds / self.least:.1f} ×"
        return [
            self.name,
            self.dtype,
            *times,
            f"{self.apart:.1g}",
            memory,
            self.problem or "agrees",
        ]


COLUMNS = ["way", "type", "ms", "of the least", "difference", "memory of planned", ""]


@dataclass(frozen=True)
class Machine:
    """What was measured: bytes/s read from memory and floating-point operations/s, in a dtype."""

    bandwidth: float
    peak: float

    def least(self, *phases: tuple[float, float]) -> float:
        """The roofline of phases that follow each other, each of (operations, bytes): seconds."""
        return sum(max(flops / self.peak, moved / self.bandwidth) for flops, moved in phases)


def seconds(run: Callable[[], object], device: str, processor: bool = False) -> float:
    """One run. processor: processor time of all threads, which other work on the machine changes less."""
    clock = time.process_time if processor else time.perf_counter
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    begun = clock()
    run()
    wait()
    return clock() - begun


@torch.no_grad()
def machine(device: str, dtype: torch.dtype, processor: bool = False) -> Machine:
    """Measure it: the best of some runs of a large matrix product and of a copy far larger than any cache."""
    slow = dtype == torch.bfloat16 and not HAS_BFLOAT16  # larger products would take seconds each
    side, count = (8192, 2**29) if device == "cuda" else (512 if slow else 1536, 2**25)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.ones(count, device=device, dtype=torch.float32)
    target = torch.empty_like(source)

    def best(run: Callable[[], object]) -> float:
        run()
        return min(seconds(run, device, processor) for _ in range(5))

    product = min(best(lambda: a @ b), best(lambda: linear(a, b)))
    copied = best(lambda: target.copy_(source))
    return Machine(bandwidth=2 * source.nbytes / copied, peak=2 * side**3 / product)


class Disagrees(SpearError):
    """Something does not compute here what the plain network does."""

    code = 1


def about(size: Preset, device: torch.device) -> list[tuple[str, str]]:
    """What runs here: (what, which)."""
    packages = [
        f"spear {spear.__version__}",
        *(f"{n} {version(n)}" for n in ("torch", "transformers")),
    ]
    found = [("software", f"Python {platform.python_version()}, {', '.join(packages)}")]
    named = re.search(r"^model name\s*: *(.+)", CPU_INFO, re.MULTILINE)
    name = named[1].strip() if named else platform.machine()
    found.append(
        ("processor", f"{name}, cores: {os.cpu_count()}, threads: {torch.get_num_threads()}")
    )
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        driver = f"CUDA {torch.version.cuda}, compute capability {gpu.major}.{gpu.minor}"
        found.append(("device", f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, {driver}"))
    quick = (
        "faster matrix products than in" if is_bfloat16_fast(device) else "only saves memory beside"
    )
    found.append(("bfloat16", f"{quick} float32 on {device.type}"))
    weights = "the weights of this package" if size.name == "nano" else "random weights"
    steps = FlowConfig(**size.flow).steps
    return [
        *found,
        ("model", f"{size.name}, {weights}, {steps} flow steps, one observation of all views"),
    ]


def examine(size: Preset, device: torch.device, repeats: int = 10) -> Iterator[Way]:
    """Every way to act on this device, the plain network first; float32 where it fits, and bfloat16.

    Of nano the weights that come with this package, else random ones. `SpearError`: not even bfloat16 fits.
    """
    said = re.search(r"MemAvailable: *(\d+)", MEMORY.read_text("utf-8") if MEMORY.is_file() else "")
    on_cpu = (
        1024 * int(said[1]) if said else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else on_cpu
    planned = {
        dtype: measure_inference(size, dtype).total for dtype in (torch.float32, torch.bfloat16)
    }
    fits = [dtype for dtype, needed in planned.items() if needed < free]
    if not fits:
        needs = f"{planned[torch.bfloat16] / GIB:.1f} GiB, {device} has {free / GIB:.1f}"
        raise SpearError(f"preset {size.name} needs {needs}: give another")
    inputs = _observation(size, device)
    truth: torch.Tensor | None = None
    for dtype in fits:
        model = _model(size, dtype, device)
        least = 1000 * machine(device.type, dtype).least(*_phases(model, inputs))
        sampler = get_sampler(model, True)
        ways: dict[str, Callable[[], torch.Tensor]] = {
            "plain network": partial(sample_plain, model, inputs, model.flow.steps),
            "fast": partial(sample_fast, model, sampler, inputs, model.flow.steps, False),
        }
        if device.type == "cuda":
            ways["fast, as a CUDA graph"] = partial(
                sample_fast, model, sampler, inputs, model.flow.steps, True
            )
        for name, run in ways.items():
            word = str(dtype).removeprefix("torch.")
            try:
                found, held = _held(run, device)
                times = [1000 * seconds(run, device.type) for _ in range(repeats)]
            except Exception as error:  # whatever a compiler may raise
                yield Way(name, word, problem=summarize_error(error))
                continue
            truth = found if truth is None else truth
            apart = relative_difference(found, truth)
            problem = (
                ""
                if apart <= MAX_RELATIVE_DIFFERENCE[dtype]
                else f"more than {MAX_RELATIVE_DIFFERENCE[dtype]:g} from the plain network"
            )
            yield Way(
                name, word, statistics.median(times), least, apart, held, planned[dtype], problem
            )
        del model, sampler, ways, run  # else the next type's memory has this one's in it


def _model(size: Preset, dtype: torch.dtype, device: torch.device) -> Any:
    if size.name == "nano":
        return load(Spear1ForActionPrediction, BUNDLED_WEIGHTS / "nano", dtype).eval().to(device)
    torch.manual_seed(0)
    with device:  # and in this type from the start: a large model would not fit twice
        return AutoModel.from_config(build_spear1_config(size), dtype=dtype).eval()


def _observation(size: Preset, device: torch.device) -> Inputs:
    """One of all views, without padding: arguments of `sampling.sample_actions`."""
    draw = torch.Generator().manual_seed(0)
    given: dict[str, torch.Tensor] = {
        f"pixels/{view}": torch.randint(
            0, 256, (1, 3, height, width), generator=draw, dtype=torch.uint8
        )
        for view, (width, height) in size.image_sizes.items()
    }
    given["input_ids"] = torch.randint(3, size.vocabulary, (1, TEXT), generator=draw)
    given["state"] = torch.zeros(1, NUM_STATE_FEATURES)
    given["noise"] = sample_noise((1, size.horizon), FlowConfig(**size.flow), draw).to_vector()
    return {name: tensor.to(device) for name, tensor in given.items()}


def _phases(model: Any, inputs: Inputs) -> list[tuple[float, float]]:
    """(operations, bytes of weights) of the prefix and of each flow step."""
    wide = model.action_out_proj.weight.element_size()
    expert = sum(p.numel() for p in model.expert.parameters())
    whole = sum(p.numel() for n, p in model.vlm.named_parameters() if "embed_tokens" not in n)
    flops = []
    for count in (1, 2):
        with FlopCounterMode(display=False) as counter:
            sample_plain(model, inputs, count)
        flops.append(counter.get_total_flops())
    step = flops[1] - flops[0]
    return [(flops[0] - step, whole * wide), *[(step, expert * wide)] * model.flow.steps]


def _held(run: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, int | None]:
    """What a run gives, after one to warm up, and the most memory that was taken."""
    first = run()
    if device.type != "cuda":
        return first, None
    torch.cuda.reset_peak_memory_stats(device)
    return run(), int(torch.cuda.max_memory_allocated(device))
