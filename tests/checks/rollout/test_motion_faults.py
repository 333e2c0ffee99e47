"""Each way to misunderstand actions has its own name, and a robot without faults has none."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from made_rollouts import MadeRobot, make_case
from spear.checks.rollout.action_frame import ActionFrameCheck
from spear.checks.rollout.action_sign import ActionSignCheck
from spear.checks.rollout.actions_dropped import ActionsDroppedCheck
from spear.checks.rollout.actions_repeated import ActionsRepeatedCheck
from spear.checks.rollout.angle_unit import AngleUnitCheck
from spear.checks.rollout.case import Case, Doubt, Finding, RolloutCheck
from spear.checks.rollout.control_rate import ControlRateCheck
from spear.checks.rollout.controller_short import ControllerShortCheck
from spear.checks.rollout.episode import RecordedEpisode
from spear.checks.rollout.latency import LatencyCheck
from spear.checks.rollout.motion import is_other_often_exact_instead
from spear.checks.rollout.quaternion_order import QuaternionOrderCheck
from spear.checks.rollout.translation_unit import TranslationUnitCheck
from spear.geometry import (
    quat_canonical,
    quat_conjugate,
    quat_exp,
    quat_log,
    quat_multiply,
    quat_rotate,
)
from spear.types import Array

CHECKS = (
    ActionFrameCheck(),
    ActionSignCheck(),
    TranslationUnitCheck(),
    AngleUnitCheck(),
    QuaternionOrderCheck(),
    ControlRateCheck(),
    LatencyCheck(),
    ControllerShortCheck(),
    ActionsRepeatedCheck(),
    ActionsDroppedCheck(),
)
Execute = Callable[[Array, Array], Array]


def as_tensor(values: Array) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values, np.float64))


def in_tool_frame(action: Array, rotation: Array) -> Array:
    """Move along the axes of the tool."""
    moved = action.copy()
    moved[:3] = quat_rotate(as_tensor(rotation), as_tensor(action[:3])).numpy()
    return moved


def rotate_about_base(action: Array, rotation: Array) -> Array:
    """Rotate about the axes of the base."""
    orientation = as_tensor(rotation)
    turn = quat_multiply(as_tensor(action[3:7]), orientation)
    moved = action.copy()
    moved[3:7] = quat_multiply(quat_conjugate(orientation), turn).numpy()
    return moved


def reverse_y(action: Array, rotation: Array) -> Array:
    """Move along y in the opposite direction."""
    return action * np.array([1, -1, 1, 1, 1, 1, 1, 1])


def scale_translation(factor: float) -> Execute:
    """Move farther by a factor."""
    return lambda action, rotation: np.concatenate([factor * action[:3], action[3:]])


def scale_rotation(factor: float) -> Execute:
    """Rotate farther by a factor."""

    def execute(action: Array, rotation: Array) -> Array:
        turn = quat_exp(factor * quat_log(as_tensor(action[3:7])))
        return np.concatenate([action[:3], turn.numpy(), action[7:]])

    return execute


def take_scalar_last(action: Array, rotation: Array) -> Array:
    """Take a quaternion w x y z for x y z w."""
    return np.concatenate([action[:3], np.roll(action[3:7], 1), action[7:]])


def move_sometimes(probability: float, factor: float) -> Execute:
    """Move farther by a factor, in a share of the actions."""
    rng = np.random.default_rng(0)

    def execute(action: Array, rotation: Array) -> Array:
        is_changed = rng.random() < probability
        return scale_translation(factor)(action, rotation) if is_changed else action

    return execute


PLANTED = {
    "tool frame": (MadeRobot(in_tool_frame), "action-frame"),
    "rotations about the base": (MadeRobot(rotate_about_base), "action-frame"),
    "reversed y": (MadeRobot(reverse_y), "action-sign"),
    "millimeters": (MadeRobot(scale_translation(0.001)), "translation-unit"),
    "controller units": (MadeRobot(scale_translation(20.0)), "translation-unit"),
    "degrees": (MadeRobot(scale_rotation(1 / 57.3)), "angle-unit"),
    "scalar last": (MadeRobot(take_scalar_last), "quaternion-order"),
    "twice the rate": (MadeRobot(num_executed=4, action_s=0.1), "control-rate"),
    "a third of the rate": (MadeRobot(action_s=0.6), "control-rate"),
    "slow answers": (MadeRobot(answer_s=lambda step: 0.5), "latency"),
    "some slow answers": (MadeRobot(answer_s=lambda step: 0.7 * (step % 4 == 0)), "latency"),
    "60 %": (MadeRobot(scale_translation(0.6)), "controller-short"),
    "everything twice": (MadeRobot(scale_translation(2.0)), "actions-repeated"),
    "some twice": (MadeRobot(move_sometimes(0.25, 2.0)), "actions-repeated"),
    "everything twice, in twice the time": (
        MadeRobot(scale_translation(2.0), action_s=0.4),
        "actions-repeated",
    ),
    "most never": (MadeRobot(move_sometimes(0.6, 0.0)), "actions-dropped"),
    "some never": (MadeRobot(move_sometimes(0.25, 0.0)), "actions-dropped"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_the_first_that_is_named(name: str) -> None:
    robot, fault = PLANTED[name]
    case = make_case(robot)

    findings = {}
    for check in CHECKS:
        result = check.examine(case)
        if isinstance(result, Finding):
            findings[check.fault] = (result.confidence, check)

    assert fault in findings
    confidence, check = findings[fault]
    unexplained = set(findings) - {fault} - set(check.causes)
    assert all(findings[fault][0] < confidence for fault in unexplained)


def take_scalar_last_slowly(action: Array, rotation: Array) -> Array:
    """Take a quaternion w x y z for x y z w, and limit the rotation to 0.3 rad."""
    taken = take_scalar_last(action, rotation)
    turn = quat_log(quat_canonical(as_tensor(taken[3:7])))
    limited = quat_exp(turn * min(1.0, 0.3 / float(turn.norm())))
    return np.concatenate([taken[:3], limited.numpy(), taken[7:]])


def in_sequence(first: Execute, second: Execute) -> Execute:
    """Change an action in two ways."""
    return lambda action, rotation: second(first(action, rotation), rotation)


def execute_late(episode: RecordedEpisode) -> RecordedEpisode:
    """Execute each answer only after the next observation; before the first answer, stand still."""
    moves = np.diff(episode.position, axis=0)
    late_moves = np.concatenate([np.zeros((1, 3)), moves[:-1]])
    position = np.concatenate([episode.position[:1], episode.position[0] + late_moves.cumsum(0)])
    return replace(episode, position=position)


def execute_twice(action: Array, rotation: Array) -> Array:
    """Translate and rotate twice as far."""
    return in_sequence(scale_translation(2.0), scale_rotation(2.0))(action, rotation)


Change = Callable[[RecordedEpisode], RecordedEpisode]
TWO_FAULTS: dict[str, tuple[MadeRobot, Change | None, set[str]]] = {
    "reversed y, and most never": (
        MadeRobot(in_sequence(reverse_y, move_sometimes(0.6, 0.0))),
        None,
        {"action-sign", "actions-dropped"},
    ),
    "reversed y, late": (MadeRobot(reverse_y), execute_late, {"action-sign", "latency"}),
    "reversed y, twice in twice the time": (
        MadeRobot(in_sequence(reverse_y, execute_twice), action_s=0.4),
        None,
        {"action-sign", "actions-repeated"},
    ),
    "five times as far, and most never": (
        MadeRobot(in_sequence(scale_translation(5.0), move_sometimes(0.6, 0.0))),
        None,
        {"translation-unit", "actions-dropped"},
    ),
    "a tenth, at twice the rate": (
        MadeRobot(scale_translation(0.1), action_s=0.1),
        None,
        {"translation-unit", "control-rate"},
    ),
}


@pytest.mark.parametrize("name", TWO_FAULTS)
def test_both_of_two_faults_are_named(name: str) -> None:
    robot, change, faults = TWO_FAULTS[name]
    case = make_case(robot, change)

    findings: set[str] = set()
    explained: set[str] = set()
    for check in CHECKS:
        if isinstance(check.examine(case), Finding):
            findings.add(check.fault)
            explained |= check.causes
    assert findings - explained == faults


def test_the_scalar_last_is_recognized_although_the_robot_limits_its_rotations() -> None:
    case = make_case(MadeRobot(take_scalar_last_slowly))

    result = QuaternionOrderCheck().examine(case)

    assert isinstance(result, Finding)
    assert "as if commands were x y z w" in result.evidence
    assert not isinstance(AngleUnitCheck().examine(case), Finding)


def test_a_frame_that_differs_in_few_moves_is_told_by_these() -> None:
    base_errors = np.where(np.arange(40) < 12, 0.5, 0.01)
    tool_errors = np.full(40, 0.01)
    lengths = np.ones(40)

    assert is_other_often_exact_instead(base_errors, tool_errors, lengths)
    assert not is_other_often_exact_instead(tool_errors, base_errors, lengths)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.fault)
@pytest.mark.parametrize("num_executed", [1, 3])
def test_a_robot_that_does_what_it_is_told_has_no_fault(
    check: RolloutCheck, num_executed: int
) -> None:
    case = make_case(MadeRobot(num_executed=num_executed))

    result = check.examine(case)

    assert not isinstance(result, Finding)
    if num_executed == 1:  # with several actions per observation, some checks cannot tell
        assert result is None


def test_a_state_in_millimeters_is_told_from_a_command_in_another_unit() -> None:
    def send_millimeters(episode: RecordedEpisode) -> RecordedEpisode:
        return replace(episode, position=1000 * episode.position)

    result = TranslationUnitCheck().examine(make_case(change=send_millimeters))

    assert isinstance(result, Finding)
    assert "not meters, but mm" in result.evidence
    assert result.cure == "send positions in meters as the state"


def test_a_base_that_is_turned_by_a_quarter_is_another_frame() -> None:
    def turn_quarter(action: Array, rotation: Array) -> Array:
        return np.concatenate([[-action[1], action[0], action[2]], action[3:]])

    result = ActionFrameCheck().examine(make_case(MadeRobot(turn_quarter)))

    assert isinstance(result, Finding)
    assert "turned by 90°" in result.evidence


def go_to_changed_targets(
    matrix: list[list[float]],
) -> Callable[[RecordedEpisode], RecordedEpisode]:
    """Go towards targets that a matrix changes, by at most 6 cm at a time."""

    def change(episode: RecordedEpisode) -> RecordedEpisode:
        position = np.array(episode.position)
        for step in range(len(episode) - 1):
            target = np.array(matrix) @ (position[step] + episode.action[step, :3])
            path = target - position[step]
            share = min(1.0, 0.06 / np.linalg.norm(path))
            position[step + 1] = position[step] + share * path
        return replace(episode, position=position)

    return change


def test_targets_in_a_turned_base_are_in_another_frame() -> None:
    """Absolute poses far from the arm: its moves have nothing to do with the commanded ones."""
    quarter_turn = [[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]

    result = ActionFrameCheck().examine(make_case(change=go_to_changed_targets(quarter_turn)))

    assert isinstance(result, Finding)
    assert "turned by 90° about the vertical axis" in result.evidence


def test_targets_in_meters_for_a_robot_with_millimeters_are_in_another_unit() -> None:
    thousandth = [[0.001, 0.0, 0.0], [0.0, 0.001, 0.0], [0.0, 0.0, 0.001]]

    case = make_case(change=go_to_changed_targets(thousandth))
    result = TranslationUnitCheck().examine(case)

    assert isinstance(result, Finding)
    assert "1000 times too near to the base" in result.evidence
    assert not isinstance(ActionFrameCheck().examine(case), Finding)


def test_an_arm_that_is_often_blocked_still_shows_a_reversed_axis() -> None:
    rng = np.random.default_rng(0)

    def reverse_or_stop(action: Array, rotation: Array) -> Array:
        moved = reverse_y(action, rotation)
        return moved if rng.random() < 0.4 else scale_translation(0.02)(moved, rotation)

    result = ActionSignCheck().examine(make_case(MadeRobot(reverse_or_stop)))

    assert isinstance(result, Finding)


def test_a_robot_that_moves_while_it_waits_is_not_judged_by_its_moves() -> None:
    robot = MadeRobot(scale_translation(2.0), answer_s=lambda step: 0.6, action_s=0.01)

    result = ActionsRepeatedCheck().examine(make_case(robot))

    assert isinstance(result, Doubt)


@pytest.mark.parametrize(
    ("action_s", "most_confidence"),
    [(0.2, 0.5), (0.01, 0.98)],  # the second robot observes again as soon as it has an answer
    ids=["stands still while it waits", "moves while it waits"],
)
def test_slow_answers_are_a_sure_fault_only_of_an_arm_that_moves_while_it_waits(
    action_s: float, most_confidence: float
) -> None:
    robot = MadeRobot(answer_s=lambda step: 0.7, action_s=action_s)

    result = LatencyCheck().examine(make_case(robot))

    assert isinstance(result, Finding)
    assert result.confidence == most_confidence
    assert ("The arm waits" in result.evidence) == (action_s == 0.2)


@pytest.mark.parametrize(("action_s", "is_late"), [(0.2, False), (0.01, True)])
def test_nearly_a_step_is_late_only_for_an_arm_that_moves_meanwhile(
    action_s: float, is_late: bool
) -> None:
    """An arm observes again right after each answer if it goes on with its last actions."""
    robot = MadeRobot(answer_s=lambda step: 0.18, action_s=action_s)

    result = LatencyCheck().examine(make_case(robot))

    assert isinstance(result, Finding) == is_late


def test_an_arm_that_follows_the_answer_before_the_last_is_late() -> None:
    """The server's times do not show it, if the network is slow."""
    result = LatencyCheck().examine(make_case(change=execute_late))

    assert isinstance(result, Finding)
    assert "the answer before the last one" in result.evidence
    assert LatencyCheck().examine(make_case()) is None


def add_lag(episode: RecordedEpisode) -> RecordedEpisode:
    """Let an arm move by 0.6 of each motion in its step, and carry on 0.4 of its last motion."""
    displacements = np.diff(episode.position, axis=0)
    orientation = as_tensor(episode.rotation)
    turns = quat_log(
        quat_canonical(quat_multiply(quat_conjugate(orientation[:-1]), orientation[1:]))
    )
    positions = [episode.position[0]]
    rotations = [orientation[0]]
    displacement = np.zeros(3)
    turn = torch.zeros(3, dtype=torch.float64)
    for step in range(len(displacements)):
        displacement = 0.6 * displacements[step] + 0.4 * displacement
        turn = 0.6 * turns[step] + 0.4 * turn
        positions.append(positions[-1] + displacement)
        rotations.append(quat_multiply(rotations[-1], quat_exp(turn)))
    return replace(episode, position=np.array(positions), rotation=torch.stack(rotations).numpy())


def make_lagging_case(execute: Execute | None = None) -> Case:
    """Make a case whose arm lags behind its commands, in the rollout and in the training."""
    robot = MadeRobot() if execute is None else MadeRobot(execute=execute)
    case = make_case(robot, change=add_lag)
    return replace(case, demonstrations=[add_lag(episode) for episode in case.demonstrations])


def drop_every_third_action() -> Execute:
    """Stand still in every third step."""
    num_actions = 0

    def execute(action: Array, rotation: Array) -> Array:
        nonlocal num_actions
        num_actions += 1
        if num_actions % 3:
            return action
        return np.array([0, 0, 0, 1, 0, 0, 0, action[7]])

    return execute


def test_an_arm_that_lags_in_training_too_is_not_accused() -> None:
    case = make_lagging_case()

    findings = [check.fault for check in CHECKS if isinstance(check.examine(case), Finding)]

    assert findings == []


@pytest.mark.parametrize(
    "execute, check",
    [
        (scale_translation(0.1), TranslationUnitCheck()),
        (scale_translation(0.6), ControllerShortCheck()),
        (scale_rotation(0.017), AngleUnitCheck()),
        (reverse_y, ActionSignCheck()),
        (in_tool_frame, ActionFrameCheck()),
        (drop_every_third_action(), ActionsDroppedCheck()),
    ],
)
def test_faults_of_a_lagging_arm_are_found(execute: Execute, check: RolloutCheck) -> None:
    case = make_lagging_case(execute)

    assert isinstance(check.examine(case), Finding)


def test_an_arm_that_lags_only_in_the_rollout_is_not_taken_for_one_without_a_fault() -> None:
    case = make_case(MadeRobot(execute=scale_translation(0.6)), change=add_lag)

    assert isinstance(ControllerShortCheck().examine(case), Finding)
