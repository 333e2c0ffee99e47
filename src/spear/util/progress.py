"""How far long work is, with rate and time left, on stderr: a bar in a terminal, else now and then a line."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from spear.errors import format_count

T = TypeVar("T")
LOG_INTERVAL_S = 30.0
"""Seconds between the lines in a log (our choice)."""


class ProgressBar:
    """Counts what is done of some work, and shows it from `with` on.

    total   how many there are to do.
    unit    what is counted, as a plural.
    num_done_before  how many of them an earlier command had done; they count as done, but not for the rate.
    """

    def __init__(
        self, name: str, total: int, unit: str = "steps", num_done_before: int = 0
    ) -> None:
        console = Console(file=sys.stderr)
        self.name, self.unit, self._info, self._lines = name, unit, "", 0
        self._bar = Progress(
            BarColumn(20),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            console=console,
            disable=not console.is_terminal,
            refresh_per_second=2,  # drawing takes time from the work
        )
        self._row = self._bar.add_task(name, total=total)
        self.total, self.num_done_before, self.done = total, num_done_before, num_done_before
        self._begun = self._said = time.monotonic()

    def __enter__(self) -> Self:
        self._begun = self._said = time.monotonic()
        self.update(self.num_done_before)
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._lines:
            self._line()  # where it ended
        self._bar.stop()

    def update(self, done: int, info: str = "") -> None:
        """So many are done. info: what else there is to say."""
        self.done, self._info = done, info
        if not self._bar.disable:
            self._bar.update(self._row, completed=done, description=self.format_line())
        elif time.monotonic() - self._said > LOG_INTERVAL_S:
            self._line()

    def print_line(self, line: str) -> None:
        """A line of its own beside the bar."""
        print(line, file=sys.stderr, flush=True)

    def format_line(self) -> str:
        """All of it in words."""
        per_second, left = self._per_second(), ""
        if self.done < self.total and per_second:
            minutes, seconds = divmod(round((self.total - self.done) / per_second), 60)
            left = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"
        done = f"{self.name}: {self.done:,} of {format_count(self.total, self.unit)}"
        return ", ".join(filter(None, [done, self.format_rate(), left, self._info]))

    def format_rate(self) -> str:
        """How fast this command does it, in words; nothing as long as nothing was done."""
        rate = self._per_second()
        if rate >= 1 or rate == 0:
            return f"{rate:,.1f} {self.unit}/s" if rate else ""
        return f"{60 * rate:.1f} {self.unit}/min"

    def _per_second(self) -> float:
        return (self.done - self.num_done_before) / max(time.monotonic() - self._begun, 1e-9)

    def _line(self) -> None:
        self.print_line(self.format_line())
        self._said, self._lines = time.monotonic(), self._lines + 1


def track_progress(items: Iterable[T], bar: ProgressBar) -> Iterator[T]:
    """The same items, counted by a bar as the next one is asked for."""
    with bar:
        for done, item in enumerate(items, bar.done + 1):
            yield item
            bar.update(done)
