"""The dataset card of a folder of labels: what is in it, for people and for Hugging Face."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow.parquet as pq

from spear.labels.questions.statistics import Statistics, statistics
from spear.labels.store import QUESTIONS, REJECTED, read
from spear.util.files import write_text

MOST_NAMES = 20
"""Names of objects that the card lists."""


def rejects(folder: Path) -> Counter[str]:
    """Kind of reason → images of a folder that were set aside."""
    path = folder / REJECTED
    reasons = pq.read_table(path)["reason"].to_pylist() if path.is_file() else []
    return Counter(map(kind_of_reason, reasons))


def kind_of_reason(reason: str) -> str:
    """A reason without what is different in every image: paths, numbers and what is said in brackets."""
    reason = re.sub(r"\([^()]*\)|\S*/\S*|'[^']*'", "…", reason)
    return re.sub(r"\d+(\.\d+)?", "N", reason)[:120]


def write_card(folder: Path) -> None:
    """Write README.md, with the YAML header by which `datasets.load_dataset(folder)` finds the shards."""
    found = statistics(read(folder, pixels=False))
    write_text(folder / "README.md", card(found, rejects(folder), (folder / QUESTIONS).is_file()))


def card(found: Statistics, rejected: Counter[str], with_questions: bool) -> str:
    """The text of the card."""
    aside = rejected.total()
    unit = {"metre": "m", "relative": "an unknown unit, another one in every image"}.get(found.unit or "", "")
    lengths = {"distance from the camera": found.distance, "longest side": found.size}
    quantiles = [
        (name, f"{h.p5:.3g}", f"{h.median:.3g}", f"{h.p95:.3g}")
        for name, h in lengths.items()
        if h is not None
    ]
    parts = [
        "---",
        "task_categories: [depth-estimation, object-detection, visual-question-answering]",
        "configs:",
        "- config_name: labels",
        "  default: true",
        "  data_files: labels-*.parquet",
        *(["- config_name: questions", f"  data_files: {QUESTIONS}"] if with_questions else []),
        *(["- config_name: rejected", f"  data_files: {REJECTED}"] if aside else []),
        "---",
        "# Images with 3D labels",
        "",
        f"{found.images:,} images with {found.objects:,} objects, {found.boxed:,} of them with an oriented 3D box; "
        f"3D questions can be asked about {found.asked:,}. "
        + (f"{aside:,} images were set aside (`{REJECTED}`)." if aside else "No image was set aside."),
        "",
        "3D numbers are in the camera frame: x right, y down, z forward. The vertices of a box come top four "
        "first, then the bottom four, each four near-left, near-right, far-right, far-left. Masks are COCO run "
        "lengths (column by column, starting with zeros).",
        "",
        *_table(("model", "images"), found.provenance.items()),
        *_table((f"length in {unit}", "5 %", "median", "95 %"), quantiles),
        *_table(("object", "count"), _head(found.names)),
        *_table(("not asked about because", "objects"), found.reasons.items()),
        *_table(("set aside because", "images"), _head(rejected)),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _head(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """The most common, by count and then by name; the others together."""
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    rest = sum(count for _, count in ranked[MOST_NAMES:])
    return ranked[:MOST_NAMES] + ([(f"({len(ranked) - MOST_NAMES} others)", rest)] if rest else [])


def _table(head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> list[str]:
    """Lines of a table; none without rows."""
    lines = [f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines, ""] if lines else []
