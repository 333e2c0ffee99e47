"""The suite of shifts evaluates the same scenes with every shift, and writes a table and a page."""

from pathlib import Path

import pytest

from refusals import Command
from spear.errors import SpearError
from spear.evaluate import shift_suite
from spear.evaluate.agents import ExpertAgent, IdleAgent
from spear.evaluate.closed_loop import evaluate_tabletop
from spear.evaluate.options import TabletopOptions
from spear.evaluate.results import Results
from spear.evaluate.shift_suite import evaluate_shifts, list_shifts, name_folder
from spear.sim.shifts import AXES, LEVELS, Shift


def make_options(out: Path | None = None, **changes: object) -> TabletopOptions:
    """Options for one scene of one family, to save time."""
    return TabletopOptions(num_scenes=1, tasks=("put_on",), out=out, **changes)


def evaluate_idle_arm(options: TabletopOptions) -> Results:
    """The results of an arm that stands still."""
    results, _ = evaluate_tabletop(IdleAgent(), options)
    return results


def test_the_suite_has_every_axis_at_every_level() -> None:
    shifts = list_shifts()

    assert shifts[0] is None
    assert len(shifts) == 1 + len(AXES) * len(LEVELS)


def test_the_suite_begins_without_a_shift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shift_suite, "list_shifts", lambda axes: [None, Shift("noise", 3)])

    results = list(evaluate_shifts(evaluate_idle_arm, make_options(tmp_path)))

    assert [result.name for result in results] == ["none", "noise:3"]
    assert [result.success.n for result in results] == [1, 1]  # one scene each


@pytest.mark.parametrize("shift", ["camera:3", "layout:3", "robot:3", "language:3", "noise:3"])
def test_the_expert_succeeds_whatever_the_shift(shift: str) -> None:
    results, _ = evaluate_tabletop(ExpertAgent(), make_options(shift=shift))

    assert results.mean_success().value == 1


@pytest.mark.parametrize("world", ["wild", "lab:2", "labs:4"])
def test_the_expert_succeeds_in_other_worlds(world: str) -> None:
    results, _ = evaluate_tabletop(ExpertAgent(), make_options(world=world))

    assert results.mean_success().value == 1


def test_a_folder_of_one_shift_does_not_take_results_of_another(tmp_path: Path) -> None:
    evaluate_tabletop(IdleAgent(), make_options(tmp_path, shift="light:1"))

    with pytest.raises(SpearError, match="shift"):
        evaluate_tabletop(IdleAgent(), make_options(tmp_path, shift="light:2"))


def test_an_unknown_world_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(SpearError, match="no world 'mars'"):
        evaluate_tabletop(IdleAgent(), make_options(tmp_path / "out", world="mars"))

    assert not (tmp_path / "out").exists()


@pytest.mark.slow  # 22 evaluations
def test_the_command_keeps_every_shift_in_a_folder_of_its_own_and_writes_a_page(
    tmp_path: Path, run_command: Command
) -> None:
    output = run_command(
        "evaluate", "--policy", "nothing", "--num-scenes", "1", "--tasks", "put_on",
        "--videos", "0", "--shift", "all", "--out", str(tmp_path),
    )  # fmt: skip

    names = {file.parent.name for file in tmp_path.glob("*/results.json")}
    assert names == {name_folder(shift) for shift in list_shifts()}
    assert "success by shift" in output
    assert "background" in output
    assert "level 3" in (tmp_path / "shifts.html").read_text()
