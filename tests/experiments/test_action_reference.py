"""The tables of the experiment with action references say what its evaluations say."""

from pathlib import Path

import pytest

from experiments.ablations.scores import add_scores
from experiments.action_reference.__main__ import (
    collect_seams,
    estimate_seam_difference,
    format_tables,
    load_cells,
)
from outcomes import make_outcome
from spear.evaluate.results import Journal


def write_evaluation(runs: Path, key: str, successes: list[bool], seams_mm: list[float]) -> None:
    """Write what run.sh leaves of one evaluation: a finished journal, and the seams."""
    folder = runs / "scores" / key
    seeds = list(range(len(successes)))
    journal = Journal(folder, key, {"replan": 1}, shard=(1, 1), scenes={"put_on": seeds})
    for seed, success in zip(seeds, successes, strict=True):
        journal.add(make_outcome("put_on", seed, success), episode_s=0.25, since_last_end_s=0.5)
    (folder / "seams.txt").write_text("".join(f"{seam}\n" for seam in seams_mm))


def test_policies_of_both_references_are_compared(tmp_path: Path) -> None:
    for seed, (previous_seam, observed_seam) in enumerate([(4.0, 6.0), (5.0, 8.0)]):
        write_evaluation(
            tmp_path,
            f"previous-{seed}/async-1-200ms",
            successes=[True, True, False, True],
            seams_mm=[previous_seam, previous_seam, 90.0],  # the median is the first
        )
        write_evaluation(
            tmp_path,
            f"observed-{seed}/async-1-200ms",
            successes=[True, False, False, seed == 0],
            seams_mm=[observed_seam],
        )
    add_scores(tmp_path, tmp_path / "scores.parquet")
    collect_seams(tmp_path, tmp_path)

    cells = load_cells(tmp_path)
    by_reference = cells["async", 1, 200]
    difference_mm = estimate_seam_difference(by_reference["observed"], by_reference["previous"])
    text = format_tables(cells)

    assert by_reference["previous"].estimate_success().value == 3 / 4
    assert by_reference["observed"].estimate_success().value == 3 / 8
    assert difference_mm.value == pytest.approx(2.5)  # the mean of 2 and 3
    assert difference_mm.low == pytest.approx(2.5 - 12.706 * 0.5, abs=0.01)  # t with one freedom
    assert "| async/1 | 200 ms | 75.0 [" in text
    assert "| 75, 75; 50, 25 |" in text
    assert "| 4.0, 5.0 | 6.0, 8.0 | +2.5 [" in text
