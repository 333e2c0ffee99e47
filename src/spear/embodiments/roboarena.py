"""RoboArena's evaluation of policies on DROID robots: `droid` under that benchmark's keys and greeting.

Facts (robo-arena/roboarena, policy_server.py and policy_client.py): the server's first message is what it
wants to be sent, these six keys and no others; "endpoint" in a request is "infer" or "reset"; exterior
cameras count from 0; all rows of an answer are executed, at 15 Hz, before the next request.

Ours: images of 512 x 288 pixels, because DROID's cameras are 16:9, which therefore nobody stretches or pads,
and because the model sees no more of them. Nothing is remembered between requests, so a reset is confirmed
and changes nothing; a request without "endpoint" is one to infer.
"""

from collections.abc import Mapping
from typing import Any

from spear.embodiments import Embodiment, Observation, droid
from spear.errors import check_known

IMAGE = "observation/exterior_image_0_left"
ENDPOINT, ENDPOINTS = "endpoint", ("infer", "reset")


def greeting(control: str) -> dict[str, Any]:
    """What the server asks for: one exterior camera and the wrist's; `control` is the action space."""
    return {
        "image_resolution": [288, 512],  # height, width
        "needs_wrist_camera": True,
        "n_external_cameras": 1,
        "needs_stereo_camera": False,
        "needs_session_id": False,
        "action_space": control,
    }


def direct_reply(request: Observation) -> str | None:
    """The confirmation of a reset; None for an observation. Raises `SpearError` for another endpoint."""
    endpoint = request.get(ENDPOINT, "infer")
    endpoint = endpoint[:80] if isinstance(endpoint, str) else f"a {type(endpoint).__name__}"
    check_known(ENDPOINT, ENDPOINTS, endpoint)
    return "reset successful" if endpoint == "reset" else None


def renamed(entries: Mapping[str, Any]) -> dict[str, Any]:
    """What belongs to `droid`'s keys, under the keys of here."""
    return {IMAGE if key == droid.IMAGE else key: value for key, value in entries.items()}


EMBODIMENT = Embodiment(
    required=renamed(droid.EMBODIMENT.required),
    optional={
        ENDPOINT: '"infer"; or "reset", which needs nothing else',
        "observation/cartesian_position": "not looked at: the pose is that of the joints",
        "session_id": "not looked at",
    },
    observe=lambda observation: droid.observe(observation, IMAGE),
    controls={
        name: droid.EMBODIMENT.controls[name]
        for name in ("joint_position", "joint_velocity", "cartesian_position")
    },
    example=lambda: {**renamed(droid.EMBODIMENT.example()), ENDPOINT: "infer"},
    greeting=greeting,
    direct_reply=direct_reply,
)
