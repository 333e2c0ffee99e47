"""Results: summaries, a faithful file, journals that go on after any cut, parts that come together."""

from dataclasses import replace
from pathlib import Path

import pytest

from refusals import refuses
from spear.evaluate.results import Journal, Outcome, Results, load_results, merge_results

HOW = {"replan": 5, "weights": "x"}


def outcome(seed: int, success: bool = True, family: str = "a") -> Outcome:
    return Outcome(family, seed, "put it there", success, True, success, False, 0, 10 + seed)


def results(wins: dict[str, list[bool]]) -> Results:
    outcomes = [outcome(seed, won, f) for f, row in wins.items() for seed, won in enumerate(row)]
    return Results("x", {"scenes": 4}, outcomes, 1.5)


def journal(folder: Path, seeds: range, shard: tuple[int, int] = (1, 1)) -> Journal:
    written = Journal(folder, "me", HOW, shard, {"a": seeds})
    for seed in seeds:
        written.add(outcome(seed, success=seed < 3), 9.0, 1.5)
    return written


def test_summary_counts_per_family_and_the_mean_weighs_families_equally() -> None:
    r = results({"a": [True, False, True, True], "b": [False, False]})
    assert r.summarize("a").success.value == r.summarize("a").grasped.value == 0.75
    assert r.summarize("a").steps == pytest.approx((10 + 12 + 13) / 3)
    assert (
        r.families == ["a", "b"]
        and r.summarize("b").steps is None
        and r.summarize("b").reached.value == 1
    )
    assert r.summarize().success.n == 6 and r.mean_success().value == pytest.approx(0.375)


def test_a_file_gives_the_same_results_and_a_broken_one_is_named(tmp_path: Path) -> None:
    r = replace(
        results({"a": [True, False], "b": [False, True]}), wanted=frozenset({("a", 0), ("b", 7)})
    )
    path = tmp_path / "deep" / "r.json"
    r.save(path)
    assert load_results(path) == r and [p.name for p in path.parent.iterdir()] == ["r.json"]
    for text in ("", "[]", '{"policy": "x"}', '{"outcomes": [{"family": "a"}]}'):
        path.write_text(text)
        refuses(r"r\.json", load_results, path)
    path.unlink()
    refuses(r"r\.json", load_results, path)
    r.save(tmp_path / "results.json")  # nor is one replaced by what begins anew
    refuses("without journals", journal, tmp_path, range(1))


def test_a_line_cut_short_is_run_again_and_the_others_are_kept(tmp_path: Path) -> None:
    journal(tmp_path, range(3))
    path = tmp_path / "episodes-1-of-1.jsonl"
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines()[-1]) + 2):
        path.write_bytes(whole[:-cut])
        again = journal(tmp_path, range(0))
        assert sorted(seed for _, seed in again.outcomes) == [0, 1]
    again.add(outcome(2), 9.0, 1.5)
    assert path.read_bytes() == whole and load_results(tmp_path).outcomes == [
        outcome(0),
        outcome(1),
        outcome(2),
    ]
    path.write_bytes(whole.replace(b'"steps": 10', b'"steps": {}'))
    refuses("not a journal", load_results, tmp_path)
    path.write_bytes(whole[:5])  # in its head
    journal(tmp_path, range(1))
    assert load_results(tmp_path).outcomes == [outcome(0)] and load_results(tmp_path).seconds == 1.5


@pytest.mark.parametrize(
    ("policy", "settings", "named"),
    [
        ("you", HOW, "policy"),
        ("me", {**HOW, "weights": "y"}, "weights"),
        ("me", {"weights": "x"}, "replan"),
    ],
)
def test_results_of_another_policy_or_settings_do_not_mix(
    policy: str, settings: dict[str, object], named: str, tmp_path: Path
) -> None:
    journal(tmp_path, range(1))
    refuses(f"{named} is", Journal, tmp_path, policy, settings, (2, 2), {})
    refuses(
        f"{named} is",
        merge_results,
        [load_results(tmp_path), Results(policy, settings, [outcome(1)], 1.0)],
    )


def test_parts_come_together_and_contradictions_are_refused(tmp_path: Path) -> None:
    one, two = (
        Results("me", {"r": 1}, [outcome(s) for s in seeds], 1.0) for seeds in ((2, 0), (1, 0))
    )
    assert [o.seed for o in merge_results([one, two]).outcomes] == [0, 1, 2]
    refuses("scene 0", merge_results, [one, replace(two, outcomes=[outcome(0, success=False)])])
    for nonsense in (b"nonsense\n", b"\xff\n"):
        (tmp_path / "episodes-2-of-2.jsonl").write_bytes(nonsense)
        refuses("episodes-2-of-2", load_results, tmp_path)
