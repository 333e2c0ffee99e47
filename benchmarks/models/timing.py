"""Timing contenders against each other."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from spear import doctor
from spear.errors import summarize_error


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
    return doctor.measure_seconds(run, device, processor)


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
            failed[name] = summarize_error(error)[:60]
    for _ in range(repeats):
        for name in found:
            found[name].append(1000 * seconds(contenders[name], device, processor))
    return {name: Times(found[name]) if name in found else failed[name] for name in contenders}
