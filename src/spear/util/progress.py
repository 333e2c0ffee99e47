"""How far long work is, with rate and time left, on stderr: a bar in a terminal, in a log a line now and
then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

T = TypeVar("T")
EVERY = 30.0
"""Seconds between the lines in a log (our choice)."""


class ProgressBar:
    """Counts what is done of some work, and shows it from `with` on.

    name    what is being done.
    total   how many there are to do; None where that is known later (`begin`).
    unit    what is counted, as a plural.
    before  how many of them an earlier command had done; they count as done, but not for the rate.
    quiet   show nothing.
    """

    def __init__(
        self, name: str, total: int | None = None, unit: str = "steps", before: int = 0, quiet: bool = False
    ) -> None:
        console = Console(file=sys.stderr)
        self.name, self.total, self.unit, self.before, self.done = name, total, unit, before, before
        self._terminal, self._quiet = console.is_terminal and not quiet, quiet
        self._bar = Progress(
            BarColumn(20),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            console=console,
            disable=not self._terminal,
            refresh_per_second=2,  # drawing takes time from the work
        )
        self._row = self._bar.add_task(name, total=total, completed=before)
        self._begun = self._said = time.monotonic()
        self._info, self._lines = "", 0

    def __enter__(self) -> ProgressBar:
        self._begun = self._said = time.monotonic()
        self._draw()
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._lines:
            self._line()  # where it ended
        self._bar.stop()

    def begin(self, total: int, before: int = 0) -> None:
        """The work itself begins only now, and there is so much of it."""
        self.total, self.before, self.done = total, before, before
        self._begun = time.monotonic()
        self._draw()

    def update(self, done: int, info: str = "") -> None:
        """So many are done. info: what else there is to say."""
        self.done, self._info = done, info
        self._draw()
        if not self._terminal and not self._quiet and time.monotonic() - self._said > EVERY:
            self._line()

    def say(self, line: str) -> None:
        """A line of its own beside the bar, also where that is quiet."""
        print(line, file=sys.stderr, flush=True)

    def text(self) -> str:
        """All of it in words."""
        of = "" if self.total is None else f" of {self.total:,}"
        parts = [f"{self.name}: {self.done:,}{of} {self.unit}", self.rate(), self._left(), self._info]
        return ", ".join(part for part in parts if part)

    def rate(self) -> str:
        """How fast this command does it, in words; nothing as long as nothing was done."""
        rate = self._per_second()
        if rate >= 1 or rate == 0:
            return f"{rate:,.1f} {self.unit}/s" if rate else ""
        return f"{60 * rate:.1f} {self.unit}/min"

    def _per_second(self) -> float:
        return (self.done - self.before) / max(time.monotonic() - self._begun, 1e-9)

    def _left(self) -> str:
        if self.total is None or self.done >= self.total or not self._per_second():
            return ""
        minutes, seconds = divmod(round((self.total - self.done) / self._per_second()), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"

    def _draw(self) -> None:
        if self._terminal:
            self._bar.update(self._row, completed=self.done, total=self.total, description=self.text())

    def _line(self) -> None:
        self.say(self.text())
        self._said, self._lines = time.monotonic(), self._lines + 1


def tracked(items: Iterable[T], bar: ProgressBar) -> Iterator[T]:
    """The same items, counted by a bar as the next one is asked for."""
    with bar:
        for done, item in enumerate(items, bar.done + 1):
            yield item
            bar.update(done)
