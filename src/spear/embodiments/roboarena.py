"""RoboArena's evaluation of policies on DROID robots: `droid` with that benchmark's keys and
greeting.

Facts (robo-arena/roboarena, policy_server.py and policy_client.py): the server's first message says
what the client must send, these six keys and no others; "endpoint" in a request is "infer" or
"reset"; the client executes all rows of an answer, at 15 Hz, before its next request. The
template's test counts exterior cameras from 0, the evaluators' client from 1
(pranavatreya/roboarena_evaluator, 5992b26, main.py).

Departures: images of 512 x 288 pixels, because DROID's cameras are 16:9, so that nobody stretches
or pads the images, and because the model sees no more pixels. The server remembers nothing between
requests, so it confirms a reset and does nothing; a request without "endpoint" is one to infer.
"""

import functools
from collections.abc import Mapping
from typing import Any

from spear.embodiments import Embodiment, Observation, droid
from spear.errors import SpearError, check_known

IMAGE_HEIGHT_PX = 288
IMAGE_WIDTH_PX = 512
EXTERIOR_IMAGE_0_KEY = "observation/exterior_image_0_left"  # the first camera, counted from 0
EXTERIOR_IMAGE_1_KEY = droid.EXTERIOR_IMAGE_KEY  # the first camera, counted from 1
EXTERIOR_IMAGE_DESCRIPTION = droid.EMBODIMENT.required[droid.EXTERIOR_IMAGE_KEY]
ENDPOINT_KEY = "endpoint"
ENDPOINTS = ("infer", "reset")


def make_greeting(control: str) -> dict[str, Any]:
    """Say what the client must send: one exterior camera and the wrist's; `control` is the action
    space.
    """
    return {
        "image_resolution": [IMAGE_HEIGHT_PX, IMAGE_WIDTH_PX],
        "needs_wrist_camera": True,
        "n_external_cameras": 1,
        "needs_stereo_camera": False,
        "needs_session_id": False,
        "action_space": control,
    }


def reply_directly(request: Observation) -> str | None:
    """Confirm a reset; return None for an observation. Raises `SpearError` for another endpoint."""
    endpoint = request.get(ENDPOINT_KEY, "infer")
    name = endpoint[:80] if isinstance(endpoint, str) else f"a {type(endpoint).__name__}"
    check_known(ENDPOINT_KEY, ENDPOINTS, name)
    return "reset successful" if endpoint == "reset" else None


def observe(observation: Observation, tool: droid.Tool = droid.ROBOTIQ) -> dict[str, Any]:
    """Convert an observation as `droid` does, with the first exterior camera."""
    for key in (EXTERIOR_IMAGE_0_KEY, EXTERIOR_IMAGE_1_KEY):
        if key in observation:
            return droid.observe(observation, key, tool)
    raise SpearError(
        f"the observation has neither {EXTERIOR_IMAGE_1_KEY!r} nor {EXTERIOR_IMAGE_0_KEY!r}. Send "
        f"{EXTERIOR_IMAGE_DESCRIPTION}."
    )


def _list_required_keys_without_exterior_image() -> dict[str, str]:
    """List what `droid` requires, without the exterior image: it may have one of two keys here."""
    required = dict(droid.EMBODIMENT.required)
    del required[droid.EXTERIOR_IMAGE_KEY]
    return required


def make_embodiment(
    robot: Embodiment, tool: droid.Tool, earlier_versions: Mapping[int, Embodiment]
) -> Embodiment:
    """Make the embodiment of the benchmark, with DROID's embodiment and its gripper."""
    return Embodiment(
        required=_list_required_keys_without_exterior_image(),
        optional={
            EXTERIOR_IMAGE_1_KEY: f"{EXTERIOR_IMAGE_DESCRIPTION}; or as the next key",
            EXTERIOR_IMAGE_0_KEY: "the same, where cameras count from 0",
            ENDPOINT_KEY: '"infer"; or "reset", which needs nothing else',
            "observation/cartesian_position": "not looked at: the pose is that of the joints",
            "session_id": "not looked at",
        },
        observe=functools.partial(observe, tool=tool),
        controls={
            name: robot.controls[name]
            for name in ("joint_position", "joint_velocity", "cartesian_position")
        },
        example=lambda: {**robot.example(), ENDPOINT_KEY: "infer"},
        greeting=make_greeting,
        direct_reply=reply_directly,
        frame=robot.frame,
        frame_version=robot.frame_version,
        earlier_versions=earlier_versions,
    )


EMBODIMENT = make_embodiment(
    droid.EMBODIMENT,
    droid.ROBOTIQ,
    earlier_versions={
        1: make_embodiment(droid.EMBODIMENT.earlier_versions[1], droid.FRANKA_HAND, {})
    },
)
