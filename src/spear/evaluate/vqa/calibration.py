"""Calibration: whether a model is as sure of its answers' numbers as it should be.

For each number of an answer, the model gives a probability distribution over bins
(`models.readout.Distribution`). The central interval of a level contains that fraction of the
probability, for example 80 %. If the model is calibrated, 80 % of the true numbers lie in their
80 % intervals. If the model is overconfident, fewer do.

The *spread* of a number is half the width of its central 68 % interval. Spreads and errors are
*relative* if they are fractions of the object's distance from the camera.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import ConfigDict, NonNegativeFloat

from spear.errors import notice
from spear.evaluate.stats import Estimate, bootstrap
from spear.models.readout import ONE_SIGMA_PROBABILITY, Distribution
from spear.models.weights.folders import find_changed_files, hash_files
from spear.question_types import ANSWER_FORMS
from spear.types import Array
from spear.util.files import read_json_as, write_text

CENTRAL_INTERVALS = (0.5, 0.8, 0.95)  # levels of the intervals that tables report
CURVE_LEVELS = tuple(round(0.05 * i, 2) for i in range(21))  # levels 0 … 1 of the curve
TRUSTED_COVERAGE = 0.8  # fraction of true numbers that the intervals of `spear ask` should contain
MAX_BANDS = 10  # see `Band`
MIN_NUMBERS_PER_BAND = 40  # with fewer than twice as many numbers, there is only one band
MIN_SPREAD = 1e-9  # relative; a smaller spread is replaced by this before an error is divided by it
# Limits of the rates in `Trust.can_tell_absent` (our choice).
MIN_RATE_NAMED_PRESENT = 0.8
MAX_RATE_NAMED_ABSENT = 0.2
CALIBRATION_FILE = "calibration.json"  # in the folder of the model's weights
NORMALIZER_FILE = "normalizer.json"  # of a policy, in the same folder


@dataclass(frozen=True)
class Certainty:
    """How sure the model was of the numbers of an answer, and how far they were from the truth.

    Each array has one entry per number of the answer.

    probability_below  probability that the model gave to all numbers below the true number.
    relative_spread    spread (`compute_spread`) as a fraction of the object's distance.
    relative_error     distance of the true number from the median of the distribution, as a
                       fraction of the object's distance.
    """

    probability_below: Array
    relative_spread: Array
    relative_error: Array

    @staticmethod
    def measure(distribution: Distribution, truth: Array, scales: Array) -> "Certainty":
        """Compare an answer's distribution with the truth.

        Args:
            distribution: The probabilities of the answer's numbers.
            truth: [numbers] the true numbers.
            scales: [numbers] the object's distance from the camera, for each number.
        """
        error = np.abs(distribution.read_numbers("median") - truth)
        return Certainty(
            probability_below=distribution.probability_below(truth),
            relative_spread=compute_spread(distribution) / scales,
            relative_error=error / scales,
        )


@dataclass(frozen=True)
class Trust:
    """How far a model's answers can be trusted, measured on images with known answers.

    The measurement is stored next to the model's weights.

    measured_on    what the images are, in words.
    factors        question type → factor. The model predicts a distribution for each number of an
                   answer. The interval of ± factor · spread around the distribution's median
                   contains `TRUSTED_COVERAGE` of the true numbers.
    names_present  rate at which the model confirms objects that are in the image. For each object,
                   the model is asked to point at the object, and then what is at this point. It
                   confirms the object if it gives the object's name.
    names_absent   rate at which the model confirms objects that are not in the image. It points
                   somewhere for these, too.
    files          file name → hash, of the files of the measured model.
    sources        the sources of the images.
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
        """Load the trust of the model in a folder.

        Returns:
            The trust; None if it was not measured, or if it was measured with another model, which
            a notice says.

        Raises:
            SpearError: The file is broken.
        """
        path = folder / CALIBRATION_FILE
        if not path.is_file():
            return None
        trust = read_json_as(Trust, path, advice="remove it")
        # The statistics of a policy's actions do not change what its SPEAR-VLM sees.
        model_files = {name: trust.files[name] for name in trust.files if name != NORMALIZER_FILE}
        changed_files = find_changed_files(folder, model_files)
        if changed_files:
            notice(
                f"{path} is of another model ({', '.join(changed_files)}). Measure it again "
                "with --calibrate."
            )
            return None
        return trust

    def save(self, folder: Path) -> Path:
        """Write the trust next to the model in a folder, and return the path of the file."""
        path = folder / CALIBRATION_FILE
        content = {**asdict(self), "files": hash_files(folder)}
        write_text(path, json.dumps(content, indent=1) + "\n")
        return path

    @property
    def can_tell_absent(self) -> bool:
        """Whether an object is absent if the model gives another name at the point of the object.

        The model must name most objects that are present, and few that are absent (our choice).
        """
        return (
            self.names_present >= MIN_RATE_NAMED_PRESENT
            and self.names_absent <= MAX_RATE_NAMED_ABSENT
        )

    def compute_intervals(
        self, question_type: str, distribution: Distribution
    ) -> tuple[Array, Array]:
        """Compute the intervals of an answer's numbers: their lower and upper ends, [numbers]."""
        median = distribution.read_numbers("median")
        half_width = self.factors[question_type] * compute_spread(distribution)
        return median - half_width, median + half_width


def compute_spread(distribution: Distribution) -> Array:
    """Compute the spread of each number of an answer, [numbers].

    For the vertices of a box, the spread of x, y or z of a vertex is the largest spread that this
    coordinate has at the vertex itself or at any vertex before it. The reason is that the
    distribution of each number depends on the numbers that the model has chosen before: if the
    first vertex is wrong, the later ones follow it with small spreads.
    """
    spread = distribution.spread()
    is_box = len(spread) == ANSWER_FORMS["box_vertices"].num_numbers
    if not is_box:
        return spread
    spread_by_vertex = spread.reshape(-1, 3)  # [8 vertices, x y z]
    running_maximum = np.maximum.accumulate(spread_by_vertex, axis=0)
    return running_maximum.ravel()


def compute_spread_factor(certainties: Sequence[Certainty]) -> float:
    """Compute the factor of a question type for `Trust.factors` from its answers."""
    ratios = []
    for certainty in certainties:
        ratios.append(certainty.relative_error / np.maximum(certainty.relative_spread, MIN_SPREAD))
    return float(np.quantile(np.concatenate(ratios), TRUSTED_COVERAGE))


@dataclass(frozen=True)
class Band:
    """Numbers of a question type's answers with similar spread.

    spread  median of their relative spreads, percent.
    error   the relative error that 68 % of them do not exceed, percent. It equals the spread if the
            model is calibrated.
    n       how many numbers there are.
    """

    spread: float
    error: float
    n: int


@dataclass(frozen=True)
class Calibration:
    """The calibration of one question type's numbers.

    n          how many numbers there are.
    coverage   level of the central interval (for example "50%") → fraction of true numbers in it,
               with a confidence interval that resamples images. If the model's `Trust` was
               measured, there is also an entry for the interval of `spear ask`.
    curve      fraction of true numbers in the central interval, for each of `CURVE_LEVELS`.
    bands      the numbers grouped by their spread, in ascending order.
    surer      median relative error of the half of the answers with the smaller spread, percent.
    less_sure  median relative error of the other half, percent.
    """

    n: int
    coverage: Mapping[str, Estimate]
    curve: Sequence[float]
    bands: Sequence[Band]
    surer: float
    less_sure: float

    @property
    def expected_calibration_error(self) -> float:
        """Mean distance of the curve from the levels, 0 to 1."""
        return float(np.mean(np.abs(np.subtract(self.curve, CURVE_LEVELS))))


class ScoredAnswer(NamedTuple):
    """An answer whose certainty is compared with its error.

    image           the index of the image that the question is about.
    certainty       how sure the model was of the answer's numbers.
    relative_error  the answer's error relative to the object's distance, percent.
    """

    image: int
    certainty: Certainty
    relative_error: float


def measure_calibration(
    answers: Sequence[ScoredAnswer], trust_factor: float | None = None
) -> Calibration:
    """Measure how well the certainty of a question type's answers predicts their errors.

    Args:
        answers: The answers.
        trust_factor: The question type's factor in `Trust`; None if it was not measured.
    """
    image_indices = [answer.image for answer in answers]
    certainties = [answer.certainty for answer in answers]
    errors = np.array([answer.relative_error for answer in answers])

    probability_below = np.concatenate([c.probability_below for c in certainties])
    curve = [
        float(_mark_inside_central_interval(probability_below, level).mean())
        for level in CURVE_LEVELS
    ]

    coverage = {}
    for level in CENTRAL_INTERVALS:
        is_inside = [_mark_inside_central_interval(c.probability_below, level) for c in certainties]
        coverage[f"{level:.0%}"] = bootstrap(group_by_image(image_indices, is_inside), np.mean)
    if trust_factor is not None:
        is_inside = [c.relative_error <= trust_factor * c.relative_spread for c in certainties]
        name = f"spear ask, {TRUSTED_COVERAGE:.0%}"
        coverage[name] = bootstrap(group_by_image(image_indices, is_inside), np.mean)

    mean_spreads = [float(c.relative_spread.mean()) for c in certainties]
    errors_by_spread = errors[np.argsort(mean_spreads, kind="stable")]
    half = (len(errors) + 1) // 2  # of an odd number of answers, the middle one is in both halves
    return Calibration(
        n=len(probability_below),
        coverage=coverage,
        curve=curve,
        bands=_make_bands(certainties),
        surer=float(np.median(errors_by_spread[:half])),
        less_sure=float(np.median(errors_by_spread[-half:])),
    )


def _make_bands(certainties: Sequence[Certainty]) -> list[Band]:
    """Divide all numbers, sorted by their spread, into bands of equal size."""
    spread = 100 * np.concatenate([c.relative_spread for c in certainties])
    error = 100 * np.concatenate([c.relative_error for c in certainties])
    order = np.argsort(spread, kind="stable")
    num_bands = int(np.clip(len(order) // MIN_NUMBERS_PER_BAND, 1, MAX_BANDS))
    bands = []
    for indices in np.array_split(order, num_bands):  # of the numbers in a band
        band_spread = float(np.median(spread[indices]))
        one_sigma_error = float(np.quantile(error[indices], ONE_SIGMA_PROBABILITY))
        bands.append(Band(band_spread, one_sigma_error, len(indices)))
    return bands


def _mark_inside_central_interval(probability_below: Array, level: float) -> Array:
    """Return whether each true number lies in its central interval of a level.

    The central interval of 80 %, for example, contains the numbers with a `probability_below` from
    0.1 to 0.9.
    """
    return np.abs(probability_below - 0.5) <= level / 2 + 1e-12  # a margin for rounding errors


def group_by_image(image_indices: Sequence[int], values: Iterable[Array | float]) -> list[Array]:
    """Group the values of answers by image, for `stats.bootstrap`.

    Args:
        image_indices: The index of each answer's image.
        values: The value, or the array of values, of each answer.

    Returns:
        The values of each image.
    """
    groups: dict[int, list[Array]] = {}
    for image, value in zip(image_indices, values, strict=True):
        groups.setdefault(image, []).append(np.atleast_1d(np.asarray(value)))
    return [np.concatenate(group) for group in groups.values()]
