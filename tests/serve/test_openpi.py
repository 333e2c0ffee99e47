"""`spear serve --ui` and the real openpi-client, each in its own process and environment, as on a
robot.

openpi-client pins numpy < 2. The environment is made once, in the folder for temporary files or in
SPEAR_OPENPI_VENV; without a package index the test is skipped.
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

import numpy as np
import pytest

from serve_here import SPEAR_CLI_CODE, run_python
from spear import embodiments
from spear.policy import Spear1Policy
from spear.serve.service import Service

PACKAGES = ("openpi-client==0.1.2", "numpy<2", "typing_extensions")

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
    observation[key] = image_tools.convert_to_uint8(image_tools.resize_with_pad(observation[key], 224, 224))
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


@pytest.fixture(scope="session")
def openpi_python() -> Path:
    default = (
        Path(tempfile.gettempdir())
        / f"spear-tests-openpi-{sys.version_info[0]}{sys.version_info[1]}"
    )
    folder = Path(os.environ.get("SPEAR_OPENPI_VENV", default))
    python = folder / "bin" / "python"
    check = [str(python), "-c", "import openpi_client.websocket_client_policy"]
    if python.exists() and subprocess.run(check, capture_output=True, check=False).returncode == 0:
        return python
    venv.create(folder, with_pip=False)
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "-q",
        "--only-binary=:all:",
    ]
    made = subprocess.run([*install, *PACKAGES], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(
            f"openpi-client could not be installed: {(made.stderr.splitlines() or ['no pip'])[-1]}"
        )
    return python


def test_the_real_client_drives_droid(
    openpi_python: Path, nano: Spear1Policy, tmp_path: Path
) -> None:
    pytest.importorskip("mujoco")
    options = ["nano", "--port", "0", "--embodiment", "droid", "--token", "secret", "--ui"]
    with run_python(SPEAR_CLI_CODE, "serve", *options, stderr=subprocess.PIPE) as server:
        line = server.stdout.readline()
        found = re.fullmatch(
            r"serving nano for droid \(joint_velocity\) at ws://127\.0\.0\.1:(\d+)\n", line
        )
        assert found, line
        assert server.stdout.readline() == f"page at http://127.0.0.1:{found[1]}/\n"
        robot = embodiments.load("droid")
        seen = {
            **robot.example(),
            "observation/exterior_image_1_left": np.zeros((360, 640, 3), np.uint8),
        }
        np.savez(tmp_path / "seen.npz", **seen)
        files = [str(tmp_path / name) for name in ("seen.npz", "out.npz")]
        client = [str(openpi_python), "-c", CLIENT, found[1], *files]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        done = subprocess.run(client, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        server.send_signal(signal.SIGTERM)
        assert server.wait(120) == 0 and "loading nano on " in server.stderr.read()
    said = json.loads(done.stdout)
    assert said["metadata"]["embodiment"] == "droid" and said["metadata"]["rate_hz"] == 15
    assert "observation/joint_position" in said["errors"][0]
    assert "observation/exterior_image_1_left" in said["errors"][1]
    assert said["timing"][0]["infer_ms"] > 0 and said["timing"][1]["prev_total_ms"] > 0
    got = np.load(tmp_path / "out.npz")
    sent = {key: got[key] for key in got.files if key.startswith("observation/")}
    expected = Service(nano, robot, "nano", "droid").answer([{**sent, "prompt": seen["prompt"]}])[0]
    assert got["actions"].shape == (15, 8)
    np.testing.assert_allclose(got["actions"], expected["actions"], atol=1e-5)
    assert got["again"].shape == (15, 8) and np.isfinite(got["again"]).all()
