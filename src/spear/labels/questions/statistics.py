"""What a set of labels holds, in numbers; and the dataset card that says so, for people and Hugging Face."""

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from spear.errors import SpearError, format_count
from spear.labels.questions.generate import find_exclusion_reasons
from spear.labels.store import QUESTIONS_FILE, SKIPPED_FILE, explain_read_errors, read_labels
from spear.types import LabeledImage, Unit
from spear.util.files import write_text

if TYPE_CHECKING:
    from spear.tokens import CoordinateTokenizer

SCORES = (
    "detection",
    "points",
    "visible",
    "edge",
    "known",
    "whole",
    "planarity",
    "stability",
    "compact",
)


class TokenUsage(NamedTuple):
    """How often each 3D token (bin) occurs in the answers: `counts`; how many bins are `unused`, and how many
    numbers `outside` all; `evenness`, 1 where all are used alike, 1 / bins where only one is: exp(entropy) /
    bins."""

    counts: Sequence[int]
    unused: int
    outside: int
    evenness: float


@dataclass
class Statistics:
    """Of a set of labels, all in one unit.

    asked       objects that 3D questions may be about.
    provenance  what made the labels ("detector: …") → images.
    names       name → objects.
    reasons     why objects are not asked about → objects (one may have several reasons).
    distances   of boxed objects: from the camera to the box's centre; sizes: the box's longest side.
    scores      score → its values, of the objects that have it. (Lists would take four times the memory.)
    """

    images: int = 0
    asked: int = 0
    unit: Unit | None = None
    provenance: Counter[str] = field(default_factory=Counter)
    names: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    distances: "array[float]" = field(default_factory=lambda: array("d"))
    sizes: "array[float]" = field(default_factory=lambda: array("d"))
    scores: "dict[str, array[float]]" = field(
        default_factory=lambda: {name: array("d") for name in SCORES}
    )

    @property
    def objects(self) -> int:
        """How many there are, with and without a 3D box."""
        return self.names.total()

    @property
    def boxed(self) -> int:
        """How many objects have a 3D box."""
        return len(self.distances)


def compute_statistics(labels: Iterable[LabeledImage]) -> Statistics:
    """Count what labels hold, in one pass that keeps no image. `SpearError`: they are in several units."""
    found = Statistics()
    for label in labels:
        found.unit = found.unit or label.unit
        if label.unit != found.unit:
            which = f"{label.source or 'label'}: in unit {label.unit!r}, not {found.unit!r} as the others"
            raise SpearError(f"{which}: give labels of one unit")
        found.images += 1
        found.provenance.update(f"{role}: {name}" for role, name in label.provenance.items())
        for o, why in zip(label.objects, find_exclusion_reasons(label), strict=True):
            found.names[o.name] += 1
            found.reasons.update(why)
            found.asked += not why
            for name in found.scores.keys() & o.scores.keys():
                found.scores[name].append(float(o.scores[name]))
            if o.box3d is not None:
                found.distances.append(float(np.linalg.norm(o.box3d.center)))
                found.sizes.append(float(o.box3d.size.max()))
    return found


def compute_token_usage(values: Sequence[float], coordinates: "CoordinateTokenizer") -> TokenUsage:
    """How often each bin holds one of `values`; those outside count for the first or the last."""
    every = np.asarray(values, np.float64)
    inside = every.clip(coordinates.bin_edges[0], coordinates.bin_edges[-1])
    counts = np.bincount(coordinates.encode(every), minlength=coordinates.num_bins)
    share = counts[counts > 0] / max(len(every), 1)
    evenness = (
        float(np.exp(-(share * np.log(share)).sum()) / coordinates.num_bins) if len(every) else 0.0
    )
    return TokenUsage(
        counts.tolist(), int((counts == 0).sum()), int((every != inside).sum()), evenness
    )


def count_skip_reasons(folder: Path) -> Counter[str]:
    """Why images of a folder were skipped → images, without paths, numbers and what is in brackets."""
    path = folder / SKIPPED_FILE
    with explain_read_errors(path):
        reasons = pq.read_table(path)["reason"].to_pylist() if path.is_file() else []
    short = (re.sub(r"\([^()]*\)|\S*/\S*|'[^']*'", "…", reason) for reason in reasons)
    return Counter(re.sub(r"\d+(\.\d+)?", "N", reason)[:120] for reason in short)


def write_dataset_card(folder: Path) -> None:
    """Write README.md, with the YAML header by which `datasets.load_dataset(folder)` finds the shards."""
    skipped = count_skip_reasons(folder).total()
    files = {
        "questions": (folder / QUESTIONS_FILE).is_file() and QUESTIONS_FILE,
        "skipped": skipped and SKIPPED_FILE,
    }
    more = "".join(
        f"- config_name: {name}\n  data_files: {file}\n" for name, file in files.items() if file
    )
    were = "image was" if skipped == 1 else "images were"
    words = (
        f"{skipped:,} {were} skipped (`{SKIPPED_FILE}`)." if skipped else "No image was skipped."
    )
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    found = compute_statistics(read_labels(folder, pixels=False))
    counts = {
        "images": format_count(found.images, "images"),
        "objects": format_count(found.objects, "objects"),
    }
    write_text(
        folder / "README.md", template.format(found=found, more=more, skipped=words, **counts)
    )
