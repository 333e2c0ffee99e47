"""Labeling: peak memory at many images ÷ at few (goal: at most 1.1).

    python benchmarks/labels/memory.py

Labels folders of JPEG files with networks that cost nothing, in a process of its own, and adds up
the peak resident memory of that process and of its workers.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import tyro

from spear.cli import run_reporting_errors
from spear.labels.engine import run_local
from spear.labels.inputs import list_images
from spear.labels.options import WorkOptions
from spear.labels.run import label_into_folder
from stand_ins import StandIn, write_photos


def main(
    few: int = 1000, many: int = 20_000, width: int = 420, height: int = 315, workers: int = 2
) -> None:
    """Measure.

    Args:
        few: images of the small run.
        many: images of the large run.
        width: of the images, in pixels.
        height: of the images, in pixels.
        workers: processes besides the main one.
    """
    totals_mb = []
    for count in (few, many):
        with tempfile.TemporaryDirectory() as folder:
            write_photos(Path(folder) / "photos", count, (width, height))
            start_time = time.perf_counter()
            peaks_mb = measure_peaks([sys.executable, __file__, "--run", folder, str(workers)])
            seconds = time.perf_counter() - start_time
        totals_mb.append(sum(peaks_mb))
        summands = " + ".join(f"{peak_mb:.0f}" for peak_mb in peaks_mb)
        print(
            f"{count:,} images: {sum(peaks_mb):.0f} MB ({summands}), {count / seconds:.1f} images/s"
        )
    print(f"ratio {totals_mb[1] / totals_mb[0]:.3f} (goal: at most 1.1)")


def measure_peaks(command: list[str]) -> list[float]:
    """Peak resident memory in MB of each process of a command, the largest first; it must
    succeed."""
    peaks_mb: dict[int, float] = {}
    process = subprocess.Popen(command)
    while process.poll() is None:
        for pid in list_process_tree(process.pid):
            peaks_mb[pid] = max(peaks_mb.get(pid, 0.0), read_peak(pid))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(process.returncode)
    return sorted(peaks_mb.values(), reverse=True)


def list_process_tree(root: int) -> list[int]:
    """A process and all its descendants."""
    try:
        children = Path(f"/proc/{root}/task/{root}/children").read_text().split()
    except OSError:
        return []
    pids = [root]
    for child in children:
        pids += list_process_tree(int(child))
    return pids


def read_peak(pid: int) -> float:
    """The peak resident memory of a process so far, in MB; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    for line in lines:
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1000
    return 0.0


def run(folder: Path, workers: int) -> None:
    """Label, in this process."""
    label_into_folder(
        list_images(str(folder / "photos")),
        folder / "labels",
        partial(run_local, (StandIn, StandIn, StandIn), workers),
        {},
        WorkOptions(),
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
