"""Success against inference latency, for each way of executing chunks, in the embedded simulator.

The same held-out scenes for every cell, so that differences are paired. The control loop runs at 5 Hz: a
latency counts in whole steps of 200 ms, rounded up. Every cell is a folder of `spear evaluate` under OUT:
stopped at any moment, the same command goes on, more SCENES add to those that are there, and `spear evaluate
compare` compares any two. The row rtc is for policies that were trained with `--set committed=N`.

The step of velocity at a seam is by how much one tick's motion differs from the last one's, in mm per tick of
200 ms, wherever another chunk takes over or the robot stops or starts again. A policy that sees everything
anew at every tick without delay (sync/1 at 0 ms) has seams everywhere: it is the measure of what is smooth.

    python benchmarks/evaluate/latency_study.py [POLICY] [SCENES] [OUT] [--rows ROW …] [--guided] [--quick]

--rows runs these rows of the table alone (sync/5 async/1 …), for several processes side by side; without it
whatever is missing is run, and the table printed. --guided adds a row with real-time chunking at inference
(guidance.py), for policies of any training; it takes several times as long. --quick tries the script on one
scene of one family; its numbers say nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tyro
from tyro.conf import Positional

from guidance import Guided
from spear.chunks import ChunkExecutor, ExecutionMode
from spear.cli import run_reporting_errors
from spear.evaluate import closed_loop
from spear.evaluate.agents import Agent, PolicyAgent, load_agent
from spear.evaluate.compare import compare_results, format_row
from spear.evaluate.options import TabletopOptions
from spear.evaluate.results import Outcome, Results
from spear.policy import Spear1Policy
from spear.sim.scene import FAMILIES

LATENCIES_MS = (0, 200, 400)
ROWS: dict[str, tuple[ExecutionMode, int]] = {
    "sync/1": ("sync", 1),
    "sync/3": ("sync", 3),
    "sync/5": ("sync", 5),
    "async/1": ("async", 1),
    "async/3": ("async", 3),
    "full/1": ("async", 1),
    "rtc/1": ("rtc", 1),
    "guided/1": ("rtc", 1),
}
"""The way of executing chunks, and after how many actions the next look is due; full is async that takes no
care of the gripper. The first is `spear evaluate`'s default, the third the whole chunk; with async a look
never waits longer than that, and comes as early as the last inference allows."""


class Recorder(ChunkExecutor):
    """Notes the steps of velocity at seams, mm per tick, and at which share of the ticks the arm was told
    nothing; file: where they go once their episode has ended."""

    file: ClassVar[Path]
    tells_all = False  # of the last chunk, whatever is left
    careless = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seams: list[float] = []
        self._before: np.ndarray | None = None
        self._speaks: list[Any] | None = None  # the rows of the chunk that chose the last motion

    def next_action(self) -> np.ndarray:
        """As it is; notes it where it does not go on with the same chunk."""
        action = super().next_action()
        speaks = None if self._executed[-1] is None else self._planned
        if self._before is not None and speaks is not self._speaks:
            self.seams.append(float(np.linalg.norm(action[:3] - self._before) * 1000))
        if self._before is not None or speaks is not None:  # the first motion has nothing before it
            self._before, self._speaks = action[:3], speaks
        return action

    def _find_gripper_change(self, actions: Iterable[np.ndarray]) -> int | None:
        """As it is, or never."""
        return None if self.careless else super()._find_gripper_change(actions)

    def committed_actions(self) -> dict[str, Any]:
        """As it is, or with all that is left."""
        rows = [step.action for step in self._planned]
        return (
            {"committed": np.stack(rows)}
            if self.tells_all and rows
            else super().committed_actions()
        )


def _ended(slot: Any, outcome: Callable[[Any], Outcome] = closed_loop._make_outcome) -> Outcome:
    """An episode's outcome, its seams kept: those of one that is stopped come when it is run again."""
    with Recorder.file.open("a") as file:
        file.writelines(f"{seam:.3f}\n" for seam in slot.executor.seams)
    with Recorder.file.with_name(STILL).open("a") as file:
        file.write(f"{np.mean([action is None for action in slot.executor._executed])}\n")
    return outcome(slot)


setattr(closed_loop, "ChunkExecutor", Recorder)  # noqa: B010
setattr(closed_loop, "_make_outcome", _ended)  # noqa: B010

SEAMS, STILL = "seams.txt", "still.txt"


def place(out: Path, row: str, latency_ms: int) -> Path:
    """A cell's folder."""
    return out / f"{row.replace('/', '-')}-{latency_ms}ms"


def cell(
    agent: Agent, row: str, latency_ms: int, scenes: int, out: Path, families: tuple[str, ...]
) -> Results:
    """One cell of the table: what its folder holds already is not run again."""
    mode, replan = ROWS[row]
    folder = place(out, row, latency_ms)
    options = TabletopOptions(
        scenes, replan=replan, out=folder, families=families, execution=mode, latency_ms=latency_ms
    )
    Recorder.file = folder / SEAMS
    Recorder.tells_all = row == "guided/1"
    Recorder.careless = row == "full/1"
    if Recorder.tells_all:
        assert isinstance(agent, PolicyAgent) and isinstance(agent.policy, Spear1Policy), (
            "no server"
        )
        own = {f.name: getattr(agent.policy, f.name) for f in fields(Spear1Policy) if f.init}
        guided = Guided(**own, delay=latency_ms // 200)
        agent = PolicyAgent(guided, agent.name, agent.weights)
    return closed_loop.evaluate_tabletop(agent, options)[0]


def noted(out: Path, row: str, latency_ms: int, name: str) -> np.ndarray:
    """What a cell's file of that name holds."""
    file = place(out, row, latency_ms) / name
    return np.array(file.read_text().split() if file.is_file() else [], float)


def smoothness(out: Path, row: str, latency_ms: int) -> str:
    """The median and the 95th percentile of a cell's steps of velocity at seams, as text."""
    steps = noted(out, row, latency_ms, SEAMS)
    return " / ".join(f"{q:.1f}" for q in np.percentile(steps, [50, 95])) if steps.size else "–"


def main(
    policy: Positional[str] = "nano",
    scenes: Positional[int] = 100,
    out: Positional[Path] = Path("runs/latency"),
    rows: tuple[str, ...] = (),
    guided: bool = False,
    quick: bool = False,
) -> None:
    """Runs what is missing; prints each cell as it is done and, in the end, a table in Markdown."""
    families = FAMILIES[:1] if quick else FAMILIES
    scenes = 1 if quick else scenes
    out = out / "quick" if quick else out
    agent = load_agent(policy, device="cpu")
    found: dict[tuple[str, int], Results] = {}
    left_out = {"rtc/1": not agent.max_committed, "guided/1": not guided}
    known = [row for row in ROWS if not left_out.get(row)]
    if not agent.max_committed:
        print(f"{policy} was not trained for rtc: left out", file=sys.stderr)
    for row in rows or known:
        for latency in LATENCIES_MS:
            found[row, latency] = cell(agent, row, latency, scenes, out, families)
            mean = found[row, latency].mean_success()
            text = f"{mean.value:.1%} [{mean.low:.1%}, {mean.high:.1%}], n = {mean.n}"
            seams, still = smoothness(out, row, latency), np.mean(noted(out, row, latency, STILL))
            print(
                f"{row:9} {latency:4} ms: {text}, seams {seams} mm, still {still:.0%}", flush=True
            )
    if rows:
        return
    print("\n| execution / k | " + " | ".join(f"{latency} ms" for latency in LATENCIES_MS) + " |")
    print("|---|" + "---|" * len(LATENCIES_MS))
    for row in known:
        means = [found[row, latency].mean_success() for latency in LATENCIES_MS]
        print(
            f"| {row} | "
            + " | ".join(f"{m.value:.1%} [{m.low:.0%}, {m.high:.0%}]" for m in means)
            + " |"
        )
    print("\nSteps of velocity at seams, mm per tick: median / 95th percentile")
    for row in known:
        print(f"| {row} | " + " | ".join(smoothness(out, row, ms) for ms in LATENCIES_MS) + " |")
    print("\nOf the undelayed success of sync/1:")
    for row in known:
        whole = found["sync/1", 0].mean_success().value or float("nan")
        print(
            f"{row:9} "
            + ", ".join(f"{found[row, ms].mean_success().value / whole:.2f}" for ms in LATENCIES_MS)
        )
    print(
        "\nAgainst sync/1 at the same latency, paired: n, both, difference in points [95 %], p, won : lost"
    )
    for row in known[1:]:
        for latency in LATENCIES_MS:
            gap = compare_results(found[row, latency], found["sync/1", latency]).mean
            print(f"{row:9} {latency:4} ms: " + ", ".join(format_row(gap)[1:]))
    print("\nPer family:")
    for (row, latency), results in found.items():
        rates = ", ".join(f"{f} {results.summarize(f).success.value:.0%}" for f in results.families)
        print(f"{row:9} {latency:4} ms: {rates}")


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
