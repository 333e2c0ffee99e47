"""Labelling: peak memory at many images ÷ at few (goal: at most 1.1).

    python benchmarks/labels/memory.py

Labels folders of JPEG files with networks that cost nothing, in a process of its own, and adds up the peak
resident memory of that process and of its workers.
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
from spear.labels.run import label_folder
from stand_ins import StandIn, photos


def main(
    few: int = 1000, many: int = 20_000, width: int = 420, height: int = 315, workers: int = 2
) -> None:
    """Measure.

    Args:
        few: images of the small run.
        many: images of the large run.
        width, height: of the images, pixels.
        workers: processes beside the main one.
    """
    peaks = []
    for count in (few, many):
        with tempfile.TemporaryDirectory() as folder:
            photos(Path(folder) / "photos", count, (width, height))
            begun = time.perf_counter()
            megabytes = peak([sys.executable, __file__, "--run", folder, str(workers)])
            seconds = time.perf_counter() - begun
        peaks.append(sum(megabytes))
        parts = " + ".join(f"{m:.0f}" for m in megabytes)
        print(
            f"{count:,} images: {sum(megabytes):.0f} MB ({parts}), {count / seconds:.1f} images/s"
        )
    print(f"ratio {peaks[1] / peaks[0]:.3f} (goal: at most 1.1)")


def peak(command: list[str]) -> list[float]:
    """Peak resident memory in MB of each process of a command, the largest first; it must succeed."""
    highest: dict[int, float] = {}
    process = subprocess.Popen(command)
    while process.poll() is None:
        for pid in tree(process.pid):
            highest[pid] = max(highest.get(pid, 0.0), high_water(pid))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(process.returncode)
    return sorted(highest.values(), reverse=True)


def tree(root: int) -> list[int]:
    """A process and all below it."""
    try:
        children = Path(f"/proc/{root}/task/{root}/children").read_text().split()
    except OSError:
        return []
    return [root, *(pid for child in children for pid in tree(int(child)))]


def high_water(pid: int) -> float:
    """The most memory that a process has had so far, MB; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM")), 0.0)


def run(folder: Path, workers: int) -> None:
    """Label, in this process."""
    label_folder(
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
