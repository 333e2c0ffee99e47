"""The dataset card of a folder of labels: what is in it, for people and for Hugging Face."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from spear.labels.parquet import write_text
from spear.labels.store import QUESTIONS, REJECTED, shards_in

MOST_NAMES = 20
"""Names of objects that the card lists."""


@dataclass
class Summary:
    """Counts over a folder of labels.

    images, objects, boxed  labelled images, objects in them, and those of them with a 3D box.
    names      name → objects.
    units      unit → images.
    models     "detector: …" → images.
    distances  [boxed] from the camera to the box's centre, in the label's unit.
    rejected   kind of reason → images that were set aside.
    """

    images: int = 0
    objects: int = 0
    boxed: int = 0
    names: Counter[str] = field(default_factory=Counter)
    units: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    distances: list[float] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)


def summarize(folder: Path) -> Summary:
    """Read through a folder of labels, without its images and masks."""
    found = Summary()
    columns = ["unit", "provenance", "objects.list.element.name", "objects.list.element.box3d.center"]
    for shard in shards_in(folder):
        for batch in pq.ParquetFile(shard).iter_batches(1024, columns=columns, use_threads=False):
            for row in batch.to_pylist():
                found.images += 1
                found.units[row["unit"]] += 1
                found.models.update(f"{k}: {v}" for k, v in json.loads(row["provenance"]).items())
                for item in row["objects"]:
                    found.objects += 1
                    found.names[item["name"]] += 1
                    if item["box3d"] is not None:
                        found.boxed += 1
                        found.distances.append(float(np.linalg.norm(item["box3d"]["center"])))
    if (folder / REJECTED).is_file():
        for reason in pq.read_table(folder / REJECTED)["reason"].to_pylist():
            found.rejected[kind_of_reason(reason)] += 1
    return found


def kind_of_reason(reason: str) -> str:
    """A reason without what is different in every image: paths, numbers and what is said in brackets."""
    reason = re.sub(r"\([^()]*\)|\S*/\S*|'[^']*'", "…", reason)
    return re.sub(r"\d+(\.\d+)?", "N", reason)[:120]


def write_card(folder: Path) -> None:
    """Write README.md, with the YAML header by which `datasets.load_dataset(folder)` finds the shards."""
    write_text(folder / "README.md", card(summarize(folder), (folder / QUESTIONS).is_file()))


def card(found: Summary, with_questions: bool) -> str:
    """The text of the card."""
    aside = sum(found.rejected.values())
    lines = [
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
        f"{found.images:,} images with {found.objects:,} objects, {found.boxed:,} of them with an oriented 3D box. "
        + (f"{aside:,} images were set aside (`{REJECTED}`)." if aside else "No image was set aside."),
        "",
        "3D numbers are in the camera frame: x right, y down, z forward. The vertices of a box come top four "
        "first, then the bottom four, each four near-left, near-right, far-right, far-left. Masks are COCO run "
        "lengths (column by column, starting with zeros).",
        "",
        _table("unit of 3D numbers", "images", found.units.most_common()),
        _table("model", "images", sorted(found.models.items())),
        _table("distance from the camera", "", _quantiles(found.distances)),
        _table("object", "count", _head(found.names)),
        _table("set aside because", "images", _head(found.rejected)),
    ]
    return "\n".join(line for line in lines if line is not None) + "\n"


def _quantiles(distances: list[float]) -> list[tuple[str, str]]:
    if not distances:
        return []
    levels = (0.01, 0.25, 0.5, 0.75, 0.99)
    values = np.quantile(distances, levels)
    return [(f"{level:.0%} are below", f"{value:.3g}") for level, value in zip(levels, values, strict=True)]


def _head(counts: Counter[str]) -> list[tuple[str, int]]:
    """The most common, by count and then by name; the others together."""
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    rest = sum(count for _, count in ranked[MOST_NAMES:])
    return ranked[:MOST_NAMES] + ([(f"({len(ranked) - MOST_NAMES} others)", rest)] if rest else [])


def _table(left: str, right: str, rows: list[tuple[str, int]] | list[tuple[str, str]]) -> str | None:
    if not rows:
        return None
    body = [f"| {name.replace('|', '/')} | {value} |" for name, value in rows]
    return "\n".join([f"| {left} | {right} |", "|---|---|", *body, ""])
