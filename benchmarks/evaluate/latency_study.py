"""Success against inference latency, for each execution mode, in the embedded simulator.

Every cell has the same held-out scenes, so that differences are paired. The control loop runs at
5 Hz, so a latency counts in whole steps of 200 ms, rounded up. Every cell is a folder of
`spear evaluate` under OUT: stopped at any moment, the same command resumes; more SCENES are added
to those that are there; and `spear evaluate compare` compares any two cells. The row rtc is for
policies that were trained with `--set committed=N`.

The velocity step at a seam is the difference between the motions of two successive ticks, in mm per
tick of 200 ms, wherever another chunk takes over or the robot stops or starts again. A policy that
infers at every tick without latency (sync/1 at 0 ms) has seams everywhere: it is the baseline for
smoothness.

    python benchmarks/evaluate/latency_study.py [POLICY] [SCENES] [OUT] [--rows ROW …]
        [--tasks FAMILY …] [--guided]

--tasks runs these task families alone. --rows runs these rows of the table alone (sync/5 async/1
…), for several processes side by side. Without it whatever is missing is run, and the table is
printed. --guided adds a row with real-time chunking at inference (guidance.py), for policies of any
training; it takes several times as long. --quick tries the script on one scene of one family; its
numbers say nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tyro
from tyro.conf import Positional

from guidance import GuidedPolicy
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
STEP_MS = 200
BASELINE_ROW = "sync/1"
ROWS: dict[str, tuple[ExecutionMode, int]] = {
    BASELINE_ROW: ("sync", 1),
    "sync/3": ("sync", 3),
    "sync/5": ("sync", 5),
    "async/1": ("async", 1),
    "async/3": ("async", 3),
    "full/1": ("async", 1),
    "rtc/1": ("rtc", 1),
    "guided/1": ("rtc", 1),
}
"""Row -> the execution mode and the replan interval. The row full/1 is async without care for the
gripper. The row sync/1 is the default of `spear evaluate`, and sync/5 executes whole chunks. With
async the next inference never waits longer than the replan interval, and starts as early as the
last one allows."""
SEAMS_FILE = "seams.txt"
STILL_FILE = "still.txt"
RECORDED_FILE = "recorded.txt"  # the episodes whose seams are written

Cells = Mapping[tuple[str, int], Results]
"""(row, latency in ms) → results."""


class RecordingExecutor(ChunkExecutor):
    """Records the velocity steps at seams, mm per tick.

    seams_file              where they go once their episode has ended; next to it, the fraction of
                            ticks without an action.
    commits_whole_chunk     whether all that is left of the last chunk is committed.
    ignores_gripper_change  whether the arm moves on fast before the gripper is used.
    """

    seams_file: ClassVar[Path]
    commits_whole_chunk = False
    ignores_gripper_change = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seams: list[float] = []
        self._last_motion: np.ndarray | None = None
        self._last_chunk: list[Any] | None = None  # the steps that chose the last motion

    def next_action(self) -> np.ndarray:
        """As `ChunkExecutor.next_action`; records a seam where another chunk takes over."""
        action = super().next_action()
        # Each chunk that is adopted makes a new list of steps, so the list identifies the chunk.
        chunk = None if self._executed_steps[-1] is None else self._planned_steps
        if self._last_motion is not None and chunk is not self._last_chunk:
            self.seams.append(float(np.linalg.norm(action[:3] - self._last_motion) * 1000))
        if self._last_motion is not None or chunk is not None:  # nothing before the first motion
            self._last_motion = action[:3]
            self._last_chunk = chunk
        return action

    def _find_gripper_change(self, actions: Iterable[np.ndarray]) -> int | None:
        return None if self.ignores_gripper_change else super()._find_gripper_change(actions)

    def committed_actions(self) -> dict[str, Any]:
        actions = [step.action for step in self._planned_steps]
        if self.commits_whole_chunk and actions:
            return {"committed": np.stack(actions)}
        return super().committed_actions()


def make_recorded_outcome(
    scene: Any, make_outcome: Callable[[Any], Outcome] = closed_loop._make_outcome
) -> Outcome:
    """An episode's outcome; its seams are written now.

    The seams of an episode that is stopped are written when it is run again. An episode that has
    ended may be run again with others; its seams are not written twice.
    """
    outcome = make_outcome(scene)
    if mark_as_recorded(outcome):
        record_seams(scene)
    return outcome


def mark_as_recorded(outcome: Outcome) -> bool:
    """Note that the seams of an episode are written. Return False if that was noted before."""
    recorded_file = RecordingExecutor.seams_file.with_name(RECORDED_FILE)
    episode = f"{outcome.family}-{outcome.seed}"
    if recorded_file.is_file() and episode in recorded_file.read_text().split():
        return False
    with recorded_file.open("a") as file:
        file.write(f"{episode}\n")
    return True


def record_seams(scene: Any) -> None:
    """Write the seams of an episode, and the fraction of its ticks that stood still."""
    with RecordingExecutor.seams_file.open("a") as file:
        file.writelines(f"{seam:.3f}\n" for seam in scene.executor.seams)
    with RecordingExecutor.seams_file.with_name(STILL_FILE).open("a") as file:
        is_still = [action is None for action in scene.executor._executed_steps]
        file.write(f"{np.mean(is_still)}\n")


# From now on, evaluations in this process record seams.
setattr(closed_loop, "ChunkExecutor", RecordingExecutor)  # noqa: B010
setattr(closed_loop, "_make_outcome", make_recorded_outcome)  # noqa: B010


def cell_folder(out: Path, row: str, latency_ms: int) -> Path:
    return out / f"{row.replace('/', '-')}-{latency_ms}ms"


def run_cell(
    agent: Agent, row: str, latency_ms: int, scenes: int, out: Path, families: Sequence[str]
) -> Results:
    """Run one cell of the table; what its folder already has is not run again."""
    mode, replan = ROWS[row]
    folder = cell_folder(out, row, latency_ms)
    options = TabletopOptions(
        scenes,
        replan_steps=replan,
        out=folder,
        tasks=tuple(families),
        execution=mode,
        latency_ms=latency_ms,
    )
    RecordingExecutor.seams_file = folder / SEAMS_FILE
    RecordingExecutor.commits_whole_chunk = row == "guided/1"
    RecordingExecutor.ignores_gripper_change = row == "full/1"
    if row == "guided/1":
        agent = make_guided_agent(agent, latency_ms)
    results, _ = closed_loop.evaluate_tabletop(agent, options)
    return results


def make_guided_agent(agent: Agent, latency_ms: int) -> PolicyAgent:
    """The same policy with real-time chunking at inference."""
    assert isinstance(agent, PolicyAgent), "give a policy"
    assert isinstance(agent.policy, Spear1Policy), "give a policy that is loaded here, no server"
    settings = {f.name: getattr(agent.policy, f.name) for f in fields(Spear1Policy) if f.init}
    guided_policy = GuidedPolicy(**settings, delay=latency_ms // STEP_MS)
    return PolicyAgent(guided_policy, agent.name, agent.weights)


def read_record(out: Path, row: str, latency_ms: int, name: str) -> np.ndarray:
    """The numbers in a cell's file of that name."""
    file = cell_folder(out, row, latency_ms) / name
    return np.array(file.read_text().split() if file.is_file() else [], float)


def describe_smoothness(out: Path, row: str, latency_ms: int) -> str:
    """The median and the 95th percentile of a cell's velocity steps at seams, as text."""
    steps = read_record(out, row, latency_ms, SEAMS_FILE)
    if not steps.size:
        return "–"
    median, percentile_95 = np.percentile(steps, [50, 95])
    return f"{median:.1f} / {percentile_95:.1f}"


def print_cell(out: Path, row: str, latency_ms: int, results: Results) -> None:
    mean = results.mean_success()
    success = f"{mean.value:.1%} [{mean.low:.1%}, {mean.high:.1%}], n = {mean.n}"
    seams = describe_smoothness(out, row, latency_ms)
    still = np.mean(read_record(out, row, latency_ms, STILL_FILE))
    print(f"{row:9} {latency_ms:4} ms: {success}, seams {seams} mm, still {still:.0%}", flush=True)


def print_tables(out: Path, rows: Sequence[str], cells: Cells) -> None:
    """Print the tables of a study whose cells are all done, in Markdown."""
    headers = [f"{latency} ms" for latency in LATENCIES_MS]
    print(f"\n| execution / k | {' | '.join(headers)} |")
    print("|---|" + "---|" * len(LATENCIES_MS))
    for row in rows:
        means = [cells[row, latency].mean_success() for latency in LATENCIES_MS]
        rates = [f"{mean.value:.1%} [{mean.low:.0%}, {mean.high:.0%}]" for mean in means]
        print(f"| {row} | {' | '.join(rates)} |")

    print("\nSteps of velocity at seams, mm per tick: median / 95th percentile")
    for row in rows:
        smoothness = [describe_smoothness(out, row, latency) for latency in LATENCIES_MS]
        print(f"| {row} | {' | '.join(smoothness)} |")

    print(f"\nOf the undelayed success of {BASELINE_ROW}:")
    baseline = cells[BASELINE_ROW, 0].mean_success().value or float("nan")
    for row in rows:
        means = [cells[row, latency].mean_success() for latency in LATENCIES_MS]
        print(f"{row:9} {', '.join(f'{mean.value / baseline:.2f}' for mean in means)}")

    print(
        f"\nAgainst {BASELINE_ROW} at the same latency, paired: "
        "n, both, difference in points [95 %], p, won : lost"
    )
    for row in rows[1:]:
        for latency in LATENCIES_MS:
            comparison = compare_results(cells[row, latency], cells[BASELINE_ROW, latency])
            print(f"{row:9} {latency:4} ms: {', '.join(format_row(comparison.mean)[1:])}")

    print("\nPer family:")
    for (row, latency), results in cells.items():
        rates = [f"{f} {results.summarize(f).success.value:.0%}" for f in results.families]
        print(f"{row:9} {latency:4} ms: {', '.join(rates)}")


def main(
    policy: Positional[str] = "nano",
    scenes: Positional[int] = 100,
    out: Positional[Path] = Path("runs/latency"),
    rows: tuple[str, ...] = (),
    tasks: tuple[str, ...] = FAMILIES,
    guided: bool = False,
    quick: bool = False,
) -> None:
    """Run what is missing; print each cell as it is done and, at the end, tables in Markdown."""
    families = tasks
    if quick:
        families = tasks[:1]
        scenes = 1
        out = out / "quick"
    agent = load_agent(policy, device="cpu")
    possible_rows = list(ROWS)
    if not agent.max_committed:
        print(f"{policy} was not trained for rtc: left out", file=sys.stderr)
        possible_rows.remove("rtc/1")
    if not guided:
        possible_rows.remove("guided/1")

    cells: dict[tuple[str, int], Results] = {}
    for row in rows or possible_rows:
        for latency in LATENCIES_MS:
            cells[row, latency] = run_cell(agent, row, latency, scenes, out, families)
            print_cell(out, row, latency, cells[row, latency])
    if not rows:
        print_tables(out, possible_rows, cells)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
