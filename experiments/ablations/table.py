"""The tables of the finished scores: numbers with intervals, compared with the published ones."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.ablations.plan import Data, Plan
from experiments.ablations.rows import Row, Table
from experiments.ablations.run import load_score
from spear.evaluate.compare import load_published_tables
from spear.evaluate.results import Results
from spear.evaluate.stats import (
    Estimate,
    estimate_difference_over_seeds,
    estimate_mean_over_seeds,
)
from spear.types import Array
from spear.util.run_settings import describe_difference

QUESTION_RECIPES = ("nano-vlm-1", "nano-vlm-2")  # the stages that ask 3D questions

Verdict = Literal["agrees", "disagrees", "cannot tell", "cannot tell: one seed", "not run yet", "–"]
ResultsBySeed = Mapping[int, Results]


@dataclass(frozen=True)
class Line:
    """One row of a table as far as it has run.

    success            mean of the task families over seeds and scenes; None before the first seed
                       is scored.
    by_seed            the same for each training.
    against            success minus that of the row it is compared with, over the seeds that both
                       have.
    published          the paper's number, %.
    published_against  its difference, points, from the paper's counterpart of the compared row.
    verdict            whether `against` has the sign of the paper's difference; "–" without one.
    steps              of the policy's training.
    images             3D-labeled images that questions were asked about.
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
class FilledTable:
    """A table with its lines; source: of its published numbers, "" where there are none."""

    table: Table
    lines: Sequence[Line]
    source: str


def fill_tables(plan: Plan, out: Path, data: Data) -> list[FilledTable]:
    """The tables of a plan with what has been scored so far."""
    filled_tables = []
    for table, rows in plan.tables:
        means: Mapping[str, float] = {}
        source = ""
        if table.reference:
            reference = load_published_tables()[table.reference]
            means = reference.means
            source = f"{reference.title}. {reference.source}"

        results = {row.name: _load_results(plan, out, row) for row in rows}
        differences = _describe_different_settings(results)
        if differences:
            note = f"Not all were scored alike: {differences}. {table.note}".strip()
            table = replace(table, note=note)
        baseline = next(row for row in rows if row.name == table.against)
        lines = [_make_line(plan, data, row, baseline, results, means) for row in rows]
        filled_tables.append(FilledTable(table, lines, source))
    return filled_tables


def _load_results(plan: Plan, out: Path, row: Row) -> dict[int, Results]:
    """The results of a row by seed, of the seeds that have been scored."""
    results = {}
    for seed in range(plan.seeds):
        score = load_score(out, plan.scoring(row.name, seed))
        if score is not None:
            results[seed] = score
    return results


def _describe_different_settings(results: Mapping[str, ResultsBySeed]) -> str:
    """How some rows were scored differently from the first, in words."""
    all_settings = []
    for by_seed in results.values():
        all_settings += [{**score.settings, "weights": ""} for score in by_seed.values()]
    differences = {describe_difference(all_settings[0], settings) for settings in all_settings}
    return "; ".join(sorted(differences - {""}))


def _make_line(
    plan: Plan,
    data: Data,
    row: Row,
    baseline: Row,
    results: Mapping[str, ResultsBySeed],
    means: Mapping[str, float],
) -> Line:
    by_seed = results[row.name]
    seeds = sorted(by_seed)
    success = None
    if seeds:
        tables = stack_successes([by_seed[seed] for seed in seeds], plan.families)
        success = estimate_mean_over_seeds(tables)

    baseline_by_seed = results[baseline.name]
    shared_seeds = sorted(set(by_seed) & set(baseline_by_seed))
    against = None
    if row != baseline and shared_seeds:
        against = estimate_difference_over_seeds(
            stack_successes([by_seed[seed] for seed in shared_seeds], plan.families),
            stack_successes([baseline_by_seed[seed] for seed in shared_seeds], plan.families),
        )

    published = means.get(row.title)
    published_baseline = means.get(baseline.title)
    published_against = None
    if row != baseline and published is not None and published_baseline is not None:
        published_against = published - published_baseline

    chain = plan.chains[row.name, 0]
    asks_questions = any(t.recipe.name in QUESTION_RECIPES and t.steps for t in chain)
    return Line(
        row=row,
        success=success,
        by_seed=[by_seed[seed].mean_success().value for seed in seeds],
        against=against,
        published=published,
        published_against=published_against,
        verdict=judge(against, published_against, len(shared_seeds)),
        steps=sum(training.steps for training in chain if training.recipe.kind == "vla"),
        images=round(row.images * data.num_images) if asks_questions else 0,
    )


def judge(against: Estimate | None, published: float | None, seeds: int) -> Verdict:
    """Judge whether a difference has the sign of the published one.

    Args:
        against: Our difference; None if one of the two rows has not run.
        published: The paper's difference, points; None without one.
        seeds: Trainings behind our difference. One alone cannot tell a better recipe from a lucky
            draw.
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


def to_json(tables: Sequence[FilledTable]) -> list[dict[str, Any]]:
    """Everything that the pages show, as data."""
    content = []
    for filled in tables:
        lines = []
        for line in filled.lines:
            lines.append(asdict(line) | {"row": line.row.name, "title": line.row.title})
        content.append(
            {
                "table": filled.table.name,
                "against": filled.table.against,
                "source": filled.source,
                "lines": lines,
            }
        )
    return content


def stack_successes(seeds: Sequence[Results], families: Sequence[str]) -> list[Array]:
    """Success [seeds, scenes] of each family, on the same scenes, in the order of their seeds."""
    tables = []
    for family in families:
        successes = []
        for results in seeds:
            outcomes = [outcome for outcome in results.outcomes if outcome.family == family]
            outcomes.sort(key=lambda outcome: outcome.seed)
            successes.append([outcome.success for outcome in outcomes])
        tables.append(np.array(successes, bool))
    return tables
