"""What asking a metered service over the network needs: a pace, patience, a memory and a bill."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from spear.errors import SpearError
from spear.util.files import write_text

PRICES_READ = date(2026, 10, 7)
"""When `PRICES` were noted, from a transcript of https://ai.google.dev/gemini-api/docs/pricing: check
there."""

PRICES: Mapping[str, tuple[tuple[date, float, float], ...]] = {
    "gemini-3.8-flash": ((date(2026, 9, 2), 0.75, 3.75), (date(2027, 1, 1), 1.50, 7.50)),
    "gemini-3.5-flash": ((date(2026, 5, 19), 1.50, 9.00),),
    "gemini-3.5-flash-lite": ((date(2026, 7, 21), 0.30, 2.50),),
    "gemini-3.1-pro-preview": ((date(2026, 2, 19), 2.00, 12.00),),
    "gemini-2.5-flash": ((date(2025, 6, 17), 0.30, 2.50),),
    "gemini-2.5-flash-lite": ((date(2025, 7, 22), 0.10, 0.40),),
}
"""Model -> (from when, US dollars per million tokens in, and out with thinking), for prompts up to 200k
tokens."""


def price(model: str, day: date) -> tuple[float, float] | None:
    """US dollars per million tokens in and out on a day; None when it is not known."""
    known = [
        (dollars_in, dollars_out) for since, dollars_in, dollars_out in PRICES.get(model, ()) if since <= day
    ]
    return known[-1] if known else None


@dataclass
class Usage:
    """What was asked so far.

    requests  that reached the service; those that it refused count too.
    cached    answers that cost nothing, since they were known already.
    input_tokens, output_tokens  as the service counts them, thinking among the output.
    """

    requests: int = 0
    cached: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def dollars(self, rates: tuple[float, float] | None) -> float | None:
        """The cost at rates per million tokens in and out; None at unknown rates."""
        if rates is None:
            return None
        return (self.input_tokens * rates[0] + self.output_tokens * rates[1]) / 1e6


class Pace:
    """Lets requests of several threads through evenly, at most `per_minute` (None: as they come)."""

    def __init__(self, per_minute: float | None = None) -> None:
        if per_minute is not None and per_minute <= 0:
            raise SpearError(f"{per_minute} requests per minute: give a positive number")
        self._interval = 60.0 / per_minute if per_minute else 0.0
        self._lock = threading.Lock()
        self._next = 0.0
        self._held = 0.0

    def wait(self) -> None:
        """Return when it is this thread's turn."""
        with self._lock:
            turn = max(time.monotonic(), self._next, self._held)
            self._next = turn + self._interval
        while (rest := max(turn, self._held) - time.monotonic()) > 0:
            time.sleep(rest)

    def hold(self, seconds: float) -> None:
        """Let nobody through for so long: the service asked for it."""
        with self._lock:
            self._held = max(self._held, time.monotonic() + seconds)


def backoff(attempt: int, first: float, longest: float) -> float:
    """Seconds to wait after failed attempt 0, 1, …: doubling from `first` to `longest`, less up to half by
    chance so that many clients do not come back at once."""
    return min(longest, first * 2.0**attempt) * random.uniform(0.5, 1.0)


def advised_wait(headers: Mapping[str, str], details: Any) -> float | None:
    """Seconds that a refusing service asks to wait; None when it does not say.

    Args:
        headers: of the response; `Retry-After` in seconds or as a date.
        details: the JSON of the response, whose error may hold a `google.rpc.RetryInfo` ("38s"). The longer
            of the two counts.
    """
    waits = []
    if value := headers.get("retry-after"):
        try:
            waits.append(float(value))
        except ValueError:
            with contextlib.suppress(TypeError, ValueError):
                waits.append((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    error = details.get("error") if isinstance(details, dict) else None
    entries = error.get("details") if isinstance(error, dict) else None
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and str(entry.get("@type", "")).endswith("google.rpc.RetryInfo"):
            with contextlib.suppress(ValueError):
                waits.append(float(str(entry.get("retryDelay", "")).removesuffix("s")))
    return max(0.0, *waits) if waits else None


class AnswerCache:
    """Answers by key: JSON files in a folder, which several processes may share; without one, the last in
    memory.

    Args:
        folder: made when it is not there.
        most: how many answers are kept in memory.

    Raises:
        SpearError: an answer cannot be written.
    """

    def __init__(self, folder: str | Path | None, most: int = 512) -> None:
        self.folder = None if folder is None else Path(folder)
        self.most = most
        self._kept: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer; None when there is none that can be read."""
        if self.folder is None:
            return self._kept.get(key)
        try:
            answer = json.loads(self._path(key).read_bytes())
        except (OSError, ValueError):
            return None
        return answer if isinstance(answer, dict) else None

    def put(self, key: str, answer: dict[str, Any]) -> None:
        """Keep an answer; a file appears only when it is whole."""
        if self.folder is None:
            self._kept[key] = answer
            while len(self._kept) > self.most:
                self._kept.popitem(last=False)
            return
        try:
            write_text(self._path(key), json.dumps(answer))
        except SpearError as error:
            raise SpearError(f"cannot keep an answer: {error}, or choose another cache folder") from error

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.json"
