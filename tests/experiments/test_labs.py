"""The table of the experiment with laboratories says what the journals of its policies say."""

from pathlib import Path

from experiments.ablations.scores import add_scores
from experiments.labs.__main__ import find_difference, format_table, load_cells
from outcomes import make_outcome
from spear.evaluate.results import Journal


def write_score(runs: Path, key: str, successes: list[bool]) -> None:
    """Write the finished journal of a policy: one scene of one family for each success."""
    seeds = list(range(1_000, 1_000 + len(successes)))
    journal = Journal(
        runs / "scores" / key, key, {"replan": 1}, shard=(1, 1), scenes={"put_on": seeds}
    )
    for seed, success in zip(seeds, successes, strict=True):
        journal.add(make_outcome("put_on", seed, success), episode_s=0.25, since_last_end_s=0.5)


def test_cells_are_compared_over_the_seeds_that_both_rows_have(tmp_path: Path) -> None:
    write_score(tmp_path, "unseen-3d-64-0", [True, True, True, False])
    write_score(tmp_path, "unseen-3d-64-1", [True, False, True, False])
    write_score(tmp_path, "unseen-2d-64-0", [True, False, False, False])
    write_score(tmp_path, "seen-3d-64-0", [True, True, True, True])
    add_scores(tmp_path, tmp_path / "scores.parquet")

    cells = load_cells(tmp_path / "scores.parquet")
    cell_3d, cell_2d, seen_cell = cells

    assert [(cell.surroundings, cell.row) for cell in cells] == [
        ("unseen", "3d"),
        ("unseen", "2d"),
        ("seen", "3d"),
    ]
    assert cell_3d.success().value == 5 / 8
    assert find_difference(cell_3d, cells) is None
    difference, num_seeds = find_difference(cell_2d, cells) or (None, 0)
    assert difference is not None
    assert difference.value == 3 / 4 - 1 / 4  # seed 0 alone, because the other row has no seed 1
    assert num_seeds == 1
    assert seen_cell.success().value == 1


def test_a_row_with_more_images_is_compared_with_its_own_kind(tmp_path: Path) -> None:
    write_score(tmp_path, "unseen-3d-64-0", [False, False, False, False])
    write_score(tmp_path, "unseen-3d-more-64-0", [True, True, True, False])
    write_score(tmp_path, "unseen-2d-more-64-0", [True, False, False, False])
    add_scores(tmp_path, tmp_path / "scores.parquet")

    cells = load_cells(tmp_path / "scores.parquet")

    differences = {cell.row: find_difference(cell, cells) for cell in cells}
    assert differences["3d"] is differences["3d-more"] is None
    difference, _ = differences["2d-more"] or (None, 0)
    assert difference is not None
    assert difference.value == 3 / 4 - 1 / 4


def test_the_table_has_a_line_for_each_cell(tmp_path: Path) -> None:
    write_score(tmp_path, "unseen-3d-4-0", [True, False])
    write_score(tmp_path, "unseen-no-images-4-0", [False, False])
    add_scores(tmp_path, tmp_path / "scores.parquet")

    _, _, *lines = format_table(load_cells(tmp_path / "scores.parquet")).splitlines()

    assert [line.split(" | ")[2] for line in lines] == ["3D questions", "no images"]
    assert lines[0].endswith("| 50.0 |")
    assert "+50.0" in lines[1]
