"""Commands about results: comparing two of them, putting parts together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from spear.cli.simpler_commands import evaluate_simpler
from spear.errors import SpearError, unknown_name

File = Annotated[Path | None, arg(metavar="FILE")]


def compare(
    first: Annotated[Positional[Path], arg(metavar="A")],
    second: Annotated[Positional[Path], arg(metavar="B")],
    /,
    out: File = None,
    films: int = 12,
) -> None:
    """Say which of two evaluated policies is better, on the scenes that both have seen.

    Prints both success rates per task family, the difference (A minus B, in percentage points) with its 95 %
    interval, and the p-value of an exact paired test.

    Examples:
        spear evaluate compare runs/mine runs/evaluate
        spear evaluate compare runs/mine runs/evaluate --out compare.html

    Args:
        first: Folder that spear evaluate wrote (or its results.json).
        second: The folder (or results.json) to compare with.
        out: Also write an HTML page with plots, and films of the same scenes side by side.
        films: At most so many pairs of films on the page; scenes that only one of the two solved come first.
    """
    from rich import print as show

    from spear.evaluate.compare import compare as pair_up
    from spear.evaluate.compare_page import comparison_page, reference_section
    from spear.evaluate.journal import load
    from spear.evaluate.reference import beside

    results = load(first), load(second)
    same = results[0].policy == results[1].policy
    comparison = pair_up(*results, names=(str(first), str(second)) if same else None)
    show(comparison.table())
    print(comparison.verdict())
    for setting in comparison.settings:
        print(f"run differently: {setting}")
    if comparison.unshared:
        print(f"left out: {comparison.unshared} episodes whose scene only one of the two saw")
    ours = list(zip((comparison.first, comparison.second), results, strict=True))
    published = beside(results[0])
    for table in published:
        show(table.table(ours))
    if out:
        folders = tuple(p if p.is_dir() else p.parent for p in (first, second))
        out.parent.mkdir(parents=True, exist_ok=True)
        extra = [reference_section(table, ours) for table in published]
        out.write_text(comparison_page(comparison, (folders[0], folders[1]), films, extra))
        print(f"page: {out}")


def merge(
    parts: Annotated[Positional[tuple[Path, ...]], arg(metavar="FOLDER...")],
    /,
    out: Path = Path("runs/merged"),
) -> None:
    """Put the parts of one evaluation together that ran with spear evaluate --shard on several machines.

    Prints the whole table; writes OUT/results.json and copies the films.

    Example:
        spear evaluate merge from-machine-1 from-machine-2 --out runs/evaluate

    Args:
        parts: Folders that spear evaluate wrote.
        out: Folder for the whole.
    """
    import shutil

    from rich import print as show

    from spear.evaluate.journal import load
    from spear.evaluate.reference import beside
    from spear.evaluate.results import merge as put_together
    from spear.evaluate.video import film_file

    if not parts:
        raise SpearError("nothing to merge: name the folders that `spear evaluate --shard` wrote")
    found = [load(path) for path in parts]
    results = put_together(found)
    results.save(out / "results.json")
    for path, part in zip(parts, found, strict=True):
        folder = path if path.is_dir() else path.parent
        for film in filter(None, (film_file(folder, o.film_name) for o in part.outcomes)):
            if film.parent.resolve() != out.resolve():
                shutil.copy2(film, out / film.name)
    show(results.table())
    for published in beside(results):
        show(published.table([(results.policy, results)]))
    print(f"results in {out}")


def reference(table: Annotated[str | None, arg(metavar="NAME")] = None) -> None:
    """Show the numbers that the SPEAR-1 paper published.

    They are theirs, not measured here. `spear evaluate` shows them beside results on the same tasks.

    Examples:
        spear evaluate reference
        spear evaluate reference --table rotation

    Args:
        table: Only this one: simpler_widowx, ablations, rotation, normalisation, siglip or droid.
    """
    from rich import print as show

    from spear.evaluate.reference import references

    known = references()
    if table is not None and table not in known:
        raise unknown_name("table", table, known)
    for name in [table] if table else known:
        show(known[name].table())


EVALUATE_COMMANDS: dict[str, Callable[..., None]] = {
    "evaluate simpler": evaluate_simpler,
    "evaluate compare": compare,
    "evaluate merge": merge,
    "evaluate reference": reference,
}
