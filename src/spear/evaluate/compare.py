"""Comparison of two results on the same scenes, and of measured results with published numbers.

A comparison of two results says which is better, by how much, and whether the difference may be
chance. Published numbers are shown next to measured results and never mixed with them. The folder
`reference` has one TOML file per published table. A file has the table's title, source, columns
(tasks) and success in percent, and says which task families of our results are the same tasks.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from rich.table import Table

from spear.errors import SpearError, format_count
from spear.evaluate.results import Outcome, Results, build_terminal_table
from spear.evaluate.stats import (
    Estimate,
    estimate_first_minus_second_and_p_value,
    estimate_mean_proportion,
)

SIGNIFICANCE_LEVEL = 0.05  # with a p-value below this, the verdict says that one is better
# Settings that may differ in a comparison: which scenes were run, and with which weights.
IGNORED_SETTINGS = ("scenes", "first_seed", "weights")

Pair = tuple[Outcome, Outcome]
"""The outcomes of the same scene in the first and in the second results."""


@dataclass(frozen=True)
class Row:
    """The comparison on the shared scenes of one family, or its mean over the families.

    name         the family.
    first        success rate of the first results.
    second       success rate of the second results.
    difference   first - second; see `estimate_first_minus_second_and_p_value`.
    only_first   how many scenes succeeded only in the first results.
    only_second  how many scenes succeeded only in the second results.
    p            p-value of the difference.
    """

    name: str
    first: Estimate
    second: Estimate
    difference: Estimate
    only_first: int
    only_second: int
    p: float


@dataclass(frozen=True)
class Comparison:
    """Two results, paired by scene.

    first_name    name of the first results.
    second_name   name of the second results.
    rows          one row per family, and a last one for their mean.
    pairs         both outcomes of each shared scene.
    num_unshared  how many scenes are in only one of the results.
    settings      the settings that differ, and warnings of unfinished results, in words.
    """

    first_name: str
    second_name: str
    rows: Sequence[Row]
    pairs: Sequence[Pair]
    num_unshared: int
    settings: Sequence[str]

    @property
    def mean(self) -> Row:
        """The row of the mean over the families."""
        return self.rows[-1]

    def verdict(self) -> str:
        """Say in one sentence which results are better, by the mean over the families."""
        difference = self.mean.difference
        chance = f"p {format_p_value(self.mean.p)}, n = {difference.n}"
        if self.mean.p >= SIGNIFICANCE_LEVEL:
            names = f"{self.first_name} and {self.second_name}"
            points = format_difference_in_points(difference)
            return f"No difference shown between {names}: {points}, {chance}."
        if difference.value > 0:
            return (
                f"{self.first_name} is better than {self.second_name}: "
                f"{format_difference_in_points(difference)}, {chance}."
            )
        # second - first: the ends of the interval exchange their places.
        gap = Estimate(-difference.value, -difference.high, -difference.low, difference.n)
        points = format_difference_in_points(gap)
        return f"{self.second_name} is better than {self.first_name}: {points}, {chance}."

    def to_table(self) -> Table:
        """Format the rows for a terminal."""
        num_scenes = format_count(len(self.pairs), "shared scenes")
        title = f"{self.first_name} against {self.second_name}, {num_scenes}"
        names = [self.first_name, self.second_name]
        headers = ["family", "n", *names, "difference [95 %]", "p", "won : lost"]
        rows = [format_row(row) for row in self.rows]
        return build_terminal_table(title, headers, rows, mean_last=True)


def compare_results(
    first: Results, second: Results, names: tuple[str, str] | None = None
) -> Comparison:
    """Compare the success in two results, paired on the scenes that both have run.

    Args:
        first: The first results.
        second: The second results.
        names: What to call them; None for the names of their policies.

    Raises:
        SpearError: They share no scene, or a scene with the same family and seed is not the same
            scene in both.
    """
    first_name, second_name = names or (first.policy, second.policy)

    # Pair the outcomes of the same scene.
    second_outcomes = {outcome.scene: outcome for outcome in second.outcomes}
    pairs = []
    for outcome in first.outcomes:
        if outcome.scene in second_outcomes:
            pairs.append((outcome, second_outcomes[outcome.scene]))
    if not pairs:
        raise SpearError(
            f"{first_name} and {second_name} share no scene. Evaluate both on the same tasks "
            "and seeds."
        )
    _check_same_scenes(first, second, pairs, first_name, second_name)

    # One row per family, and one for their mean.
    pairs_by_family: dict[str, list[Pair]] = {}
    for first_outcome, second_outcome in pairs:
        family_pairs = pairs_by_family.setdefault(first_outcome.family, [])
        family_pairs.append((first_outcome, second_outcome))
    rows = [_make_row(family, [members]) for family, members in pairs_by_family.items()]
    rows.append(_make_row("mean of families", list(pairs_by_family.values())))

    # Count the scenes of only one result, and list how the two evaluations differ.
    num_unshared = len(first.outcomes) + len(second.outcomes) - 2 * len(pairs)
    differences = _list_differing_settings(first, second)
    for name, results in ((first_name, first), (second_name, second)):
        unfinished = results.describe_unfinished()
        if unfinished:
            differences.append(f"in {name}, {unfinished}")
    return Comparison(first_name, second_name, rows, pairs, num_unshared, differences)


def _check_same_scenes(
    first: Results, second: Results, pairs: Sequence[Pair], first_name: str, second_name: str
) -> None:
    """Raise `SpearError` if paired outcomes are of different scenes."""
    for first_outcome, second_outcome in pairs:
        if first_outcome.instruction != second_outcome.instruction:
            raise SpearError(
                f"scene {first_outcome.seed} of {first_outcome.family} is "
                f"{first_outcome.instruction!r} for {first_name} and "
                f"{second_outcome.instruction!r} for {second_name}, because the simulator "
                "changed. Evaluate the older one again."
            )
    first_starts = first.settings.get("starts", "the official ones")
    second_starts = second.settings.get("starts", "the official ones")
    if first_starts != second_starts:
        raise SpearError(
            f"{first_name} starts from {first_starts} and {second_name} from {second_starts}, "
            "which are other scenes. Evaluate both from the same."
        )


def _list_differing_settings(first: Results, second: Results) -> list[str]:
    """List the settings that differ between two results, in words."""
    differences = []
    for key in {**first.settings, **second.settings}:
        if key in IGNORED_SETTINGS:
            continue
        first_setting = first.settings.get(key, "not said")
        second_setting = second.settings.get(key, "not said")
        if first_setting != second_setting:
            name = key.replace("_", " ")
            differences.append(f"{name} {first_setting} and {second_setting}")
    return differences


def _make_row(name: str, strata: Sequence[Sequence[Pair]]) -> Row:
    """Make the row of one family, or of several families with the same weight.

    Args:
        name: The row's name.
        strata: The pairs of outcomes of each family: one entry for the row of a family, several for
            the row of their mean.
    """
    successes = []  # per family: success of each scene in the first and in the second results
    first_counts = []  # per family: (number of successes, number of scenes)
    second_counts = []
    only_first = 0  # scenes that succeeded only in the first results
    only_second = 0
    for pairs in strata:
        first = [first_outcome.success for first_outcome, _ in pairs]
        second = [second_outcome.success for _, second_outcome in pairs]
        successes.append((first, second))
        first_counts.append((sum(first), len(first)))
        second_counts.append((sum(second), len(second)))
        for has_first_succeeded, has_second_succeeded in zip(first, second, strict=True):
            only_first += has_first_succeeded and not has_second_succeeded
            only_second += has_second_succeeded and not has_first_succeeded
    difference, p = estimate_first_minus_second_and_p_value(successes)
    return Row(
        name=name,
        first=estimate_mean_proportion(first_counts),
        second=estimate_mean_proportion(second_counts),
        difference=difference,
        only_first=only_first,
        only_second=only_second,
        p=p,
    )


def format_row(row: Row) -> list[str]:
    """Format a row as the cells of a table.

    Returns:
        Name, n, both rates, the difference with its interval, the p-value, and "a : b" if only the
        first succeeded on a scenes and only the second on b scenes.
    """
    return [
        row.name,
        str(row.difference.n),
        f"{row.first.value:.1%}",
        f"{row.second.value:.1%}",
        row.difference.to_text("+.1f", scale=100),
        format_p_value(row.p).removeprefix("= "),
        f"{row.only_first} : {row.only_second}",
    ]


def format_difference_in_points(difference: Estimate) -> str:
    """Format a difference of rates, for example as "+35.0 points [+20.1, +47.2]"."""
    return difference.to_text("+.1f", scale=100, unit=" points")


def format_p_value(p: float) -> str:
    """Format a p-value with its relation sign: "= 0.021" or "< 0.0001"."""
    if p < 1e-4:
        return "< 0.0001"
    return f"= {p:.2g}" if p < 0.1 else f"= {p:.2f}"


@dataclass(frozen=True)
class PublishedTable:
    """A published table of success rates.

    title     heading of the table.
    source    the publication.
    columns   names of the tasks; empty if only means were published.
    families  the task family of our results that is the same task, for each column.
    rows      method → success in percent, for each column.
    means     method → mean success in percent, as published.
    note      what to know when reading the table.
    """

    title: str
    source: str
    columns: Sequence[str]
    families: Sequence[str]
    rows: Mapping[str, Sequence[float]]
    means: Mapping[str, float]
    note: str = ""

    def headers(self) -> list[str]:
        """Return the headers of the columns of `cells`."""
        return ["success, %", *self.columns, "mean"]

    def cells(self, measured_results: Sequence[tuple[str, Results]] = ()) -> list[list[str]]:
        """Format the table as text, and below it our results.

        Args:
            measured_results: (name, results) of each of our results.

        Returns:
            One list of cells per row. The first cell says whether the row is published or measured.
        """
        lines = []
        for method, mean in self.means.items():
            row = [f"{value:.1f}" for value in self.rows.get(method, ())]
            if not row:
                row = ["–"] * len(self.columns)
            lines.append([f"{method} (published)", *row, f"{mean:.1f}"])
        for name, results in measured_results:
            measured_families = set(results.families)
            row = []
            for family in self.families:
                is_measured = family in measured_families
                rate = results.summarize(family).success if is_measured else None
                row.append(_format_percent(rate))
            has_all_families = measured_families == set(self.families)
            mean_rate = results.mean_success() if has_all_families else None
            lines.append([f"{name} (measured here)", *row, _format_percent(mean_rate)])
        return lines

    def to_table(self, measured_results: Sequence[tuple[str, Results]] = ()) -> Table:
        """Format the table and our results for a terminal."""
        caption = f"Published numbers: {self.source}. {self.note}".strip()
        return build_terminal_table(
            self.title, self.headers(), self.cells(measured_results), caption
        )


def _format_percent(rate: Estimate | None) -> str:
    if rate is None:
        return "–"
    return f"{100 * rate.value:.1f} [{100 * rate.low:.0f}, {100 * rate.high:.0f}]"


def load_published_tables() -> dict[str, PublishedTable]:
    """Load all published tables: name → table."""
    folder = resources.files("spear.evaluate").joinpath("reference")
    files = [file for file in folder.iterdir() if file.name.endswith(".toml")]
    tables = {}
    for file in sorted(files, key=lambda file: file.name):
        fields = tomllib.loads(file.read_text("utf-8"))
        tables[file.name.removesuffix(".toml")] = PublishedTable(**fields)
    return tables


def find_published_tables_of_same_tasks(results: Results) -> list[PublishedTable]:
    """Find the published tables that have a task of these results.

    There are none if the results are of other starts than the official ones, because published
    numbers are of the official starts.
    """
    if "starts" in results.settings:
        return []
    families = set(results.families)
    return [table for table in load_published_tables().values() if families & set(table.families)]
