"""Median errors of two models, or two recipes, in 3D questions, and their paired difference.

    python -m experiments.training_seeds.errors --first runs/a1 runs/a2 runs/a3 \\
        --second runs/b1 runs/b2 runs/b3

Each folder is what `spear evaluate vqa` wrote. The folders form pairs by their order, and both of a
pair were asked the same questions. The interval is that of the mean difference over pairs, with
Student's t. It covers what was drawn anew for each pair: trainings, images or both.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from spear.cli import run_reporting_errors
from spear.cli.evaluate import KEY_OF_RENAMED_OPTION
from spear.errors import SpearError, format_count
from spear.evaluate.stats import compute_crossed_half_width, compute_variances_of_crossed_mean
from spear.evaluate.vqa.measures import MEASURES, choose_main_measure
from spear.util.files import read_json

MODEL_KEY = KEY_OF_RENAMED_OPTION["--model"]
LABELS_KEY = KEY_OF_RENAMED_OPTION["--labels"]
QUESTION_SETTINGS = (
    "--questions-per-image",
    "--question-types",
    "--seed",
    "--view",
    "--shift",
    "--labels",
    "--num-images",
)
"""Options on which it depends what is asked."""


@dataclass(frozen=True)
class Difference:
    """The difference of two median errors, first - second, as the mean over pairs.

    value       the mean difference.
    half_width  half the width of its 95 % interval; None for a single pair.
    """

    value: float
    half_width: float | None


def load_scores(folder: Path) -> dict[str, Any]:
    """Load the scores that `spear evaluate vqa` wrote to a folder."""
    return read_json(folder / "scores.json", advice="give folders that `spear evaluate vqa` wrote")


def check_same_questions(
    first: Mapping[str, Any], second: Mapping[str, Any], folders: tuple[Path, Path]
) -> None:
    """Raise `SpearError` unless both of a pair were asked the same, and decoded alike."""
    for option in (*QUESTION_SETTINGS, "--decode"):
        key = KEY_OF_RENAMED_OPTION.get(option, option)
        if first.get(key) != second.get(key):
            raise SpearError(
                f"{folders[0]} and {folders[1]} differ in {option}. Evaluate both models of a "
                "pair with the same options."
            )


def read_errors(scores: Sequence[Mapping[str, Any]], question_type: str) -> list[float] | None:
    """Read the median error of a question type in each of the scores.

    Returns:
        One error per score; None if one of them has no finite error.
    """
    errors = []
    for content in scores:
        measure = choose_main_measure(question_type, content["unit"])
        type_score = content["families"].get(question_type, {"measures": {}})
        error = type_score["measures"].get(measure, {"value": None})["value"]
        if error is None:
            return None
        errors.append(error)
    return errors


def estimate_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Estimate the mean difference of paired errors, with Student's t over pairs."""
    differences = np.subtract(first, second)
    if len(differences) == 1:
        return Difference(float(differences[0]), None)
    # One column, so that all variance is that between pairs.
    variances = compute_variances_of_crossed_mean([differences[:, None]])
    return Difference(float(differences.mean()), compute_crossed_half_width(variances))


def describe_coverage(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> str:
    """Say what the intervals cover: what the pairs do not share.

    Raises:
        SpearError: Pairs share models as well as images.
    """
    if len(first) == 1:
        return "one pair: the difference has no interval. Give more pairs."
    first_models = {content[MODEL_KEY] for content in first}
    second_models = {content[MODEL_KEY] for content in second}
    images = {content[LABELS_KEY] for content in first}
    has_own_models = len(first_models) == len(first) and len(second_models) == len(first)
    has_own_images = len(images) == len(first)
    if has_own_models and has_own_images:
        return "the intervals cover trainings and images."
    if has_own_models:
        return "some pairs share images: the intervals cover the trainings only, not the images."
    if has_own_images:
        return "some pairs share a model: the intervals cover the images only, not the trainings."
    raise SpearError(
        "some pairs share a model, and some share images, so no interval is valid. Give every "
        "pair images of its own."
    )


def main(first: tuple[Path, ...], second: tuple[Path, ...]) -> None:
    """Print a table with one row per question type.

    Args:
        first: Folders of one model or recipe, one per pair.
        second: Those of the other, in the same order.
    """
    folders = [*first, *second]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise SpearError("a folder is given twice: give one per evaluation")
    if len(first) != len(second):
        raise SpearError(
            f"{format_count(len(first), 'folders')} cannot be paired with {len(second)}. "
            "Give both sides equally many."
        )
    first_scores = [load_scores(folder) for folder in first]
    second_scores = [load_scores(folder) for folder in second]
    for pair in zip(first_scores, second_scores, zip(first, second, strict=True), strict=True):
        check_same_questions(*pair)
    coverage = describe_coverage(first_scores, second_scores)

    print(f"{'median error':<20}{'first':>10}{'second':>10}   first - second [95 %]")
    for question_type in first_scores[0]["families"]:
        first_errors = read_errors(first_scores, question_type)
        second_errors = read_errors(second_scores, question_type)
        name = question_type.replace("_", " ")
        if first_errors is None or second_errors is None:
            print(f"{name:<20}  no finite error in some folder")
            continue
        unit = MEASURES[choose_main_measure(question_type, first_scores[0]["unit"])].unit
        difference = estimate_difference(first_errors, second_errors)
        text = f"{difference.value:+.1f} {unit}"
        if difference.half_width is not None:
            low = difference.value - difference.half_width
            high = difference.value + difference.half_width
            text += f" [{low:+.1f}, {high:+.1f}]"
        means = f"{np.mean(first_errors):>10.1f}{np.mean(second_errors):>10.1f}"
        print(f"{name:<20}{means}   {text}")
    print(coverage)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
