"""Long work writes its progress as lines to a log, which is no terminal."""

import pytest

from spear.util import progress
from spear.util.progress import ProgressBar, track_progress


@pytest.fixture
def clock_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test can advance by adding to its only element."""
    clock_s = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock_s[0])
    return clock_s


@pytest.mark.usefixtures("clock_s")
def test_short_work_has_no_line_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    items = list(track_progress("abc", ProgressBar("reading", 3)))

    assert items == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_long_work_has_a_line_every_30_seconds_and_one_at_its_end(
    capsys: pytest.CaptureFixture[str], clock_s: list[float]
) -> None:
    """An episode takes a second, so the rate is 1 per second and 7,169 episodes take 1:59:29."""
    with ProgressBar("recording", 7300, "episodes", num_done_before=100) as bar:
        for done in range(101, 150):
            clock_s[0] += 1
            bar.set_num_done(done, "3 failed")

    assert capsys.readouterr().err.splitlines() == [
        "recording: 131 of 7,300 episodes, 1.0 episodes/s, 1:59:29 left, 3 failed",
        "recording: 149 of 7,300 episodes, 1.0 episodes/s, 1:59:11 left, 3 failed",
    ]
