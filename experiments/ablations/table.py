"""What the finished trainings say: numbers with intervals beside the published, and whether they agree."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.ablations.plan import Data, Plan
from experiments.ablations.rows import Row, Table
from experiments.ablations.run import scored
from spear.evaluate.compare import load_references
from spear.evaluate.results import Results
from spear.evaluate.stats import Estimate, estimate_difference_over_seeds, estimate_mean_over_seeds
from spear.types import Array
from spear.util.run_settings import describe_difference

Verdict = Literal["agrees", "disagrees", "cannot tell", "cannot tell: one seed", "not run yet", "–"]
_Results = dict[str, dict[int, Results]]
"""The episodes of rows that have been scored, by row and seed."""


@dataclass(frozen=True)
class Line:
    """One row of a table as far as it has run.

    success     mean of the task families over seeds and scenes; None before the first seed is scored.
    by_seed     the same for each training.
    against     success minus that of the row it is compared with, over the seeds that both have.
    published   the paper's number, %, and its distance, points, from the paper's counterpart of that row.
    verdict     whether the sign of `against` is the paper's; "–" where there is none to compare with.
    steps       of the policy's training. images: 3D-labelled images that questions were asked about.
    """

    row: Row
    success: Estimate | None
    by_seed: Sequence[float]
    against: Estimate | None
    published: float | None
    published_against: float | None
    verdict: Verdict
    steps: int
    images: int


@dataclass(frozen=True)
class Filled:
    """A table with its lines, and where its published numbers come from ("" where there are none)."""

    table: Table
    lines: Sequence[Line]
    source: str


def fill(plan: Plan, out: Path, data: Data) -> list[Filled]:
    """The tables of a plan with what has been scored so far."""
    filled = []
    for table, rows in plan.tables:
        reference = load_references()[table.reference] if table.reference else None
        means = dict(reference.means) if reference else {}
        found = {
            r.name: {s: scored(out, plan.scoring(r.name, s)) for s in range(plan.seeds)}
            for r in rows
        }
        results = {
            n: {s: one for s, one in each.items() if one is not None} for n, each in found.items()
        }
        how = [
            {**one.settings, "weights": ""} for each in results.values() for one in each.values()
        ]
        if others := "; ".join(
            sorted({words for one in how if (words := describe_difference(how[0], one))})
        ):
            table = replace(
                table, note=f"Not all were scored alike: {others}. {table.note}".strip()
            )
        first = next(row for row in rows if row.name == table.against)
        lines = [_line(plan, data, row, first, results, means) for row in rows]
        filled.append(
            Filled(table, lines, f"{reference.title}. {reference.source}" if reference else "")
        )
    return filled


def to_json(tables: Sequence[Filled]) -> list[dict[str, Any]]:
    """Everything that the pages show, as data."""
    found = []
    for table, lines, source in ((filled.table, filled.lines, filled.source) for filled in tables):
        rows = [asdict(x) | {"row": x.row.name, "title": x.row.title} for x in lines]
        found.append(
            {"table": table.name, "against": table.against, "source": source, "lines": rows}
        )
    return found


def judge(against: Estimate | None, published: float | None, seeds: int) -> Verdict:
    """Whether a difference has the sign of the published one, if its interval does not leave that open.

    against    ours; None where one of the two has not run. published: theirs, points.
    seeds      trainings behind ours. One alone cannot tell a better recipe from a lucky draw.
    """
    if published is None:
        return "–"
    if against is None:
        return "not run yet"
    if seeds < 2:
        return "cannot tell: one seed"
    if against.low <= 0 <= against.high:
        return "cannot tell"
    return "agrees" if (against.value > 0) == (published > 0) else "disagrees"


def _line(
    plan: Plan, data: Data, row: Row, first: Row, results: _Results, means: dict[str, float]
) -> Line:
    own, other = results[row.name], results[first.name]
    shared = sorted(set(own) & set(other))
    # Whether any stage before the policy asks 3D questions.
    chain = plan.chains[row.name, 0]
    asks = any(t.recipe.name in ("nano-vlm-1", "nano-vlm-2") and t.steps for t in chain)
    against = None
    if row != first and shared:
        pair = ([each[seed] for seed in shared] for each in (own, other))
        against = estimate_difference_over_seeds(
            *(successes(seeds, plan.families) for seeds in pair)
        )
    published, base = means.get(row.title), means.get(first.title)
    apart = None if row == first or published is None or base is None else published - base
    return Line(
        row,
        estimate_mean_over_seeds(successes([own[seed] for seed in sorted(own)], plan.families))
        if own
        else None,
        [own[seed].mean_success().value for seed in sorted(own)],
        against,
        published,
        apart,
        judge(against, apart, len(shared)),
        sum(t.steps for t in chain if t.recipe.kind == "vla"),
        round(row.images * data.images) if asks else 0,
    )


def successes(seeds: Sequence[Results], families: Sequence[str]) -> list[Array]:
    """Success [seeds, scenes] of each family, on the same scenes, in order."""
    rows = [sorted(results.outcomes, key=lambda o: o.seed) for results in seeds]
    found = ([[o.success for o in row if o.family == name] for row in rows] for name in families)
    return [np.array(each, bool) for each in found]
