"""Progress of long work on stderr: a bar in a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from spear.errors import escape_control_characters, format_count

T = TypeVar("T")
LOG_INTERVAL_S = 30.0  # between the lines in a log (our choice)


class ProgressBar:
    """Counts finished items of some work, and shows the count inside its `with` block.

    Args:
        name: of the work.
        total: number of items to do.
        unit: what is counted, as a plural.
        num_done_before: how many of them an earlier command has done. They do not count for the
            rate.
    """

    def __init__(
        self, name: str, total: int, unit: str = "steps", num_done_before: int = 0
    ) -> None:
        self.name = name
        self.unit = unit
        self.total = total
        self.num_done_before = num_done_before
        self.done = num_done_before
        self._info = ""
        self._num_lines = 0
        self._start_time_s = time.monotonic()
        self._last_line_time_s = self._start_time_s
        console = Console(file=sys.stderr)
        self._bar = Progress(
            BarColumn(20),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            console=console,
            disable=not console.is_terminal,
            refresh_per_second=2,  # drawing takes time from the work
        )
        self._task = self._bar.add_task(name, total=total)

    def __enter__(self) -> Self:
        self._start_time_s = time.monotonic()
        self._last_line_time_s = self._start_time_s
        self.update(self.num_done_before)
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._num_lines:
            self._log_line()  # shows where the work ended
        self._bar.stop()

    def update(self, done: int, info: str = "") -> None:
        """Set the number of finished items, and what else to show."""
        self.done = done
        self._info = info
        if not self._bar.disable:
            self._bar.update(self._task, completed=done, description=self.format_line())
        elif time.monotonic() - self._last_line_time_s > LOG_INTERVAL_S:
            self._log_line()

    def print_line(self, line: str) -> None:
        """Print a line above the bar."""
        print(escape_control_characters(line), file=sys.stderr, flush=True)

    def format_line(self) -> str:
        """All that is known: "training: 100 of 1,000 steps, 5.0 steps/s, 0:03:00 left"."""
        phrases = [
            f"{self.name}: {self.done:,} of {format_count(self.total, self.unit)}",
            self.format_rate(),
            self._format_remaining_time(),
            self._info,
        ]
        return ", ".join(phrase for phrase in phrases if phrase)

    def format_rate(self) -> str:
        """How fast this command works, "5.0 steps/s"; empty before the first item."""
        rate_hz = self._rate_hz()
        if rate_hz == 0:
            return ""
        if rate_hz >= 1:
            return f"{rate_hz:,.1f} {self.unit}/s"
        return f"{60 * rate_hz:.1f} {self.unit}/min"

    def _format_remaining_time(self) -> str:
        rate_hz = self._rate_hz()
        if self.done >= self.total or not rate_hz:
            return ""
        minutes, seconds = divmod(round((self.total - self.done) / rate_hz), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d} left"

    def _rate_hz(self) -> float:
        elapsed_s = time.monotonic() - self._start_time_s
        return (self.done - self.num_done_before) / max(elapsed_s, 1e-9)

    def _log_line(self) -> None:
        self.print_line(self.format_line())
        self._last_line_time_s = time.monotonic()
        self._num_lines += 1


def track_progress(items: Iterable[T], bar: ProgressBar) -> Iterator[T]:
    """Yield the items, and count each one when the next is asked for."""
    with bar:
        for num_done, item in enumerate(items, bar.done + 1):
            yield item
            bar.update(num_done)
