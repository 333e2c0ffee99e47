"""What a long command says while it works."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from rich import progress
from rich.console import Console

if TYPE_CHECKING:
    from spear.labels.run import Progress


class Report:
    """How far labelling is, with rate and time left: a bar in a terminal, elsewhere a line now and then."""

    EVERY = 30.0
    """Seconds between lines."""

    def __init__(self) -> None:
        console = Console(file=sys.stderr)
        text = progress.TextColumn("{task.description}")
        self._bar = progress.Progress(
            progress.BarColumn(), text, console=console, disable=not console.is_terminal
        )
        self._row = self._bar.add_task("listing images", total=None)
        self._lines = not console.is_terminal
        self._begun = self._said = time.monotonic()
        self._last: Progress | None = None

    def __enter__(self) -> Report:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def __call__(self, now: Progress) -> None:
        if self._last is None:
            self._begun = self._said = time.monotonic()
        self._last = now
        text = f"{now.done:,} of {now.total:,} images, {now.rejected:,} set aside{self.speed()}{self._left()}"
        self._bar.update(self._row, completed=now.done, total=now.total, description=text)
        if self._lines and time.monotonic() - self._said > self.EVERY:
            print(text, file=sys.stderr, flush=True)
            self._said = time.monotonic()

    def _rate(self) -> float:
        """Images per second of this command."""
        last = self._last
        return 0.0 if last is None else (last.done - last.before) / max(time.monotonic() - self._begun, 1e-9)

    def speed(self) -> str:
        """The rate in words; nothing when nothing was done."""
        return f", {self._rate():.1f} images/s" if self._rate() else ""

    def _left(self) -> str:
        if self._last is None or not self._rate():
            return ""
        minutes, seconds = divmod(round((self._last.total - self._last.done) / self._rate()), 60)
        return f", {minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"
