"""Results beside others: two on the same scenes (who is better, by how much, whether that may be chance), and
numbers that others published, which are shown beside ours and never mixed into them.

There is one TOML file per published table in `reference/`: its title, source, columns (tasks), which families
of our results are the same tasks, and success in %.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from rich.table import Table

from spear.errors import SpearError, format_count
from spear.evaluate.results import Outcome, Results, build_terminal_table
from spear.evaluate.stats import Estimate, estimate_mean_proportion, estimate_paired_difference

SIGNIFICANCE_LEVEL = 0.05
"""Below this p-value we say that one is better."""
Pair = tuple[Outcome, Outcome]


@dataclass(frozen=True)
class Row:
    """One family, or the mean of the families, on the shared scenes: the success rates, their difference and
    its p (`stats.estimate_paired_difference`), and how many scenes only one of the two solved."""

    name: str
    first: Estimate
    second: Estimate
    difference: Estimate
    only_first: int
    only_second: int
    p: float


@dataclass(frozen=True)
class Comparison:
    """first, second: names. rows: the families and, last, their mean. pairs: both outcomes of each shared
    scene; unshared: how many only one of them saw. settings: how the two were run differently, in words."""

    first: str
    second: str
    rows: Sequence[Row]
    pairs: Sequence[Pair]
    unshared: int
    settings: Sequence[str]

    @property
    def mean(self) -> Row:
        """The row of all families."""
        return self.rows[-1]

    def verdict(self) -> str:
        """The answer in one sentence, from the mean over the families."""
        d, chance = (
            self.mean.difference,
            f"p {format_p_value(self.mean.p)}, n = {self.mean.difference.n}",
        )
        if self.mean.p >= SIGNIFICANCE_LEVEL:
            both = f"{self.first} and {self.second}"
            return f"No difference shown between {both}: {format_points(d)}, {chance}."
        better, worse = (self.first, self.second) if d.value > 0 else (self.second, self.first)
        gap = d if d.value > 0 else Estimate(-d.value, -d.high, -d.low, d.n)
        return f"{better} is better than {worse}: {format_points(gap)}, {chance}."

    def to_table(self) -> Table:
        """The rows for a terminal."""
        title = (
            f"{self.first} against {self.second}, {format_count(len(self.pairs), 'shared scenes')}"
        )
        headers = ["family", "n", self.first, self.second, "difference [95 %]", "p", "won : lost"]
        return build_terminal_table(
            title, headers, [format_row(row) for row in self.rows], mean_last=True
        )


def compare_results(
    first: Results, second: Results, names: tuple[str, str] | None = None
) -> Comparison:
    """Success of `first` minus `second`, paired on the scenes that both have seen. names: the policies', if
    none are given. Raises `SpearError` when they share no scene, or one is not the same in both."""
    a, b = names or (first.policy, second.policy)
    other = {(o.family, o.seed): o for o in second.outcomes}
    pairs = [(o, other[o.family, o.seed]) for o in first.outcomes if (o.family, o.seed) in other]
    if not pairs:
        raise SpearError(f"results: {a} and {b} share no scene: use the same families and seeds")
    for one, two in pairs:
        if one.instruction != two.instruction:
            said = f"{one.instruction!r} for {a} and {two.instruction!r} for {b}"
            why = f"results: {one.family} scene {one.seed} is {said}: the simulator changed"
            raise SpearError(f"{why}: evaluate the older one again")
    if (starts := [r.settings.get("starts", "the official ones") for r in (first, second)])[
        0
    ] != starts[1]:
        raise SpearError(
            f"results: starts of {a}: {starts[0]}, of {b}: {starts[1]}: these are other scenes"
        )
    families: dict[str, list[Pair]] = {}
    for pair in pairs:
        families.setdefault(pair[0].family, []).append(pair)
    rows = [_row(name, [some]) for name, some in families.items()]
    rows.append(_row("mean of families", list(families.values())))
    unshared = len(first.outcomes) + len(second.outcomes) - 2 * len(pairs)
    same = (
        "scenes",
        "first_seed",
        "weights",
    )  # which scenes were run is no difference, nor by which weights
    keys = [k for k in {**first.settings, **second.settings} if k not in same]
    both = [(k, *(r.settings.get(k, "not said") for r in (first, second))) for k in keys]
    settings = [f"{k.replace('_', ' ')}: {one} and {two}" for k, one, two in both if one != two]
    settings += [
        f"{n}: {words}" for n, r in ((a, first), (b, second)) if (words := r.describe_unfinished())
    ]
    return Comparison(a, b, rows, pairs, unshared, settings)


def format_row(row: Row) -> list[str]:
    """name, n, both rates, difference with interval, p, scenes that only one solved: as text."""
    d = row.difference
    rates = [f"{row.first.value:.1%}", f"{row.second.value:.1%}"]
    decided = f"{row.only_first} : {row.only_second}"
    gap = d.to_text("+.1f", 100)
    return [row.name, str(d.n), *rates, gap, format_p_value(row.p).removeprefix("= "), decided]


def format_points(difference: Estimate) -> str:
    """A difference of rates, as "+35.0 points [+20.1, +47.2]"."""
    return difference.to_text("+.1f", 100, " points")


def format_p_value(p: float) -> str:
    """A p-value with its sign: "= 0.021" or "< 0.0001"."""
    return "< 0.0001" if p < 1e-4 else f"= {p:.2g}" if p < 0.1 else f"= {p:.2f}"


def _row(name: str, strata: Sequence[Sequence[Pair]]) -> Row:
    """Of one family, or of several, each counting the same."""
    wins = [([x.success for x, _ in pairs], [y.success for _, y in pairs]) for pairs in strata]
    decided = [x.success for pairs in strata for x, y in pairs if x.success != y.success]
    only = sum(decided), len(decided) - sum(decided)
    first = estimate_mean_proportion([(sum(x), len(x)) for x, _ in wins])
    second = estimate_mean_proportion([(sum(y), len(y)) for _, y in wins])
    gap, p = estimate_paired_difference(wins)
    return Row(name, first, second, gap, *only, p)


@dataclass(frozen=True)
class Reference:
    """A published table: of each method success per column (a task), and the mean as published, %.

    families  the same tasks as families of our results; empty, as columns, for means alone.
    note      what to know when reading it.
    """

    title: str
    source: str
    columns: Sequence[str]
    families: Sequence[str]
    rows: Mapping[str, Sequence[float]]
    means: Mapping[str, float]
    note: str = ""

    def headers(self) -> list[str]:
        """Of the columns of `cells`."""
        return ["success, %", *self.columns, "mean"]

    def cells(self, ours: Sequence[tuple[str, Results]] = ()) -> list[list[str]]:
        """The table as text, marked as published; below it our results (by name), as measured here."""
        lines = []
        for name, mean in self.means.items():
            row = [f"{v:.1f}" for v in self.rows.get(name, ())] or ["–"] * len(self.columns)
            lines.append([f"{name} (published)", *row, f"{mean:.1f}"])
        for name, results in ours:
            here = set(results.families)
            found = [
                results.summarize(family).success if family in here else None
                for family in self.families
            ]
            found.append(results.mean_success() if here == set(self.families) else None)
            lines.append([f"{name} (measured here)", *map(_points, found)])
        return lines

    def to_table(self, ours: Sequence[tuple[str, Results]] = ()) -> Table:
        """The same for a terminal."""
        caption = f"Published numbers: {self.source}. {self.note}".strip()
        return build_terminal_table(self.title, self.headers(), self.cells(ours), caption)


def _points(e: Estimate | None) -> str:
    return "–" if e is None else f"{100 * e.value:.1f} [{100 * e.low:.0f}, {100 * e.high:.0f}]"


def load_references() -> dict[str, Reference]:
    """All published tables, by name."""
    folder = resources.files("spear.evaluate").joinpath("reference")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return {
        f.name.removesuffix(".toml"): Reference(**tomllib.loads(f.read_text("utf-8")))
        for f in files
    }


def find_matching_references(results: Results) -> list[Reference]:
    """The published tables that hold a task of these results, and these starts."""
    own = set() if "starts" in results.settings else set(results.families)
    return [r for r in load_references().values() if own & set(r.families)]
