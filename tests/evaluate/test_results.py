"""Results: summaries, files that can be read back, journals that resume, shards that merge."""

from dataclasses import replace
from pathlib import Path

import pytest

from refusals import refuses
from spear.evaluate.results import Journal, Outcome, Results, load_results, merge_results

SETTINGS = {"replan": 5, "weights": "x"}
JOURNAL_NAME = "episodes-1-of-1.jsonl"


def make_outcome(seed: int, success: bool = True, family: str = "a") -> Outcome:
    """Make the outcome of an episode of 10 + seed steps, which grasps only if it succeeds."""
    return Outcome(
        family=family,
        seed=seed,
        instruction="put it there",
        success=success,
        reached=True,
        grasped=success,
        wrong_object_moved=False,
        unreachable=0,
        steps=10 + seed,
    )


def make_results(successes: dict[str, list[bool]]) -> Results:
    """Make results from family → whether each of its scenes 0, 1, … succeeded."""
    outcomes = []
    for family, family_successes in successes.items():
        for seed, success in enumerate(family_successes):
            outcomes.append(make_outcome(seed, success, family))
    return Results(policy="x", settings={"scenes": 4}, outcomes=outcomes, seconds=1.5)


def write_journal(folder: Path, seeds: range, shard: tuple[int, int] = (1, 1)) -> Journal:
    """Write a journal of family "a" in which the scenes 0, 1 and 2 succeed, and keep it open.

    An episode takes 9 s, but several run at once, so that one ends every 1.5 s.
    """
    journal = Journal(folder, "me", SETTINGS, shard, {"a": seeds})
    for seed in seeds:
        journal.add(make_outcome(seed, success=seed < 3), episode_s=9.0, since_last_end_s=1.5)
    return journal


def test_a_summary_counts_the_episodes_of_a_family() -> None:
    results = make_results({"a": [True, False, True, True], "b": [False, False]})

    summary = results.summarize("a")

    assert results.families == ["a", "b"]
    assert summary.success.value == 0.75
    assert summary.grasped.value == 0.75
    assert summary.steps == pytest.approx((10 + 12 + 13) / 3)  # of the successes 0, 2 and 3


def test_a_summary_without_successes_has_no_steps_to_success() -> None:
    summary = make_results({"b": [False, False]}).summarize("b")

    assert summary.steps is None
    assert summary.reached.value == 1


def test_the_mean_weighs_families_equally() -> None:
    results = make_results({"a": [True, False, True, True], "b": [False, False]})

    assert results.summarize().success.n == 6
    assert results.mean_success().value == pytest.approx((0.75 + 0) / 2)


def test_a_file_gives_the_same_results(tmp_path: Path) -> None:
    wanted = frozenset({("a", 0), ("b", 7)})
    results = replace(make_results({"a": [True, False], "b": [False, True]}), wanted=wanted)
    path = tmp_path / "deep" / "r.json"

    results.save(path)

    assert load_results(path) == results
    assert [file.name for file in path.parent.iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"policy": "x"}', '{"outcomes": [{"family": "a"}]}', None]
)
def test_a_broken_or_missing_file_is_named(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    if text is not None:  # None: there is no file
        path.write_text(text)

    refuses(r"r\.json", load_results, path)


def test_results_without_journals_are_not_replaced(tmp_path: Path) -> None:
    make_results({"a": [True]}).save(tmp_path / "results.json")

    refuses("without journals", write_journal, tmp_path, range(1))


def test_a_line_cut_short_is_run_again_and_the_others_are_kept(tmp_path: Path) -> None:
    write_journal(tmp_path, range(3))
    path = tmp_path / JOURNAL_NAME
    complete = path.read_bytes()
    last_line = complete.splitlines()[-1]

    # Cut off at least the final newline, and at most the whole last line.
    for num_missing_bytes in range(1, len(last_line) + 2):
        path.write_bytes(complete[:-num_missing_bytes])
        journal = write_journal(tmp_path, range(0))
        assert sorted(seed for _, seed in journal.outcomes) == [0, 1]
    journal.add(make_outcome(2), episode_s=9.0, since_last_end_s=1.5)

    assert path.read_bytes() == complete
    assert load_results(tmp_path).outcomes == [make_outcome(seed) for seed in range(3)]


def test_a_journal_cut_in_its_first_line_begins_anew(tmp_path: Path) -> None:
    write_journal(tmp_path, range(3))
    path = tmp_path / JOURNAL_NAME
    path.write_bytes(path.read_bytes()[:5])

    write_journal(tmp_path, range(1))

    results = load_results(tmp_path)
    assert results.outcomes == [make_outcome(0)]
    assert results.seconds == 1.5  # the wall time of this one episode


def test_a_line_that_is_no_episode_is_refused(tmp_path: Path) -> None:
    write_journal(tmp_path, range(3))
    path = tmp_path / JOURNAL_NAME
    path.write_bytes(path.read_bytes().replace(b'"steps": 10', b'"steps": {}'))

    refuses("is no journal", load_results, tmp_path)


@pytest.mark.parametrize("content", [b"nonsense\n", b"\xff\n"])
def test_a_file_that_is_no_journal_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "episodes-2-of-2.jsonl").write_bytes(content)

    refuses("episodes-2-of-2", load_results, tmp_path)


# Policy and settings of another evaluation, and what differs from `write_journal`.
OTHER_EVALUATIONS = [
    ("you", SETTINGS, "policy"),
    ("me", {**SETTINGS, "weights": "y"}, "weights"),
    ("me", {"weights": "x"}, "replan"),
]


@pytest.mark.parametrize(("policy", "settings", "difference"), OTHER_EVALUATIONS)
def test_a_folder_has_results_of_one_evaluation_only(
    policy: str, settings: dict[str, object], difference: str, tmp_path: Path
) -> None:
    write_journal(tmp_path, range(1))

    message = f"{difference} is"
    refuses(message, Journal, tmp_path, policy, settings, shard=(2, 2), scenes={})


@pytest.mark.parametrize(("policy", "settings", "difference"), OTHER_EVALUATIONS)
def test_results_of_different_evaluations_do_not_merge(
    policy: str, settings: dict[str, object], difference: str
) -> None:
    results = Results("me", SETTINGS, [make_outcome(0)], seconds=1.0)
    other_results = Results(policy, settings, [make_outcome(1)], seconds=1.0)

    refuses(f"{difference} is", merge_results, [results, other_results])


def test_merged_scenes_are_in_order_and_each_once() -> None:
    first = Results("me", SETTINGS, [make_outcome(2), make_outcome(0)], seconds=1.0)
    second = Results("me", SETTINGS, [make_outcome(1), make_outcome(0)], seconds=1.0)

    merged = merge_results([first, second])

    assert [outcome.seed for outcome in merged.outcomes] == [0, 1, 2]


def test_a_scene_that_ended_differently_in_two_shards_is_refused() -> None:
    first = Results("me", SETTINGS, [make_outcome(0)], seconds=1.0)
    second = replace(first, outcomes=[make_outcome(0, success=False)])

    refuses("scene 0", merge_results, [first, second])
