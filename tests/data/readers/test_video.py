"""The AV1 writer leaves the process as it found it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from spear.data.readers.video import VideoWriter


def _schedulers() -> set[int]:
    return {os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")}


@pytest.mark.skipif(sys.platform != "linux", reason="scheduling is told as Linux tells it")
def test_no_thread_becomes_a_real_time_one(tmp_path: Path) -> None:
    # As root, SVT-AV1 makes the calling thread one, which would starve whatever else is on the machine.
    before = _schedulers() | {os.sched_getscheduler(0)}
    with VideoWriter(tmp_path / "video.mp4", 64, 64, 10) as video:
        for _ in range(3):
            video.write(np.zeros((64, 64, 3), np.uint8))
            assert _schedulers() <= before
    assert _schedulers() <= before
