"""RoboArena's wire over a real socket, message by message as its clients send and read them."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest
from websockets.sync.client import ClientConnection, connect

from serve_here import serving
from spear.embodiments import load, roboarena
from spear.errors import SpearError
from spear.serve import wire
from spear.types import Array

KEYS = {
    "image_resolution", "needs_wrist_camera", "n_external_cameras", "needs_stereo_camera", "needs_session_id",
    "action_space",
}  # fmt: skip


def packed(value: object) -> object:
    """An array as openpi's packer makes it."""
    if isinstance(value, np.ndarray):
        parts = {b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
        return {b"__ndarray__": True, **parts}
    return value


def actions(raw: bytes | str) -> Array:
    assert isinstance(raw, bytes)
    found = msgpack.unpackb(raw)["actions"]
    return np.frombuffer(found[b"data"], found[b"dtype"]).reshape(found[b"shape"])


def asked(client: ClientConnection, **request: object) -> bytes | str:
    client.send(msgpack.packb(request, default=packed))
    return client.recv()


@pytest.mark.parametrize("control", roboarena.EMBODIMENT.controls)
def test_the_configuration_then_observations_and_resets(control: str) -> None:
    with (
        serving(robot="roboarena", control=control) as server,
        connect(f"ws://127.0.0.1:{server.port}", compression=None) as client,
    ):
        about = msgpack.unpackb(client.recv())
        assert set(about) == KEYS and about["action_space"] == control
        height, width = about["image_resolution"]
        image = np.zeros((height, width, 3), np.uint8)
        seen = {f"observation/exterior_image_{i}_left": image for i in range(about["n_external_cameras"])}
        seen |= {"observation/wrist_image_left": image} if about["needs_wrist_camera"] else {}
        seen |= {"session_id": "a1"} if about["needs_session_id"] else {}
        for key, size in (("joint", 7), ("cartesian", 6), ("gripper", 1)):
            seen[f"observation/{key}_position"] = np.zeros(size, np.float32)
        seen["prompt"] = "test"
        rows = actions(asked(client, **seen, endpoint="infer"))
        assert rows.shape == (15, 8 if control.startswith("joint") else 7) and np.isfinite(rows).all()
        for session in ({}, {"session_id": "a1"}):
            assert asked(client, **session, endpoint="reset") == "reset successful"
        np.testing.assert_array_equal(actions(asked(client, **seen)), rows)
        for key, value in (("endpoint", "stop"), ("endpoint", image), ("prompt", "")):
            said = asked(client, **{**seen, key: value})
            assert isinstance(said, str) and key in said and "\n" not in said
        assert "exterior_image_0_left" in asked(client, endpoint="infer")
        nested = b"\x82\xa8endpoint\xa5reset\xa1a" + b"\x91" * 20 + b"\xc0"  # what it costs stays bounded
        client.send(nested)
        assert client.recv().startswith("a: ")


def test_the_pose_and_the_commands_are_those_of_droid() -> None:
    ours, droid = load("roboarena"), load("droid")
    seen = {k: v for k, v in ours.example().items() if k != "endpoint"}
    theirs = dict(seen)
    theirs["observation/exterior_image_1_left"] = theirs.pop("observation/exterior_image_0_left")
    for key, value in droid.read(theirs).items():
        np.testing.assert_array_equal(ours.read(seen)[key], value)
    assert all(droid.controls[name] is control for name, control in ours.controls.items())
    with pytest.raises(SpearError, match="exterior_image_0_left"):
        ours.read({**seen, roboarena.IMAGE: np.zeros((9, 9), np.uint8)})
    assert wire.decode(wire.encode(roboarena.greeting("joint_position")))["image_resolution"] == [288, 512]
