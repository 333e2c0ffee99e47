"""The difference of two models' errors in 3D questions, over pairs of evaluations."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.training_seeds.errors import estimate_difference, main
from spear.errors import SpearError


def write_scores(folder: Path, error_mm: float | None, labels: str = "sim", seed: int = 0) -> Path:
    """Write scores as `spear evaluate vqa` does, with the median error of one question type."""
    content = {
        "--seed": seed,
        "model": folder.name,
        "questions": labels,
        "unit": "metre",
        "families": {"distance": {"measures": {"error": {"value": error_mm}}}},
    }
    folder.mkdir()
    (folder / "scores.json").write_text(json.dumps(content))
    return folder


def test_the_interval_of_three_pairs_is_that_of_student() -> None:
    difference = estimate_difference([30.0, 34.0, 41.0], [29.0, 32.0, 38.0])  # 1, 2 and 3

    assert difference.value == pytest.approx(2.0)
    # The 97.5 % quantile of Student's t for two degrees of freedom, times the standard error.
    assert difference.half_width == pytest.approx(4.3027 / np.sqrt(3), rel=1e-4)


def test_the_interval_contains_the_true_difference_in_95_percent() -> None:
    rng = np.random.default_rng(0)
    num_studies = 2000
    num_hits = 0
    for _ in range(num_studies):
        images = rng.normal(0.0, 20.0, size=3)  # how hard the images of a pair are, for both
        first = 40.0 + images + rng.normal(0.0, 2.0, size=3)
        second = 35.0 + images + rng.normal(0.0, 2.0, size=3)
        difference = estimate_difference(first.tolist(), second.tolist())
        assert difference.half_width is not None
        num_hits += abs(difference.value - 5.0) <= difference.half_width

    assert num_hits / num_studies == pytest.approx(0.95, abs=0.015)


def compare_two_pairs(folder: Path, second_labels: str) -> None:
    """Compare 30 with 20 mm in the images `sim`, and 40 with 30 mm in images of choice."""
    main(
        first=(write_scores(folder / "a1", 30), write_scores(folder / "a2", 40, second_labels)),
        second=(write_scores(folder / "b1", 20), write_scores(folder / "b2", 30, second_labels)),
    )


def test_pairs_with_other_images_cover_trainings_and_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare_two_pairs(tmp_path, second_labels="sim:1000")

    printed = capsys.readouterr().out
    assert "+10.0 mm [+10.0, +10.0]" in printed
    assert "cover trainings and images" in printed


def test_pairs_with_the_same_images_cover_trainings_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare_two_pairs(tmp_path, second_labels="sim")

    assert "cover the trainings only" in capsys.readouterr().out


def test_one_pair_has_no_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_scores(tmp_path / "a", 30)
    second = write_scores(tmp_path / "b", 20)

    main(first=(first,), second=(second,))

    printed = capsys.readouterr().out
    assert "+10.0 mm\n" in printed
    assert "one pair" in printed


def test_an_infinite_error_is_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(first=(write_scores(tmp_path / "a", None),), second=(write_scores(tmp_path / "b", 20),))

    assert "no finite error" in capsys.readouterr().out


def test_a_pair_with_other_questions_is_refused(tmp_path: Path) -> None:
    first = write_scores(tmp_path / "a", 30, seed=0)
    second = write_scores(tmp_path / "b", 20, seed=1)

    with pytest.raises(SpearError, match="differ in --seed"):
        main(first=(first,), second=(second,))


def test_pairs_that_share_models_and_images_are_refused(tmp_path: Path) -> None:
    first: list[Path] = []
    second: list[Path] = []
    for index, labels in enumerate(["sim", "sim", "sim:1000"]):
        for side, folders in (("a", first), ("b", second)):
            (tmp_path / f"{side}{index}").mkdir()
            # The model's name is that of the folder: two pairs have the same.
            name = f"{side}{index}/{min(index, 1)}"
            folders.append(write_scores(tmp_path / name, 30, labels))

    with pytest.raises(SpearError, match="no interval is valid"):
        main(first=tuple(first), second=tuple(second))
