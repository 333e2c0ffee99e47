"""Which finding comes first, and which ones others explain."""

from collections.abc import Sequence

import numpy as np
import pytest

from made_rollouts import MadeRobot, make_case
from spear.checks.rollout.case import Case, Finding, Result, RolloutCheck
from spear.diagnose import diagnosis
from spear.diagnose.diagnosis import Diagnosis, diagnose
from spear.diagnose.policy_case import PolicyCase
from spear.types import Array


def make_check(
    fault: str, confidence: float, causes: Sequence[str] = (), camera: str | None = None
) -> RolloutCheck:
    """Make a check that finds its fault in every rollout."""

    class MadeCheck(RolloutCheck):
        def examine(self, case: Case) -> Result:
            return Finding(confidence, evidence="made", cure="none", file="none", camera=camera)

    MadeCheck.fault = fault
    MadeCheck.title = fault
    MadeCheck.needs = frozenset()
    MadeCheck.causes = frozenset(causes)
    return MadeCheck()


def diagnose_with(monkeypatch: pytest.MonkeyPatch, *checks: RolloutCheck) -> Diagnosis:
    """Diagnose a case with the given checks alone."""
    monkeypatch.setattr(diagnosis, "make_all_checks", lambda: checks)
    return diagnose(PolicyCase())


def list_faults(result: Diagnosis) -> list[str]:
    """List the faults that a diagnosis names, the first one first."""
    return [ranked.check.fault for ranked in result.findings]


def list_explanations(result: Diagnosis) -> dict[str, str]:
    """Return fault → the fault that explains it."""
    return {ranked.check.fault: cause for ranked, cause in result.secondary}


@pytest.mark.parametrize("takes_joints", [True, False])
def test_a_robot_of_joint_angles_is_told_to_check_its_joints(
    takes_joints: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a robot sends no orientation, so a joint is wrong, and not the order of a quaternion."""
    checks = [make_check("quaternion-order", 0.9), make_check("camera-bgr", 0.8)]
    monkeypatch.setattr(diagnosis, "make_all_checks", lambda: checks)

    result = diagnose(PolicyCase(takes_joints=takes_joints))

    orientation, colors = [ranked.finding for ranked in result.findings]
    assert ("zero" in orientation.cure) == takes_joints
    assert colors.cure == "none"


@pytest.mark.parametrize(
    ("cause_confidence", "effect_confidence", "is_explained"),
    [
        (0.8, 0.7, True),
        (0.7, 0.7, True),
        (0.7, 0.8, False),
        (0.85, 0.98, True),  # both are sure
    ],
)
def test_a_fault_explains_only_what_is_no_surer(
    cause_confidence: float,
    effect_confidence: float,
    is_explained: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cause = make_check("cause", cause_confidence, causes=["effect"])
    effect = make_check("effect", effect_confidence)

    result = diagnose_with(monkeypatch, cause, effect)

    if is_explained:
        assert list_faults(result) == ["cause"]
        assert list_explanations(result) == {"effect": "cause"}
    else:
        assert list_faults(result) == ["effect", "cause"]
        assert list_explanations(result) == {}


def test_of_two_faults_that_explain_each_other_the_surer_one_remains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = make_check("first", 0.91, causes=["second"])
    second = make_check("second", 0.94, causes=["first"])

    result = diagnose_with(monkeypatch, first, second)

    assert list_faults(result) == ["second"]
    assert list_explanations(result) == {"first": "second"}


@pytest.mark.parametrize(
    ("camera_of_cause", "is_explained"), [("external", True), (None, True), ("wrist", False)]
)
def test_a_fault_of_a_camera_explains_nothing_of_another_camera(
    camera_of_cause: str | None, is_explained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cause = make_check("cause", 0.9, causes=["effect"], camera=camera_of_cause)
    effect = make_check("effect", 0.8, camera="external")

    result = diagnose_with(monkeypatch, cause, effect)

    assert ("effect" in list_faults(result)) != is_explained


def test_a_turned_base_comes_before_slow_answers_and_does_not_explain_them() -> None:
    """The arm waits for its answers, so that they only make it slow."""

    def turn_quarter(action: Array, rotation: Array) -> Array:
        return np.concatenate([[-action[1], action[0], action[2]], action[3:]])

    case = make_case(MadeRobot(turn_quarter, answer_s=lambda step: 0.7))

    result = diagnose(PolicyCase(case.rollout))

    assert list_faults(result) == ["action-frame", "latency"]
    assert list_explanations(result) == {}
