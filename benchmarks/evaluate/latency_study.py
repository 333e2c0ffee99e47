"""Success against inference latency, for each way of executing chunks, in the embedded simulator.

The same held-out scenes for every cell, so that differences are paired. The control loop runs at 5 Hz: a
latency counts in whole steps of 200 ms, rounded up. Every cell is a folder of `spear evaluate` under OUT:
stopped at any moment, the same command goes on, more SCENES add to those that are there, and `spear evaluate
compare` compares any two.

    python benchmarks/evaluate/latency_study.py [POLICY] [SCENES] [OUT] [--rows ROW …] [--quick]

--rows runs these rows of the table alone (sync/5 async/1 …), for several processes side by side; without it
whatever is missing is run, and the table printed. --quick tries the script on one scene of one family; its
numbers say nothing.
"""

from __future__ import annotations

from pathlib import Path

import tyro
from tyro.conf import Positional

from spear.chunks import Mode
from spear.evaluate.agents import Agent, load_agent
from spear.evaluate.closed_loop import evaluate
from spear.evaluate.compare import cells, compare
from spear.evaluate.options import TabletopOptions
from spear.evaluate.results import Results
from spear.sim.scene import FAMILIES

LATENCIES_MS = (0, 200, 400)
ROWS: dict[str, tuple[Mode, int]] = {
    "sync/1": ("sync", 1),
    "sync/5": ("sync", 5),
    "async/1": ("async", 1),
    "async/3": ("async", 3),
    "ensemble": ("ensemble", 1),
}
"""The way of executing chunks, and after how many actions the next look is due. The first is `spear
evaluate`'s default, the second the whole chunk; with async a look never waits longer than that, and comes as
early as the last inference allows."""


def cell(
    agent: Agent, row: str, latency_ms: int, scenes: int, out: Path, families: tuple[str, ...]
) -> Results:
    """One cell of the table: what its folder holds already is not run again."""
    mode, replan = ROWS[row]
    folder = out / f"{row.replace('/', '-')}-{latency_ms}ms"
    options = TabletopOptions(
        scenes, replan=replan, out=folder, families=families, execution=mode, latency_ms=latency_ms
    )
    return evaluate(agent, options, quiet=True)[0]


def main(
    policy: Positional[str] = "nano",
    scenes: Positional[int] = 100,
    out: Positional[Path] = Path("runs/latency"),
    rows: tuple[str, ...] = (),
    quick: bool = False,
) -> None:
    """Runs what is missing; prints each cell as it is done and, in the end, a table in Markdown."""
    families = FAMILIES[:1] if quick else FAMILIES
    scenes = 1 if quick else scenes
    out = out / "quick" if quick else out
    agent = load_agent(policy)
    found: dict[tuple[str, int], Results] = {}
    for row in rows or ROWS:
        for latency in LATENCIES_MS:
            found[row, latency] = cell(agent, row, latency, scenes, out, families)
            mean = found[row, latency].mean()
            print(f"{row:9} {latency:4} ms: {mean.value:.1%} [{mean.low:.1%}, {mean.high:.1%}], n = {mean.n}")
    if rows:
        return
    print("\n| execution / k | " + " | ".join(f"{latency} ms" for latency in LATENCIES_MS) + " |")
    print("|---|" + "---|" * len(LATENCIES_MS))
    for row in ROWS:
        means = [found[row, latency].mean() for latency in LATENCIES_MS]
        print(f"| {row} | " + " | ".join(f"{m.value:.1%} [{m.low:.0%}, {m.high:.0%}]" for m in means) + " |")
    print("\nAgainst sync/1 at the same latency, paired: n, both, difference in points [95 %], p, won : lost")
    for row in list(ROWS)[1:]:
        for latency in LATENCIES_MS:
            gap = compare(found[row, latency], found["sync/1", latency]).mean
            print(f"{row:9} {latency:4} ms: " + ", ".join(cells(gap)[1:]))
    print("\nPer family:")
    for (row, latency), results in found.items():
        rates = ", ".join(f"{f} {results.summary(f).success.value:.0%}" for f in results.families)
        print(f"{row:9} {latency:4} ms: {rates}")


if __name__ == "__main__":
    tyro.cli(main)
