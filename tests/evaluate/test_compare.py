"""Comparison of two results: pairs of shared scenes, verdicts, and films side by side."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from refusals import Command, refuses
from spear.evaluate.compare import Comparison, compare_results, format_p_value
from spear.evaluate.results import Outcome, Results
from spear.report.comparison import make_comparison_page, select_filmed_pairs


def make_results(name: str, successes: dict[str, str], first_seed: int = 0) -> Results:
    """Make results from family → one letter per scene, "x" for a success.

    Args:
        name: The name of the policy.
        successes: Family → letters.
        first_seed: The seed of each family's first scene.
    """
    outcomes = []
    for family, letters in successes.items():
        for seed, letter in enumerate(letters, first_seed):
            is_success = letter == "x"
            instruction = f"{family} {seed}"
            outcome = Outcome(
                family=family,
                seed=seed,
                instruction=instruction,
                success=is_success,
                reached=True,
                grasped=is_success,
                wrong_object_moved=False,
                unreachable=0,
                steps=10,
            )
            outcomes.append(outcome)
    return Results(name, {"replan": 5, "scenes": 4}, outcomes, seconds=1.0)


def test_outcomes_are_paired_by_scene_and_unshared_scenes_are_left_out() -> None:
    first = make_results("first", {"a": "xx.x", "b": "xx"})
    reordered = replace(first, outcomes=list(first.outcomes)[::-1])
    second = make_results("second", {"a": "x.....", "c": "x"})

    comparison = compare_results(reordered, second)

    (row,) = comparison.rows[:-1]  # the last row is the mean
    assert row.name == "a"
    assert (row.only_first, row.only_second, row.difference.n) == (2, 0, 4)
    assert row.difference.value == pytest.approx(3 / 4 - 1 / 4)
    assert comparison.num_unshared == 5  # two of a, two of b, one of c


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("xx.x", "x..."),  # 2 scenes solved by the first only, none by the second only, of 4
        ("x" * 6 + "." * 6, "." * 6 + "x" + "." * 5),  # 6 scenes and 1 scene, of 12
    ],
)
def test_few_scenes_show_no_difference(first: str, second: str) -> None:
    comparison = compare_results(
        make_results("first", {"a": first}), make_results("second", {"a": second})
    )

    assert comparison.mean.p > 0.05
    assert comparison.mean.difference.low < 0


@pytest.fixture
def unequal() -> tuple[Results, Results]:
    """Results that differ by 0.5 in family "a" and by 0.2 in family "b"."""
    first = make_results("first", {"a": "x" * 5 + "." * 5, "b": "x" * 4 + "." * 16})
    second = make_results("second", {"a": "." * 10, "b": "." * 20})
    return first, second


def test_the_mean_weighs_families_equally(unequal: tuple[Results, Results]) -> None:
    comparison = compare_results(*unequal)

    assert comparison.mean.difference.value == pytest.approx((0.5 + 0.2) / 2)
    family_rows = comparison.rows[:-1]
    assert all(row.p > comparison.mean.p for row in family_rows)  # fewer scenes say less


def test_the_verdict_names_the_better_in_either_order(unequal: tuple[Results, Results]) -> None:
    first, second = unequal

    verdict = compare_results(first, second).verdict()

    assert verdict.startswith("first is better than second: +35.0 points [+")
    assert compare_results(second, first).verdict() == verdict


def test_the_verdict_says_where_no_difference_is_shown() -> None:
    first = make_results("first", {"a": "xx..x"})
    second = make_results("second", {"a": "x.x.x"})

    comparison = compare_results(first, second)

    assert comparison.verdict().startswith("No difference shown between first and second")
    assert comparison.mean.difference.low < 0 < comparison.mean.difference.high


@pytest.mark.parametrize(("p", "text"), [(1e-9, "< 0.0001"), (0.0213, "= 0.021"), (0.5, "= 0.50")])
def test_p_values_are_written_with_their_sign(p: float, text: str) -> None:
    assert format_p_value(p) == text


def test_settings_that_differ_are_named() -> None:
    """The number of scenes may differ in any comparison, so it is not named."""
    first = make_results("first", {"a": "x."})
    second = make_results("second", {"a": "xx"})
    second = replace(second, settings={"replan": 2, "scenes": 9, "new": 1})

    assert compare_results(first, second).settings == ["replan 5 and 2", "new not said and 1"]


def test_other_starts_are_refused_in_either_order() -> None:
    official = make_results("first", {"a": "x."})
    off_grid = replace(make_results("second", {"a": "xx"}), settings={"starts": "off the grid"})

    refuses("starts", compare_results, official, off_grid)
    refuses("starts", compare_results, off_grid, official)


def test_results_without_a_shared_scene_are_refused() -> None:
    first = make_results("first", {"a": "x."})
    second = make_results("second", {"a": "x"}, first_seed=7)

    refuses("first and second", compare_results, first, second)


def test_a_scene_with_another_instruction_is_refused() -> None:
    first = make_results("first", {"a": "x."})
    second = make_results("second", {"a": "xx"})
    changed_outcomes = [replace(o, instruction="something else") for o in second.outcomes]

    refuses("scene 0", compare_results, first, replace(second, outcomes=changed_outcomes))


@pytest.fixture
def filmed(tmp_path: Path) -> tuple[Comparison, tuple[Path, Path]]:
    """A comparison, and two folders with films of its scenes. Scene 1 of family "b" is only filmed
    in the first folder.
    """
    comparison = compare_results(
        make_results("first", {"a": "xxx", "b": ".x"}),
        make_results("second", {"a": "x..", "b": "x."}),
    )
    names_by_folder = {
        tmp_path / "a": ("a-success-0", "a-success-1", "a-success-2", "b-failure-0", "b-success-1"),
        tmp_path / "b": ("a-success-0", "a-failure-1", "a-failure-2", "b-success-0"),
    }
    for folder, names in names_by_folder.items():
        folder.mkdir()
        for name in names:
            (folder / f"{name}.mp4").write_bytes(name.encode())
    return comparison, (tmp_path / "a", tmp_path / "b")


def test_films_of_disagreements_come_first_and_families_take_turns(
    filmed: tuple[Comparison, tuple[Path, Path]],
) -> None:
    comparison, folders = filmed

    pairs = select_filmed_pairs(comparison, folders, limit=9)

    scenes = [first.scene for first, _ in pairs]
    assert scenes == [("a", 1), ("b", 0), ("a", 2), ("b", 1), ("a", 0)]
    assert len(select_filmed_pairs(comparison, folders, limit=2)) == 2


def test_the_page_shows_films_side_by_side(
    filmed: tuple[Comparison, tuple[Path, Path]],
) -> None:
    comparison, folders = filmed

    html = make_comparison_page(comparison, folders)

    assert html.count("<video") == 9  # five pairs, one of which has only one film
    assert "side by side: 5 of 5" in html
    assert html.count("second: failure, not filmed") == 1
    # The paired test is an approximation, so the page must not call it an exact test.
    assert "exact" not in html.replace("exactly", "")
    assert not re.search(r'(src|href)="(?!data:)', html)  # the page needs no other file


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of results. In "a", the first succeed in 8 of 10 scenes, the second in none.

    In "b", both succeed in all 9 scenes.
    """
    first = make_results("mine <b>", {"a": "x" * 8 + "..", "b": "x" * 9})
    second = make_results("theirs", {"a": "." * 10, "b": "x" * 9})
    first.save(tmp_path / "mine" / "results.json")
    second.save(tmp_path / "theirs" / "results.json")
    return tmp_path / "mine", tmp_path / "theirs"


def test_the_command_prints_the_verdict(folders: tuple[Path, Path], run_command: Command) -> None:
    first, second = folders

    output = run_command("evaluate", "compare", str(first), str(second / "results.json"))

    assert "mine <b> is better than theirs: +40.0 points" in output  # the mean of 80 and 0
    assert "+80.0" in output


def test_the_command_writes_a_page(
    folders: tuple[Path, Path], tmp_path: Path, run_command: Command
) -> None:
    first, second = folders
    page = tmp_path / "deep" / "page.html"

    run_command("evaluate", "compare", str(first), str(second), "--report", str(page))

    html = page.read_text()
    assert "mine &lt;b&gt; is better" in html  # the name of the policy is escaped
    assert "<b> is better" not in html


def test_the_command_refuses_a_folder_without_results(
    folders: tuple[Path, Path], tmp_path: Path, run_refused_command: Command
) -> None:
    first, _ = folders

    assert str(tmp_path) in run_refused_command("evaluate", "compare", str(first), str(tmp_path))


def test_the_command_refuses_to_compare_results_with_themselves(
    folders: tuple[Path, Path], run_refused_command: Command
) -> None:
    _, second = folders

    run_refused_command("evaluate", "compare", str(second), str(second / "results.json"))


def test_results_of_the_same_policy_are_named_by_their_folders(
    folders: tuple[Path, Path], tmp_path: Path, run_command: Command
) -> None:
    _, second = folders
    second_folder = tmp_path / "again"
    make_results("theirs", {"a": "x" * 10}).save(second_folder / "results.json")

    output = run_command("evaluate", "compare", str(second), str(second_folder))

    assert f"{second_folder} is better than {second}" in output
