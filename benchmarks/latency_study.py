"""Success against inference latency, for each way of executing chunks, in the embedded simulator.

The same held-out scenes for every cell, so that differences are paired. The control loop runs at 5 Hz: a latency counts
in whole steps of 200 ms, rounded up.

    python benchmarks/latency_study.py [CHECKPOINT] [SCENES] [OUT.json] [--quick]

--quick tries the script on one scene of one family; its numbers say nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import tyro
from tyro.conf import Positional

from spear.chunks import Mode
from spear.evaluate.closed_loop import evaluate
from spear.evaluate.compare import compare
from spear.evaluate.load import load_actor
from spear.sim.scene import FAMILIES

LATENCIES_MS = (0, 200, 400)
REPLAN = {"sync": 5, "async": 3, "ensemble": 1}
"""Actions executed between looks: the paper's whole chunk when the robot waits; with async, so many that a chunk still
has actions while the next is computed at the longest latency."""


def main(
    checkpoint: Positional[str] = "nano",
    scenes: Positional[int] = 100,
    out: Positional[str] = "runs/latency.json",
    quick: bool = False,
) -> None:
    """Prints a row per cell as it is done; saves all of them."""
    families, latencies = (FAMILIES[:1], LATENCIES_MS[::2]) if quick else (FAMILIES, LATENCIES_MS)
    scenes = 1 if quick else scenes
    actor, sizes = load_actor(checkpoint)
    rows: list[dict[str, Any]] = []
    reference = None
    print(f"{'execution':10} {'latency':>8} {'success [95 %]':>20} {'against sync at 0 ms':>24}")
    for mode in get_args(Mode):
        for latency in latencies:
            results, _ = evaluate(
                actor,
                families,
                scenes,
                replan=REPLAN[mode],
                execution=mode,
                latency_ms=latency,
                quiet=True,
                **sizes,
            )
            reference = reference or results
            s = results.summary().success
            gap = compare(results, reference).mean.difference.value
            print(
                f"{mode:10} {latency:5} ms {s.value:8.1%} [{s.low:.1%}, {s.high:.1%}] {gap:+23.1%}",
                flush=True,
            )
            rows.append({"execution": mode, "latency_ms": latency, **results.to_dict()})
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            Path(out).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    tyro.cli(main)
