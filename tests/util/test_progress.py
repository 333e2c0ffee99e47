"""What long work says while it runs: lines in a log, a bar in a terminal."""

import pytest

from spear.util import progress
from spear.util.progress import ProgressBar, track_progress


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: sum(now))
    assert list(track_progress("abc", ProgressBar("reading", 3))) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""  # short work
    with ProgressBar("recording", 7300, "episodes", num_done_before=100) as bar:
        for done in range(101, 150):
            now.append(1)
            bar.update(done, "3 failed")
    assert capsys.readouterr().err.splitlines() == [
        "recording: 131 of 7,300 episodes, 1.0 episodes/s, 1:59:29 left, 3 failed",
        "recording: 149 of 7,300 episodes, 1.0 episodes/s, 1:59:11 left, 3 failed",
    ]
