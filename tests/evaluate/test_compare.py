"""Comparing two results: paired on shared scenes, honest about chance, films side by side on one page."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from refusals import Command, refuses
from spear.evaluate.compare import compare_results, format_p_value
from spear.evaluate.results import Outcome, Results
from spear.report.comparison import make_comparison_page, select_filmed_pairs


def results(name: str, wins: dict[str, str], first_seed: int = 0) -> Results:
    """wins: per family one letter per scene, "x" for a success."""
    outcomes = [
        Outcome(f, first_seed + i, f"{f} {first_seed + i}", c == "x", True, c == "x", False, 0, 10)
        for f, row in wins.items()
        for i, c in enumerate(row)
    ]
    return Results(name, {"replan": 5, "scenes": 4}, outcomes, 1.0)


def test_pairs_by_scene_not_by_order_and_leaves_out_the_rest() -> None:
    first = results("x", {"a": "xx.x", "b": "xx"})
    c = compare_results(
        replace(first, outcomes=list(first.outcomes)[::-1]), results("y", {"a": "x.....", "c": "x"})
    )
    assert [r.name for r in c.rows[:-1]] == ["a"]
    row = c.rows[0]
    assert (row.only_first, row.only_second, row.difference.n, c.unshared) == (2, 0, 4, 5)
    assert row.difference.value == pytest.approx(0.5) and row.p > 0.05 and row.difference.low < 0
    few = compare_results(
        results("x", {"a": "x" * 6 + "." * 6}), results("y", {"a": "." * 6 + "x" + "." * 5})
    )
    assert few.mean.p > 0.05 and few.mean.difference.low < 0  # 6 : 1 of 12 is no difference yet


def test_the_mean_weighs_families_equally_and_the_verdict_follows_its_interval() -> None:
    first = results("x", {"a": "x" * 5 + "." * 5, "b": "x" * 4 + "." * 16})
    second = results("y", {"a": "." * 10, "b": "." * 20})
    c = compare_results(first, second)
    assert c.mean.difference.value == pytest.approx((0.5 + 0.2) / 2)
    assert all(row.p > c.mean.p for row in c.rows[:-1])
    assert c.verdict().startswith("x is better than y: +35.0 points [+")
    assert compare_results(second, first).verdict() == c.verdict()
    none = compare_results(results("x", {"a": "xx..x"}), results("y", {"a": "x.x.x"}))
    assert none.verdict().startswith("No difference shown between x and y")
    assert none.mean.difference.low < 0 < none.mean.difference.high
    assert [format_p_value(p) for p in (1e-9, 0.0213, 0.5)] == ["< 0.0001", "= 0.021", "= 0.50"]


def test_other_settings_are_named_and_other_scenes_refused() -> None:
    first, second = results("x", {"a": "x."}), results("y", {"a": "xx"})
    found = compare_results(
        first, replace(second, settings={"replan": 2, "scenes": 9, "new": 1})
    ).settings
    assert found == ["replan: 5 and 2", "new: not said and 1"]
    for pair in ((first, second), (second, first)):
        refuses(
            "starts",
            compare_results,
            pair[0],
            replace(pair[1], settings={"starts": "off the grid"}),
        )
    refuses("x and z", compare_results, first, results("z", {"a": "x"}, first_seed=7))
    changed = [replace(o, instruction="something else") for o in second.outcomes]
    refuses("scene 0", compare_results, first, replace(second, outcomes=changed))


def test_films_of_disagreements_come_first_and_families_take_turns(tmp_path: Path) -> None:
    c = compare_results(
        results("x", {"a": "xxx", "b": ".x"}), results("y", {"a": "x..", "b": "x."})
    )
    a, b = tmp_path / "a", tmp_path / "b"
    films = {a: ("a-success-0", "a-success-1", "a-success-2", "b-failure-0", "b-success-1")}
    films[b] = ("a-success-0", "a-failure-1", "a-failure-2", "b-success-0")
    for folder, names in films.items():
        folder.mkdir()
        for name in names:
            (folder / f"{name}.mp4").write_bytes(name.encode())
    shown = [(x.family, x.seed) for x, _ in select_filmed_pairs(c, (a, b), 9)]
    assert shown == [
        ("a", 1),
        ("b", 0),
        ("a", 2),
        ("b", 1),
        ("a", 0),
    ]  # of b's scene 1 there is one film
    assert len(select_filmed_pairs(c, (a, b), 2)) == 2
    html = make_comparison_page(c, (a, b))
    assert html.count("<video") == 9 and "side by side: 5 of 5" in html
    assert html.count("y: failure, not filmed") == 1 and "exact" not in html.replace("exactly", "")
    assert not re.search(r'(src|href)="(?!data:)', html)


def test_the_command_prints_and_writes_a_page(
    tmp_path: Path, run_command: Command, run_refused_command: Command
) -> None:
    results("mine <b>", {"a": "x" * 8 + "..", "b": "x" * 9}).save(
        tmp_path / "mine" / "results.json"
    )
    results("theirs", {"a": "." * 10, "b": "x" * 9}).save(tmp_path / "theirs" / "results.json")
    page = tmp_path / "deep" / "page.html"
    argv = [
        "evaluate",
        "compare",
        str(tmp_path / "mine"),
        str(tmp_path / "theirs" / "results.json"),
    ]
    said = run_command(*argv, "--out", str(page))
    assert "mine <b> is better than theirs: +40.0 points" in said and "+80.0" in said
    assert (
        "mine &lt;b&gt; is better" in page.read_text() and "<b> is better" not in page.read_text()
    )
    assert str(tmp_path) in run_refused_command(
        "evaluate", "compare", str(tmp_path / "mine"), str(tmp_path)
    )
    run_refused_command(*argv[:2], argv[3].removesuffix("/results.json"), argv[3])  # with itself
    results("theirs", {"a": "x" * 10}).save(
        tmp_path / "again" / "results.json"
    )  # told apart by folders
    said = run_command("evaluate", "compare", str(tmp_path / "theirs"), str(tmp_path / "again"))
    assert f"{tmp_path / 'again'} is better than {tmp_path / 'theirs'}" in said
