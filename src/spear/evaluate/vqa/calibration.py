"""Calibration: predicted spreads and intervals against what is true.

Of every number, the distribution over its bins says which interval holds 50, 80, 95 % of the probability. A
calibrated model's truths fall into them as often, an overconfident model's less often.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from pydantic import ConfigDict, NonNegativeFloat

from spear.errors import notice
from spear.evaluate.stats import Estimate, bootstrap
from spear.models.readout import ONE_SIGMA_PROBABILITY, Distribution
from spear.models.weights.folders import find_changed_files, hash_files
from spear.question_types import NUM_ANSWER_NUMBERS
from spear.types import Array
from spear.util.files import read_json_as, write_text

CENTRAL_INTERVALS = (0.5, 0.8, 0.95)
"""The central intervals that tables report."""
CURVE_LEVELS = tuple(round(0.05 * i, 2) for i in range(21))
"""Those of the curve."""
MOST_GROUPS, PER_GROUP = 10, 40
TRUSTED_COVERAGE = 0.8
"""How many of the truths the interval of an answer is to hold."""
CALIBRATION_FILE = "calibration.json"


@dataclass(frozen=True)
class Certainty:
    """How sure an answer's numbers were, and whether rightly: [numbers] each, for a true answer `truth`.

    below    probability that was given to less than the truth.
    spread   `uncertainty` relative to the thing's distance.
    off      distance of the truth from the middle of the distribution (its median), relative likewise.
    """

    below: Array
    spread: Array
    off: Array

    @staticmethod
    def of(said: Distribution, truth: Array, scales: Array) -> "Certainty":
        """From what was held possible for an answer's numbers; scales: the distances they relate to."""
        off = np.abs(said.read("median") - truth) / scales
        return Certainty(said.probability_below(truth), compute_uncertainty(said) / scales, off)


@dataclass(frozen=True)
class Trust:
    """How far a model's answers can be trusted, measured on images with known answers and kept beside its
    weights.

    measured_on   these images, in words.
    factors       family -> what its spread is to be multiplied with: that far from the middle of the
                  distribution (its median) lie at most `TRUSTED` of the truths.
    names_present, names_absent  how often the model names an object as it should, asked for what is where it
                  points for it: one that is in the image, and one that is not.
    files         as `hash_files` of the folder says, of the model that was measured.
    sources       of these images: their bytes are the renderer's and the encoder's, too.
    """

    measured_on: str
    factors: Mapping[str, NonNegativeFloat]
    names_present: float
    names_absent: float
    files: Mapping[str, str] = field(default_factory=dict, compare=False)
    sources: Sequence[str] = field(default=(), compare=False)
    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    @staticmethod
    def load(folder: Path) -> "Trust | None":
        """Of the model in a folder, where it was measured. Raises SpearError for a broken file; one that was
        measured with another model is said and left out."""
        if not (path := folder / CALIBRATION_FILE).is_file():
            return None
        said = read_json_as(Trust, path, "remove it")
        if other := find_changed_files(folder, said.files):
            notice(
                f"{path}: of another model ({', '.join(other)}): measure it again with --calibrate"
            )
            return None
        return said

    def save(self, folder: Path) -> Path:
        """Write the file of the model in a folder, and return its path."""
        path = folder / CALIBRATION_FILE
        write_text(path, json.dumps({**asdict(self), "files": hash_files(folder)}, indent=1) + "\n")
        return path

    @property
    def tells_absent(self) -> bool:
        """Whether a name that does not come back means that the thing is not there (our choice)."""
        return self.names_present >= 0.8 and self.names_absent <= 0.2

    def interval(self, family: str, said: Distribution) -> tuple[Array, Array]:
        """The ends [numbers] of the intervals of an answer's numbers."""
        middle, half = said.read("median"), self.factors[family] * compute_uncertainty(said)
        return middle - half, middle + half


def compute_uncertainty(said: Distribution) -> Array:
    """[numbers] half the width of the central 68 %; of a box's vertices the widest so far on that axis.

    A number's distribution is given those before it: if the first vertex is wrong, the others follow it.
    """
    spread = said.spread()
    if len(spread) != NUM_ANSWER_NUMBERS["box_vertices"]:
        return spread
    return np.maximum.accumulate(spread.reshape(-1, 3), axis=0).ravel()


def compute_spread_factor(answers: Sequence[Certainty]) -> float:
    """Of a family's answers, for `Trust`."""
    ratios = [c.off / np.maximum(c.spread, 1e-9) for c in answers]
    return float(np.quantile(np.concatenate(ratios), TRUSTED_COVERAGE))


@dataclass(frozen=True)
class Band:
    """Numbers of similar predicted spread: the median of it, and the error that 68 % of them stay below, both
    in percent of the distance. They are equal where the model is calibrated."""

    spread: float
    error: float
    n: int


@dataclass(frozen=True)
class Calibration:
    """The calibration of one family's numbers.

    coverage  central interval ("50%"), and where the model was measured for it that of `spear ask` → fraction
              of the truths that lie in it; intervals resample images.
    curve     the same, without intervals, for every level of `LEVELS`.
    bands     in order of the spread.
    surer, less_sure  median error, in percent of the distance, of the half of the answers whose mean spread
                      is smaller, and of the other half.
    """

    n: int
    coverage: Mapping[str, Estimate]
    curve: Sequence[float]
    bands: Sequence[Band]
    surer: float
    less_sure: float

    @property
    def miss(self) -> float:
        """How far the curve is from the diagonal, on average (the expected calibration error)."""
        return float(np.mean(np.abs(np.subtract(self.curve, CURVE_LEVELS))))


def calibrate(
    answers: Sequence[tuple[int, Certainty, float]], scale: float | None = None
) -> Calibration:
    """From (image, certainty, relative error in percent) of each of a family's answers.

    scale: what `Trust` multiplies the family's spread with."""
    images, certain, errors = zip(*answers, strict=True)
    below = np.concatenate([c.below for c in certain])
    spread, off = (
        100 * np.concatenate([getattr(c, name) for c in certain]) for name in ("spread", "off")
    )
    order = np.argsort(spread, kind="stable")
    groups = int(np.clip(len(order) // PER_GROUP, 1, MOST_GROUPS))
    parts = [(spread[rows], off[rows]) for rows in np.array_split(order, groups)]
    bands = [
        Band(float(np.median(s)), float(np.quantile(e, ONE_SIGMA_PROBABILITY)), len(s))
        for s, e in parts
    ]
    ranked = np.array(errors)[np.argsort([float(c.spread.mean()) for c in certain], kind="stable")]
    half = (len(errors) + 1) // 2

    inside = {
        f"{level:.0%}": [_inside(c.below, level) for c in certain] for level in CENTRAL_INTERVALS
    }
    if scale is not None:
        inside[f"spear ask, {TRUSTED_COVERAGE:.0%}"] = [c.off <= scale * c.spread for c in certain]
    rows = {name: group_by_image(images, some) for name, some in inside.items()}
    coverage = {name: bootstrap(some, np.mean) for name, some in rows.items()}
    curve = [float(_inside(below, level).mean()) for level in CURVE_LEVELS]
    surer, less_sure = float(np.median(ranked[:half])), float(np.median(ranked[-half:]))
    return Calibration(len(below), coverage, curve, bands, surer, less_sure)


def _inside(below: Array, level: float) -> Array:
    """Whether each truth lies in the central interval that holds `level` of the probability."""
    return np.abs(below - 0.5) <= level / 2 + 1e-12


def group_by_image(images: Sequence[int], values: Iterable[Array | float]) -> list[Array]:
    """Images of answers, and their values → the values of each image's answers, for `stats.bootstrap`."""
    groups: dict[int, list[Array]] = {}
    for image, value in zip(images, values, strict=True):
        groups.setdefault(image, []).append(np.atleast_1d(np.asarray(value)))
    return [np.concatenate(g) for g in groups.values()]
