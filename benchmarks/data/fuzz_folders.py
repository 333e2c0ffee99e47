"""Thousands of changes of folders that come from others, each read until it is refused.

    python benchmarks/data/fuzz_folders.py [CHANGES] [--kinds KIND …] [--shared FOLDER] [--quick]

A model takes long to load and is changed a third as often. The changes are drawn from --seed. Goal:
reading a changed folder succeeds or fails with one sentence. It raises nothing else, asks no
question, needs less than 1 GiB of memory and opens no file outside of the folder. The kinds rlds,
lerobot-v2 and lerobot-v3 need the shared data.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import tyro
from tyro.conf import Positional

from spear.cli import run_reporting_errors

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/support"))

from hostile_folders import KINDS, OWN_KINDS, open_fuzz  # noqa: E402


def main(
    changes: Positional[int] = 1700,
    kinds: tuple[str, ...] = KINDS,
    shared: Path = ROOT.parent / "shared",
    seed: int = 0,
    quick: bool = False,
) -> None:
    """Change folders of each kind; exit with an error if one does what it must not."""
    num_changes = 20 if quick else changes
    kinds = OWN_KINDS if quick and not shared.is_dir() else kinds
    num_findings = 0
    for kind in kinds:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as workspace:
            num_of_kind = num_changes // 3 if kind == "model" else num_changes
            report = open_fuzz(kind, Path(workspace), shared).run(num_of_kind, seed)
        for finding in report.findings:
            print(f"{finding.kind}, {finding.change}: {finding.problem}")
        num_findings += len(report.findings)
        print(
            f"{kind:12} {report.num_changes} changes: {report.num_accepted} read, "
            f"{report.num_refused} refused, {len(report.findings)} findings, "
            f"{time.perf_counter() - started:.0f} s",
            flush=True,
        )
    if num_findings:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
