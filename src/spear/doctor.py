"""Examines whether SPEAR-1 is correct and fast on this machine: `spear doctor`.

One observation goes through the plain network in float32, and through every implementation that
can replace it: the fast one, its CUDA graph, and both in bfloat16. The actions of each are compared
with those of the plain network, and its time with the least time that the machine needs for the
same operations.
"""

import math
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
from spear.errors import SpearError, VerdictError, summarize_error
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
from spear.train.memory import GIB, measure_inference_memory

INSTRUCTION_TOKENS = 12  # length of the instruction in the observation
MEMORY_INFO = Path("/proc/meminfo")
NUM_TRIALS = 5  # of each measurement of the machine's speed; the fastest trial counts
# "of the least" is the time in multiples of the least time; the last column says "agrees", or what
# the problem is.
COLUMNS = ["implementation", "type", "ms", "of the least", "difference", "memory of planned", ""]

Phase = tuple[float, float]
"""(floating-point operations, bytes moved) of a part of the computation."""


@dataclass(frozen=True)
class InferenceResult:
    """How fast and how exactly one implementation computes actions.

    Attributes:
        name: the implementation.
        dtype: the type of its weights.
        median_ms: median time for one observation.
        least_ms: time that the machine needs for the operations and for reading the weights.
        difference: `sampling.relative_difference` of its actions from those of the plain network,
            in the first type that fits into memory.
        peak_bytes: GPU memory that was used; None on a CPU.
        planned_bytes: GPU memory that `spear estimate-memory` estimates.
        problem: why the implementation did not run, or that its actions differ too much; otherwise
            empty.
    """

    name: str
    dtype: str
    median_ms: float = float("nan")
    least_ms: float = float("nan")
    difference: float = float("nan")
    peak_bytes: int | None = None
    planned_bytes: int = 0
    problem: str = ""

    def to_row(self) -> list[str]:
        """Return a row of the table with `COLUMNS`."""
        did_run = not math.isnan(self.median_ms)
        if not did_run:
            return [self.name, self.dtype, "–", "–", "–", "–", self.problem]
        memory = "–"
        if self.peak_bytes is not None:
            memory = f"{self.peak_bytes / GIB:.2f} of {self.planned_bytes / GIB:.2f} GiB"
        return [
            self.name,
            self.dtype,
            f"{self.median_ms:.1f}",
            f"{self.median_ms / self.least_ms:.1f} ×",
            f"{self.difference:.1g}",
            memory,
            self.problem or "agrees",
        ]


@dataclass(frozen=True)
class MachineSpeed:
    """The measured speed of a machine with one type of numbers.

    Attributes:
        bytes_per_s: bytes that a copy reads from memory and writes to it, per second.
        flops_per_s: floating-point operations of a matrix product, per second.
    """

    bytes_per_s: float
    flops_per_s: float

    def compute_least_seconds(self, *phases: Phase) -> float:
        """Return the least time in which the machine can compute phases one after the other.

        In each phase the machine computes and moves bytes at the same time, so the slower of the
        two counts (the roofline model).
        """
        total_s = 0.0
        for flops, moved_bytes in phases:
            total_s += max(flops / self.flops_per_s, moved_bytes / self.bytes_per_s)
        return total_s


class DisagreementError(VerdictError):
    """On this machine an implementation computes other actions than the plain network."""

    code = 1


def measure_one_run_s(
    run: Callable[[], object], device: str, use_processor_time: bool = False
) -> float:
    """Measure the seconds of one call of `run`, without a call before it to warm up.

    Args:
        run: the function to measure.
        device: type of the device on which it computes, "cpu" or "cuda".
        use_processor_time: whether to sum the processor time of all threads, which other work on
            the machine changes less than the time on the clock.
    """
    clock = time.process_time if use_processor_time else time.perf_counter
    if device == "cuda":  # a GPU works asynchronously
        torch.cuda.synchronize()
    start_s = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start_s


@torch.no_grad()
def measure_machine(
    device: str, dtype: torch.dtype, use_processor_time: bool = False
) -> MachineSpeed:
    """Measure the machine's speed by a large matrix product, and a copy larger than any cache.

    Args:
        device: type of the device, "cpu" or "cuda".
        dtype: type of the numbers of the matrix product.
        use_processor_time: as for `measure_one_run_s`.
    """

    def measure_best(run: Callable[[], object]) -> float:
        """Return the shortest of some runs, in seconds."""
        run()  # to warm up
        return min(measure_one_run_s(run, device, use_processor_time) for _ in range(NUM_TRIALS))

    # On a processor without instructions for bfloat16, a larger product would take seconds.
    is_slow = dtype == torch.bfloat16 and not HAS_BFLOAT16
    side = 512 if is_slow else 1536  # of the square matrices
    num_copied = 2**25  # numbers of 4 bytes
    if device == "cuda":
        side = 8192
        num_copied = 2**29

    first = torch.randn(side, side, device=device).to(dtype)
    second = torch.randn(side, side, device=device).to(dtype)
    # The faster of PyTorch's product and ours counts.
    product_s = min(
        measure_best(lambda: first @ second), measure_best(lambda: linear(first, second))
    )
    source = torch.ones(num_copied, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    copy_s = measure_best(lambda: target.copy_(source))
    copied_bytes = 2 * source.nbytes  # read and written
    product_flops = 2 * side**3  # a multiplication and an addition for each of side³ terms
    return MachineSpeed(bytes_per_s=copied_bytes / copy_s, flops_per_s=product_flops / product_s)


def list_machine_facts(preset: Preset, device: torch.device) -> list[tuple[str, str]]:
    """Return what is examined (software, processor, GPU, model), as pairs of name and text."""
    packages = [f"spear {spear.__version__}"]
    packages += [f"{name} {version(name)}" for name in ("torch", "transformers")]
    facts = [("software", f"Python {platform.python_version()}, {', '.join(packages)}")]

    match = re.search(r"^model name\s*: *(.+)", CPU_INFO, re.MULTILINE)
    processor = match[1].strip() if match else platform.machine()
    facts.append(
        ("processor", f"{processor}, cores: {os.cpu_count()}, threads: {torch.get_num_threads()}")
    )
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        driver = f"CUDA {torch.version.cuda}, compute capability {gpu.major}.{gpu.minor}"
        facts.append(("device", f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, {driver}"))

    if is_bfloat16_fast(device):
        facts.append(("bfloat16", f"faster matrix products than in float32 on {device.type}"))
    else:
        facts.append(("bfloat16", f"only saves memory, compared with float32 on {device.type}"))

    weights = "the weights of this package" if preset.name == "nano" else "random weights"
    steps = FlowConfig(**preset.flow).steps
    model = f"{preset.name}, {weights}, {steps} flow steps, one observation of all views"
    facts.append(("model", model))
    return facts


def measure_implementations(
    preset: Preset, device: torch.device, repeats: int = 10
) -> Iterator[InferenceResult]:
    """Yield the result of each implementation on this device, the plain network first.

    All implementations are examined in float32, if that fits into memory, and in bfloat16. For
    nano, the weights are those that come with this package; for other presets they are random.

    Args:
        preset: the preset of the model.
        device: the device.
        repeats: number of timed runs of each implementation.

    Raises:
        SpearError: the model does not even fit into memory in bfloat16.
    """
    planned_bytes = {
        dtype: measure_inference_memory(preset, dtype).total
        for dtype in (torch.float32, torch.bfloat16)
    }
    free_bytes = _read_free_bytes(device)
    fitting_dtypes = [dtype for dtype, needed in planned_bytes.items() if needed < free_bytes]
    if not fitting_dtypes:
        needed_gib = planned_bytes[torch.bfloat16] / GIB
        raise SpearError(
            f"preset {preset.name} needs {needed_gib:.1f} GiB, and {device} "
            f"has {free_bytes / GIB:.1f}. Give a smaller preset with --preset."
        )

    inputs = _make_observation(preset, device)
    expected: torch.Tensor | None = None
    for dtype in fitting_dtypes:
        model = _load_or_make_model(preset, dtype, device)
        speed = measure_machine(device.type, dtype)
        least_ms = 1000 * speed.compute_least_seconds(*_measure_phase_costs(model, inputs))
        implementations = _list_implementations(model, inputs)
        for name, run in implementations.items():
            dtype_name = str(dtype).removeprefix("torch.")
            try:
                actions, peak_bytes = _run_and_measure_memory(run, device)
                times_ms = [1000 * measure_one_run_s(run, device.type) for _ in range(repeats)]
            except Exception as error:  # a compiler may raise errors of any type
                yield InferenceResult(name, dtype_name, problem=summarize_error(error))
                continue
            if expected is None:  # the first result is that of the plain network
                expected = actions
            difference = relative_difference(actions, expected)
            yield InferenceResult(
                name,
                dtype_name,
                median_ms=statistics.median(times_ms),
                least_ms=least_ms,
                difference=difference,
                peak_bytes=peak_bytes,
                planned_bytes=planned_bytes[dtype],
                problem=_explain_large_difference(difference, dtype),
            )
        # Otherwise this model would count in the measured memory of the next type.
        del model, implementations, run


def _read_free_bytes(device: torch.device) -> float:
    """Return the free memory of the device.

    On a CPU this includes memory that the system frees when a program needs it. If the system does
    not say, the result is all of the machine's memory.
    """
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return free_bytes
    text = MEMORY_INFO.read_text("utf-8") if MEMORY_INFO.is_file() else ""
    match = re.search(r"MemAvailable: *(\d+)", text)  # in KiB
    if match is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 1024 * int(match[1])


def _list_implementations(model: Any, inputs: Inputs) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the functions that compute actions, by the name of the implementation."""
    steps = model.flow_config.steps
    packed = True  # as in `sample_actions` without autocast
    sampler = get_sampler(model, packed)
    fast = partial(sample_fast, model, sampler, inputs, steps)
    implementations: dict[str, Callable[[], torch.Tensor]] = {
        "plain network": partial(sample_plain, model, inputs, steps),
        "fast": partial(fast, use_graph=False),
    }
    if inputs["noise"].device.type == "cuda":
        fast_as_graph = partial(fast, use_graph=True)
        implementations["fast, as a CUDA graph"] = fast_as_graph
    return implementations


def _explain_large_difference(difference: float, dtype: torch.dtype) -> str:
    """Say that a difference from the plain network is too large; "" if it is not."""
    max_difference = MAX_RELATIVE_DIFFERENCE[dtype]
    if difference <= max_difference:
        return ""
    return f"more than {max_difference:g} from the plain network"


def _load_or_make_model(preset: Preset, dtype: torch.dtype, device: torch.device) -> Any:
    """Return the shipped model for nano, and a model with random weights for other presets."""
    if preset.name == "nano":
        return load(Spear1ForActionPrediction, BUNDLED_WEIGHTS / "nano", dtype).eval().to(device)
    torch.manual_seed(0)
    with device:  # made on its device and in its type, because a large model would not fit twice
        return AutoModel.from_config(build_spear1_config(preset), dtype=dtype).eval()


def _make_observation(preset: Preset, device: torch.device) -> Inputs:
    """Return the inputs of `sampling.sample_actions` for one random observation.

    The observation has all views of the preset, and its instruction has no padding.
    """
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, torch.Tensor] = {}
    for view, (width, height) in preset.image_sizes.items():
        inputs[f"pixels/{view}"] = torch.randint(
            0, 256, (1, 3, height, width), generator=generator, dtype=torch.uint8
        )
    # Token ids from 3 on are words; smaller ids are special tokens, such as padding.
    ids = torch.randint(3, preset.vocabulary_size, (1, INSTRUCTION_TOKENS), generator=generator)
    noise = sample_noise((1, preset.horizon), FlowConfig(**preset.flow), generator)
    inputs["input_ids"] = ids
    inputs["state"] = torch.zeros(1, NUM_STATE_FEATURES)
    inputs["noise"] = noise.to_vector()
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _measure_phase_costs(model: Any, inputs: Inputs) -> list[Phase]:
    """Return the phases of one inference: the prefix, which the VLM reads, and each flow step.

    Each phase has its floating-point operations, and the bytes of the weights that it reads.
    """
    # Two inferences that differ by one flow step tell what this step costs, and thereby what the
    # prefix costs, which both read once.
    total_flops = []
    for num_steps in (1, 2):
        with FlopCounterMode(display=False) as counter:
            sample_plain(model, inputs, num_steps)
        total_flops.append(counter.get_total_flops())
    one_step_total, two_steps_total = total_flops
    step_flops = two_steps_total - one_step_total
    prefix_flops = one_step_total - step_flops

    bytes_per_weight = model.action_out_proj.weight.element_size()
    num_expert_weights = sum(parameter.numel() for parameter in model.expert.parameters())
    num_vlm_weights = 0
    for name, parameter in model.vlm.named_parameters():
        if "embed_tokens" not in name:  # only a few rows of the embedding table are read
            num_vlm_weights += parameter.numel()
    prefix = (prefix_flops, num_vlm_weights * bytes_per_weight)
    step = (step_flops, num_expert_weights * bytes_per_weight)
    return [prefix] + [step] * model.flow_config.steps


def _run_and_measure_memory(
    run: Callable[[], torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, int | None]:
    """Run an implementation to warm up, then once more on a GPU, and measure its memory.

    Returns:
        The actions, and the most GPU memory in bytes that the second run used; None on a CPU.
    """
    actions = run()
    if device.type != "cuda":
        return actions, None
    torch.cuda.reset_peak_memory_stats(device)
    return run(), int(torch.cuda.max_memory_allocated(device))
