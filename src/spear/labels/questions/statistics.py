"""What a set of labels holds, in numbers; and the dataset card that says so, for people and Hugging Face."""

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq

from spear.errors import SpearError
from spear.labels.questions.generate import why_not_asked
from spear.labels.store import QUESTIONS, SKIPPED, read
from spear.types import LabeledImage, Unit
from spear.util.files import write_text

if TYPE_CHECKING:
    from spear.tokens import CoordinateTokenizer

SCORES = ("detection", "points", "visible", "edge", "planarity", "stability", "compact")


@dataclass(frozen=True)
class Histogram:
    """How `n` numbers are spread: `counts` [k] of those within `edges` [k + 1], and their median."""

    n: int
    edges: Sequence[float]
    counts: Sequence[int]
    median: float


@dataclass(frozen=True)
class TokenUse:
    """How often each 3D token (bin) occurs in the answers: `counts`; how many bins are `unused`, and how many
    numbers `outside` all; `evenness`, 1 where all are used alike, 1 / bins where only one is: exp(entropy) /
    bins."""

    counts: Sequence[int]
    unused: int
    outside: int
    evenness: float


@dataclass(frozen=True)
class Statistics:
    """Of a set of labels, all in one unit.

    boxed, asked    objects with a 3D box, and those that 3D questions may be about.
    provenance      what made the labels ("detector: …") → images.
    names           name → objects, most frequent first.
    distance, size  of boxed objects: from the camera to the box's centre, and the box's longest side.
    scores          score → its histogram, of objects that have it.
    reasons         why objects are not asked about → objects (one may have several reasons).
    """

    images: int
    objects: int
    boxed: int
    asked: int
    unit: Unit | None
    provenance: Mapping[str, int]
    names: Mapping[str, int]
    distance: Histogram | None
    size: Histogram | None
    scores: Mapping[str, Histogram]
    reasons: Mapping[str, int]


def statistics(labels: Iterable[LabeledImage]) -> Statistics:
    """Count what labels hold, in one pass that keeps no image. `SpearError`: a label in another unit than the
    others."""
    names, reasons, provenance = Counter[str](), Counter[str](), Counter[str]()
    images = asked = 0
    distances, sizes = array("d"), array("d")  # a list would take four times the memory
    scores = {name: array("d") for name in SCORES}
    unit: Unit | None = None
    for label in labels:
        unit = label.unit if unit is None else unit
        if label.unit != unit:
            raise SpearError(
                f"{label.source or 'label'}: in unit {label.unit!r}, not {unit!r} as the others: give "
                "labels of one unit"
            )
        images += 1
        provenance.update(f"{role}: {name}" for role, name in label.provenance.items())
        for o, why in zip(label.objects, why_not_asked(label), strict=True):
            names[o.name] += 1
            reasons.update(why)
            asked += not why
            for name in scores.keys() & o.scores.keys():
                scores[name].append(float(o.scores[name]))
            if o.box3d is not None:
                distances.append(float(np.linalg.norm(o.box3d.center)))
                sizes.append(float(o.box3d.size.max()))
    return Statistics(
        images=images,
        objects=names.total(),
        boxed=len(distances),
        asked=asked,
        unit=unit,
        provenance=dict(sorted(provenance.items())),
        names=dict(names.most_common()),
        distance=histogram(distances),
        size=histogram(sizes),
        scores={name: h for name, values in scores.items() if (h := histogram(values)) is not None},
        reasons=dict(reasons.most_common()),
    )


def histogram(values: Sequence[float], bins: int = 40) -> Histogram | None:
    """Of finite numbers, between the least and the largest; None of no numbers."""
    if not values:
        return None
    counts, edges = np.histogram(values, bins=bins)
    return Histogram(len(values), edges.tolist(), counts.tolist(), float(np.median(values)))


def token_use(values: Sequence[float], coordinates: "CoordinateTokenizer") -> TokenUse:
    """How often each bin holds one of `values`; those outside count for the first or the last."""
    low, high = float(coordinates.edges[0]), float(coordinates.edges[-1])
    ids = coordinates.encode(values)
    counts = np.bincount(np.asarray(ids), minlength=coordinates.bins)
    share = counts[counts > 0] / max(counts.sum(), 1)
    return TokenUse(
        counts=counts.tolist(),
        unused=int((counts == 0).sum()),
        outside=sum(not low <= v <= high for v in values),
        evenness=float(np.exp(-(share * np.log(share)).sum()) / coordinates.bins) if len(share) else 0.0,
    )


def skip_reasons(folder: Path) -> Counter[str]:
    """Why images of a folder were skipped → images, without what is different in every image: paths, numbers,
    and what is said in brackets."""
    path = folder / SKIPPED
    reasons = pq.read_table(path)["reason"].to_pylist() if path.is_file() else []
    short = (re.sub(r"\([^()]*\)|\S*/\S*|'[^']*'", "…", reason) for reason in reasons)
    return Counter(re.sub(r"\d+(\.\d+)?", "N", reason)[:120] for reason in short)


def write_card(folder: Path) -> None:
    """Write README.md, with the YAML header by which `datasets.load_dataset(folder)` finds the shards."""
    skipped = skip_reasons(folder).total()
    files = {"questions": (folder / QUESTIONS).is_file() and QUESTIONS, "skipped": skipped and SKIPPED}
    more = "".join(f"- config_name: {name}\n  data_files: {file}\n" for name, file in files.items() if file)
    words = f"{skipped:,} images were skipped (`{SKIPPED}`)." if skipped else "No image was skipped."
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    found = statistics(read(folder, pixels=False))
    write_text(folder / "README.md", template.format(found=found, more=more, skipped=words))
