"""Calibration: predicted spreads and intervals compared with the truth.

The distribution over a number's bins says which interval has 50, 80, 95 % of the probability. The
truths fall into these intervals as often if the model is calibrated, and less often if it is
overconfident.
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
from spear.question_types import ANSWER_FORMS
from spear.types import Array
from spear.util.files import read_json_as, write_text

CENTRAL_INTERVALS = (0.5, 0.8, 0.95)  # those that tables report
CURVE_LEVELS = tuple(round(0.05 * i, 2) for i in range(21))  # those of the calibration curve
TRUSTED_COVERAGE = 0.8  # the fraction of truths that the interval of an answer should contain
MAX_BANDS = 10
MIN_NUMBERS_PER_BAND = 40
MIN_SPREAD = 1e-9  # relative; no error is divided by less
MIN_NAMES_PRESENT = 0.8  # our choice, see `Trust.tells_absent`
MAX_NAMES_ABSENT = 0.2  # our choice
CALIBRATION_FILE = "calibration.json"


@dataclass(frozen=True)
class Certainty:
    """How sure an answer's numbers were, and how far they were from the truth: [numbers] each.

    probability_below  probability that the model gave to less than the truth.
    relative_spread    `compute_uncertainty`, relative to the object's distance.
    relative_error     distance of the truth from the median of the distribution, likewise.
    """

    probability_below: Array
    relative_spread: Array
    relative_error: Array

    @staticmethod
    def of(distribution: Distribution, truth: Array, scales: Array) -> "Certainty":
        """Compare an answer's distribution with the truth; scales: the distances it is relative
        to.
        """
        error = np.abs(distribution.read("median") - truth)
        return Certainty(
            probability_below=distribution.probability_below(truth),
            relative_spread=compute_uncertainty(distribution) / scales,
            relative_error=error / scales,
        )


@dataclass(frozen=True)
class Trust:
    """How far a model's answers can be trusted, measured on images with known answers.

    It is stored next to the model's weights.

    measured_on    the images, in words.
    factors        question type → factor on its spread, so that `TRUSTED_COVERAGE` of the truths
                   are at most that far from the median of the distribution.
    names_present  how often the model names an object that is in the image, when it is asked what
                   is at the point where it sees that object.
    names_absent   the same for an object that is not in the image.
    files          hashes of the measured model's files.
    sources        of the images.
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
        """Load the trust of the model in a folder; None if it was not measured.

        A file that was measured with another model is ignored with a notice. Raises `SpearError`
        for a broken file.
        """
        path = folder / CALIBRATION_FILE
        if not path.is_file():
            return None
        trust = read_json_as(Trust, path, "remove it")
        changed_files = find_changed_files(folder, trust.files)
        if changed_files:
            notice(
                f"{path}: of another model ({', '.join(changed_files)}): "
                "measure it again with --calibrate"
            )
            return None
        return trust

    def save(self, folder: Path) -> Path:
        """Write the file of the model in a folder, and return its path."""
        path = folder / CALIBRATION_FILE
        content = {**asdict(self), "files": hash_files(folder)}
        write_text(path, json.dumps(content, indent=1) + "\n")
        return path

    @property
    def tells_absent(self) -> bool:
        """Whether a name that the model does not repeat means that the object is absent (our
        choice).
        """
        return self.names_present >= MIN_NAMES_PRESENT and self.names_absent <= MAX_NAMES_ABSENT

    def interval(self, question_type: str, distribution: Distribution) -> tuple[Array, Array]:
        """The ends [numbers] of the intervals of an answer's numbers."""
        median = distribution.read("median")
        half_width = self.factors[question_type] * compute_uncertainty(distribution)
        return median - half_width, median + half_width


def compute_uncertainty(distribution: Distribution) -> Array:
    """Half the width of the central 68 % of each number, [numbers].

    For a box's vertices it is the widest so far on that axis: each number's distribution is
    conditioned on the numbers before it, so if the first vertex is wrong, the others follow it.
    """
    spread = distribution.spread()
    if len(spread) != ANSWER_FORMS["box_vertices"].num_numbers:
        return spread
    return np.maximum.accumulate(spread.reshape(-1, 3), axis=0).ravel()


def compute_spread_factor(answers: Sequence[Certainty]) -> float:
    """The factor on the spread of a question type's answers, for `Trust.factors`."""
    ratios = []
    for certainty in answers:
        ratios.append(certainty.relative_error / np.maximum(certainty.relative_spread, MIN_SPREAD))
    return float(np.quantile(np.concatenate(ratios), TRUSTED_COVERAGE))


@dataclass(frozen=True)
class Band:
    """Numbers of similar predicted spread.

    spread  median of their spread, in percent of the distance.
    error   the error that 68 % of them stay below, likewise; equal to the spread if the model is
            calibrated.
    """

    spread: float
    error: float
    n: int


@dataclass(frozen=True)
class Calibration:
    """The calibration of one question type's numbers.

    coverage   central interval ("50%") → fraction of the truths in it; intervals resample images.
               If the model's `Trust` was measured, also the interval of `spear ask`.
    curve      the same, without intervals, for every level of `CURVE_LEVELS`.
    bands      in order of the spread.
    surer      median error, in percent of the distance, of the half of the answers whose mean
               spread is smaller; less_sure: of the other half.
    """

    n: int
    coverage: Mapping[str, Estimate]
    curve: Sequence[float]
    bands: Sequence[Band]
    surer: float
    less_sure: float

    @property
    def miss(self) -> float:
        """Mean distance of the curve from the diagonal (the expected calibration error)."""
        return float(np.mean(np.abs(np.subtract(self.curve, CURVE_LEVELS))))


def calibrate(
    answers: Sequence[tuple[int, Certainty, float]], scale: float | None = None
) -> Calibration:
    """Compute the calibration of a question type.

    Args:
        answers: For each answer the index of its image, its certainty, and its relative error in
            percent.
        scale: The question type's factor in `Trust`.
    """
    images = [image for image, _, _ in answers]
    certainties = [certainty for _, certainty, _ in answers]
    errors = np.array([error for _, _, error in answers])

    probability_below = np.concatenate([c.probability_below for c in certainties])
    curve = [float(_is_inside(probability_below, level).mean()) for level in CURVE_LEVELS]

    coverage = {}
    for level in CENTRAL_INTERVALS:
        is_inside = [_is_inside(c.probability_below, level) for c in certainties]
        coverage[f"{level:.0%}"] = bootstrap(group_by_image(images, is_inside), np.mean)
    if scale is not None:
        is_inside = [c.relative_error <= scale * c.relative_spread for c in certainties]
        name = f"spear ask, {TRUSTED_COVERAGE:.0%}"
        coverage[name] = bootstrap(group_by_image(images, is_inside), np.mean)

    mean_spreads = [float(c.relative_spread.mean()) for c in certainties]
    errors_by_spread = errors[np.argsort(mean_spreads, kind="stable")]
    half = (len(errors) + 1) // 2
    return Calibration(
        n=len(probability_below),
        coverage=coverage,
        curve=curve,
        bands=_make_bands(certainties),
        surer=float(np.median(errors_by_spread[:half])),
        less_sure=float(np.median(errors_by_spread[-half:])),
    )


def _make_bands(certainties: Sequence[Certainty]) -> list[Band]:
    spread = 100 * np.concatenate([c.relative_spread for c in certainties])
    error = 100 * np.concatenate([c.relative_error for c in certainties])
    order = np.argsort(spread, kind="stable")
    num_bands = int(np.clip(len(order) // MIN_NUMBERS_PER_BAND, 1, MAX_BANDS))
    bands = []
    for rows in np.array_split(order, num_bands):
        one_sigma_error = np.quantile(error[rows], ONE_SIGMA_PROBABILITY)
        bands.append(Band(float(np.median(spread[rows])), float(one_sigma_error), len(rows)))
    return bands


def _is_inside(probability_below: Array, level: float) -> Array:
    """Whether each truth lies in the central interval that has `level` of the probability."""
    return np.abs(probability_below - 0.5) <= level / 2 + 1e-12


def group_by_image(images: Sequence[int], values: Iterable[Array | float]) -> list[Array]:
    """Group the values of answers by image, for `stats.bootstrap`.

    Args:
        images: The index of each answer's image.
        values: The value, or values, of each answer.
    """
    groups: dict[int, list[Array]] = {}
    for image, value in zip(images, values, strict=True):
        groups.setdefault(image, []).append(np.atleast_1d(np.asarray(value)))
    return [np.concatenate(group) for group in groups.values()]
