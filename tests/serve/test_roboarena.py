"""RoboArena's protocol over a real socket, message by message as its clients send and read them.

RoboArena evaluates policies on DROID robots. Its embodiment has DROID's controls and observations,
but its own greeting, and requests with an "endpoint" ("infer" or "reset").
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from websockets.sync.client import ClientConnection, connect

from refusals import refuses
from serve_here import run_server
from spear.embodiments import droid, load, roboarena
from spear.serve import wire
from spear.types import Array

GREETING_KEYS = [
    "action_space",
    "image_resolution",
    "n_external_cameras",
    "needs_session_id",
    "needs_stereo_camera",
    "needs_wrist_camera",
]
CONTROLS = pytest.mark.parametrize("control", roboarena.EMBODIMENT.controls)


class RoboArenaClient:
    """A client that has read the server's greeting."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self.greeting = wire.decode(connection.recv())

    def send(self, message: bytes) -> str | Array:
        """Send a message; returns the actions, or the reply if it is a text, such as an error."""
        self._connection.send(message)
        reply = self._connection.recv()
        return reply if isinstance(reply, str) else wire.decode(reply)["actions"]

    def ask(self, **request: Any) -> str | Array:
        """Send a request with these keys; returns what `send` does."""
        return self.send(wire.encode(request))

    def make_observation(self, first_camera: int = 1) -> dict[str, Any]:
        """An observation as the greeting asks for it.

        The external cameras are numbered from `first_camera` on.
        """
        image = np.zeros((*self.greeting["image_resolution"], 3), np.uint8)
        observation: dict[str, Any] = {
            "observation/wrist_image_left": image,
            "observation/joint_position": np.zeros(7, np.float32),
            "observation/cartesian_position": np.zeros(6, np.float32),
            "observation/gripper_position": np.zeros(1, np.float32),
            "prompt": "test",
        }
        for number in range(self.greeting["n_external_cameras"]):
            key = f"observation/exterior_image_{first_camera + number}_left"
            observation[key] = image
        return observation


@contextmanager
def connect_client(control: str | None = None) -> Iterator[RoboArenaClient]:
    """Run a server for RoboArena with one of its controls, and connect a client."""
    with (
        run_server(robot="roboarena", control=control) as server,
        connect(f"ws://127.0.0.1:{server.port}", compression=None) as connection,
    ):
        yield RoboArenaClient(connection)


@pytest.fixture
def client() -> Iterator[RoboArenaClient]:
    """A client of a server with RoboArena's default control."""
    pytest.importorskip("mujoco")
    with connect_client() as connected:
        yield connected


@CONTROLS
def test_the_greeting_says_what_the_client_must_send(control: str) -> None:
    with connect_client(control) as client:
        assert sorted(client.greeting) == GREETING_KEYS
        assert client.greeting["action_space"] == control


# RoboArena's template numbers cameras from 0, its evaluators' client from 1.
@pytest.mark.parametrize("first_camera", [0, 1])
@CONTROLS
def test_an_observation_is_answered_with_rows_of_the_control(
    control: str, first_camera: int
) -> None:
    pytest.importorskip("mujoco")
    with connect_client(control) as client:
        observation = client.make_observation(first_camera)

        rows = client.ask(**observation, endpoint="infer")

    # Six numbers of a pose or seven joints, and the gripper. Five actions are 15 rows at 15 Hz.
    num_columns = 7 if control == "cartesian_position" else 8
    assert rows.shape == (15, num_columns)
    assert np.isfinite(rows).all()


def test_a_request_without_an_endpoint_is_one_to_infer(client: RoboArenaClient) -> None:
    observation = client.make_observation()

    rows = client.ask(**observation)

    np.testing.assert_array_equal(rows, client.ask(**observation, endpoint="infer"))


@pytest.mark.parametrize("session", [{}, {"session_id": "a1"}])
def test_a_reset_is_confirmed_and_changes_nothing(
    client: RoboArenaClient, session: dict[str, str]
) -> None:
    observation = client.make_observation()
    actions_before = client.ask(**observation)

    assert client.ask(**session, endpoint="reset") == "reset successful"

    np.testing.assert_array_equal(client.ask(**observation), actions_before)


@pytest.mark.parametrize(
    ("key", "value"),
    [("endpoint", "stop"), ("endpoint", np.zeros((288, 512, 3), np.uint8)), ("prompt", "")],
)
def test_an_error_names_the_wrong_key(client: RoboArenaClient, key: str, value: Any) -> None:
    error = client.ask(**{**client.make_observation(), key: value})

    assert isinstance(error, str)
    assert key in error
    assert "\n" not in error


def test_an_error_names_a_missing_key(client: RoboArenaClient) -> None:
    assert "wrist_image_left" in client.ask(endpoint="infer")


def test_a_reset_that_is_nested_too_deeply_is_refused(client: RoboArenaClient) -> None:
    # In msgpack, {"endpoint": "reset", "a": [[[…None…]]]} with 20 lists in each other.
    error = client.send(b"\x82\xa8endpoint\xa5reset\xa1a" + b"\x91" * 20 + b"\xc0")

    assert error.startswith("a has ")


def test_observations_and_controls_are_those_of_droid() -> None:
    pytest.importorskip("mujoco")
    robot = load("roboarena")

    observation = robot.read(robot.example())

    np.testing.assert_equal(observation, droid.EMBODIMENT.read(droid.EMBODIMENT.example()))
    for name, control in robot.controls.items():
        assert droid.EMBODIMENT.controls[name] is control


def test_an_observation_without_an_exterior_camera_is_refused() -> None:
    robot = load("roboarena")
    observation = robot.example()
    del observation[droid.EXTERIOR_IMAGE_KEY]

    refuses("exterior_image_1_left' nor .*exterior_image_0_left", robot.read, observation)
