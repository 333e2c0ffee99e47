"""RoboArena's wire over a real socket, message by message as its clients send and read them."""

from typing import Any

import numpy as np
import pytest
from websockets.sync.client import ClientConnection, connect

from refusals import refuses
from serve_here import run_server
from spear.embodiments import droid, load, roboarena
from spear.serve import wire

KEYS = ("image_resolution", "needs_wrist_camera", "n_external_cameras", "needs_stereo_camera")
KEYS += ("needs_session_id", "action_space")


def asked(client: ClientConnection, **request: Any) -> Any:
    client.send(wire.encode(request))
    reply = client.recv()
    return reply if isinstance(reply, str) else wire.decode(reply)["actions"]


@pytest.mark.parametrize(
    "first", [0, 1]
)  # where the template's test begins to count, and the evaluators
@pytest.mark.parametrize("control", roboarena.EMBODIMENT.controls)
def test_the_configuration_then_observations_and_resets(control: str, first: int) -> None:
    with (
        run_server(robot="roboarena", control=control) as server,
        connect(f"ws://127.0.0.1:{server.port}", compression=None) as client,
    ):
        about = wire.decode(client.recv())
        assert sorted(about) == sorted(KEYS) and about["action_space"] == control
        image = np.zeros((*about["image_resolution"], 3), np.uint8)
        seen: dict[str, Any] = {"observation/wrist_image_left": image, "prompt": "test"}
        cameras = range(first, first + about["n_external_cameras"])
        seen |= {f"observation/exterior_image_{i}_left": image for i in cameras}
        for key, size in (("joint", 7), ("cartesian", 6), ("gripper", 1)):
            seen[f"observation/{key}_position"] = np.zeros(size, np.float32)
        rows = asked(client, **seen, endpoint="infer")
        assert (
            rows.shape == (15, 8 if control.startswith("joint") else 7) and np.isfinite(rows).all()
        )
        for session in ({}, {"session_id": "a1"}):
            assert asked(client, **session, endpoint="reset") == "reset successful"
        np.testing.assert_array_equal(asked(client, **seen), rows)
        for key, value in (("endpoint", "stop"), ("endpoint", image), ("prompt", "")):
            said = asked(client, **{**seen, key: value})
            assert isinstance(said, str) and key in said and "\n" not in said
        assert "wrist_image_left" in asked(client, endpoint="infer")
        client.send(
            b"\x82\xa8endpoint\xa5reset\xa1a" + b"\x91" * 20 + b"\xc0"
        )  # too deep, for a reset too
        assert client.recv().startswith("a has ")


def test_the_pose_and_the_commands_are_those_of_droid() -> None:
    robot, example = load("roboarena"), roboarena.EMBODIMENT.example()
    np.testing.assert_equal(robot.read(example), droid.EMBODIMENT.read(droid.EMBODIMENT.example()))
    assert all(
        droid.EMBODIMENT.controls[name] is c for name, c in roboarena.EMBODIMENT.controls.items()
    )
    del example[droid.EXTERIOR_IMAGE_KEY]
    refuses("exterior_image_1_left' nor .*exterior_image_0_left", robot.read, example)
