"""Timing contenders against each other, and what the machine could do at most."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from spear.models.fast.linear import linear


@dataclass(frozen=True)
class Times:
    """Milliseconds of repeated runs."""

    all: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.all)

    def __str__(self) -> str:
        return f"{self.median:.1f} ({min(self.all):.1f}–{max(self.all):.1f})"


class Elsewhere:
    """A contender in another process: calling it runs it there once; `took` is what that took, by either
    clock.

    took  seconds of (the clock, the processor).
    """

    took: tuple[float, float]

    def __call__(self) -> object:
        raise NotImplementedError


def seconds(run: Callable[[], object], device: str, processor: bool) -> float:
    """One run. processor: processor time of all threads, which other work on the machine changes less."""
    if isinstance(run, Elsewhere):
        run()
        return run.took[processor]
    clock = time.process_time if processor else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    begun = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - begun


def race(
    contenders: Mapping[str, Callable[[], object]],
    device: str,
    repeats: int,
    processor: bool = False,
    warm_ups: int = 2,
) -> dict[str, Times | str]:
    """Each contender's times, one run of each in turn, so that a change of the machine's speed meets all.

    A contender that fails is given as the first line of its error.
    """
    found: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for name, run in contenders.items():
        try:
            for _ in range(warm_ups):
                run()
            found[name] = []
        except Exception as error:  # whatever another project's code may raise
            failed[name] = (str(error) or type(error).__name__).splitlines()[0][:60]
    for _ in range(repeats):
        for name in found:
            found[name].append(1000 * seconds(contenders[name], device, processor))
    return {name: Times(found[name]) if name in found else failed[name] for name in contenders}


@dataclass(frozen=True)
class Machine:
    """What was measured: bytes/s read from memory and floating-point operations/s, in a dtype."""

    bandwidth: float
    peak: float

    def least(self, *phases: tuple[float, float]) -> float:
        """The roofline of phases that follow each other, each of (operations, bytes): seconds."""
        return sum(max(flops / self.peak, moved / self.bandwidth) for flops, moved in phases)


@torch.no_grad()
def machine(device: str, dtype: torch.dtype, processor: bool = False) -> Machine:
    """Measure it: the best of some runs of a large matrix product and of a copy far larger than any cache."""
    side, count = (8192, 2**29) if device == "cuda" else (1536, 2**25)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.ones(count, device=device, dtype=torch.float32)
    target = torch.empty_like(source)

    def best(run: Callable[[], object]) -> float:
        run()
        return min(seconds(run, device, processor) for _ in range(5))

    product = min(best(lambda: a @ b), best(lambda: linear(a, b)))
    copied = best(lambda: target.copy_(source))
    return Machine(bandwidth=2 * source.nbytes / copied, peak=2 * side**3 / product)
