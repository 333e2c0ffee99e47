"""Results: summaries, comparison on shared scenes, a faithful file."""

from __future__ import annotations

import inspect
import io
from pathlib import Path

import pytest
from rich.console import Console

from spear.errors import SpearError
from spear.evaluate.results import SCENES, Outcome, Results


def outcome(family: str, seed: int, success: bool, steps: int = 10) -> Outcome:
    return Outcome(family, seed, "put it there", success, True, success, False, 0, steps)


def results(name: str, wins: dict[str, list[bool]]) -> Results:
    outcomes = [outcome(f, seed, won, 10 + seed) for f, row in wins.items() for seed, won in enumerate(row)]
    return Results(name, {"scenes": 4}, outcomes, 1.5)


def test_summary_counts_per_family_and_the_mean_weighs_families_equally() -> None:
    r = results("x", {"a": [True, False, True, True], "b": [False, False]})
    assert r.families == ["a", "b"]
    assert r.summary("a").success.value == 0.75
    assert r.summary("a").steps == pytest.approx((10 + 12 + 13) / 3)
    assert r.summary("b").steps is None
    assert r.summary().success.n == 6
    assert r.mean_success == pytest.approx(0.375)


def test_save_and_load_give_the_same_results(tmp_path: Path) -> None:
    r = results("x", {"a": [True, False], "b": [False, True]})
    path = tmp_path / "deep" / "r.json"
    r.save(path)
    assert Results.load(path) == r
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"policy": "x"}', '{"outcomes": [{"family": "a"}]}'])
def test_a_broken_results_file_is_one_clear_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(SpearError, match=r"r\.json"):
        Results.load(path)
    with pytest.raises(SpearError, match="no such file"):
        Results.load(tmp_path / "absent.json")


def test_table_shows_every_family_with_its_interval() -> None:
    buffer = io.StringIO()
    Console(file=buffer, width=120).print(results("me", {"carrot": [True] * 4}).table())
    assert "carrot" in buffer.getvalue()
    assert "[51%, 100%]" in buffer.getvalue()


def test_the_mean_has_an_interval_and_the_table_says_how_wide() -> None:
    few = results("x", {"a": [True] * 12 + [False] * 12, "b": [True] * 6 + [False] * 18})
    assert few.mean().value == 0.375
    assert 0.12 < few.mean().half_width < 0.14  # 48 scenes
    assert "up to ±18.6 for a family (n = 24)" in few.width()
    assert "need up to 381 scenes" in few.width()
    assert (
        "need up to 381 scenes" in results("x", {"a": [True, True]}).width()
    )  # two wins say little of the rate
    sure = results("x", {"a": [True] * 95 + [False] * 5 + [True] * 9})
    assert "need" not in sure.width()
    many = results("x", {"a": [i % 2 == 0 for i in range(SCENES)]})
    assert "need" not in many.width()
    buffer = io.StringIO()
    Console(file=buffer, width=120).print(few.table())
    assert "±18.6" in buffer.getvalue()
    assert "37.5% [25%, 52%]" in buffer.getvalue()


def test_the_default_number_of_scenes_is_enough_for_five_points() -> None:
    from spear.cli import COMMANDS
    from spear.evaluate.simpler.run import EPISODES
    from spear.evaluate.simpler.tasks import TASKS

    assert inspect.signature(COMMANDS["evaluate"]).parameters["scenes"].default == SCENES
    simpler = inspect.signature(COMMANDS["evaluate simpler"]).parameters["scenes"].default
    assert simpler >= SCENES and all(simpler % task.starts == 0 for task in TASKS.values())
    assert simpler == EPISODES
