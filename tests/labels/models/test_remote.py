import errno
import os
import threading
import time
from datetime import UTC, date, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from spear.errors import SpearError
from spear.labels.models.remote import PRICES, AnswerCache, Pace, Usage, advised_wait, backoff, price


def test_a_pace_spaces_the_turns_of_all_threads() -> None:
    pace = Pace(600)
    start = time.monotonic()
    turns: list[float] = []

    def run() -> None:
        for _ in range(3):
            pace.wait()
            turns.append(time.monotonic() - start)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(turn >= 0.1 * i - 1e-6 for i, turn in enumerate(sorted(turns)))


def test_a_hold_holds_everybody() -> None:
    pace = Pace()
    pace.wait()
    pace.hold(0.2)
    start = time.monotonic()
    pace.wait()
    assert time.monotonic() - start >= 0.2 - 1e-3


def test_backoff_doubles_up_to_the_longest() -> None:
    for attempt, most in enumerate([1, 2, 4, 8, 10, 10]):
        waits = [backoff(attempt, 1, 10) for _ in range(50)]
        assert most / 2 <= min(waits) < max(waits) <= most
        assert len(set(waits)) > 10


@pytest.mark.parametrize(
    ("headers", "details", "expected"),
    [
        ({}, None, None),
        ({"retry-after": "7"}, {}, 7),
        ({"retry-after": "soon"}, {"error": {"details": "none"}}, None),
        ({}, {"error": {"details": [{"@type": "x/google.rpc.RetryInfo", "retryDelay": "38.5s"}]}}, 38.5),
        (
            {"retry-after": "50"},
            {"error": {"details": [{"@type": "google.rpc.RetryInfo", "retryDelay": "3s"}]}},
            50,
        ),
        ({}, {"error": {"details": [{"@type": "google.rpc.Help"}, 3]}}, None),
        ({}, {"error": {"details": [{"@type": "google.rpc.RetryInfo"}]}}, None),
    ],
)
def test_advice_is_read_wherever_it_stands(
    headers: dict[str, str], details: Any, expected: float | None
) -> None:
    assert advised_wait(headers, details) == expected


def test_advice_may_be_a_date() -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    wait = advised_wait({"retry-after": later}, None)
    assert wait is not None and 60 < wait <= 90
    assert advised_wait({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, None) == 0


def test_prices_follow_the_calendar() -> None:
    assert price("gemini-3.8-flash", date(2026, 12, 31)) == (0.75, 3.75)
    assert price("gemini-3.8-flash", date(2027, 1, 1)) == (1.5, 7.5)
    assert (
        price("gemini-3.8-flash", date(2020, 1, 1)) is None and price("no-model", date(2026, 12, 1)) is None
    )
    assert all(list(rows) == sorted(rows) for rows in PRICES.values())
    assert Usage(input_tokens=2_000_000, output_tokens=100_000).dollars((0.75, 3.75)) == pytest.approx(1.875)
    assert Usage().dollars(None) is None


def test_answers_in_memory_are_limited() -> None:
    cache = AnswerCache(None, most=2)
    for key in "abc":
        cache.put(key, {"text": key})
    assert cache.get("a") is None and cache.get("c") == {"text": "c"}


def test_a_full_disk_leaves_no_half_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = AnswerCache(tmp_path)
    cache.put("aa", {"text": "old"})
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SpearError, match=r"cannot keep an answer: .*aa\.json: the disk is full"):
        cache.put("aa", {"text": "new"})
    assert cache.get("aa") == {"text": "old"}
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["aa.json"]
