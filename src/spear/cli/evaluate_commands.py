"""Commands about results: comparing two of them, putting parts together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

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
    from spear.evaluate.compare_page import comparison_page
    from spear.evaluate.results import Results

    results = Results.load(first), Results.load(second)
    same = results[0].policy == results[1].policy
    comparison = pair_up(*results, names=(str(first), str(second)) if same else None)
    show(comparison.table())
    print(comparison.verdict())
    for setting in comparison.settings:
        print(f"run differently: {setting}")
    if comparison.unshared:
        print(f"left out: {comparison.unshared} episodes whose scene only one of the two saw")
    if out:
        folders = tuple(p if p.is_dir() else p.parent for p in (first, second))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(comparison_page(comparison, (folders[0], folders[1]), films))
        print(f"page: {out}")


EVALUATE_COMMANDS: dict[str, Callable[..., None]] = {"evaluate compare": compare}
