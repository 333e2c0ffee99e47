"""Timing contenders against each other."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from spear import doctor
from spear.errors import summarize_error

MAX_ERROR_LENGTH = 60


@dataclass(frozen=True)
class Times:
    """Milliseconds of repeated runs."""

    runs_ms: list[float]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.runs_ms)

    def __str__(self) -> str:
        return f"{self.median_ms:.1f} ({min(self.runs_ms):.1f}–{max(self.runs_ms):.1f})"


class RemoteContender:
    """A contender in another process: calling it runs it there once, and sets its times.

    clock_s      seconds by the clock.
    processor_s  seconds of processor time.
    """

    clock_s: float
    processor_s: float

    def __call__(self) -> object:
        raise NotImplementedError


def measure_seconds(run: Callable[[], object], device: str, use_processor_time: bool) -> float:
    """Measure one run; see `spear.doctor.measure_one_run_s`."""
    if isinstance(run, RemoteContender):
        run()
        return run.processor_s if use_processor_time else run.clock_s
    return doctor.measure_one_run_s(run, device, use_processor_time)


def race(
    contenders: Mapping[str, Callable[[], object]],
    device: str,
    repeats: int,
    use_processor_time: bool = False,
    num_warm_ups: int = 2,
) -> dict[str, Times | str]:
    """Measure contenders, one run of each in turn, so that a change of the machine's speed meets
    all.

    Returns the times of each; of a contender that fails, the first line of its error.
    """
    runs_ms: dict[str, list[float]] = {}
    failures: dict[str, str] = {}
    for name, run in contenders.items():
        try:
            for _ in range(num_warm_ups):
                run()
        except Exception as error:  # whatever another project's code may raise
            failures[name] = summarize_error(error)[:MAX_ERROR_LENGTH]
        else:
            runs_ms[name] = []

    for _ in range(repeats):
        for name in runs_ms:
            seconds = measure_seconds(contenders[name], device, use_processor_time)
            runs_ms[name].append(1000 * seconds)

    results: dict[str, Times | str] = {}
    for name in contenders:
        results[name] = Times(runs_ms[name]) if name in runs_ms else failures[name]
    return results


def format_ratio(numerator: Times | str | None, denominator: Times | str | float | None) -> str:
    """Return the ratio of two medians, "–" where one is missing."""
    if isinstance(denominator, Times):
        denominator = denominator.median_ms
    if not isinstance(numerator, Times) or not isinstance(denominator, float):
        return "–"
    return f"{numerator.median_ms / denominator:.2f}"


def format_row(cells: list[str]) -> str:
    """Return a line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def format_header(names: list[str]) -> str:
    """Return the first two lines of a Markdown table."""
    return format_row(names) + "\n|" + "---|" * len(names)
