"""A comparison as one HTML page: verdict, plots, table, and films of the same scenes side by side."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from spear.evaluate.compare import ALPHA, Comparison, Pair, cells, p_value, points
from spear.evaluate.film import MIME, film_file
from spear.evaluate.reference import Reference
from spear.evaluate.results import Results
from spear.report import page
from spear.report.page import Section


def comparison_page(
    comparison: Comparison, folders: tuple[Path, Path], films: int = 12, extra: Sequence[Section] = ()
) -> str:
    """A self-contained document.

    folders  where the films of the first and the second policy lie.
    films    at most so many pairs of films, chosen by `filmed_pairs`.
    extra    more sections, below ours.
    """
    c, mean = comparison, comparison.mean
    shown = filmed_pairs(c, folders, films)
    differ = "".join(page.paragraph(f"Run differently: {s}.", soft=True) for s in c.settings)
    lead = page.paragraph(c.verdict()) + differ
    facts = [
        (f"{mean.first.value:.1%}", f"{c.first}: mean success [{mean.first.low:.0%}, {mean.first.high:.0%}]"),
        (
            f"{mean.second.value:.1%}",
            f"{c.second}: mean success [{mean.second.low:.0%}, {mean.second.high:.0%}]",
        ),
        (
            f"{points(mean.difference.value)}",
            f"points between them [{points(mean.difference.low)}, {points(mean.difference.high)}]",
        ),
        (f"p {p_value(mean.p)}", f"exact paired test, {len(c.pairs)} shared scenes"),
    ]
    groups = [(r.name.replace("_", " "), [(c.first, r.first), (c.second, r.second)]) for r in c.rows]
    headers = [
        "family",
        "scenes",
        c.first,
        c.second,
        "difference, points [95 %]",
        "p",
        f"only {c.first} : only {c.second}",
    ]
    rows = [[text.replace("_", " ") if not i else text for i, text in enumerate(cells(r))] for r in c.rows]
    sections = [
        Section("Success on the shared scenes", page.success_bars(groups)),
        Section(
            f"Difference: {c.first} minus {c.second}",
            page.difference_bars([(r.name.replace("_", " "), r.difference) for r in c.rows])
            + page.table(headers, rows)
            + page.paragraph(_method(c), soft=True),
        ),
    ]
    if shown:
        sections.append(Section("The same scenes, side by side", _films(c, shown, folders)))
    return page.page(f"{c.first} against {c.second}", lead, facts, [*sections, *extra])


def reference_section(reference: Reference, ours: Sequence[tuple[str, Results]]) -> Section:
    """Published numbers with ours below them, marked which is which."""
    text = page.paragraph(f"Published numbers: {reference.source}. {reference.note}".strip(), soft=True)
    return Section(
        f"Published: {reference.title}", page.table(reference.headers(), reference.cells(ours)) + text
    )


def filmed_pairs(comparison: Comparison, folders: tuple[Path, Path], limit: int) -> list[Pair]:
    """The shared scenes to show: first those that only one of the two solved, of which both folders have a
    film, then those of which one has, then others of which both have one. Families take turns."""
    seen: dict[tuple[bool, bool, str], int] = {}
    ranked = []
    for a, b in comparison.pairs:
        count = sum(film_file(f, o.film_name) is not None for f, o in zip(folders, (a, b), strict=True))
        agree = a.success == b.success
        if count == 2 or (count and not agree):
            key = (agree, count == 1, a.family)
            seen[key] = seen.get(key, 0) + 1
            ranked.append((*key[:2], seen[key], (a, b)))
    return [pair for *_, pair in sorted(ranked, key=lambda r: r[:3])][:limit]


def _films(c: Comparison, pairs: Sequence[Pair], folders: tuple[Path, Path]) -> str:
    parts = []
    for pair in pairs:
        family, seed = pair[0].family.replace("_", " "), pair[0].seed
        parts.append(f"<h3>{escape(f'{family}, scene {seed}: {pair[0].instruction}')}</h3>")
        figures = []
        for name, outcome, folder in zip((c.first, c.second), pair, folders, strict=True):
            path = film_file(folder, outcome.film_name)
            word = f"success after {outcome.steps} steps" if outcome.success else "failure"
            if path:
                figures.append(page.film(path.read_bytes(), MIME[path.suffix], f"{name}: {word}"))
            else:
                figures.append(
                    page.paragraph(f"{name}: {word}, not filmed (evaluate with --films all)", soft=True)
                )
        parts.append(page.grid(figures, wide=True))
    return "".join(parts)


def _method(c: Comparison) -> str:
    text = (
        "Both policies saw the same scenes, so each scene is compared with itself. Intervals are 95 %: of rates after "
        "Wilson, of paired differences after Agresti and Min. p-values are of the exact two-sided McNemar test, which "
        "looks at the scenes that only one of the two solved; the last row sums these over the families and is the "
        f"one to judge by: with several families, one of them falls below {ALPHA} by chance more often than that."
    )
    if c.unshared:
        text += f" {c.unshared} episodes are left out, since only one of the two saw their scene."
    return text
