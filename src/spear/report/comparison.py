"""Makes two pages: one compares two policies in the same scenes, one predictions with
demonstrations."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spear.errors import format_count
from spear.evaluate.compare import (
    SIGNIFICANCE_LEVEL,
    Comparison,
    Pair,
    PublishedTable,
    format_difference_in_points,
    format_p_value,
    format_row,
)
from spear.evaluate.open_loop import OpenLoopErrors
from spear.evaluate.results import Outcome, Results
from spear.report.page import Fact, render, replace_underscores
from spear.report.plot import (
    GREY,
    LINE_COLORS,
    Axis,
    Line,
    draw_bars,
    draw_chart,
    draw_rate_differences,
    make_rate_bars,
)
from spear.types import Array

NUM_SHOWN_EPISODES = 3  # on the page of an open-loop evaluation
MM_PER_M = 1000


class _ActionChart(NamedTuple):
    """A chart of one of the 8 numbers of an action over the steps.

    Attributes:
        title: title of the chart, with the unit.
        column: index of the number.
        factor: shown value divided by the number.
    """

    title: str
    column: int
    factor: int


ACTION_CHARTS = (
    _ActionChart("Forward (x), mm", 0, MM_PER_M),
    _ActionChart("Left (y), mm", 1, MM_PER_M),
    _ActionChart("Up (z), mm", 2, MM_PER_M),
    _ActionChart("Gripper opening", 7, 1),
)


def make_comparison_page(
    comparison: Comparison,
    folders: tuple[Path, Path],
    max_films: int = 12,
    published: Sequence[PublishedTable] = (),
    named_results: Sequence[tuple[str, Results]] = (),
) -> str:
    """Make a self-contained page that compares two policies.

    Args:
        comparison: the comparison.
        folders: the folders with the films of the first and of the second policy.
        max_films: the largest number of pairs of films, chosen by `select_filmed_pairs`.
        published: tables of published numbers.
        named_results: pairs of name and results, which each of these tables shows, too.
    """
    rows = comparison.rows
    rate_groups = []
    for row in rows:
        rates = [(comparison.first_name, row.first), (comparison.second_name, row.second)]
        rate_groups.append((replace_underscores(row.name), make_rate_bars(rates)))
    table_rows = []
    for row in rows:
        name, *cells = format_row(row)
        table_rows.append([replace_underscores(name), *cells])
    pairs = select_filmed_pairs(comparison, folders, max_films)
    return render(
        "comparison.html",
        title=f"{comparison.first_name} against {comparison.second_name}",
        facts=_list_facts(comparison),
        comparison=comparison,
        alpha=SIGNIFICANCE_LEVEL,
        rates=draw_bars(rate_groups),
        differences=draw_rate_differences(
            [(replace_underscores(row.name), row.difference) for row in rows]
        ),
        rows=table_rows,
        scenes=[_make_scene_section(comparison, pair, folders) for pair in pairs],
        published=[(table, table.headers(), table.cells(named_results)) for table in published],
    )


def _list_facts(comparison: Comparison) -> list[Fact]:
    """Return the large numbers at the page's top, each with its meaning."""
    mean = comparison.mean
    facts = []
    named_rates = ((comparison.first_name, mean.first), (comparison.second_name, mean.second))
    for name, rate in named_rates:
        words = f"{name}: mean success [{rate.low:.0%}, {rate.high:.0%}]"
        facts.append((f"{rate.value:.1%}", words))
    # "+35.0" is the large number, and "points [+20.1, +47.2]" its meaning.
    points, unit_and_interval = format_difference_in_points(mean.difference).split(" ", 1)
    facts.append((points, unit_and_interval))
    num_scenes = format_count(len(comparison.pairs), "shared scenes")
    facts.append((f"p {format_p_value(mean.p)}", f"paired test, {num_scenes}"))
    return facts


def make_open_loop_page(model: OpenLoopErrors, baseline: OpenLoopErrors) -> str:
    """Make a self-contained page of a policy's actions in held-out episodes.

    Args:
        model: the policy's errors, with its predicted and the true actions.
        baseline: the errors of a baseline, with its actions.
    """
    num_episodes = format_count(len(model.truth), "held-out episodes")
    return render(
        "open_loop.html",
        title=f"{model.name}: predicted actions, the first of {num_episodes}",
        facts=[],
        charts=draw_open_loop_actions(model, baseline),
    )


def draw_open_loop_actions(model: OpenLoopErrors, baseline: OpenLoopErrors) -> list[list[str]]:
    """Draw predicted and true translations and gripper openings over the steps.

    Returns:
        The charts of each of the first `NUM_SHOWN_EPISODES` held-out episodes.
    """
    charts_of_episodes = []
    num_shown = min(NUM_SHOWN_EPISODES, len(model.truth))
    for index in range(num_shown):
        truth = model.truth[index]
        named_prediction = (model.name, model.predicted[index])
        named_baseline = (baseline.name, baseline.predicted[index])
        charts = [
            _draw_action_chart(chart, truth, named_prediction, named_baseline)
            for chart in ACTION_CHARTS
        ]
        charts_of_episodes.append(charts)
    return charts_of_episodes


def _draw_action_chart(
    chart: _ActionChart,
    truth: Array,
    model: tuple[str, Array],
    baseline: tuple[str, Array],
) -> str:
    """Draw one number of the actions over the steps of an episode.

    Args:
        chart: which number is drawn.
        truth: [T, 8] the demonstrator's actions.
        model: name of the model, and its actions [T, 8].
        baseline: name of the baseline, and its actions [T, 8].
    """
    steps = range(len(truth))

    def select(actions: Array) -> Array:
        """Return the chart's number of each action [T], in the unit of the chart."""
        return chart.factor * actions[:, chart.column]

    model_name, predicted = model
    baseline_name, baseline_actions = baseline
    lines = [
        Line("demonstrator", steps, select(truth), GREY, dots=True),
        Line(model_name, steps, select(predicted), LINE_COLORS[0], dots=True),
        Line(baseline_name, steps, select(baseline_actions), LINE_COLORS[1], dashed=True),
    ]
    return draw_chart(lines, Axis("step (5 Hz)"), title=chart.title)


def select_filmed_pairs(
    comparison: Comparison, folders: tuple[Path, Path], limit: int
) -> list[Pair]:
    """Select at most `limit` shared scenes whose films the page shows, the most interesting first.

    A scene is interesting if only one of the two policies solved it. The order is: interesting
    scenes of which both folders have a film, interesting scenes of which one folder has a film,
    other scenes of which both folders have a film. Within each of the three groups, the task
    families take turns.

    Returns:
        The two outcomes in each selected scene.
    """
    num_so_far: Counter[tuple[bool, bool, str]] = Counter()  # by group and task family
    ranked_pairs = []
    for pair in comparison.pairs:
        first, second = pair
        has_first_film = (folders[0] / first.film_name).is_file()
        has_second_film = (folders[1] / second.film_name).is_file()
        has_both_films = has_first_film and has_second_film
        has_one_film = has_first_film != has_second_film
        has_same_ending = first.success == second.success
        if has_both_films or (has_one_film and not has_same_ending):
            num_so_far[has_same_ending, has_one_film, first.family] += 1
            turn = num_so_far[has_same_ending, has_one_film, first.family]
            rank = (has_same_ending, has_one_film, turn)  # False sorts before True
            ranked_pairs.append((rank, pair))
    ranked_pairs.sort(key=lambda ranked: ranked[0])
    return [pair for _, pair in ranked_pairs[:limit]]


def _make_scene_section(
    comparison: Comparison, pair: Pair, folders: tuple[Path, Path]
) -> dict[str, Any]:
    """Return the values that the template shows of a scene: its title, and how each policy ended.

    The ending comes with the data of the film; None if there is no film.
    """
    names = (comparison.first_name, comparison.second_name)
    runs = []
    for name, outcome, folder in zip(names, pair, folders, strict=True):
        path = folder / outcome.film_name
        film = path.read_bytes() if path.is_file() else None
        runs.append((f"{name}: {describe_ending(outcome)}", film))
    outcome, _ = pair  # both are of the same scene
    family = replace_underscores(outcome.family)
    return {"title": f"{family}, scene {outcome.seed}: {outcome.instruction}", "runs": runs}


def describe_ending(outcome: Outcome) -> str:
    """Say in words how an episode ended."""
    words = "failure"
    if outcome.success:
        words = f"success after {format_count(outcome.steps, 'steps')}"
    if outcome.unreachable:
        words += f", {format_count(outcome.unreachable, 'steps')} out of reach"
    return words
