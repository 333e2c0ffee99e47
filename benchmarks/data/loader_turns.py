"""Ways to do the same work, measured in turn: each in processes of its own, which stand still while others
run.

What makes batches ahead would otherwise fill its queue while another way is being measured. Besides the time
that passes, the processor time is taken, which other work on the machine changes little.
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


@dataclass(frozen=True)
class Turn:
    """So many samples in so many seconds, for which all processes together worked so long."""

    samples: int
    seconds: float
    processor: float

    @property
    def rate(self) -> float:
        """Samples per second."""
        return self.samples / self.seconds

    @property
    def cost(self) -> float:
        """Milliseconds of processor time per sample."""
        return 1000 * self.processor / self.samples


class Way(Protocol):
    """Something that is measured for some seconds at a time."""

    def turn(self, seconds: float) -> Turn: ...

    def end(self) -> None: ...


class Forked:
    """A way in Python: what `start` gives yields, again and again, how many samples it has made.

    skip  so many of these at the beginning of each turn are made ahead, and do not count.
    """

    def __init__(self, start: Callable[[], Iterator[int]], skip: int) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, start, skip))
        self.process.start()
        self.pipe.recv()  # it is ready
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.killpg(self.process.pid, number)

    def turn(self, seconds: float) -> Turn:
        self._signal(signal.SIGCONT)
        self.pipe.send(seconds)
        found: Turn = self.pipe.recv()
        self._signal(signal.SIGSTOP)
        return found

    def end(self) -> None:
        self._signal(signal.SIGKILL)
        self.process.join()


def _serve(pipe: Any, start: Callable[[], Iterator[int]], skip: int) -> None:
    os.setsid()  # a group of its own: it and all that it starts
    source = start()
    next(source)
    pipe.send("ready")
    while True:
        seconds = pipe.recv()
        for _ in range(skip):
            next(source)
        samples, worked, begun = 0, group_seconds(), time.perf_counter()
        while time.perf_counter() - begun < seconds:
            samples += next(source)
        pipe.send(Turn(samples, time.perf_counter() - begun, group_seconds() - worked))


def group_seconds() -> float:
    """Processor seconds that the living processes of this process's group have taken so far."""
    total, group = 0, str(os.getpgrp())
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = (
                file.read_text().rpartition(")")[2].split()
            )  # from the third on: state, parent, group
        except OSError:  # it has ended
            continue
        if fields[2] == group:
            total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


class Command:
    """A way in another Python. It says "ready"; then for each line with seconds it gives a line with a
    turn."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._line("ready")
        os.killpg(self.process.pid, signal.SIGSTOP)

    def _line(self, sent: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        if sent != "ready":
            self.process.stdin.write(f"{sent}\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args!r}: it ended with {self.process.wait()}")
        return line

    def turn(self, seconds: float) -> Turn:
        os.killpg(self.process.pid, signal.SIGCONT)
        samples, took, worked = self._line(str(seconds)).split()
        os.killpg(self.process.pid, signal.SIGSTOP)
        return Turn(int(samples), float(took), float(worked))

    def end(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def in_turn(ways: Mapping[str, Way], rounds: int, seconds: float) -> dict[str, list[Turn]]:
    """Each way once per round, forwards and backwards, so that a slow change of the machine meets all
    alike."""
    taken: dict[str, list[Turn]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways)[:: -1 if number % 2 else 1]:
            taken[name].append(ways[name].turn(seconds))
    return taken


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} … {max(values):.2f})"


def table(taken: Mapping[str, Sequence[Turn]], ours: str, goals: Mapping[str, str]) -> str:
    """A Markdown table: rates, costs, and the ratio of ours to each way, round by round."""
    lines = [
        "| way | samples/s | processor ms per sample | ours ÷ it, samples/s | its ÷ our processor "
        "time | goal |",
        "|---|---|---|---|---|---|",
    ]
    for name, turns in taken.items():
        pairs = list(zip(taken[ours], turns, strict=True))
        rate, cost = (
            statistics.median(t) for t in ([t.rate for t in turns], [t.cost for t in turns])
        )
        rates = "" if name == ours else spread([mine.rate / it.rate for mine, it in pairs])
        costs = "" if name == ours else spread([it.cost / mine.cost for mine, it in pairs])
        lines.append(
            f"| {name} | {rate:.0f} | {cost:.2f} | {rates} | {costs} | {goals.get(name, '')} |"
        )
    return "\n".join(lines)
