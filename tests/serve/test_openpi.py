"""`spear serve --ui` and the real openpi-client, each in its own process and Python environment.

openpi-client pins numpy < 2, so it needs an environment of its own, as on a robot's computer. The
environment is made once, in the folder for temporary files or in SPEAR_OPENPI_VENV. Without a
package index the test is skipped.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve_here import SPEAR_CLI_CODE, run_python
from spear import embodiments
from spear.policy import Spear1Policy
from spear.serve.service import Service

PACKAGES = ("openpi-client==0.1.2", "numpy<2", "typing_extensions")

# The client's program. It sends a good observation, then two bad ones, then a good one again. It
# writes the actions and what it sent to a file, and prints the rest as JSON.
CLIENT = """
import json, sys
import numpy as np
from openpi_client import image_tools
from openpi_client.websocket_client_policy import WebsocketClientPolicy

port, observation_file, out = sys.argv[1:]
assert np.__version__ < "2"
policy = WebsocketClientPolicy("127.0.0.1", int(port), api_key="secret")
observation = dict(np.load(observation_file))
observation["prompt"] = str(observation["prompt"])
for key in ("observation/exterior_image_1_left", "observation/wrist_image_left"):
    padded = image_tools.resize_with_pad(observation[key], 224, 224)
    observation[key] = image_tools.convert_to_uint8(padded)
first = policy.infer(observation)
errors = []
for bad in ({**observation, "observation/joint_position": np.full(7, np.nan)}, {"prompt": "go"}):
    try:
        policy.infer(bad)
    except RuntimeError as error:
        errors.append(str(error))
second = policy.infer({**observation, "observation/gripper_position": np.float32(0.5)})
np.savez(out, actions=first["actions"], again=second["actions"], **{
    k: v for k, v in observation.items() if k != "prompt"})
print(json.dumps({"metadata": policy.get_server_metadata(), "errors": errors,
                  "timing": [first["server_timing"], second["server_timing"]]}))
"""


CHECK = "import openpi_client.websocket_client_policy"  # fails if the environment is incomplete
DEFAULT_FOLDER_NAME = f"spear-tests-openpi-{sys.version_info[0]}{sys.version_info[1]}"


@pytest.fixture(scope="session")
def openpi_python() -> Path:
    """The Python of an environment with openpi-client."""
    default_folder = Path(tempfile.gettempdir()) / DEFAULT_FOLDER_NAME
    folder = Path(os.environ.get("SPEAR_OPENPI_VENV", default_folder))
    python = folder / "bin" / "python"
    if python.exists():
        check = subprocess.run([str(python), "-c", CHECK], capture_output=True, check=False)
        if check.returncode == 0:
            return python

    venv.create(folder, with_pip=False)
    install = [sys.executable, "-m", "pip", "--python", str(python)]
    install += ["install", "-q", "--only-binary=:all:", *PACKAGES]
    installed = subprocess.run(install, capture_output=True, text=True, check=False)
    if installed.returncode:
        error_lines = installed.stderr.splitlines() or ["no pip"]
        pytest.skip(f"openpi-client could not be installed: {error_lines[-1]}")
    return python


def run_client(python: Path, port: str, observation_file: Path, out: Path) -> dict[str, Any]:
    """Run openpi's client in its environment; returns what it printed."""
    environment = {}
    for name, value in os.environ.items():
        if not name.startswith("PYTHON"):
            environment[name] = value
    command = [str(python), "-c", CLIENT, port, str(observation_file), str(out)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert process.returncode == 0, process.stderr
    printed: dict[str, Any] = json.loads(process.stdout)
    return printed


@pytest.mark.slow  # starts servers and clients as their own programs
def test_the_real_client_drives_droid(
    openpi_python: Path, nano: Spear1Policy, tmp_path: Path
) -> None:
    pytest.importorskip("mujoco")
    robot = embodiments.load("droid")
    wide_image = np.zeros((360, 640, 3), np.uint8)
    observation = {**robot.example(), "observation/exterior_image_1_left": wide_image}
    np.savez(tmp_path / "observation.npz", **observation)
    options = ["--policy", "nano", "--port", "0", "--embodiment", "droid"]
    options += ["--token", "secret", "--ui"]

    with run_python(SPEAR_CLI_CODE, "serve", *options, stderr=subprocess.PIPE) as server:
        line = server.stdout.readline()
        address = re.fullmatch(
            r"serving nano for droid \(joint_velocity\) at ws://127\.0\.0\.1:(\d+)\n", line
        )
        assert address, line
        assert server.stdout.readline() == f"page at http://127.0.0.1:{address[1]}/\n"
        printed = run_client(
            openpi_python, address[1], tmp_path / "observation.npz", tmp_path / "out.npz"
        )
        server.send_signal(signal.SIGTERM)
        assert server.wait(120) == 0
        assert "loading nano on " in server.stderr.read()

    assert printed["metadata"]["embodiment"] == "droid"
    assert printed["metadata"]["rate_hz"] == 15
    first_error, second_error = printed["errors"]
    assert "observation/joint_position" in first_error
    assert "observation/exterior_image_1_left" in second_error
    first_timing, second_timing = printed["timing"]
    assert first_timing["infer_ms"] > 0
    assert second_timing["prev_total_ms"] > 0

    # The actions are those that the policy computes here from what the client sent.
    received = np.load(tmp_path / "out.npz")
    sent = {key: received[key] for key in received.files if key.startswith("observation/")}
    sent["prompt"] = observation["prompt"]
    [expected] = Service(nano, robot, name="nano", robot="droid").answer([sent])
    assert received["actions"].shape == (15, 8)
    np.testing.assert_allclose(received["actions"], expected["actions"], atol=1e-5)
    assert received["again"].shape == (15, 8)  # after the errors
    assert np.isfinite(received["again"]).all()
