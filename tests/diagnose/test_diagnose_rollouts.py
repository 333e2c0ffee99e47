"""A rollout of nano in the simulator: without a fault nothing is found, with one it is named."""

import json
from pathlib import Path

import numpy as np
import pytest

from rollouts import RobotFaults, record_rollout
from spear.cli import main
from spear.diagnose.registry import FAULTS, make_all_checks
from spear.policy import Spear1Policy
from spear.types import Array

pytest.importorskip("mujoco", reason="the simulator records the rollouts")
SCENES = [("put_on", 50), ("stack_cube", 50), ("put_in_basket", 51)]


def invert_gripper(action: Array, state: Array) -> list[Array]:
    """Execute the opposite of the gripper's command."""
    inverted = np.array(action, np.float32)
    inverted[7] = 1 - inverted[7]
    return [inverted]


def test_every_check_has_a_fault_of_its_own() -> None:
    faults = [check.fault for check in make_all_checks()]

    assert len(set(faults)) == len(faults)
    assert set(faults) <= set(FAULTS)


@pytest.mark.slow  # records demonstrations and rollouts in the simulator
@pytest.mark.parametrize(
    ("faults", "exit_code", "expected"),
    [(RobotFaults(), 0, []), (RobotFaults(execute=invert_gripper), 1, ["gripper-inverted"])],
    ids=["clean", "inverted gripper"],
)
def test_a_rollout_of_nano_is_diagnosed(
    faults: RobotFaults, exit_code: int, expected: list[str], tmp_path: Path
) -> None:
    main(f"record --num-episodes 6 --out {tmp_path}/train --workers 1".split())
    record_rollout(Spear1Policy.load("nano"), tmp_path / "rollout", SCENES, faults, max_steps=25)
    folders = f"--episodes {tmp_path}/train --rollout {tmp_path}/rollout"
    files = f"--json {tmp_path}/diagnosis.json --out {tmp_path}/page.html"

    code = main(f"diagnose {folders} {files} --device cpu".split())

    report = json.loads((tmp_path / "diagnosis.json").read_text())
    assert [finding["fault"] for finding in report["findings"]] == expected
    assert code == exit_code
    assert "<video" in (tmp_path / "page.html").read_text()
