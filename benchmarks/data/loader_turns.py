"""Loaders of the same data, measured in turns: each in its own processes, which pause meanwhile.

A loader that makes batches ahead would otherwise fill its queue while another one is measured.
Besides the time that passes, the processor time is measured, which other work on the machine
changes little.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

READY = "ready"  # what a loader says before its first turn


@dataclass(frozen=True)
class Turn:
    """One measurement; the processor time is that of all processes of the loader."""

    num_samples: int
    duration_s: float
    processor_s: float

    @property
    def rate(self) -> float:
        """Samples per second."""
        return self.num_samples / self.duration_s

    @property
    def cost_ms(self) -> float:
        """Processor time per sample."""
        return 1000 * self.processor_s / self.num_samples


class Loader(Protocol):
    """A loader that is measured for some seconds at a time."""

    def run_turn(self, duration_s: float) -> Turn: ...

    def stop(self) -> None: ...


class ForkedLoader:
    """A loader in Python.

    Args:
        start: Makes an iterator that yields, again and again, how many samples it has loaded.
        num_skipped: How many of its first batches of each turn were made ahead, and do not count.
    """

    def __init__(self, start: Callable[[], Iterator[int]], num_skipped: int) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, worker_pipe = context.Pipe()
        self.process = context.Process(target=_serve_turns, args=(worker_pipe, start, num_skipped))
        self.process.start()
        self.pipe.recv()
        self._signal_group(signal.SIGSTOP)

    def _signal_group(self, number: int) -> None:
        assert self.process.pid is not None
        os.killpg(self.process.pid, number)

    def run_turn(self, duration_s: float) -> Turn:
        self._signal_group(signal.SIGCONT)
        self.pipe.send(duration_s)
        turn: Turn = self.pipe.recv()
        self._signal_group(signal.SIGSTOP)
        return turn

    def stop(self) -> None:
        self._signal_group(signal.SIGKILL)
        self.process.join()


def _serve_turns(pipe: Any, start: Callable[[], Iterator[int]], num_skipped: int) -> None:
    """Run turns on request, in a process group with all processes that the loader starts."""
    os.setsid()
    source = start()
    next(source)
    pipe.send(READY)
    while True:
        duration_s = pipe.recv()
        for _ in range(num_skipped):
            next(source)

        num_samples = 0
        processor_start_s = measure_group_processor_s()
        start_s = time.perf_counter()
        while time.perf_counter() - start_s < duration_s:
            num_samples += next(source)
        measured_s = time.perf_counter() - start_s
        processor_s = measure_group_processor_s() - processor_start_s
        pipe.send(Turn(num_samples, measured_s, processor_s))


def measure_group_processor_s() -> float:
    """Processor time that the living processes of this process group have used so far."""
    total_ticks = 0
    group = str(os.getpgrp())
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = file.read_text()
        except OSError:  # the process has ended
            continue
        # From the third field on: state, parent, group, …; the 14th and 15th are processor times.
        fields = text.rpartition(")")[2].split()
        if fields[2] == group:
            user_ticks = int(fields[11])
            system_ticks = int(fields[12])
            total_ticks += user_ticks + system_ticks
    return total_ticks / os.sysconf("SC_CLK_TCK")


class CommandLoader:
    """A loader in another Python.

    It prints "ready". For each line with seconds that it reads it then prints a line with a turn.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._read_line()
        os.killpg(self.process.pid, signal.SIGSTOP)

    def _read_line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args!r}: it ended with {self.process.wait()}")
        return line

    def run_turn(self, duration_s: float) -> Turn:
        assert self.process.stdin is not None
        os.killpg(self.process.pid, signal.SIGCONT)
        self.process.stdin.write(f"{duration_s}\n")
        self.process.stdin.flush()
        num_samples, measured_s, processor_s = self._read_line().split()
        os.killpg(self.process.pid, signal.SIGSTOP)
        return Turn(int(num_samples), float(measured_s), float(processor_s))

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def measure_in_turns(
    loaders: Mapping[str, Loader], num_rounds: int, duration_s: float
) -> dict[str, list[Turn]]:
    """Measure each loader once per round.

    Every second round goes backwards, so that a slow change of the machine affects all of them
    alike.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in loaders}
    for round_number in range(num_rounds):
        names = list(loaders)
        if round_number % 2:
            names.reverse()
        for name in names:
            turns[name].append(loaders[name].run_turn(duration_s))
    return turns


def format_spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} … {max(values):.2f})"


def format_table(
    turns: Mapping[str, Sequence[Turn]], reference: str, goals: Mapping[str, str]
) -> str:
    """A Markdown table of rates, costs, and ratios of the reference to each loader."""
    lines = [
        "| loader | samples/s | processor ms per sample | ours ÷ it, samples/s "
        "| its ÷ our processor time | goal |",
        "|---|---|---|---|---|---|",
    ]
    for name, loader_turns in turns.items():
        rate = statistics.median(turn.rate for turn in loader_turns)
        cost_ms = statistics.median(turn.cost_ms for turn in loader_turns)
        rate_ratio = ""
        cost_ratio = ""
        if name != reference:
            rate_ratios: list[float] = []
            cost_ratios: list[float] = []
            for reference_turn, turn in zip(turns[reference], loader_turns, strict=True):
                rate_ratios.append(reference_turn.rate / turn.rate)
                cost_ratios.append(turn.cost_ms / reference_turn.cost_ms)
            rate_ratio = format_spread(rate_ratios)
            cost_ratio = format_spread(cost_ratios)
        goal = goals.get(name, "")
        lines.append(
            f"| {name} | {rate:.0f} | {cost_ms:.2f} | {rate_ratio} | {cost_ratio} | {goal} |"
        )
    return "\n".join(lines)
