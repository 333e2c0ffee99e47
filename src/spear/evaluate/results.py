"""The outcome of a closed-loop evaluation: one record per episode, summaries per family, JSON, a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spear.errors import SpearError
from spear.evaluate.stats import Estimate, samples_for, wilson, wilson_mean
from spear.util.files import write_text

if TYPE_CHECKING:
    from rich.table import Table

HALF_WIDTH = 0.05
"""How well a family's success rate is to be known: ± 5 points."""
SCENES = samples_for(HALF_WIDTH)
"""Scenes per family that are enough for that whatever the rate: the default of an evaluation."""


@dataclass(frozen=True)
class Outcome:
    """How one episode went.

    reached, grasped      milestones on the way: the gripper was at the right object; the object was lifted.
    success               the object rests, released, on the target.
    wrong_object_moved    something else than the asked-for object was carried or pushed away.
    unreachable           control steps whose target the arm could not reach.
    steps                 control steps (5 Hz) until success or the end.
    """

    family: str
    seed: int
    instruction: str
    success: bool
    reached: bool
    grasped: bool
    wrong_object_moved: bool
    unreachable: int
    steps: int

    @property
    def film_name(self) -> str:
        """The name, without its ending, of the file with this episode's film."""
        return f"{self.family}-{'success' if self.success else 'failure'}-{self.seed}"


@dataclass(frozen=True)
class Summary:
    """One family's numbers; proportions carry 95 % Wilson intervals. steps: mean over the successes."""

    success: Estimate
    reached: Estimate
    grasped: Estimate
    wrong_object: Estimate
    steps: float | None


@dataclass(frozen=True)
class Results:
    """A whole evaluation: who acted, how, every episode's outcome, and the wall time."""

    policy: str
    settings: dict[str, Any]
    outcomes: Sequence[Outcome]
    seconds: float

    @property
    def families(self) -> list[str]:
        """The families that were evaluated, in the order in which they were asked for."""
        return list(dict.fromkeys(o.family for o in self.outcomes))

    @property
    def mean_success(self) -> float:
        """The mean of the families' success rates, each family counting the same."""
        return self.mean().value

    def mean(self) -> Estimate:
        """`mean_success` with its interval, see `spear.evaluate.stats.wilson_mean`."""
        rows = [[o.success for o in self.outcomes if o.family == f] for f in self.families]
        return wilson_mean([(sum(row), len(row)) for row in rows])

    def width(self) -> str:
        """In words: how wide the intervals are, and how many scenes make them ±5 points."""
        widest = max((self.summary(f).success for f in self.families), key=lambda e: e.half_width)
        text = f"intervals: ±{100 * self.mean().half_width:.1f} points for the mean, "
        text += f"up to ±{100 * widest.half_width:.1f} for a family (n = {widest.n})"
        if widest.half_width <= HALF_WIDTH:
            return text
        rates = [self.summary(f).success for f in self.families]
        need = max(samples_for(HALF_WIDTH, min(max(0.5, e.low), e.high)) for e in rates)
        return f"{text}. ±{100 * HALF_WIDTH:.0f} points need up to {need} scenes per family"

    def summary(self, family: str | None = None) -> Summary:
        """The numbers of one family, or of all episodes together."""
        chosen = [o for o in self.outcomes if family in (None, o.family)]
        steps = [o.steps for o in chosen if o.success]
        return Summary(
            success=wilson(sum(o.success for o in chosen), len(chosen)),
            reached=wilson(sum(o.reached for o in chosen), len(chosen)),
            grasped=wilson(sum(o.grasped for o in chosen), len(chosen)),
            wrong_object=wilson(sum(o.wrong_object_moved for o in chosen), len(chosen)),
            steps=float(np.mean(steps)) if steps else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready data, the summaries first."""
        return {
            "policy": self.policy,
            "settings": self.settings,
            "seconds": self.seconds,
            "mean_success": self.mean_success,
            "summary": {f: asdict(self.summary(f)) for f in self.families},
            "outcomes": [asdict(o) for o in self.outcomes],
        }

    def save(self, path: Path) -> None:
        """Writes JSON, whole or not at all."""
        write_text(path, json.dumps(self.to_dict(), indent=1))

    @staticmethod
    def load(path: Path) -> Results:
        """Reads what `save` wrote. Raises `SpearError` for a file that is not one."""
        try:
            raw = json.loads(path.read_text())
            outcomes = [Outcome(**o) for o in raw["outcomes"]]
            return Results(raw["policy"], raw["settings"], outcomes, raw["seconds"])
        except FileNotFoundError:
            raise SpearError(f"results: {path}: no such file") from None
        except (ValueError, KeyError, TypeError):
            raise SpearError(f"results: {path}: not a file that `spear evaluate --out` wrote") from None

    def table(self) -> Table:
        """The summaries for a terminal."""
        from rich.table import Table

        table = Table(
            title=f"{self.policy}: closed loop, {len(self.outcomes)} episodes, {self.seconds:.0f} s"
        )
        for column in ("family", "success [95 %]", "reached", "grasped", "wrong object", "steps"):
            table.add_column(column, justify="left" if column == "family" else "right")
        for family in self.families:
            s = self.summary(family)
            table.add_row(
                family,
                f"{s.success.value:.0%} \\[{s.success.low:.0%}, {s.success.high:.0%}]",
                f"{s.reached.value:.0%}",
                f"{s.grasped.value:.0%}",
                f"{s.wrong_object.value:.0%}",
                "" if s.steps is None else f"{s.steps:.0f}",
            )
        table.add_section()
        mean = self.mean()
        table.add_row("mean of families", f"{mean.value:.1%} \\[{mean.low:.0%}, {mean.high:.0%}]", *[""] * 4)
        table.caption = self.width()
        return table


def merge(parts: Sequence[Results]) -> Results:
    """Parts of one evaluation as one: families in the order of their first appearance, scenes by seed.

    A scene that is in several parts counts once. Raises `SpearError` when policies or settings differ, or
    when a scene ended differently in two parts.
    """
    first = parts[0]
    found: dict[tuple[str, int], Outcome] = {}
    for part in parts:
        if part.policy != first.policy:
            raise SpearError(
                f"results: of {first.policy} and of {part.policy}: these do not merge: compare them"
            )
        differ = sorted(k for k, v in part.settings.items() if first.settings.get(k) != v)
        if differ or part.settings.keys() != first.settings.keys():
            raise SpearError(
                f"results of {part.policy}: run with different {', '.join(differ) or 'settings'}: "
                "only parts of one evaluation merge"
            )
        for o in part.outcomes:
            if found.setdefault((o.family, o.seed), o) != o:
                raise SpearError(
                    f"results of {part.policy}: {o.family} scene {o.seed} ended differently in two parts: the policy "
                    "or the simulator changed in between: evaluate again into a new folder"
                )
    order = list(dict.fromkeys(f for f, _ in found))
    outcomes = sorted(found.values(), key=lambda o: (order.index(o.family), o.seed))
    return Results(first.policy, first.settings, outcomes, sum(p.seconds for p in parts))
