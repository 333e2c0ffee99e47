"""The table of the bench: how often each fault was named, and how often clean runs were accused."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spear.evaluate.stats import estimate_proportion

Result = Mapping[str, Any]
COLUMNS = (
    "group",
    "runs",
    "named first",
    "named",
    "95 % interval (%)",
    "named instead",
)


def summarize(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Make the rows of the table: one for each fault, all single faults, pairs, and clean runs.

    Args:
        results: the lines of `results.jsonl`.
    """
    singles = [result for result in results if result["kind"] == "single"]
    rows = []
    for fault in sorted({result["faults"][0] for result in singles}):
        fault_results = [result for result in singles if result["faults"][0] == fault]
        rows.append(_make_row(fault, fault_results))
    for kind, group in (("single", "all single faults"), ("pair", "pairs"), ("clean", "clean")):
        kind_results = [result for result in results if result["kind"] == kind]
        if kind_results:
            rows.append(_make_row(group, kind_results))
    return rows


def is_named_first(result: Result) -> bool:
    """Return whether the likeliest finding is a planted fault; for clean runs, whether any is."""
    if result["kind"] == "clean":
        return bool(result["named"])
    return bool(result["named"]) and result["named"][0] in result["faults"]


def are_all_named(result: Result) -> bool:
    """Return whether all planted faults are among the findings; for clean runs, as above."""
    if result["kind"] == "clean":
        return bool(result["named"])
    return set(result["faults"]) <= set(result["named"])


def _make_row(group: str, results: Sequence[Result]) -> dict[str, Any]:
    """Summarize the results of a group. The interval is that of the group's measure.

    The measure of single faults is how many are named first, of pairs how many are both named, and
    of clean runs how many are accused.
    """
    num_first = sum(map(is_named_first, results))
    num_named = sum(map(are_all_named, results))
    is_pair = results[0]["kind"] == "pair"
    estimate = estimate_proportion(num_named if is_pair else num_first, len(results))
    wrong_names: Counter[str] = Counter()
    for result in results:
        is_right = result["kind"] != "clean" and is_named_first(result)
        if result["named"] and not is_right:
            wrong_names[result["named"][0]] += 1
    return {
        "group": group,
        "runs": len(results),
        "named first": num_first,
        "named": num_named,
        "95 % interval (%)": f"{100 * estimate.low:.1f} … {100 * estimate.high:.1f}",
        "named instead": ", ".join(f"{name} {count}" for name, count in wrong_names.most_common(3)),
    }


def write_table(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write the table as CSV, and print it."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print("  ".join(str(row[column]) for column in COLUMNS))
