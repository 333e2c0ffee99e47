"""Shows the progress of long work on stderr: as a bar in a terminal, elsewhere as lines."""

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
    """Counts the finished items of some work, and shows the count inside the `with` block.

    Args:
        name: name of the work.
        total: number of all items.
        unit: the word for the items, in the plural.
        num_done_before: how many of the items an earlier command has done. They do not count for
            the rate.
    """

    def __init__(
        self, name: str, total: int, unit: str = "steps", num_done_before: int = 0
    ) -> None:
        self.name = name
        self.unit = unit
        self.total = total
        self.num_done_before = num_done_before
        self.num_done = num_done_before
        self._info = ""
        self._num_lines = 0
        self._start_time_s = time.monotonic()
        self._last_line_time_s = self._start_time_s
        console = Console(file=sys.stderr)
        self._bar = Progress(
            BarColumn(bar_width=20),  # characters
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            console=console,
            disable=not console.is_terminal,
            refresh_per_second=2,  # drawing takes time from the work
        )
        self._task = self._bar.add_task(name, total=total)

    def __enter__(self) -> Self:
        self._start_time_s = time.monotonic()
        self._last_line_time_s = self._start_time_s
        self.set_num_done(self.num_done_before)
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        has_logged = self._num_lines > 0
        if has_logged:
            self._log_line()  # the last line shows where the work ended
        self._bar.stop()

    def set_num_done(self, num_done: int, info: str = "") -> None:
        """Set the number of finished items, and a text that is shown after the count."""
        self.num_done = num_done
        self._info = info
        is_terminal = not self._bar.disable
        if is_terminal:
            self._bar.update(self._task, completed=num_done, description=self.format_line())
        elif time.monotonic() - self._last_line_time_s > LOG_INTERVAL_S:
            self._log_line()

    def print_line(self, line: str) -> None:
        """Print a line, in a terminal above the bar.

        While the bar is shown, rich replaces `sys.stderr` by a file that removes the bar, writes
        the line and draws the bar again below it.
        """
        print(escape_control_characters(line), file=sys.stderr, flush=True)

    def format_line(self) -> str:
        """Return a line such as "training: 100 of 1,000 steps, 5.0 steps/s, 0:03:00 left"."""
        phrases = [
            f"{self.name}: {self.num_done:,} of {format_count(self.total, self.unit)}",
            self.format_rate(),
            self._format_remaining_time(),
            self._info,
        ]
        return ", ".join(phrase for phrase in phrases if phrase)

    def format_rate(self) -> str:
        """Return how fast this command works, such as "5.0 steps/s"; "" before the first item."""
        rate_hz = self._compute_rate_hz()
        if rate_hz == 0:
            return ""
        if rate_hz >= 1:
            return f"{rate_hz:,.1f} {self.unit}/s"
        return f"{60 * rate_hz:.1f} {self.unit}/min"

    def _format_remaining_time(self) -> str:
        """Return the remaining time, such as "0:03:00 left"; "" if it is not known."""
        rate_hz = self._compute_rate_hz()
        if self.num_done >= self.total or not rate_hz:
            return ""
        remaining_s = round((self.total - self.num_done) / rate_hz)
        minutes, seconds = divmod(remaining_s, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d} left"

    def _compute_rate_hz(self) -> float:
        """Return the number of items that this command finishes per second."""
        elapsed_s = time.monotonic() - self._start_time_s
        return (self.num_done - self.num_done_before) / max(elapsed_s, 1e-9)

    def _log_line(self) -> None:
        """Write the present state as a line."""
        self.print_line(self.format_line())
        self._last_line_time_s = time.monotonic()
        self._num_lines += 1


def track_progress(items: Iterable[T], bar: ProgressBar) -> Iterator[T]:
    """Yield the items, and count each one when the next is asked for."""
    with bar:
        for num_done, item in enumerate(items, bar.num_done + 1):
            yield item
            bar.set_num_done(num_done)
