"""The outcomes of a closed-loop evaluation: one record per episode, summaries per family, and their files.

Outcomes are on disk as they come, so that an interrupted evaluation goes on where it was, and shards come
together. A folder of results holds one journal per shard, `episodes-2-of-5.jsonl` (`episodes-1-of-1.jsonl`
without sharding): its first line says who acted and how, each further line is one episode, or which scenes
are to be run. Only whole lines count.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import NonNegativeInt
from pydantic.dataclasses import dataclass
from rich import box
from rich.markup import escape
from rich.table import Table

from spear.errors import SpearError, format_count
from spear.evaluate.stats import (
    Estimate,
    estimate_mean_proportion,
    estimate_proportion,
    find_num_samples,
)
from spear.util.files import read_json_as, report_write_errors, write_text
from spear.util.run_settings import describe_difference, to_plain_json

TARGET_HALF_WIDTH = 0.05
"""How well a family's success rate is to be known: ± 5 points."""
ScenesByFamily = Mapping[str, Sequence[int]]
"""Family → the seeds of its scenes."""
MILESTONES = ("success", "reached", "grasped", "wrong_object_moved")
"""The yes-or-no fields of an `Outcome`."""


@dataclass(frozen=True)
class Outcome:
    """How one episode went; in SIMPLER, as `spear.evaluate.simpler.tasks.Moment` says it.

    reached, grasped      milestones on the way: the gripper was at the right object; the object was lifted.
    success               the object rests, released, on the target.
    wrong_object_moved    something else than the asked-for object was carried or pushed away.
    unreachable           control steps whose target the arm could not reach.
    steps                 control steps (5 Hz) until success or the end.
    """

    family: str
    seed: NonNegativeInt
    instruction: str
    success: bool
    reached: bool
    grasped: bool
    wrong_object_moved: bool
    unreachable: NonNegativeInt
    steps: NonNegativeInt

    @property
    def film_name(self) -> str:
        """The name of the file with this episode's film."""
        return f"{self.family}-{'success' if self.success else 'failure'}-{self.seed}.mp4"


@dataclass(frozen=True)
class Summary:
    """One family's numbers; proportions carry 95 % Wilson intervals. steps: mean over the successes.
    unreachable: mean per episode."""

    success: Estimate
    reached: Estimate
    grasped: Estimate
    wrong_object: Estimate
    unreachable: float
    steps: float | None


@dataclass(frozen=True)
class Results:
    """An evaluation: who acted, how, every episode's outcome, the wall time, and which scenes were to be run,
    where a journal says it."""

    policy: str
    settings: dict[str, Any]
    outcomes: Sequence[Outcome]
    seconds: float
    wanted: frozenset[tuple[str, int]] = frozenset()

    def describe_unfinished(self) -> str:
        """What to know, in words, where not all scenes have ended; "" where they have."""
        left = len(self.wanted - {(o.family, o.seed) for o in self.outcomes})
        return (
            f"{format_count(left, 'scenes')} left: rates may be too high; successes end first"
            if left
            else ""
        )

    @property
    def families(self) -> list[str]:
        """The families that were evaluated, in the order in which they were asked for."""
        return list(dict.fromkeys(o.family for o in self.outcomes))

    def mean_success(self) -> Estimate:
        """The mean of the families' success rates, each counting the same."""
        rows = [[o.success for o in self.outcomes if o.family == f] for f in self.families]
        return estimate_mean_proportion([(sum(row), len(row)) for row in rows])

    def describe_precision(self) -> str:
        """In words: how wide the intervals are, and how many scenes make them ±5 points."""
        rates = [self.summarize(f).success for f in self.families]
        widest = max(rates, key=lambda e: e.half_width)
        text = f"intervals: ±{100 * self.mean_success().half_width:.1f} points for the mean, "
        text += f"up to ±{100 * widest.half_width:.1f} for a family (n = {widest.n})"
        text = f"UNFINISHED: {words}. {text}" if (words := self.describe_unfinished()) else text
        if widest.half_width <= TARGET_HALF_WIDTH:
            return text
        need = max(find_num_samples(TARGET_HALF_WIDTH, min(max(0.5, e.low), e.high)) for e in rates)
        return f"{text}. ±{100 * TARGET_HALF_WIDTH:.0f} points need up to {need} scenes per family"

    def summarize(self, family: str | None = None) -> Summary:
        """The numbers of one family, or of all episodes together."""
        chosen = [o for o in self.outcomes if family in (None, o.family)]
        steps = [o.steps for o in chosen if o.success]
        rates = (
            estimate_proportion(sum(getattr(o, name) for o in chosen), len(chosen))
            for name in MILESTONES
        )
        success, reached, grasped, wrong = rates
        lost, mean = (
            float(np.mean([o.unreachable for o in chosen])),
            float(np.mean(steps)) if steps else None,
        )
        return Summary(success, reached, grasped, wrong, lost, mean)

    def save(self, path: Path) -> None:
        """Writes JSON, the summaries first, whole or not at all."""
        content = {
            "policy": self.policy,
            "settings": self.settings,
            "seconds": self.seconds,
            "mean_success": self.mean_success().value,
            "summary": {f: asdict(self.summarize(f)) for f in self.families},
            "outcomes": [asdict(o) for o in self.outcomes],
            "wanted": sorted(self.wanted),
        }
        write_text(path, json.dumps(content, indent=1))

    def to_table(self) -> Table:
        """The summaries for a terminal."""
        rows = []
        for family in self.families:
            s = self.summarize(family)
            rates = [f"{e.value:.0%}" for e in (s.reached, s.grasped, s.wrong_object)]
            steps = [f"{s.unreachable:.1f}", "" if s.steps is None else f"{s.steps:.0f}"]
            rows.append([family, s.success.to_text(".0%"), *rates, *steps])
        mean = self.mean_success()
        rows.append(
            ["mean of families", f"{mean.value:.1%} [{mean.low:.0%}, {mean.high:.0%}]", *[""] * 5]
        )
        num_episodes = format_count(len(self.outcomes), "episodes")
        title = f"{self.policy}: closed loop, {num_episodes}, {self.seconds:.0f} s"
        headers = ["family", "success [95 %]", "reached", "grasped", "wrong object"]
        headers += ["steps out of reach", "steps to success"]
        return build_terminal_table(title, headers, rows, self.describe_precision(), mean_last=True)


def build_terminal_table(
    title: str,
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str = "",
    mean_last: bool = False,
) -> Table:
    """A table for a terminal, numbers right; 80 characters fold none of our words. mean_last: the last row is
    set off."""
    lean: Any = {
        "box": box.SIMPLE_HEAD,
        "show_edge": False,
        "pad_edge": False,
        "collapse_padding": True,
    }
    table = Table(title="\n" + escape(title), caption=escape(caption), **lean)
    short = all(len(row[0]) <= 16 for row in rows)
    for index, header in enumerate(headers):
        kept = header.startswith("success [") if index else short  # what the table is for
        table.add_column(
            escape(header), justify="right" if index else "left", no_wrap=kept, overflow="fold"
        )
    for row in rows:
        if mean_last and row is rows[-1]:
            table.add_section()
        table.add_row(*map(escape, row))
    return table


def merge_results(parts: Sequence[Results]) -> Results:
    """Parts of one evaluation as one: families in the order of their first appearance, scenes by seed, each
    once. Raises `SpearError` when policies or settings differ, or a scene ended differently."""
    first = parts[0]
    found: dict[tuple[str, int], Outcome] = {}
    for part in parts:
        if other := describe_difference(
            *({"policy": p.policy, **p.settings} for p in (first, part))
        ):
            raise SpearError(
                f"results of {part.policy}: {other}: only parts of one evaluation merge"
            )
        for o in part.outcomes:
            if found.setdefault((o.family, o.seed), o) != o:
                which = f"results of {part.policy}: {o.family} scene {o.seed} ended differently in two parts"
                raise SpearError(
                    f"{which}: rounding, or another policy: remove one journal, or all"
                )
    order = list(dict.fromkeys(f for f, _ in found))
    outcomes = sorted(found.values(), key=lambda o: (order.index(o.family), o.seed))
    wanted = frozenset[tuple[str, int]]().union(*(p.wanted for p in parts))
    return Results(first.policy, first.settings, outcomes, sum(p.seconds for p in parts), wanted)


def parse_shard(text: str) -> tuple[int, int]:
    """ "2/5", the second of five parts of an evaluation, as (2, 5): every fifth scene from the second on.
    Raises `SpearError` for anything else than k/n with 1 <= k <= n."""
    index, _, of = text.partition("/")
    if not (index.isdecimal() and of.isdecimal() and 1 <= int(index) <= int(of)):
        raise SpearError(f"--shard {text}: write it as 2/5 for the second of five parts")
    return int(index), int(of)


class Journal:
    """The journal that this process writes. done: the outcomes that any journal of the folder holds."""

    def __init__(
        self,
        folder: Path,
        policy: str,
        settings: Mapping[str, Any],
        shard: tuple[int, int],
        scenes: ScenesByFamily,
    ) -> None:
        """Opens a journal, or goes on with it, to run these scenes. `SpearError`: of other settings."""
        folder.mkdir(parents=True, exist_ok=True)
        self.done: dict[tuple[str, int], Outcome] = {}
        wanted = {(family, seed) for family, seeds in scenes.items() for seed in seeds}
        if not (found := find_journals(folder)) and (folder / "results.json").is_file():
            raise SpearError(
                f"{folder}: holds results.json without journals: give another --out, or move it"
            )
        for path in found:
            earlier = read_journal(path)
            heads = ({"policy": earlier.policy, **earlier.settings}, {"policy": policy, **settings})
            if other := describe_difference(*heads):
                raise SpearError(
                    f"{folder}: holds other results: {other}: give another --out, or remove it"
                )
            self.done |= {(o.family, o.seed): o for o in earlier.outcomes}
            wanted -= earlier.wanted
        self._path = folder / f"episodes-{shard[0]}-of-{shard[1]}.jsonl"
        if self._path.is_file():
            whole = self._path.read_bytes().rpartition(b"\n")[0]
            os.truncate(self._path, len(whole) + 1 if whole else 0)
        plan = {"scenes": {family: list(seeds) for family, seeds in scenes.items()}}
        self._begin = [
            {"policy": policy, "settings": to_plain_json(settings)},
            *([plan] if wanted else []),
        ]

    def add(self, outcome: Outcome, seconds: float, wall: float) -> None:
        """One more episode, on disk when this returns. seconds: that it ran; wall: since the one before."""
        with report_write_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            line = {**asdict(outcome), "seconds": seconds, "wall": wall}
            lines = [*self._begin[1 if file.tell() else 0 :], line]
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        self._begin = []
        self.done[outcome.family, outcome.seed] = outcome


def find_journals(folder: Path) -> list[Path]:
    """The journals of a folder that say at least who acted."""
    return sorted(p for p in folder.glob("episodes-*-of-*.jsonl") if b"\n" in p.read_bytes())


def read_journal(path: Path) -> Results:
    """The episodes of one journal so far. Raises `SpearError` for a file that is not one."""
    try:
        lines = path.read_text("utf-8").rpartition("\n")[0].split("\n")
        head, *others = [json.loads(line) for line in lines]
        plans, episodes = ([e for e in others if ("scenes" in e) is plan] for plan in (True, False))
        wanted = frozenset(
            (f, s) for plan in plans for f, seeds in plan["scenes"].items() for s in seeds
        )
        seconds = sum(
            e.pop("wall", e.pop("seconds")) for e in episodes
        )  # once, seconds was what wall is
        return Results(head["policy"], head["settings"], episodes, seconds, wanted)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SpearError(f"results: {path}: not a journal of `spear evaluate`: remove it") from None


def load_results(path: Path) -> Results:
    """The results in a folder (its journals together, or else its results.json), or in a results file. Raises
    `SpearError` when there are none, or when they do not belong together."""
    if path.is_dir() and (found := find_journals(path)):
        results = merge_results([read_journal(p) for p in found])
        if not results.outcomes:
            raise SpearError(
                f"results: {path}: no episode has ended there: run `spear evaluate` again"
            )
        return results
    file = path / "results.json" if path.is_dir() else path
    return read_json_as(
        Results, file, "give what `spear evaluate --out` wrote", "cannot read results"
    )
