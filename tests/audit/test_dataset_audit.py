"""The audit finds each planted mistake by name, finds right data right, and says when it cannot tell."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from data_tiny import make
from refusals import Command, refuses
from spear.audit.dataset_audit import Report, audit, claims, judge, make_recording
from spear.audit.hypotheses import Recording
from spear.checks.senses import Check, check_cameras, look
from spear.cli import main
from spear.data.actions import derive_actions
from spear.data.options import Conversion
from spear.data.readers.dataset_layout import REGISTRY
from spear.data.store.episode_store import write_episodes
from spear.data.store.prepare import prepare
from spear.embodiments.kinematics import franka_pose
from spear.report.audit import conclusion, text
from spear.util.images import encode_jpeg

RATE = 10.0
BRIDGE, FIRST = "observation/state", {"external": "observation/image_0"}
_BOTH: dict[str, str | None] = {"kind": "delta", "signs": "+++", "shift": "0", "state": "euler_xyz"}
RIGHT = {
    "translation": {**_BOTH, "frame": "base", "unit": "m", "form": "-"},
    "rotation": {**_BOTH, "frame": "ee", "unit": "rad", "form": "euler_xyz"},
}


def motions(
    episodes: int = 6, steps: int = 24, still: bool = False
) -> list[tuple[np.ndarray, Rotation]]:
    """Positions (m) and orientations of smooth random arms, whose wrists turn far about every axis."""
    rng, found = np.random.default_rng(0), []
    for _ in range(episodes):
        time = np.arange(steps)[:, None] / RATE
        draw = lambda low, high: rng.uniform(low, high, (1, 3))  # noqa: E731
        waves = [draw(-1, 1) * np.sin(w * time + draw(0, 6)) for w in (1.5, 4.0, 2.0, 3.0)]
        position = [0.4, 0.0, 0.2] + (0 if still else 0.05) * (waves[0] + 0.5 * waves[1])
        turns = Rotation.from_rotvec(0.7 * (waves[2] + waves[3]))
        found.append((position, Rotation.from_rotvec(rng.uniform(-0.8, 0.8, 3)) * turns))
    return found


def recordings(**planted: Any) -> list[Recording]:
    """Recordings whose layout is RIGHT, but for what is planted."""
    rng, found = np.random.default_rng(1), []
    for number, (position, rotation) in enumerate(motions(still=planted.get("still", False))):
        step, turn = np.zeros_like(position), np.zeros_like(position)
        step[:-1] = np.diff(position, axis=0)
        inverse = rotation[:-1].inv()
        delta = inverse * rotation[1:]
        if planted.get("frame") == "ee":
            step[:-1] = inverse.apply(step[:-1])
        if planted.get("rotation_frame") == "base":
            delta = rotation[1:] * inverse
        order = planted.get("form", "xyz")
        turn[:-1] = delta.as_rotvec() if order == "rotvec" else delta.as_euler(order)
        if planted.get("kind") == "absolute":
            step[:-1], turn[:-1] = position[1:], rotation[1:].as_euler("xyz")
        if planted.get("kind") == "velocity":
            step, turn = step * RATE, turn * RATE
        late = planted.get("late", 0)
        step, turn = np.roll(step, -late, axis=0), np.roll(turn, -late, axis=0)
        step = step * planted.get("step_scale", 1) + rng.normal(
            0, planted.get("noise", 1e-4), step.shape
        )
        state = rotation.as_euler(planted.get("state", "xyz"))
        turn, state = turn * planted.get("turn_scale", 1), state * planted.get("state_scale", 1)
        position, valid = (
            position * planted.get("position_scale", 1),
            np.arange(len(step)) < len(step) - 1,
        )
        found.append(Recording(f"made#{number}", position, state, step, turn, valid, RATE))
    return found


def only(part: str, **planted: Any) -> list[Recording]:
    """Recordings without the logged values of the other part, which saves time."""
    other = "turn" if part == "translation" else "translation"
    return [dataclasses.replace(recording, **{other: None}) for recording in recordings(**planted)]


def verdicts(report: Report, part: str) -> dict[str, tuple[str, str]]:
    found = next(p for p in report.parts if p.name == part)
    return {f.question: (f.best, f.verdict) for f in found.findings}


def test_a_right_dataset_is_found_right() -> None:
    report = judge(recordings(), RIGHT)
    assert report.outcome == "consistent" and conclusion(report).startswith("consistent: ")
    for part in report.parts:
        assert part.verdict == "agrees" and part.best.relative < 0.05
        assert all(
            f.verdict in ("agrees", "cannot tell") and f.best == f.said for f in part.findings
        )
    assert verdicts(report, "translation")["frame"] == ("base", "agrees")
    assert verdicts(report, "rotation")["frame"] == ("ee", "agrees")
    lagging = judge(only("translation", late=1), claims(REGISTRY["bridge_dataset"]))  # as arms do
    assert lagging.outcome == "consistent" and "(not in the layout; 1 fits best)" in conclusion(
        lagging
    )


def test_single_episodes_that_were_recorded_otherwise_are_seen() -> None:
    whole = 2 * only("translation")
    right = judge(whole, RIGHT)
    assert right.outcome == "consistent" and "first" not in conclusion(right)
    assert "50 episodes, the first" in conclusion(dataclasses.replace(right, episodes=50))
    odd = dataclasses.replace(whole[0], position=whole[0].position * [-1, -1, 1])
    report = judge([odd, *whole[1:]], RIGHT)
    assert report.outcome == "undecided" and "1 of 12 episodes" in conclusion(report)


@pytest.mark.parametrize(
    ("planted", "part", "question", "truth"),
    [
        ({"frame": "ee"}, "translation", "frame", "ee"),
        ({"rotation_frame": "base"}, "rotation", "frame", "base"),
        ({"step_scale": 1000}, "translation", "unit", "mm"),
        ({"step_scale": np.array([1, -1, 1])}, "translation", "signs", "+-+"),
        ({"turn_scale": np.array([-1, 1, -1])}, "rotation", "signs", "-+-"),
        ({"turn_scale": 180 / np.pi}, "rotation", "unit", "deg"),
        ({"kind": "absolute"}, "rotation", "kind", "absolute"),
        ({"kind": "velocity"}, "translation", "kind", "velocity"),
        ({"late": -1}, "rotation", "shift", "-1"),
        ({"state": "XYZ"}, "rotation", "state", "euler_XYZ"),
    ],
    ids=str,
)
def test_each_planted_mistake_is_found(
    planted: dict[str, Any], part: str, question: str, truth: str
) -> None:
    made = only(part, **planted)
    report = judge(made, RIGHT)
    assert verdicts(report, part)[question] == (truth, "wrong")
    assert report.outcome == "contradiction" and "WRONG" in text(report)
    said = {**RIGHT, part: {**RIGHT[part], question: truth}}
    if part == "translation" and question in ("frame", "signs"):
        assert next(p for p in judge(made, said).parts if p.name == part).verdict == "agrees"


def test_units_are_measured_and_named() -> None:
    # As of simulators whose actions are -1 … 1.
    found = verdicts(judge(only("translation", step_scale=1 / 0.05), RIGHT), "translation")
    best, verdict = found["unit"]
    assert verdict == "wrong" and float(best.split()[0]) == pytest.approx(0.05, rel=0.1)
    assert found["frame"] == ("base", "agrees")
    made = only("translation", position_scale=1000, step_scale=1000)
    assert "not metres, but mm" in conclusion(judge(made, RIGHT))
    report = judge(recordings(state_scale=180 / np.pi, turn_scale=180 / np.pi), RIGHT)
    assert any("degrees, where the layout has radians" in remark for remark in report.states)


def test_what_cannot_be_told_is_said() -> None:
    (part,) = judge(only("translation", still=True), RIGHT).parts
    assert part.verdict == "cannot tell" and "hardly moves" in part.note
    (noise,) = judge(only("translation", noise=1.0), RIGHT).parts
    assert noise.verdict == "cannot tell" and "no reading explains" in noise.note
    assert {f.verdict for f in noise.findings} == {"cannot tell"}
    # An arm that never tilts: its own frame is the base frame.
    flat = [dataclasses.replace(r, rotation=np.zeros_like(r.rotation)) for r in only("translation")]
    frame = next(f for f in judge(flat, RIGHT).parts[0].findings if f.question == "frame")
    assert frame.verdict == "cannot tell" and set(frame.tied) == {"base", "ee"}
    short = [dataclasses.replace(r, valid=np.zeros_like(r.valid)) for r in recordings()]
    refuses("no episode has five known steps", judge, short, RIGHT)


def test_episodes_of_a_store_each_have_their_own_rate(tmp_path: Path) -> None:
    """A fast camera's first would make the steps of the others look like 3.6 m/s."""
    episodes = []
    for number, rate in enumerate((30.0, 5.0, 5.0, 5.0)):
        time = np.arange(24) / rate
        position = np.stack([0.4 + 0.4 * np.sin(1.5 * time), 0 * time, 0.3 + 0 * time], axis=1)
        episodes.append(make(number, 24, (8, 8), position=position, rate_hz=rate))
    write_episodes(episodes, tmp_path / "store")
    report = audit(tmp_path / "store")
    assert report.states == [] and "rate_hz" not in [check.name for check in report.checks]


def test_the_command_agrees_with_a_store_and_not_with_a_wrong_layout(
    tmp_path: Path,
    done: Command,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A store is right; exported, with a spear.json that claims another frame, the layout is wrong."""
    episodes, canonical, page = [], tmp_path / "store", tmp_path / "audit.html"
    for number, (position, rotation) in enumerate(motions(3)):
        turn = rotation.as_quat(scalar_first=True)
        gripper = np.float32(np.arange(len(turn)) < 12)
        action = derive_actions(position, turn, np.append(gripper[1:], gripper[-1]))
        mask = np.arange(len(turn)) < len(turn) - 1
        parts = {"position": position, "rotation": turn, "gripper": gripper, "action": action}
        episodes.append(make(number, len(turn), (8, 8), rate_hz=RATE, action_mask=mask, **parts))
    write_episodes(episodes, canonical)
    shown = done("data", "audit", str(canonical), "--out", str(page))
    assert shown.splitlines()[-1].startswith("consistent: ") and "WRONG" not in shown
    assert (
        "the layout agrees with the data" in page.read_text()
        and page.read_text().count("<svg") == 9
    )
    assert "http" not in page.read_text()

    exported = tmp_path / "exported"
    done("data", "export", str(canonical), "--out", str(exported))
    claim = json.loads((exported / "spear.json").read_text())
    column = claim.pop("action")
    claim = {
        k: v for k, v in claim.items() if k not in ("action", "action_mask", "success", "source")
    } | {
        "logged_translation": f"{column}[0:3]",
        "logged_rotation": f"{column}[3:7]",
        "logged_rotation_format": "quat_wxyz",
        "logged_kind": "delta",
        "logged_frame": "base",
    }
    (exported / "spear.json").write_text(json.dumps(claim))
    assert main(["data", "audit", str(exported), "--out", str(page)]) == 2  # scripts rely on it
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].startswith("contradiction: ")
    assert (
        said.err.startswith(f"error: {exported}: contradiction: ")
        and "frame: ee, not base" in said.err
    )
    assert said.err.count("\n") == 1 and "WRONG" in page.read_text()
    undecided = dataclasses.replace(
        audit(exported), parts=[], checks=[Check("grip", "cannot tell", "shut")]
    )
    monkeypatch.setattr("spear.audit.dataset_audit.audit", lambda *_: undecided)
    assert main(["data", "audit", str(exported)]) == 3
    assert str(capsys.readouterr()).count("(shut)") == 1  # its verdict is said once


def test_the_real_sample_fits_its_registry_entry(shared: Path) -> None:
    report = audit(shared / "data" / "bridge_v2_sample")
    assert report.outcome == "consistent" and report.episodes == 25
    assert verdicts(report, "translation")["frame"] == ("base", "agrees")
    assert verdicts(report, "translation")["signs"] == ("+++", "agrees")
    assert verdicts(report, "rotation")["shift"] == ("0", "not said")
    assert verdicts(report, "rotation")["kind"] == ("delta", "agrees")


def bridge(shared: Path, folder: Path, **changes: Any) -> Report:
    """The audit of the real sample with another layout; without its rotations, which saves time."""
    layout = folder / "layout.json"
    layout.write_text(json.dumps({"like": "bridge_dataset", "logged_rotation": None, **changes}))
    return audit(shared / "data" / "bridge_v2_sample", layout=layout)


@pytest.mark.parametrize(
    ("changes", "named", "key"),
    [
        ({"command_range": [1, 0]}, "gripper command", "command_range"),
        ({"gripper_range": [1, 0]}, "gripper command", "gripper_range"),
        ({"command": "action[5]"}, "gripper command", "another column"),
        ({"command_range": [0, 8]}, "gripper command", "command_range"),  # metres, or millimetres
        ({"gripper_range": [0, 4], "command": None}, "gripper", "gripper_range"),
        ({"gripper_range": [0, 2]}, "gripper", "gripper_range"),  # it is never open
        ({"gripper_range": [1, 0], "command_range": [1, 0]}, "gripper", "gripper_range"),
        ({"gripper_range": [1, 0], "command": None}, "gripper", "gripper_range"),
        ({"rate_hz": 200.0}, "rate_hz", "m/s"),
        ({"images": {"external": "observation/image_9"}}, "camera external", "absent"),
        ({"images": {**FIRST, "wrist": "observation/image_3"}}, "camera wrist", "blank"),
        ({"instruction": "words"}, "instruction", "no column 'words'"),
        ({"success": "ended"}, "success", "no column 'ended'"),
    ],
    ids=str,
)
def test_grippers_and_cameras_that_are_something_else(
    shared: Path, tmp_path: Path, changes: dict[str, Any], named: str, key: str
) -> None:
    report = bridge(shared, tmp_path, **changes)
    (check,) = [check for check in report.checks if check.verdict == "wrong"]
    assert report.outcome == "contradiction" and check.name == named and key in check.words
    if (
        "gripper" in named
    ):  # which preparing says, too: where both are inverted nothing contradicts itself
        how = Conversion(layout=tmp_path / "layout.json")
        with pytest.warns(match=f": {named}: "):
            prepare(shared / "data/bridge_v2_sample", tmp_path / "out", how=how)


def test_two_cameras_that_are_exchanged() -> None:
    still = np.random.default_rng(0).integers(0, 255, (60, 80, 3)).astype(np.uint8)
    beside, hand = [], []
    for step in range(8):
        beside.append(still.copy())
        beside[-1][10:20, 5 * step : 5 * step + 20] = 0  # the arm, before the same background
        hand.append(np.roll(still, 9 * step, axis=1))
    position = np.arange(24.0).reshape(8, 3) / 100
    external, wrist = (
        look([*map(encode_jpeg, shown)], position, 5.0, "it") for shown in (beside, hand)
    )
    refuses("images", look, [encode_jpeg(still)] * 7, position, 5.0, "it")
    assert external.change < 0.2 < wrist.change and not external.blank
    for views, verdict in (((external, wrist), "agrees"), ((wrist, external), "wrong")):
        (check,) = check_cameras({"external": [views[0]] * 6, "wrist": [views[1]] * 6})
        assert check.verdict == verdict


def test_a_camera_slower_than_the_steps_is_not_called_exchanged() -> None:
    pictures = np.random.default_rng(0).integers(0, 255, (10, 96, 128, 3)).astype(np.uint8)
    images = [encode_jpeg(pictures[step // 6]) for step in range(60)]
    position = np.arange(180.0).reshape(60, 3) / 1000
    view = look(images, position, 30.0, "it")
    assert view.change > 0.5 and look(images[:4], position[:4], 30.0, "it").change != view.change
    assert all(
        c.verdict != "wrong" for c in check_cameras({"external": [view] * 6, "wrist": [view] * 6})
    )


def test_units_and_columns_that_no_reading_explains(shared: Path, tmp_path: Path) -> None:
    report = bridge(shared, tmp_path, length_unit="mm")
    assert report.outcome == "contradiction" and "length_unit" in conclusion(report)
    swapped = {"position": f"{BRIDGE}[3:6]", "rotation": f"{BRIDGE}[0:3]"}
    assert bridge(shared, tmp_path, **swapped).outcome == "undecided"
    for key, value in {"gripper_range": [-1, 1], "rate_hz": 60.0}.items():
        checks = {
            check.name: check.verdict for check in bridge(shared, tmp_path, **{key: value}).checks
        }
        assert checks[key] == "cannot tell"
    folder = str(shared / "data" / "bridge_v2_sample")
    assert main(["data", "audit", folder, "--layout", str(tmp_path / "layout.json")]) == 3


@pytest.mark.parametrize(
    ("key", "columns"),
    [("position", BRIDGE), ("logged_translation", "action"), ("logged_rotation", "action[3:5]")],
)
def test_columns_of_another_width_are_named(
    shared: Path, tmp_path: Path, key: str, columns: str
) -> None:
    shape = rf"wrong shape: .*{key.replace('_', ' ')} is \(10, \d\)"
    refuses(shape, bridge, shared, tmp_path, **{key: columns})


def test_states_that_are_written_otherwise_are_told_by_name(shared: Path, tmp_path: Path) -> None:
    """Not as a frame of the actions, which would be the next contradiction."""
    report = bridge(shared, tmp_path, rotation_format="euler_ZYX", logged_rotation="action[3:6]")
    assert report.outcome == "contradiction" and "euler_xyz" in report.forms
    assert "rotation_format: euler_xyz" in conclusion(report) and "frame" not in conclusion(report)


def test_what_a_franka_logs_is_compared_with_the_frame_of_its_own_hand() -> None:
    """O_T_EE has z out of the gripper; our frame, which joint angles give, is half a turn about x from it."""
    spec, rng = (
        REGISTRY["iamlab_cmu_pickup_insert_converted_externally_to_rlds"],
        np.random.default_rng(0),
    )
    found, time = [], np.arange(24)[:, None] / 20
    for number in range(6):
        middle = np.array([0, -0.5, 0, -2.2, 0, 1.7, 0.8]) + rng.uniform(-0.2, 0.2, 7)
        joints = middle + 0.25 * np.sin(rng.uniform(1, 4, 7) * time + rng.uniform(0, 6, 7))
        position, ours = franka_pose(joints)
        hand = Rotation.from_quat(ours, scalar_first=True) * Rotation.from_euler("x", np.pi)
        assert (hand.as_matrix()[:, 2, 2] < 0).all()  # down
        action = np.zeros((24, 8))
        action[:, :7] = np.roll(np.c_[position, hand.as_quat(scalar_first=True)], -1, axis=0)
        steps = {"observation": {"state": np.c_[joints, action[:, 7]]}, "action": action}
        found.append(make_recording(steps, spec, f"made#{number}"))
    report = judge(found, claims(dataclasses.replace(spec, rotation_format="quat_wxyz")))
    assert report.outcome == "consistent"
    assert all(part.said is not None and part.said.relative < 1e-3 for part in report.parts)
