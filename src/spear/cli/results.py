"""What the commands that evaluate a policy have in common: which films, and what is said at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spear.errors import SpearError

if TYPE_CHECKING:
    from spear.evaluate.results import Results
    from spear.evaluate.runner import Films


def films_wanted(films: str) -> Films:
    """What --films says. Raises `SpearError` for anything but a number, "failures" or "all"."""
    if films == "failures":
        return "failures"
    if films == "all":
        return "all"
    if not films.isdecimal():
        raise SpearError(f"--films {films}: give a number, failures for a film of every failure, or all")
    return int(films)


def report(policy: str, out: Path, earlier: Results | None) -> None:
    """Save and print the results in a folder, beside published ones and against `earlier` ones."""
    from rich import print as show

    from spear.evaluate.compare import compare as difference
    from spear.evaluate.journal import load
    from spear.evaluate.reference import beside

    results = load(out)
    results.save(out / "results.json")
    show(results.table())
    for published in beside(results):
        show(published.table([(policy, results)]))
    if earlier:
        show(difference(results, earlier).table())
    print(f"results in {out}")
