"""BridgeData V2 and DROID as they are distributed raw, on small recordings in exactly their layout."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from spear.cli import main
from spear.data.audit import audit
from spear.data.readers.bridge_raw import read_bridge_numpy, read_bridge_raw
from spear.data.readers.droid_raw import read_droid_raw
from spear.data.readers.formats import episode_counts, find_format, read_episodes
from spear.errors import SpearError
from spear.util.images import decode_image, encode_jpeg

STEPS = 5


def grey(level: int, height: int = 48, width: int = 64) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def states(rows: int) -> np.ndarray:
    t = np.arange(rows)[:, None]
    return np.hstack([0.25 + 0.01 * t, 0.02 * t, 0.1 + 0 * t, 0.1 * t, 0 * t, -0.05 * t, (t % 2) * 1.0])


def record_bridge(
    day: Path, number: int = 0, lang: str | None = "put the spoon in the pot\n", observed: Any = None
) -> Path:
    """One raw trajectory: STEPS actions, one observation more; with other states, as many as they are."""
    full_state = states(STEPS + 1) if observed is None else observed
    folder = day / "raw" / "traj_group0" / f"traj{number}"
    (folder / "images0").mkdir(parents=True)
    for step in range(len(full_state)):
        (folder / "images0" / f"im_{step}.jpg").write_bytes(encode_jpeg(grey(20 * step % 200 + 40)))
    seen = {"full_state": full_state, "time_stamp": [0.2 * k for k in range(len(full_state))]}
    (folder / "obs_dict.pkl").write_bytes(pickle.dumps(seen))
    actions = np.diff(full_state, axis=0)
    actions[:, 6] = np.resize([1, 1, 0, 0, 1], len(actions))
    policy = [{"actions": a, "policy_type": "VRTeleopPolicy"} for a in actions]
    (folder / "policy_out.pkl").write_bytes(pickle.dumps(policy))
    (folder / "agent_data.pkl").write_bytes(pickle.dumps({"term_t": STEPS}))
    if lang is not None:
        (folder / "lang.txt").write_text(lang + "confidence: 1\n")
    return folder


def test_raw_bridge(tmp_path: Path) -> None:
    root = tmp_path / "bridgedata_raw"
    task = root / "rss" / "toykitchen2" / "set_table" / "00"
    record_bridge(task / "2022-01-01_00-00-00")
    early = record_bridge(task / "2021-07-01_00-00-00")
    assert find_format(root) == "bridge_raw" and episode_counts(root) == {"train": 2}
    late_camera, episode = list(read_episodes(root))
    assert episode.instruction == "put the spoon in the pot" and episode.rate_hz == 5
    assert len(episode) == STEPS and episode.source.endswith("2022-01-01_00-00-00/raw/traj_group0/traj0#0")
    np.testing.assert_allclose(episode.position, states(STEPS)[:, :3], atol=1e-6)
    turned = Rotation.from_euler("xyz", states(STEPS)[:, 3:6]).inv() * Rotation.from_quat(
        episode.rotation, scalar_first=True
    )
    assert turned.magnitude().max() < 1e-6 and episode.action is not None
    np.testing.assert_array_equal(episode.action[:, 7], [1, 1, 0, 0, 1])
    assert [int(decode_image(i).mean().round()) for i in episode.images["external"]] == [40, 60, 80, 100, 120]
    # Before 2021-07-23 images came a step late: observations move up against the actions.
    assert len(late_camera) == STEPS - 1 and late_camera.action is not None
    np.testing.assert_allclose(late_camera.position, states(STEPS)[1:, :3], atol=1e-6)
    np.testing.assert_array_equal(late_camera.action[:, 7], [1, 1, 0, 0])
    (early / "images0" / "im_2.jpg").unlink()
    record_bridge(task / "2022-02-02_00-00-00", lang=None)
    cut = record_bridge(task / "2022-03-03_00-00-00")
    (cut / "obs_dict.pkl").write_bytes((cut / "obs_dict.pkl").read_bytes()[:50])
    short = record_bridge(task / "2022-04-04_00-00-00")
    (short / "images0" / "im_5.jpg").unlink()
    evil = record_bridge(task / "2022-05-05_00-00-00")
    (evil / "policy_out.pkl").write_bytes(pickle.dumps([Evil()]))
    reasons: list[str] = []
    good = list(read_bridge_raw(root, on_bad=lambda error: reasons.append(str(error))))
    assert len(good) == 1
    expected = (
        "missing image: ",
        "empty instruction: ",
        "unreadable: ",
        "frames and rows differ: ",
        "it holds builtins.print, which is no array",
    )
    for reason, part in zip(reasons, expected, strict=True):
        assert part in reason and "\n" not in reason


class Evil:
    def __reduce__(self) -> Any:
        return print, ("this must not run",)


def test_numpy_bridge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = states(STEPS + 1)

    def trajectory(words: str) -> dict[str, Any]:
        seen = [
            {"images0": grey(10 * k, 32, 32), "state": state[k], "time_stamp": 0.2 * k}
            for k in range(STEPS + 1)
        ]
        return {
            "observations": seen[:-1],
            "next_observations": seen[1:],
            "actions": list(np.diff(state, axis=0)),
            "terminals": [0] * STEPS,
            "language": [words],
        }

    for split, count in (("train", 2), ("val", 1)):
        (tmp_path / "set_table/00" / split).mkdir(parents=True)
        np.save(tmp_path / "set_table/00" / split / "out.npy", [trajectory("stack the cups")] * count)
    assert find_format(tmp_path) == "bridge_numpy" and episode_counts(tmp_path) == {"train": 2, "val": 1}
    episodes = list(read_episodes(tmp_path, "train[1:]+val"))
    assert [e.source.partition("/")[2] for e in episodes] == [
        "set_table/00/train/out.npy#1",
        "set_table/00/val/out.npy#0",
    ]
    assert decode_image(episodes[0].images["external"][3]).shape == (32, 43, 3)  # 4:3 again
    np.testing.assert_allclose(episodes[0].position, state[:-1, :3], atol=1e-6)
    file = tmp_path / "set_table/00/val/out.npy"
    assert len(list(read_bridge_numpy(file, "val"))) == 1
    np.save(file, np.array([{}, {"observations": []}, trajectory("")], object))
    reasons: list[str] = []
    assert not list(read_bridge_numpy(file, "val", on_bad=lambda error: reasons.append(str(error))))
    assert [r.partition(":")[0] for r in reasons] == ["no trajectory", "empty episode", "empty instruction"]
    np.save(file, np.array([Evil()], object))
    with pytest.raises(SpearError, match=r"unreadable: .*it holds builtins\.print"):
        list(read_bridge_numpy(file, "val"))
    assert capsys.readouterr().out == ""


def record_droid(folder: Path, uuid: str, frames: int = STEPS, steps: int = STEPS, **metadata: Any) -> Path:
    """One raw episode; the commanded pose of a step is where the arm then is in the next."""
    (folder / "recordings" / "MP4").mkdir(parents=True)
    t = np.arange(steps)[:, None]
    pose = np.hstack([0.4 + 0.01 * t, 0 * t, 0.3 - 0.01 * t, np.pi + 0 * t, 0 * t, 0.1 * t])
    with h5py.File(folder / "trajectory.h5", "w") as file:
        file["observation/robot_state/cartesian_position"] = pose
        file["observation/robot_state/gripper_position"] = np.linspace(0, 1, steps)
        file["observation/robot_state/joint_positions"] = np.zeros((steps, 7))
        file["observation/controller_info/movement_enabled"] = np.arange(steps) > 0
        file["observation/camera_type/22"] = np.zeros(steps)
        file["action/cartesian_position"] = np.vstack([pose[1:], pose[-1:]])
        file["action/gripper_position"] = np.resize([0, 0, 0, 1, 1.0], steps)
    said = {"uuid": uuid, "current_task": "Move the cup", "success": True, "trajectory_length": steps}
    said |= {"wrist_cam_serial": "22", "ext1_cam_serial": "11", "ext2_cam_serial": "33"} | metadata
    (folder / f"metadata_{uuid}.json").write_text(json.dumps(said))
    for serial, offset in (("11", 0), ("22", 80)):
        with av.open(str(folder / "recordings" / "MP4" / f"{serial}.mp4"), "w") as out:
            stream: Any = out.add_stream("libx264", rate=60, options={"crf": "10"})
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for step in range(frames):
                image = grey(30 + 10 * step + offset)
                out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            out.mux(stream.encode())
    return folder


def test_raw_droid(tmp_path: Path) -> None:
    day = tmp_path / "1.0.1" / "IRIS" / "success" / "2023-12-04"
    first = record_droid(day / "Mon_Dec__4_13:52:16_2023", "IRIS+a+1", frames=STEPS + 1)
    record_droid(day / "Mon_Dec__4_14:00:00_2023", "IRIS+a+2")
    failure = tmp_path / "1.0.1" / "IRIS" / "failure" / "2023-12-04" / "Mon_Dec__4_15:00:00_2023"
    record_droid(failure, "IRIS+a+3", success=False)
    notes = {"IRIS+a+1": {"language_instruction1": "Put the cup on the plate", "language_instruction2": "x"}}
    (tmp_path / "1.0.1" / "aggregated-annotations-030724.json").write_text(json.dumps(notes))
    assert find_format(tmp_path) == "droid_raw" and episode_counts(tmp_path) == {"train": 2, "failure": 1}
    one, two, three = read_episodes(tmp_path, "train+failure")
    assert (one.source, one.rate_hz, one.success) == ("droid_raw/IRIS+a+1", 15, True)
    assert [e.instruction for e in (one, two, three)] == [
        "Put the cup on the plate",
        "Move the cup",
        "Move the cup",
    ]
    assert three.success is False and sorted(one.images) == ["external", "wrist"]
    levels = [decode_image(image).mean() for image in one.images["external"]]
    np.testing.assert_allclose(levels, [30, 40, 50, 60, 70], atol=3)
    np.testing.assert_allclose(decode_image(one.images["wrist"][0]).mean(), 110, atol=3)
    np.testing.assert_allclose(one.gripper, np.linspace(1, 0, STEPS), atol=1e-6)
    assert one.action is not None and one.action_mask is not None
    np.testing.assert_array_equal(one.action[:, 7], [1, 1, 1, 0, 0])
    np.testing.assert_array_equal(one.action_mask, [0, 1, 1, 1, 0])  # not enabled; leads nowhere known
    np.testing.assert_allclose(one.action[0, :3], [0.01, 0, -0.01], atol=1e-6)
    # A gripper that points straight down stands parallel to the base in our frame.
    np.testing.assert_allclose(np.abs(one.rotation[0]), [1, 0, 0, 0], atol=1e-6)
    (first / "recordings/MP4/11.mp4").unlink()
    record_droid(day / "a_short", "short", frames=STEPS - 1)
    record_droid(day / "b_long", "long", frames=STEPS + 9)
    (record_droid(day / "c_cut", "cut") / "trajectory.h5").write_bytes(b"\x89HDF")
    record_droid(day / "d_nameless", "nameless", wrist_cam_serial="")
    (record_droid(day / "e_unsaid", "suppress_notices") / "metadata_unsaid.json").unlink()
    reasons: list[str] = []
    good = list(read_droid_raw(tmp_path, on_bad=lambda error: reasons.append(str(error))))
    assert [e.source for e in good] == ["droid_raw/IRIS+a+2"]
    expected = (
        "missing video: ",
        ".mp4 has 4 frames, but there are 5 steps",
        "more than 5 frames",
        "unreadable: ",
        "no camera 'wrist'",
        "no metadata: ",
    )
    for reason, part in zip(reasons, expected, strict=True):
        assert part in reason and "\n" not in reason


def test_raw_recordings_are_audited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As they are, without preparing them; a layout that is wrong ends with exit code 2."""
    day = tmp_path / "bridge" / "2022-01-01_00-00-00"
    for number in range(3):
        time = np.arange(25)[:, None] + 3 * number
        wave = np.sin(time * [0.31, 0.23, 0.4])
        observed = np.hstack([[0.3, 0, 0.2] + 0.1 * wave, np.cos(0.3 * time) * [0, 0, 0.9], time % 2.0])
        record_bridge(day, number, observed=observed)
    report = audit(tmp_path / "bridge")
    assert report.agrees and report.episodes == 3
    assert report.parts[0].verdict == "agrees"
    frame = next(f for f in report.parts[0].findings if f.question == "frame")
    assert (frame.best, frame.verdict) == ("base", "agrees")
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps({"like": "bridge_raw", "logged_frame": "ee"}))
    assert main(["data", "audit", str(tmp_path / "bridge"), "--layout", str(wrong)]) == 2
    assert "translation frame: base, not ee" in capsys.readouterr().err

    observations = [{"images0": grey(9, 32, 32), "state": row} for row in observed[:-1]]
    actions = list(np.diff(observed, axis=0))
    (tmp_path / "numpy" / "train").mkdir(parents=True)
    one = {"observations": observations, "actions": actions, "language": ["stack the cups"]}
    np.save(tmp_path / "numpy" / "train" / "out.npy", [one] * 3)
    assert audit(tmp_path / "numpy").parts[0].verdict == "agrees"

    folder = record_droid(tmp_path / "droid" / "Mon_Dec__4_13:52:16_2023", "IRIS+a+1", steps=25)
    (folder / "recordings/MP4/11.mp4").unlink()  # no video is looked at
    report = audit(tmp_path / "droid")
    assert report.agrees and report.parts[0].best.relative < 1e-3
    kind = next(f for f in report.parts[0].findings if f.question == "kind")
    assert kind.best == "absolute"
