"""A rollout of nano in the simulator: without a fault nothing is found, with one it is named."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rollouts import RobotFaults, record_rollout
from spear.cli import main
from spear.diagnose.registry import FAULTS, find_checks
from spear.geometry import quat_rotate
from spear.policy import Spear1Policy
from spear.types import Array

pytest.importorskip("mujoco", reason="the simulator records the rollouts")
SCENES = [("put_on", 50), ("stack_cube", 50), ("put_in_basket", 51)]


def move_along_tool(action: Array, state: Array) -> list[Array]:
    """Execute the translation along the axes of the tool."""
    moved = np.array(action, np.float64)
    orientation = torch.as_tensor(np.asarray(state[3:7], np.float64))
    moved[:3] = quat_rotate(orientation, torch.as_tensor(moved[:3])).numpy()
    return [moved.astype(np.float32)]


def test_every_check_has_a_fault_of_its_own() -> None:
    faults = [check.fault for check in find_checks()]

    assert len(set(faults)) == len(faults)
    assert set(faults) <= set(FAULTS)


@pytest.mark.slow  # records demonstrations and rollouts in the simulator
@pytest.mark.parametrize(
    ("faults", "exit_code", "expected"),
    [(RobotFaults(), 0, []), (RobotFaults(execute=move_along_tool), 1, ["action-frame"])],
    ids=["clean", "tool frame"],
)
def test_a_rollout_of_nano_is_diagnosed(
    faults: RobotFaults, exit_code: int, expected: list[str], tmp_path: Path
) -> None:
    main(f"record --num-episodes 6 --out {tmp_path}/train --workers 1".split())
    record_rollout(Spear1Policy.load("nano"), tmp_path / "rollout", SCENES, faults, max_steps=25)
    folders = f"--episodes {tmp_path}/train --rollout {tmp_path}/rollout"
    files = f"--json {tmp_path}/diagnosis.json --out {tmp_path}/page.html"

    code = main(f"diagnose {folders} {files} --device cpu".split())

    written = json.loads((tmp_path / "diagnosis.json").read_text())
    assert [finding["fault"] for finding in written["findings"]] == expected
    assert code == exit_code
    assert "<video" in (tmp_path / "page.html").read_text()
