"""`spear diagnose` tells its verdict by text, JSON and exit code."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from data_tiny import copy_dataset, make_episode
from spear.checks.rollout.case import Case, Doubt, Finding, Result, RolloutCheck
from spear.cli import main
from spear.data.store.episode_store import append_episodes
from spear.diagnose.load import load_case, load_policy_case
from spear.errors import SpearError

Diagnose = Callable[..., tuple[int, dict[str, Any]]]
"""The type of the fixture `diagnose`: checks -> the exit code, and the content of the JSON file."""


class MadeCheck(RolloutCheck):
    """A check whose result a test chooses."""

    fault = "action-frame"
    title = "the robot moves along other axes"
    result: ClassVar[Result] = None

    def examine(self, case: Case) -> Result:
        return self.result


class DependentCheck(MadeCheck):
    """A check whose fault the other one causes."""

    fault = "start-outside"
    title = "the robot starts elsewhere"


FINDING = Finding(
    confidence=0.9, evidence="evidence in numbers", cure="turn it", file="my_robot.py"
)


@pytest.fixture
def diagnose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Diagnose:
    """Return a function that runs the command with these checks; by default without a page."""
    append_episodes([make_episode(0)], tmp_path / "rollout")

    def run(*checks: RolloutCheck, out: str = "None") -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr("spear.diagnose.diagnosis.make_all_checks", lambda: checks)
        file = tmp_path / "diagnosis.json"
        command = f"diagnose --rollout {tmp_path}/rollout --json {file} --device cpu --out {out}"
        code = main(command.split())
        return code, json.loads(file.read_text())

    return run


def make_check(result: Result, kind: type[MadeCheck] = MadeCheck) -> RolloutCheck:
    """Make a check with a result."""
    check = kind()
    check.result = result  # type: ignore[misc]
    return check


def test_a_clean_case_exits_with_0(diagnose: Diagnose, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = diagnose(make_check(None))

    assert code == 0
    assert report["verdict"] == "nothing found"
    assert report["findings"] == []
    assert report["not_found"] == ["action-frame"]
    assert "examined and not found: action-frame" in capsys.readouterr().out


def test_a_fault_exits_with_1_and_is_explained(
    diagnose: Diagnose, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = diagnose(make_check(FINDING))

    assert code == 1
    assert report["verdict"] == "found"
    assert report["findings"] == [
        {
            "fault": "action-frame",
            "confidence": 0.9,
            "evidence": "evidence in numbers",
            "cure": "turn it",
            "file": "my_robot.py",
        }
    ]
    printed = capsys.readouterr()
    assert "evidence in numbers" in printed.out
    assert printed.err == "found: begin with action-frame (90% sure): turn it.\n"


@pytest.mark.parametrize(
    "result",
    [
        Doubt("it is odd", is_suspicion=True),
        Finding(0.3, evidence="hardly", cure="turn", file="file"),
    ],
)
def test_a_suspicion_is_undecided_and_exits_with_3(result: Result, diagnose: Diagnose) -> None:
    code, report = diagnose(make_check(result))

    assert code == 3
    assert report["verdict"] == "undecided"
    assert report["findings"] == []
    assert set(report["suspicions"]) == {"action-frame"}


def test_nothing_examined_is_undecided(
    diagnose: Diagnose,
) -> None:
    code, report = diagnose(make_check(Doubt("too short")))

    assert code == 3
    assert report["not_examined"] == {"action-frame": "too short"}
    assert report["not_found"] == []


def test_bad_input_exits_with_2(tmp_path: Path) -> None:
    assert main(["diagnose"]) == 2
    assert main(["diagnose", "--rollout", str(tmp_path / "absent")]) == 2


def test_findings_are_ranked_and_causes_explain_their_effects(
    diagnose: Diagnose, capsys: pytest.CaptureFixture[str]
) -> None:
    cause = make_check(FINDING)
    cause.causes = frozenset({"start-outside"})  # type: ignore[misc]
    finding = Finding(0.95, evidence="far away", cure="go", file="file")
    effect = make_check(finding, DependentCheck)

    _, report = diagnose(effect, cause)

    findings = report["findings"]
    assert [entry["fault"] for entry in findings] == ["action-frame"]
    (secondary,) = report["secondary"]
    assert secondary["fault"] == "start-outside"
    assert secondary["explained_by"] == "action-frame"
    assert "explained by action-frame: start-outside" in capsys.readouterr().out


def test_the_page_has_the_finding(diagnose: Diagnose, tmp_path: Path) -> None:
    diagnose(make_check(FINDING), out=str(tmp_path / "page.html"))

    page = (tmp_path / "page.html").read_text()
    assert "evidence in numbers" in page
    assert "commanded" in page


def test_the_page_says_what_was_not_examined(diagnose: Diagnose, tmp_path: Path) -> None:
    diagnose(make_check(Doubt("the rollout is too short")), out=str(tmp_path / "page.html"))

    page = (tmp_path / "page.html").read_text()
    assert "was not examined: the rollout is too short" in page


@pytest.mark.parametrize(
    ("robot", "place"),
    [
        ("widowx", "your robot's client"),
        ("examples/my_robot.py", "observe in examples/my_robot.py"),
    ],
)
def test_the_advice_names_the_file_that_the_user_wrote(
    robot: str,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    append_episodes([make_episode(0)], tmp_path / "rollout")
    finding = replace(FINDING, file="observe in your robot's file")
    monkeypatch.setattr("spear.diagnose.diagnosis.make_all_checks", lambda: (make_check(finding),))

    main(f"diagnose --rollout {tmp_path}/rollout --robot {robot} --out None".split())

    assert place in capsys.readouterr().out


def test_an_unknown_robot_is_bad_input(tmp_path: Path) -> None:
    append_episodes([make_episode(0)], tmp_path / "rollout")

    assert main(f"diagnose --rollout {tmp_path}/rollout --robot widow --out None".split()) == 2


def test_the_data_folder_of_a_run_stands_for_its_only_dataset(tmp_path: Path) -> None:
    append_episodes([make_episode(0)], tmp_path / "data" / "kitchen")
    append_episodes([make_episode(0)], tmp_path / "rollout")

    case = load_case("nano", tmp_path / "data", tmp_path / "rollout", "cpu")

    assert case.get_training().path == tmp_path / "data" / "kitchen"


def test_the_data_folder_of_a_run_with_several_datasets_is_refused_with_their_names(
    tmp_path: Path,
) -> None:
    append_episodes([make_episode(0)], tmp_path / "kitchen")
    append_episodes([make_episode(0)], tmp_path / "office")

    with pytest.raises(SpearError, match=r"2 prepared datasets .*/kitchen or .*/office\."):
        load_policy_case("nano", tmp_path, "cpu")


def test_episodes_that_are_not_prepared_are_refused_with_the_command(
    shared: Path, tmp_path: Path
) -> None:
    raw = copy_dataset(shared / "data/bridge_v2_sample/1.0.0", tmp_path / "raw")

    with pytest.raises(SpearError, match=r"spear data prepare .* --out prepared"):
        load_policy_case("nano", raw, "cpu")
