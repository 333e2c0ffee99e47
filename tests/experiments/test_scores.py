"""The published tables of the ablations agree with the outcomes that the repository keeps.

A line of a published table names the keys of its scores. The outcomes of all episodes behind a
score are kept in scores.parquet under its key.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from experiments.ablations.published import find_keys, load_line, read_published_tables
from experiments.ablations.scores import add_scores, find_key, load_scores
from outcomes import make_outcome
from spear.errors import SpearError
from spear.evaluate.results import Journal, load_results
from spear.evaluate.stats import estimate_difference_over_seeds, estimate_mean_over_seeds

TABLES = read_published_tables()
"""The lines of each table, as Markdown."""


def list_lines() -> list[Any]:
    """Return each line as test case: its table, and its number in the table."""
    cases = []
    for index, table in enumerate(TABLES):
        for number, line in enumerate(table):
            title = line.split("|")[1].strip()
            cases.append(pytest.param(table, number, id=f"{index}-{title}"))
    return cases


LINES = list_lines()


def find_baseline_line(table: list[str], number: int) -> str:
    """Return the line with which the numbered line of a table is compared.

    It is the nearest line above, or the line itself, that has no difference ("–").
    """
    lines_upward = reversed(table[: number + 1])
    return next(line for line in lines_upward if re.search(r"\[[\d., ]+\] \| – \|", line))


@pytest.mark.parametrize(("table", "number"), LINES)
def test_a_published_success_rate_is_that_of_the_kept_episodes(
    table: list[str], number: int
) -> None:
    line = table[number]
    success_tables = load_line(line)  # of each task family: bools [seeds, scenes]

    rate = estimate_mean_over_seeds(success_tables).to_text(".1f", scale=100)
    assert f"| {rate} |" in line
    assert sum(successes.size for successes in success_tables) >= 200  # episodes


@pytest.mark.parametrize(("table", "number"), LINES)
def test_a_published_difference_is_that_of_the_kept_episodes(table: list[str], number: int) -> None:
    line = table[number]
    baseline = find_baseline_line(table, number)
    if line == baseline:  # it has no difference
        return

    difference = estimate_difference_over_seeds(load_line(line), load_line(baseline))

    assert f"| {difference.to_text('+.1f', scale=100)} |" in line


def test_every_kept_score_is_published() -> None:
    published_keys: set[str] = set()
    for table in TABLES:
        for line in table:
            published_keys.update(find_keys(line))

    assert set(load_scores()) == published_keys
    assert published_keys


def write_journal(folder: Path, seeds: list[int], num_ended: int) -> None:
    """Write the journal of an evaluation in scenes of one family.

    Args:
        folder: the journal's folder.
        seeds: seeds of the scenes.
        num_ended: how many of the scenes are finished.
    """
    journal = Journal(folder, "policy", {"replan": 1}, shard=(1, 1), scenes={"put_on": seeds})
    for seed in seeds[:num_ended]:
        journal.add(
            make_outcome("put_on", seed, success=True), episode_s=0.25, since_last_end_s=0.5
        )


def test_a_finished_score_is_read_back_as_its_journal_says(tmp_path: Path) -> None:
    folder = tmp_path / "scores" / "0123456789ab"
    write_journal(folder, [3, 1], num_ended=2)

    add_scores(tmp_path, tmp_path / "scores.parquet")

    results = load_scores(tmp_path / "scores.parquet")["0123456789ab"]
    journal = load_results(folder)
    assert sorted(results.outcomes, key=lambda outcome: outcome.seed) == journal.outcomes
    assert results.policy == journal.policy
    assert results.settings == journal.settings
    assert results.seconds == journal.seconds


def test_an_unfinished_score_is_not_kept(tmp_path: Path) -> None:
    write_journal(tmp_path / "scores" / "0123456789ab", [0, 1], num_ended=1)

    add_scores(tmp_path, tmp_path / "scores.parquet")

    assert load_scores(tmp_path / "scores.parquet") == {}


def test_scores_are_added_to_a_file_and_replace_those_of_the_same_key(tmp_path: Path) -> None:
    scores = tmp_path / "scores.parquet"
    write_journal(tmp_path / "first" / "scores" / "aaaa", [0], num_ended=1)
    write_journal(tmp_path / "first" / "scores" / "bbbb", [0], num_ended=1)
    write_journal(tmp_path / "second" / "scores" / "bbbb", [0, 1], num_ended=2)

    add_scores(tmp_path / "first", scores)
    add_scores(tmp_path / "second", scores)

    lengths = {key: len(results.outcomes) for key, results in load_scores(scores).items()}
    assert lengths == {"aaaa": 1, "bbbb": 2}


def test_a_prefix_that_several_keys_share_is_refused(tmp_path: Path) -> None:
    write_journal(tmp_path / "scores" / "aaaa", [0], num_ended=1)
    write_journal(tmp_path / "scores" / "aabb", [0], num_ended=1)
    add_scores(tmp_path, tmp_path / "scores.parquet")

    with pytest.raises(SpearError, match="2 keys begin with aa"):
        find_key("aa", tmp_path / "scores.parquet")
