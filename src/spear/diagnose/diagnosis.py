"""Runs all checks on a case, and ranks what they find."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from spear.checks.rollout.case import Doubt, Finding, Material, RolloutCheck
from spear.diagnose.policy_case import PolicyCase
from spear.diagnose.registry import make_all_checks
from spear.util.files import write_text

Verdict = Literal["nothing found", "found", "undecided"]

ANY_ROBOT_FILE = "your robot's file"
ROBOT_FILE_WITH_EXAMPLE = f"{ANY_ROBOT_FILE} (see examples/my_robot.py)"
CLIENT = "your robot's client, which sends the observations and executes the actions"
ORIENTATION_FAULTS = ("angle-unit", "euler-order", "quaternion-order")
"""Faults of which a wrong sign or zero of a joint has the signs, because it turns the gripper."""
JOINTS_CURE = (
    "check the sign, the zero and the unit of each joint, in the calibration and in the program "
    "that sends the joint angles; a wrong one looks like this fault"
)
"""What to change for `ORIENTATION_FAULTS`, if a robot sends joint angles and no orientation."""
MIN_CONFIDENCE = 0.5  # a finding of less confidence only makes the diagnosis undecided
# Checks that see their fault clearly are 0.85 to 0.98 sure, by their kind. So confidences from here
# on count as equal where one finding may explain another.
SURE_CONFIDENCE = 0.85


@dataclass(frozen=True)
class RankedFinding:
    """A finding with the check that made it."""

    check: RolloutCheck
    finding: Finding


@dataclass(frozen=True)
class Diagnosis:
    """The result of all checks.

    findings    what is wrong, the likeliest first.
    secondary   findings that another finding explains, with the fault that explains each.
    suspicions  fault → why a check can neither find it nor exclude it.
    unknown     fault → why it was not examined.
    clean       the faults that are excluded, as far as the check can see.
    """

    findings: Sequence[RankedFinding]
    secondary: Sequence[tuple[RankedFinding, str]]
    suspicions: Mapping[str, str]
    unknown: Mapping[str, str]
    clean: Sequence[str]

    @property
    def verdict(self) -> Verdict:
        """Whether something is wrong."""
        if self.findings:
            return "found"
        if self.suspicions or not self.clean:
            return "undecided"
        return "nothing found"

    def to_json(self) -> str:
        """Return everything that the checks said as JSON."""
        findings = [_describe_for_json(ranked) for ranked in self.findings]
        secondary = []
        for ranked, explaining_fault in self.secondary:
            secondary.append({**_describe_for_json(ranked), "explained_by": explaining_fault})
        content = {
            "verdict": self.verdict,
            "findings": findings,
            "secondary": secondary,
            "suspicions": dict(self.suspicions),
            "not_examined": dict(self.unknown),
            "not_found": list(self.clean),
        }
        return json.dumps(content, indent=1)


def _describe_for_json(ranked: RankedFinding) -> dict[str, Any]:
    """Describe a finding by plain values."""
    return {
        "fault": ranked.check.fault,
        "confidence": ranked.finding.confidence,
        "evidence": ranked.finding.evidence,
        "cure": ranked.finding.cure,
        "file": ranked.finding.file,
    }


def diagnose(case: PolicyCase) -> Diagnosis:
    """Run all checks on a case."""
    material = list_material(case)
    results: list[RankedFinding] = []
    suspicions: dict[str, str] = {}
    unknown: dict[str, str] = {}
    clean: list[str] = []
    for check in make_all_checks():
        missing = sorted(check.needs - material)
        if missing:
            unknown[check.fault] = f"needs {' and '.join(missing)}"
            continue
        result = check.examine(case)
        if isinstance(result, Finding):
            result = replace(result, file=insert_robot_file(result.file, case.robot))
            if case.takes_joints and check.fault in ORIENTATION_FAULTS:
                result = replace(result, cure=JOINTS_CURE, file=f"{CLIENT}; or {result.file}")
        if isinstance(result, Doubt):
            reasons = suspicions if result.is_suspicion else unknown
            reasons[check.fault] = result.reason
        elif result is None:
            clean.append(check.fault)
        elif result.confidence < MIN_CONFIDENCE:
            suspicions[check.fault] = result.evidence
        else:
            results.append(RankedFinding(check, result))
    findings, secondary = _rank(results)
    return Diagnosis(findings, secondary, suspicions, unknown, clean)


def insert_robot_file(location: str, robot: str | None) -> str:
    """Insert the name of the robot's file into a text that says where to change something.

    >>> insert_robot_file("observe in your robot's file", "robot.py")
    'observe in robot.py'
    >>> insert_robot_file("observe in your robot's file", "widowx")
    "your robot's client, which sends the observations and executes the actions"
    """
    if robot is None or ANY_ROBOT_FILE not in location:
        return location
    if robot.endswith(".py"):
        return location.replace(ROBOT_FILE_WITH_EXAMPLE, robot).replace(ANY_ROBOT_FILE, robot)
    # The robots that the package knows were converted correctly before, so their clients differ.
    return CLIENT


def list_material(case: PolicyCase) -> frozenset[Material]:
    """List what a case has for checks to look at."""
    material: set[Material] = set()
    if case.rollout:
        material.add("rollout")
    if case.demonstrations:
        material.add("demonstrations")
    if case.policy is not None:
        material.add("policy")
    return frozenset(material)


def _rank(
    results: Sequence[RankedFinding],
) -> tuple[list[RankedFinding], list[tuple[RankedFinding, str]]]:
    """Sort findings by confidence, and split off those that another one explains."""
    ranked = sorted(results, key=lambda entry: -entry.finding.confidence)
    findings = []
    secondary = []
    for rank, entry in enumerate(ranked):
        explaining_fault = _find_explaining_fault(rank, ranked)
        if explaining_fault is None:
            findings.append(entry)
        else:
            secondary.append((entry, explaining_fault))
    return findings, secondary


def _find_explaining_fault(rank: int, ranked: Sequence[RankedFinding]) -> str | None:
    """Return the fault that explains the finding of a rank, if one does.

    A finding does not explain a surer one, nor what happens to another camera's pictures. Of two
    that could explain each other, the surer one explains the other.
    """
    entry = ranked[rank]
    if entry.finding.is_independent:
        return None
    least_confidence = min(entry.finding.confidence, SURE_CONFIDENCE)
    for cause_rank, cause in enumerate(ranked):
        if entry.check.fault not in cause.check.causes:
            continue
        if _are_of_different_cameras(cause.finding, entry.finding):
            continue
        is_mutual = cause.check.fault in entry.check.causes
        if is_mutual and cause_rank > rank:
            continue
        if cause.finding.confidence >= least_confidence:
            return cause.check.fault
    return None


def _are_of_different_cameras(first: Finding, second: Finding) -> bool:
    """Return whether two findings concern one camera each, and not the same one."""
    if first.camera is None or second.camera is None:
        return False
    return first.camera != second.camera


def write_diagnosis_json(diagnosis: Diagnosis, file: Path) -> None:
    """Write a diagnosis to a file, as JSON."""
    write_text(file, diagnosis.to_json() + "\n")
