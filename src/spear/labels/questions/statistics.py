"""Statistics of a set of labels, and the dataset card (README.md) that states some of them."""

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
from spear.labels.store import QUESTIONS_FILE, SKIPPED_FILE, read_labels, translate_read_errors
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
"""The scores of labeled objects (`objects.label_object`) whose distributions are computed."""
MAX_REASON_LENGTH = 120  # summaries shorten reasons for skipping to this many characters


class TokenUsage(NamedTuple):
    """How often each 3D token occurs in answers. Each 3D token stands for a bin, an interval.

    Attributes:
        counts: How many numbers of the answers are in each bin.
        num_unused: How many bins contain no number.
        num_outside: How many numbers of the answers are outside all bins.
        evenness: exp(entropy) / number of bins. It is 1 if all bins contain equally many numbers,
            and 1 / number of bins if one bin contains all numbers. It is 0 without numbers.
    """

    counts: Sequence[int]
    num_unused: int
    num_outside: int
    evenness: float


def _make_score_arrays() -> "dict[str, array[float]]":
    return {name: array("d") for name in SCORES}


@dataclass
class LabelStatistics:
    """Statistics of a set of labels, all in one unit.

    Attributes:
        num_images: Number of labeled images.
        num_askable: Number of objects that 3D questions may be about.
        unit: Unit of the labels.
        provenance: A model that made labels ("detector: …") → number of images.
        names: Name → number of objects.
        reasons: Reason why 3D questions may not be about an object → number of objects. An object
            may have several reasons.
        distances: For each box, the distance from the camera to the box's center.
        sizes: For each box, the length of the longest side.
        scores: Name of a score → the values of all objects that have this score. Arrays take a
            quarter of the memory of lists.
    """

    num_images: int = 0
    num_askable: int = 0
    unit: Unit | None = None
    provenance: Counter[str] = field(default_factory=Counter)
    names: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    distances: "array[float]" = field(default_factory=lambda: array("d"))
    sizes: "array[float]" = field(default_factory=lambda: array("d"))
    scores: "dict[str, array[float]]" = field(default_factory=_make_score_arrays)

    @property
    def num_objects(self) -> int:
        """How many objects there are, with and without a 3D box."""
        return self.names.total()

    @property
    def num_boxes(self) -> int:
        """How many objects have a 3D box."""
        return len(self.distances)

    def add(self, label: LabeledImage) -> None:
        """Count a label.

        Raises:
            SpearError: The label is in another unit than the labels that were counted before.
        """
        self.unit = self.unit or label.unit
        if label.unit != self.unit:
            raise SpearError(
                f"{label.source or 'a label'} is in unit {label.unit!r}, the labels before it in "
                f"{self.unit!r}. Give labels of one unit."
            )
        self.num_images += 1
        self.provenance.update(f"{role}: {name}" for role, name in label.provenance.items())
        for o, reasons in zip(label.objects, find_exclusion_reasons(label), strict=True):
            self.names[o.name] += 1
            self.reasons.update(reasons)
            if not reasons:
                self.num_askable += 1
            for name in self.scores.keys() & o.scores.keys():
                self.scores[name].append(float(o.scores[name]))
            if o.box3d is not None:
                self.distances.append(float(np.linalg.norm(o.box3d.center)))
                self.sizes.append(float(o.box3d.size.max()))


def compute_statistics(labels: Iterable[LabeledImage]) -> LabelStatistics:
    """Compute the statistics of labels, in one pass that keeps no image in memory.

    Raises:
        SpearError: The labels are in several units.
    """
    statistics = LabelStatistics()
    for label in labels:
        statistics.add(label)
    return statistics


def compute_token_usage(values: Sequence[float], coordinates: "CoordinateTokenizer") -> TokenUsage:
    """Count how many of `values` are in each bin of the 3D tokens.

    Values outside all bins count for the first or the last bin.
    """
    numbers = np.asarray(values, np.float64)
    clipped = numbers.clip(coordinates.bin_edges[0], coordinates.bin_edges[-1])
    counts = np.bincount(coordinates.encode(numbers), minlength=coordinates.num_bins)
    evenness = 0.0
    if len(numbers):
        frequencies = counts[counts > 0] / len(numbers)
        entropy = -(frequencies * np.log(frequencies)).sum()
        evenness = float(np.exp(entropy) / coordinates.num_bins)
    return TokenUsage(
        counts=counts.tolist(),
        num_unused=int((counts == 0).sum()),
        num_outside=int((numbers != clipped).sum()),
        evenness=evenness,
    )


def count_skip_reasons(folder: Path) -> Counter[str]:
    """Count the images of a folder that were skipped, by reason.

    Paths, numbers, quotations and brackets are removed from the reasons, so that reasons that
    differ only in these are counted together.
    """
    path = folder / SKIPPED_FILE
    if not path.is_file():
        return Counter()
    with translate_read_errors(path):
        reasons = pq.read_table(path)["reason"].to_pylist()
    summaries = Counter[str]()
    for reason in reasons:
        # "a/1.jpg has 3 x 4 pixels (broken)" becomes "… has N x N pixels …".
        without_details = re.sub(r"\([^()]*\)|\S*/\S*|'[^']*'", "…", reason)
        without_numbers = re.sub(r"\d+(\.\d+)?", "N", without_details)
        summaries[without_numbers[:MAX_REASON_LENGTH]] += 1
    return summaries


def write_dataset_card(folder: Path) -> None:
    """Write the dataset card of a folder of labels, README.md.

    By its YAML header `datasets.load_dataset(folder)` finds the shards.
    """
    num_skipped = count_skip_reasons(folder).total()
    configs = ""
    if (folder / QUESTIONS_FILE).is_file():
        configs += f"- config_name: questions\n  data_files: {QUESTIONS_FILE}\n"
    if num_skipped:
        configs += f"- config_name: skipped\n  data_files: {SKIPPED_FILE}\n"

    skipped = "No image was skipped."
    if num_skipped:
        verb = "was" if num_skipped == 1 else "were"
        skipped = f"{format_count(num_skipped, 'images')} {verb} skipped (`{SKIPPED_FILE}`)."

    statistics = compute_statistics(read_labels(folder, pixels=False))
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    card = template.format(
        configs=configs,
        images=format_count(statistics.num_images, "images"),
        objects=format_count(statistics.num_objects, "objects"),
        num_boxes=statistics.num_boxes,
        num_askable=statistics.num_askable,
        skipped=skipped,
    )
    write_text(folder / "README.md", card)
