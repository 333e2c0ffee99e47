"""The audit names each planted mistake, finds right data right, and says when it cannot tell.

Most tests make recordings whose states and logged actions fit the layout's answers
(`RIGHT_ANSWERS`), except for mistakes that the test plants (`Mistakes`). Others audit the real
sample of BridgeData V2 with a changed layout.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from data_tiny import make_episode
from refusals import Command, refuses
from spear.audit.dataset_audit import (
    ActionPart,
    Finding,
    Report,
    audit_dataset,
    audit_recordings,
    collect_answers_about_logged_actions,
    list_possible_logged_units,
    make_recording,
)
from spear.audit.describe import propose_layout
from spear.checks.recording import Recording
from spear.checks.result import Check
from spear.cli import main
from spear.data.actions import derive_actions
from spear.data.options import Conversion
from spear.data.readers.dataset_layout import REGISTRY
from spear.data.store.episode_store import append_episodes
from spear.data.store.prepare import prepare
from spear.embodiments.kinematics import compute_franka_ee_poses
from spear.report.audit import (
    advise_on_undecided,
    format_conclusion,
    format_report,
    write_audit_page,
)

RATE_HZ = 10.0
BRIDGE_STATE = "observation/state"
BRIDGE_CAMERA = {"external": "observation/image_0"}
_SHARED_ANSWERS: dict[str, str | None] = {
    "kind": "delta",
    "signs": "+++",
    "delay_steps": "0",
    "state_format": "euler_xyz",
}
RIGHT_ANSWERS = {
    "translation": {**_SHARED_ANSWERS, "frame": "base", "unit": "m", "action_format": "-"},
    "rotation": {**_SHARED_ANSWERS, "frame": "ee", "unit": "rad", "action_format": "euler_xyz"},
}
"""The answers of a right layout about the recordings of `make_recordings` without mistakes."""


def make_motions(
    num_episodes: int = 6, num_steps: int = 24, is_still: bool = False
) -> list[tuple[np.ndarray, Rotation]]:
    """Make motions of arms whose wrists rotate far about every axis.

    Args:
        num_episodes: The number of motions.
        num_steps: The number of states of each motion.
        is_still: Whether the positions stay the same.

    Returns:
        Positions [num_steps, 3] (m) and orientations of each motion.
    """
    rng = np.random.default_rng(0)
    time_s = np.arange(num_steps)[:, None] / RATE_HZ
    amplitude_m = 0.0 if is_still else 0.05
    motions = []
    for _ in range(num_episodes):
        waves = []  # sine waves [num_steps, 3]: two for positions, two for orientations
        for frequency in (1.5, 4.0, 2.0, 3.0):  # rad/s
            amplitude = rng.uniform(-1, 1, (1, 3))
            phase = rng.uniform(0, 6, (1, 3))
            waves.append(amplitude * np.sin(frequency * time_s + phase))
        position = [0.4, 0.0, 0.2] + amplitude_m * (waves[0] + 0.5 * waves[1])
        turns = Rotation.from_rotvec(0.7 * (waves[2] + waves[3]))
        start = Rotation.from_rotvec(rng.uniform(-0.8, 0.8, 3))
        motions.append((position, start * turns))
    return motions


@dataclasses.dataclass(frozen=True)
class Mistakes:
    """How recordings differ from `RIGHT_ANSWERS`. The default values are right.

    translation_frame   frame of logged translations: "base" or "ee".
    rotation_frame      frame of logged rotations: "base" or "ee".
    kind                "delta", "velocity" or "absolute".
    delay_steps         by how many steps the arm follows its actions late.
    action_format       how logged rotations are written: "rotvec", or an axis order of SciPy, whose
                        "xyz" is our "euler_xyz".
    state_format        how recorded orientations are written: an axis order of SciPy.
    translation_factor  factor on logged translations, for all axes or one for each.
    rotation_factor     factor on the numbers of logged rotations.
    state_factor        factor on the numbers of recorded orientations.
    position_factor     factor on recorded positions.
    noise               standard deviation of the noise of logged translations.
    is_still            whether the arm keeps its position.
    """

    translation_frame: str = "base"
    rotation_frame: str = "ee"
    kind: str = "delta"
    delay_steps: int = 0
    action_format: str = "xyz"
    state_format: str = "xyz"
    translation_factor: Any = 1.0
    rotation_factor: Any = 1.0
    state_factor: float = 1.0
    position_factor: float = 1.0
    noise: float = 1e-4
    is_still: bool = False


def make_recordings(mistakes: Mistakes = Mistakes()) -> list[Recording]:
    """Make six recordings that fit `RIGHT_ANSWERS`, except for the planted mistakes."""
    rng = np.random.default_rng(1)
    recordings = []
    for number, (position, rotation) in enumerate(make_motions(is_still=mistakes.is_still)):
        translation, turn = log_actions(position, rotation, mistakes)
        # An arm that follows late executes actions that were logged earlier.
        translation = np.roll(translation, -mistakes.delay_steps, axis=0)
        turn = np.roll(turn, -mistakes.delay_steps, axis=0)
        noise = rng.normal(0, mistakes.noise, translation.shape)
        recordings.append(
            Recording(
                source=f"made#{number}",
                position=position * mistakes.position_factor,
                rotation=rotation.as_euler(mistakes.state_format) * mistakes.state_factor,
                translation=translation * mistakes.translation_factor + noise,
                turn=turn * mistakes.rotation_factor,
                valid=np.arange(len(position)) < len(position) - 1,  # the last state has no action
                rate_hz=RATE_HZ,
            )
        )
    return recordings


def log_actions(
    position: np.ndarray, rotation: Rotation, mistakes: Mistakes
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the logged translations and rotations that lead from state to state.

    Args:
        position: [T, 3] positions, m.
        rotation: T orientations.
        mistakes: In which frame and format, and as which kind, actions are logged.

    Returns:
        Twice [T, 3]. The last row is 0, because the last state has no next one.
    """
    translation = np.zeros_like(position)
    turn = np.zeros_like(position)
    if mistakes.kind == "absolute":
        translation[:-1] = position[1:]
        turn[:-1] = rotation[1:].as_euler("xyz")
        return translation, turn

    inverse = rotation[:-1].inv()
    step = np.diff(position, axis=0)
    delta = inverse * rotation[1:]
    if mistakes.translation_frame == "ee":
        step = inverse.apply(step)
    if mistakes.rotation_frame == "base":
        delta = rotation[1:] * inverse
    translation[:-1] = step
    if mistakes.action_format == "rotvec":
        turn[:-1] = delta.as_rotvec()
    else:
        turn[:-1] = delta.as_euler(mistakes.action_format)
    if mistakes.kind == "velocity":
        return translation * RATE_HZ, turn * RATE_HZ
    return translation, turn


def make_partial_recordings(action_part: str, mistakes: Mistakes = Mistakes()) -> list[Recording]:
    """Make recordings with only logged translations or only logged rotations, to save time.

    Args:
        action_part: "translation" or "rotation", which the recordings keep.
        mistakes: The planted mistakes.
    """
    removed = "turn" if action_part == "translation" else "translation"
    return [dataclasses.replace(r, **{removed: None}) for r in make_recordings(mistakes)]


def find_part(report: Report, name: str) -> ActionPart:
    """Find a report's findings about "translation" or "rotation"."""
    return next(action_part for action_part in report.action_parts if action_part.name == name)


def find_finding(report: Report, action_part: str, question: str) -> Finding:
    """Find a report's finding about one question, for example "frame"."""
    findings = find_part(report, action_part).findings
    return next(finding for finding in findings if finding.question == question)


def find_verdict(report: Report, action_part: str, question: str) -> tuple[str, str]:
    """Find a report's best answer to one question, and its verdict on the layout's answer."""
    finding = find_finding(report, action_part, question)
    return finding.best_answer, finding.verdict


def test_texts_of_others_are_escaped_on_the_page(tmp_path: Path) -> None:
    script = "<script>alert(1)<script>"
    report = dataclasses.replace(
        audit_recordings(make_recordings(), RIGHT_ANSWERS),
        path=script,
        state_problems=[script],
        checks=[Check(script, "wrong", script)],
        skipped=[script],
    )

    write_audit_page(report, tmp_path / "page.html")

    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_right_data_are_consistent() -> None:
    report = audit_recordings(make_recordings(), RIGHT_ANSWERS)

    assert report.outcome == "consistent"
    assert format_conclusion(report).startswith("consistent: ")
    assert find_verdict(report, "translation", "frame") == ("base", "agrees")
    assert find_verdict(report, "rotation", "frame") == ("ee", "agrees")


@pytest.mark.parametrize("name", ["translation", "rotation"])
def test_every_answer_of_a_right_layout_is_the_best_one(name: str) -> None:
    action_part = find_part(audit_recordings(make_recordings(), RIGHT_ANSWERS), name)

    assert action_part.verdict == "agrees"
    assert action_part.best_fit.relative_error < 0.05
    for finding in action_part.findings:
        assert finding.verdict in ("agrees", "cannot tell")
        assert finding.best_answer == finding.layout_answer


def test_an_arm_that_follows_late_is_consistent_and_its_delay_is_mentioned() -> None:
    """A layout of logged actions does not say a delay, so no delay contradicts it."""
    answers = collect_answers_about_logged_actions(REGISTRY["bridge_dataset"])

    report = audit_recordings(
        make_partial_recordings("translation", Mistakes(delay_steps=1)), answers
    )

    assert report.outcome == "consistent"
    assert "(1 fits best; spear.json has no key for it)" in format_conclusion(report)


def test_a_report_about_the_first_episodes_says_so() -> None:
    all_recordings = 2 * make_partial_recordings("translation")  # 12 episodes
    report = audit_recordings(all_recordings, RIGHT_ANSWERS)
    cut_report = dataclasses.replace(report, num_episodes=50)  # as many as an audit reads

    assert "of the first" not in format_conclusion(report)
    assert "of the first 50 episodes" in format_conclusion(cut_report)


def test_a_single_episode_that_was_recorded_otherwise_is_noticed() -> None:
    """Its x and y have the opposite signs. Odd episodes are sought among eight or more."""
    recordings = 2 * make_partial_recordings("translation")
    mirrored = dataclasses.replace(recordings[0], position=recordings[0].position * [-1, -1, 1])

    report = audit_recordings([mirrored, *recordings[1:]], RIGHT_ANSWERS)

    assert report.outcome == "undecided"
    assert "1 of 12 episodes" in format_conclusion(report)


# Columns: the planted mistake; the part and the question in which the audit should find it; and the
# answer that the audit should give.
@pytest.mark.parametrize(
    ("mistakes", "action_part", "question", "truth"),
    [
        (Mistakes(translation_frame="ee"), "translation", "frame", "ee"),
        (Mistakes(rotation_frame="base"), "rotation", "frame", "base"),
        (Mistakes(translation_factor=1000), "translation", "unit", "mm"),
        (Mistakes(translation_factor=np.array([1, -1, 1])), "translation", "signs", "+-+"),
        (Mistakes(rotation_factor=np.array([-1, 1, -1])), "rotation", "signs", "-+-"),
        (Mistakes(rotation_factor=180 / np.pi), "rotation", "unit", "deg"),
        (Mistakes(kind="absolute"), "rotation", "kind", "absolute"),
        (Mistakes(kind="velocity"), "translation", "kind", "velocity"),
        (Mistakes(delay_steps=-1), "rotation", "delay_steps", "-1"),
        (Mistakes(state_format="XYZ"), "rotation", "state_format", "euler_XYZ"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_planted_mistake_is_named(
    mistakes: Mistakes, action_part: str, question: str, truth: str
) -> None:
    report = audit_recordings(make_partial_recordings(action_part, mistakes), RIGHT_ANSWERS)

    assert find_verdict(report, action_part, question) == (truth, "wrong")
    assert report.outcome == "contradiction"
    assert "WRONG" in format_report(report)


@pytest.mark.parametrize(
    ("mistakes", "question", "truth"),
    [
        (Mistakes(translation_frame="ee"), "frame", "ee"),
        (Mistakes(translation_factor=np.array([1, -1, 1])), "signs", "+-+"),
    ],
    ids=["frame", "signs"],
)
def test_a_corrected_layout_agrees(mistakes: Mistakes, question: str, truth: str) -> None:
    corrected = {**RIGHT_ANSWERS["translation"], question: truth}
    answers = {**RIGHT_ANSWERS, "translation": corrected}

    report = audit_recordings(make_partial_recordings("translation", mistakes), answers)

    assert find_part(report, "translation").verdict == "agrees"


def test_an_unknown_unit_is_measured() -> None:
    """Some controllers take actions of -1 … 1, where 1 may stand for 0.05 m."""
    report = audit_recordings(
        make_partial_recordings("translation", Mistakes(translation_factor=1 / 0.05)), RIGHT_ANSWERS
    )

    unit, verdict = find_verdict(report, "translation", "unit")
    assert verdict == "wrong"
    assert float(unit.split()[0]) == pytest.approx(0.05, rel=0.1)  # "0.05 m" or near
    assert find_verdict(report, "translation", "frame") == ("base", "agrees")


@pytest.mark.parametrize(("unit_m", "verdict"), [(0.05, "agrees"), (0.5, "wrong")])
def test_a_unit_of_a_controller_that_the_layout_names_is_judged(
    unit_m: float, verdict: str
) -> None:
    """The controller's true unit is 0.05 m."""
    layout = dataclasses.replace(REGISTRY["bridge_dataset"], logged_translation_unit=unit_m)
    recordings = make_partial_recordings("translation", Mistakes(translation_factor=1 / 0.05))

    report = audit_recordings(
        recordings,
        collect_answers_about_logged_actions(layout),
        units=list_possible_logged_units(layout),
    )

    _, unit_verdict = find_verdict(report, "translation", "unit")
    assert unit_verdict == verdict


@pytest.mark.parametrize(("unit_rad", "verdict"), [(0.5, "agrees"), (0.05, "wrong")])
def test_a_unit_of_logged_rotations_that_the_layout_names_is_judged(
    unit_rad: float, verdict: str
) -> None:
    """The controller's true unit is 0.5 rad."""
    layout = dataclasses.replace(
        REGISTRY["bridge_dataset"], logged_rotation_unit=unit_rad, logged_rotation_frame="ee"
    )
    recordings = make_partial_recordings("rotation", Mistakes(rotation_factor=1 / 0.5))

    report = audit_recordings(
        recordings,
        collect_answers_about_logged_actions(layout),
        units=list_possible_logged_units(layout),
    )

    _, unit_verdict = find_verdict(report, "rotation", "unit")
    assert unit_verdict == verdict


def test_positions_in_millimeters_are_named() -> None:
    """States and actions are both in millimeters, so they do not contradict each other."""
    mistakes = Mistakes(position_factor=1000, translation_factor=1000)

    report = audit_recordings(make_partial_recordings("translation", mistakes), RIGHT_ANSWERS)

    assert "not meters, but mm" in format_conclusion(report)


def test_orientations_in_degrees_are_named() -> None:
    mistakes = Mistakes(state_factor=180 / np.pi, rotation_factor=180 / np.pi)

    report = audit_recordings(make_recordings(mistakes), RIGHT_ANSWERS)

    assert any(
        "degrees, where the layout has radians" in remark for remark in report.state_problems
    )


def test_an_arm_that_hardly_moves_tells_nothing() -> None:
    (action_part,) = audit_recordings(
        make_partial_recordings("translation", Mistakes(is_still=True)), RIGHT_ANSWERS
    ).action_parts

    assert action_part.verdict == "cannot tell"
    assert "hardly moves" in action_part.note


def test_actions_that_nothing_explains_tell_nothing() -> None:
    (action_part,) = audit_recordings(
        make_partial_recordings("translation", Mistakes(noise=1.0)), RIGHT_ANSWERS
    ).action_parts

    assert action_part.verdict == "cannot tell"
    assert "no hypothesis explains" in action_part.note
    assert {finding.verdict for finding in action_part.findings} == {"cannot tell"}


def test_an_arm_that_never_tilts_does_not_tell_the_frame() -> None:
    """If the orientation is always that of the base, both frames have the same axes."""
    recordings = make_partial_recordings("translation")
    upright = [dataclasses.replace(r, rotation=np.zeros_like(r.rotation)) for r in recordings]

    frame = find_finding(audit_recordings(upright, RIGHT_ANSWERS), "translation", "frame")

    assert frame.verdict == "cannot tell"
    assert set(frame.tied_answers) == {"base", "ee"}


def test_episodes_without_five_known_steps_are_refused() -> None:
    recordings = make_recordings()
    unknown = [dataclasses.replace(r, valid=np.zeros_like(r.valid)) for r in recordings]

    refuses("no episode of .* has five known steps", audit_recordings, unknown, RIGHT_ANSWERS)


def test_episodes_of_a_store_each_have_their_own_rate(tmp_path: Path) -> None:
    """With the rate of the first episode (30 Hz), the others, which move at up to 0.6 m/s, would
    seem to move at 3.6 m/s, which is implausible.
    """
    episodes = []
    for number, rate_hz in enumerate((30.0, 5.0, 5.0, 5.0)):
        time_s = np.arange(24) / rate_hz
        x = 0.4 + 0.4 * np.sin(1.5 * time_s)
        position = np.stack([x, np.zeros(24), np.full(24, 0.3)], axis=1)
        episodes.append(make_episode(number, 24, (8, 8), position=position, rate_hz=rate_hz))
    append_episodes(episodes, tmp_path / "store")

    report = audit_dataset(tmp_path / "store")

    assert report.state_problems == []
    assert "rate_hz" not in [check.name for check in report.checks]


def write_canonical_store(folder: Path, command_base: Rotation | None = None) -> None:
    """Write three episodes with canonical actions, in whose middle the gripper closes.

    Args:
        folder: The store's folder.
        command_base: Rotation from the base that the positions are in to that of the commands.
    """
    episodes = []
    for number, (position, rotation) in enumerate(make_motions(3)):
        quaternion = rotation.as_quat(scalar_first=True)
        num_steps = len(quaternion)
        gripper = np.float32(np.arange(num_steps) < 12)
        command = np.append(gripper[1:], gripper[-1])  # leads to the next opening
        action = derive_actions(position, quaternion, command)
        if command_base is not None:
            action[:, :3] = command_base.apply(action[:, :3])
        episode = make_episode(
            number,
            num_steps,
            (8, 8),
            rate_hz=RATE_HZ,
            position=position,
            rotation=quaternion,
            gripper=gripper,
            action=action,
            action_mask=np.arange(num_steps) < num_steps - 1,
        )
        episodes.append(episode)
    append_episodes(episodes, folder)


def export_with_wrong_frame(store: Path, exported: Path, run_command: Command) -> None:
    """Export a store as a LeRobot dataset, and make its spear.json wrong.

    The layout then describes the actions by `logged_…` keys, and claims the base frame for
    rotations, which are in the end-effector frame.
    """
    run_command("data", "export", str(store), "--out", str(exported))
    layout_file = exported / "spear.json"
    layout = json.loads(layout_file.read_text())
    action_column = layout["action"]
    for key in ("action", "action_mask", "success", "source"):
        layout.pop(key, None)
    layout |= {
        "logged_translation": f"{action_column}[0:3]",
        "logged_rotation": f"{action_column}[3:7]",
        "logged_rotation_format": "quat_wxyz",
        "logged_kind": "delta",
        "logged_frame": "base",
    }
    layout_file.write_text(json.dumps(layout))


def test_the_command_finds_a_store_consistent(tmp_path: Path, run_command: Command) -> None:
    write_canonical_store(tmp_path / "store")
    page = tmp_path / "audit.html"

    output = run_command("data", "audit", str(tmp_path / "store"), "--report", str(page))

    assert output.splitlines()[-1].startswith("consistent: ")
    assert "WRONG" not in output
    assert "the layout agrees with the data" in page.read_text()
    assert page.read_text().count("<svg") == 9  # the plots
    assert "http" not in page.read_text()  # the page needs nothing from the internet


def test_the_command_finds_a_wrong_layout(
    tmp_path: Path, run_command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    write_canonical_store(tmp_path / "store")
    exported = tmp_path / "exported"
    export_with_wrong_frame(tmp_path / "store", exported, run_command)
    page = tmp_path / "audit.html"
    capsys.readouterr()

    exit_code = main(["data", "audit", str(exported), "--report", str(page)])

    output = capsys.readouterr()
    assert exit_code == 2  # scripts rely on this code for a contradiction
    assert output.out.splitlines()[-1].startswith("contradiction: ")
    assert output.err.startswith(f"error: In {exported}, the layout is WRONG, because ")
    assert "frame is ee, not base" in output.err
    assert output.err.count("\n") == 1
    assert "WRONG" in page.read_text()


def test_recordings_of_an_arm_in_another_base_are_not_blamed_on_a_layout_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recordings = tmp_path / "recordings"
    write_canonical_store(recordings, command_base=Rotation.from_euler("z", 180, degrees=True))

    exit_code = main(["data", "audit", str(recordings)])

    assert exit_code == 2
    message = capsys.readouterr().err
    assert "the translation " in message
    assert "`spear diagnose` names the cause" in message
    assert "Write what fits" not in message


def test_the_last_line_says_what_is_undecided_and_what_would_decide_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_canonical_store(tmp_path / "store")
    undecided = dataclasses.replace(
        audit_dataset(tmp_path / "store"),
        action_parts=[],
        checks=[Check("grip", "cannot tell", "shut")],
    )
    monkeypatch.setattr("spear.audit.dataset_audit.audit_dataset", lambda *_: undecided)

    exit_code = main(["data", "audit", str(tmp_path / "store")])

    assert exit_code == 3  # undecided
    output = capsys.readouterr()
    message = output.err
    assert output.out.splitlines()[-1] == "undecided: nothing contradicts the layout in the data"
    assert "does not decide grip (shut)." in message
    assert "more episodes with larger motions, or say it in spear.json" in message


def test_an_arm_that_does_not_follow_needs_slower_motions() -> None:
    """With noise of 1 m, no hypothesis explains the states."""
    report = audit_recordings(
        make_partial_recordings("translation", Mistakes(noise=1.0)), RIGHT_ANSWERS, "my_robot"
    )

    advice = advise_on_undecided(report)

    assert advice.startswith("my_robot does not decide ")
    assert "Record slower motions" in advice


def test_a_layout_that_says_nothing_needs_a_line() -> None:
    unsaid = {**RIGHT_ANSWERS["translation"], "frame": None}
    report = audit_recordings(
        make_partial_recordings("translation"), {**RIGHT_ANSWERS, "translation": unsaid}, "my_robot"
    )

    assert "Write the missing keys into spear.json" in advise_on_undecided(report)


def test_the_real_sample_fits_its_registry_entry(shared: Path) -> None:
    report = audit_dataset(shared / "data" / "bridge_v2_sample")

    assert report.outcome == "consistent"
    assert report.num_episodes == 25
    assert find_verdict(report, "translation", "frame") == ("base", "agrees")
    assert find_verdict(report, "translation", "signs") == ("+++", "agrees")
    assert find_verdict(report, "rotation", "delay_steps") == ("0", "not said")
    assert find_verdict(report, "rotation", "kind") == ("delta", "agrees")


def audit_bridge(shared: Path, folder: Path, **changes: Any) -> Report:
    """Audit the real sample of BridgeData V2 with a changed layout.

    Without `logged_rotation` among the changes, its logged rotations are left out, to save time.

    Args:
        shared: The folder of real data.
        folder: Where the layout is written.
        changes: Keys of the layout and their values.
    """
    layout = folder / "layout.json"
    layout.write_text(json.dumps({"like": "bridge_dataset", "logged_rotation": None, **changes}))
    return audit_dataset(shared / "data" / "bridge_v2_sample", layout_file=layout)


# Changes to the sample's right layout; the name of the check that should find the mistake; and some
# words of its message.
GRIPPER_MISTAKES = [
    ({"command_range": [1, 0]}, "gripper command", "command_range"),
    ({"gripper_range": [1, 0]}, "gripper command", "gripper_range"),
    ({"command": "action[5]"}, "gripper command", "another column"),
    ({"command_range": [0, 8]}, "gripper command", "command_range"),  # as if in another unit
    ({"gripper_range": [0, 4], "command": None}, "gripper", "gripper_range"),
    ({"gripper_range": [0, 2]}, "gripper", "gripper_range"),  # it is never open
    ({"gripper_range": [1, 0], "command_range": [1, 0]}, "gripper", "gripper_range"),
    ({"gripper_range": [1, 0], "command": None}, "gripper", "gripper_range"),
]
OTHER_MISTAKES = [
    ({"rate_hz": 200.0}, "rate_hz", "m/s"),
    ({"images": {"external": "observation/image_9"}}, "camera external", "absent"),
    ({"images": {**BRIDGE_CAMERA, "wrist": "observation/image_3"}}, "camera wrist", "blank"),
    ({"instruction": "words"}, "instruction", "column 'words'"),
    ({"success": "ended"}, "success", "column 'ended'"),
]


@pytest.mark.parametrize(
    ("changes", "check_name", "words"), [*GRIPPER_MISTAKES, *OTHER_MISTAKES], ids=str
)
def test_each_mistake_in_a_layout_is_named(
    shared: Path, tmp_path: Path, changes: dict[str, Any], check_name: str, words: str
) -> None:
    report = audit_bridge(shared, tmp_path, **changes)

    (check,) = [check for check in report.checks if check.verdict == "wrong"]
    assert report.outcome == "contradiction"
    assert check.name == check_name
    assert words in check.words


@pytest.mark.parametrize(("changes", "check_name", "words"), GRIPPER_MISTAKES, ids=str)
def test_preparing_warns_of_each_gripper_mistake(
    shared: Path, tmp_path: Path, changes: dict[str, Any], check_name: str, words: str
) -> None:
    """So it does if opening and command are both inverted and do not contradict each other."""
    layout = tmp_path / "layout.json"
    layout.write_text(json.dumps({"like": "bridge_dataset", **changes}))

    with pytest.warns(match=f"The check of {check_name} in "):
        prepare(
            shared / "data/bridge_v2_sample", tmp_path / "out", conversion=Conversion(layout=layout)
        )


def test_positions_in_another_unit_than_the_layout_says(shared: Path, tmp_path: Path) -> None:
    report = audit_bridge(shared, tmp_path, length_unit="mm")

    assert report.outcome == "contradiction"
    assert "length_unit" in format_conclusion(report)


def test_columns_that_nothing_explains_are_undecided(shared: Path, tmp_path: Path) -> None:
    """Positions and orientations of the layout are exchanged."""
    exchanged = {"position": f"{BRIDGE_STATE}[3:6]", "rotation": f"{BRIDGE_STATE}[0:3]"}

    report = audit_bridge(shared, tmp_path, **exchanged)

    assert report.outcome == "undecided"


@pytest.mark.parametrize(("key", "value"), [("gripper_range", [-1, 1]), ("rate_hz", 60.0)])
def test_doubtful_values_are_undecided(shared: Path, tmp_path: Path, key: str, value: Any) -> None:
    report = audit_bridge(shared, tmp_path, **{key: value})

    verdicts = {check.name: check.verdict for check in report.checks}
    assert verdicts[key] == "cannot tell"


def test_an_undecided_audit_has_an_exit_code_of_its_own(shared: Path, tmp_path: Path) -> None:
    layout = tmp_path / "layout.json"
    changes = {"like": "bridge_dataset", "logged_rotation": None, "rate_hz": 60.0}
    layout.write_text(json.dumps(changes))
    folder = str(shared / "data" / "bridge_v2_sample")

    exit_code = main(["data", "audit", folder, "--layout", str(layout)])

    assert exit_code == 3  # not 2, which means a contradiction


@pytest.mark.parametrize(
    ("key", "column"),
    [
        ("position", BRIDGE_STATE),
        ("logged_translation", "action"),
        ("logged_rotation", "action[3:5]"),
    ],
)
def test_columns_of_another_width_are_named(
    shared: Path, tmp_path: Path, key: str, column: str
) -> None:
    name = key.replace("_", " ")
    message = rf"{name} of .* has the shape \(10, \d\)"  # the first episode has 10 steps

    refuses(message, audit_bridge, shared, tmp_path, **{key: column})


def test_a_wrong_format_of_states_is_named_instead_of_a_wrong_frame(
    shared: Path, tmp_path: Path
) -> None:
    report = audit_bridge(
        shared, tmp_path, rotation_format="euler_ZYX", logged_rotation="action[3:6]"
    )

    assert report.outcome == "contradiction"
    assert "euler_xyz" in report.fitting_formats
    assert "rotation_format euler_xyz" in format_conclusion(report)
    assert "frame" not in format_conclusion(report)


def test_poses_logged_by_a_franka_are_compared_with_the_frame_of_its_hand() -> None:
    """The pose O_T_EE of libfranka has its z axis out of the gripper. Our end-effector frame is
    rotated by half a turn about x from that frame.
    """
    layout = REGISTRY["iamlab_cmu_pickup_insert_converted_externally_to_rlds"]
    rng = np.random.default_rng(0)
    time_s = np.arange(24)[:, None] / 20
    recordings = []
    for number in range(6):
        # Seven joints [24, 7] swing about a posture in which the gripper points down.
        center = np.array([0, -0.5, 0, -2.2, 0, 1.7, 0.8]) + rng.uniform(-0.2, 0.2, 7)
        frequency = rng.uniform(1, 4, 7)
        phase = rng.uniform(0, 6, 7)
        joints = center + 0.25 * np.sin(frequency * time_s + phase)
        position, orientation = compute_franka_ee_poses(joints)
        half_turn = Rotation.from_euler("x", np.pi)
        hand = Rotation.from_quat(orientation, scalar_first=True) * half_turn
        z_of_hand_in_base = hand.as_matrix()[:, 2, 2]
        assert (z_of_hand_in_base < 0).all()  # the hand's z axis points down
        action = np.zeros((24, 8))
        poses = np.c_[position, hand.as_quat(scalar_first=True)]  # [24, 7]
        action[:, :7] = np.roll(poses, -1, axis=0)  # the next pose
        steps = {"observation": {"state": np.c_[joints, action[:, 7]]}, "action": action}
        recordings.append(make_recording(steps, layout, f"made#{number}"))

    quaternion_layout = dataclasses.replace(layout, rotation_format="quat_wxyz")
    report = audit_recordings(recordings, collect_answers_about_logged_actions(quaternion_layout))

    assert report.outcome == "consistent"
    for action_part in report.action_parts:
        assert action_part.layout_fit is not None
        assert action_part.layout_fit.relative_error < 1e-3


def test_rotations_in_another_frame_than_translations_can_be_described(
    tmp_path: Path, run_command: Command
) -> None:
    write_canonical_store(tmp_path / "store")
    exported = tmp_path / "exported"
    export_with_wrong_frame(tmp_path / "store", exported, run_command)
    layout_file = exported / "spear.json"
    layout = {**json.loads(layout_file.read_text()), "logged_rotation_frame": "ee"}
    layout_file.write_text(json.dumps(layout))

    report = audit_dataset(exported)

    assert find_part(report, "translation").verdict == "agrees"
    assert find_part(report, "rotation").verdict == "agrees"


def test_rotations_in_another_frame_than_translations_are_found(
    tmp_path: Path, run_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The export would be recognized by its columns' names. This test is about its numbers alone.
    monkeypatch.setattr("spear.audit.describe.is_own_format", lambda features: False)
    write_canonical_store(tmp_path / "store")
    exported = tmp_path / "exported"
    run_command("data", "export", str(tmp_path / "store"), "--out", str(exported))

    proposal = propose_layout(exported)

    assert proposal["logged_frame"] == "base"
    assert proposal["logged_rotation_frame"] == "ee"


def test_a_gripper_that_never_moves_by_its_layout_is_not_judged(
    tmp_path: Path, run_command: Command
) -> None:
    write_canonical_store(tmp_path / "store")
    exported = tmp_path / "exported"
    run_command("data", "export", str(tmp_path / "store"), "--out", str(exported))
    layout_file = exported / "spear.json"
    layout = json.loads(layout_file.read_text())
    del layout["gripper"], layout["gripper_range"]
    layout_file.write_text(json.dumps({**layout, "gripper_opening": 0.0}))

    report = audit_dataset(exported)

    assert not any(check.name.startswith("gripper") for check in report.checks)
