"""`examples/bridge_raw.py` writes recordings of `bridge_data_robot` to an episode store."""

import pickle
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from refusals import refuses
from spear.data.readers.formats import read_episodes
from spear.geometry import euler_to_quat
from spear.util.images import decode_image, encode_jpeg

EXAMPLE = Path(__file__).parents[2] / "examples" / "bridge_raw.py"
NUM_ACTIONS = 8
STEP_M = 0.01  # how far the arm moves along y per step


def write_recording(folder: Path) -> None:
    """Write a recording as `bridge_data_robot` does: one observation more than actions."""
    (folder / "images0").mkdir(parents=True)
    states = np.tile([0.3, 0.0, 0.15, 0.02, -0.1, 0.4, 1.0], (NUM_ACTIONS + 1, 1))
    states[:, 1] = STEP_M * np.arange(NUM_ACTIONS + 1)
    states[NUM_ACTIONS // 2 + 1 :, 6] = 0.1
    actions = np.zeros((NUM_ACTIONS, 7))
    actions[:, 1] = 2 * STEP_M  # of the target, which the arm follows at half the speed
    actions[: NUM_ACTIONS // 2, 6] = 1.0
    (folder / "obs_dict.pkl").write_bytes(pickle.dumps({"full_state": states, "state": states}))
    outputs = [{"actions": row, "policy_type": "VRTeleopPolicy"} for row in actions]
    (folder / "policy_out.pkl").write_bytes(pickle.dumps(outputs))
    for step in range(NUM_ACTIONS + 1):
        picture = np.full((480, 640, 3), 20 * step, np.uint8)
        (folder / "images0" / f"im_{step}.jpg").write_bytes(encode_jpeg(picture))


def run_example(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
    runpy.run_path(str(EXAMPLE))["main"]()


def test_recordings_become_episodes_in_our_conventions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recordings = tmp_path / "recordings" / "2026-01-01_00-00-00" / "raw" / "traj_group0"
    write_recording(recordings / "traj0")
    write_recording(recordings / "traj1")
    (recordings / "traj1" / "lang.txt").write_text("put the carrot on the plate\nconfidence: 1\n")
    out = tmp_path / "store"

    run_example(
        monkeypatch, str(tmp_path / "recordings"), "--out", str(out), "--instruction", "lift it"
    )

    first, second = read_episodes(out)
    assert first.instruction == "lift it"
    assert second.instruction == "put the carrot on the plate"
    assert first.rate_hz == 5
    assert len(first) == NUM_ACTIONS
    assert decode_image(first.images["external"][3], "step 3").shape == (480, 640, 3)
    assert decode_image(first.images["external"][3], "step 3").mean() == pytest.approx(60, abs=2)
    expected_rotation = euler_to_quat(torch.tensor([0.02, -0.1, 0.4]), "xyz").numpy()
    np.testing.assert_allclose(first.rotation[0], expected_rotation, atol=1e-5)


def test_actions_are_the_motions_of_the_states_with_the_commands_of_the_gripper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recording(tmp_path / "recordings" / "traj0")
    out = tmp_path / "store"

    run_example(monkeypatch, str(tmp_path / "recordings"), "--out", str(out), "--instruction", "go")

    (episode,) = read_episodes(out)
    assert episode.action is not None
    np.testing.assert_allclose(
        episode.action[:-1, :3], np.tile([0, STEP_M, 0], (NUM_ACTIONS - 1, 1)), atol=1e-6
    )
    np.testing.assert_array_equal(episode.action[:, 7], [1] * 4 + [0] * 4)


def test_an_interrupted_recording_is_named_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recordings = tmp_path / "recordings"
    write_recording(recordings / "traj0")
    write_recording(recordings / "traj1")
    observations = recordings / "traj0" / "obs_dict.pkl"
    observations.write_bytes(observations.read_bytes()[:100])
    out = tmp_path / "store"

    run_example(monkeypatch, str(recordings), "--out", str(out), "--instruction", "go")

    assert "left out: traj0 (UnpicklingError" in capsys.readouterr().out
    (episode,) = read_episodes(out)
    assert episode.source.endswith("traj1")


def test_recordings_of_which_none_can_be_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recording(tmp_path / "recordings" / "traj0")
    (tmp_path / "recordings" / "traj0" / "policy_out.pkl").unlink()

    arguments = (str(tmp_path / "recordings"), "--out", str(tmp_path / "store"))
    refuses("none of the recordings", run_example, monkeypatch, *arguments)


def test_a_folder_without_recordings_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuses("no obs_dict.pkl", run_example, monkeypatch, str(tmp_path), "--out", "store")
