"""RoboArena's evaluation of policies on DROID robots: `droid` with the keys and the first message
that this benchmark expects.

Facts (robo-arena/roboarena, policy_server.py and policy_client.py):

- The server's first message, here called greeting, says what the client must send. It has six keys
  (see `make_greeting`) and no others.
- The key "endpoint" of a request is "infer" or "reset".
- The client executes all rows of an answer, at 15 Hz, before its next request.
- The benchmark's template counts exterior cameras from 0, but the evaluators' client counts from 1
  (pranavatreya/roboarena_evaluator, 5992b26, main.py). So the first camera may have either key.

Our choices: images have 512 x 288 pixels. DROID's cameras are 16:9, so this size needs neither
stretching nor padding, and the model sees no more pixels than that. The server remembers nothing
between requests, so it confirms a reset and does nothing. A request without "endpoint" is one to
infer.
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
    """Make the server's first message: the client must send one exterior camera and the wrist's.

    Args:
        control: the name of the control, which the message calls the action space.
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
    """Return the answer to a request to reset, or None if the request is an observation.

    Raises `SpearError` for an unknown endpoint.
    """
    endpoint = request.get(ENDPOINT_KEY, "infer")
    # A request can have any value here. The check gets a text in its place that the error can show:
    # the value's text, cut if it is long, or its type.
    checked_text = endpoint[:80] if isinstance(endpoint, str) else f"a {type(endpoint).__name__}"
    check_known(ENDPOINT_KEY, ENDPOINTS, checked_text)
    return "reset successful" if endpoint == "reset" else None


def convert_to_policy_observation(
    observation: Observation, tool: droid.Tool = droid.ROBOTIQ
) -> dict[str, Any]:
    """Convert an observation as `droid` does. The first exterior camera may have either key."""
    for key in (EXTERIOR_IMAGE_0_KEY, EXTERIOR_IMAGE_1_KEY):
        if key in observation:
            return droid.convert_to_policy_observation(observation, key, tool)
    raise SpearError(
        f"the observation has neither {EXTERIOR_IMAGE_1_KEY!r} nor {EXTERIOR_IMAGE_0_KEY!r}. Send "
        f"{EXTERIOR_IMAGE_DESCRIPTION}."
    )


def _list_required_keys_without_exterior_image() -> dict[str, str]:
    """List the required keys of `droid` except that of the exterior image, which may differ."""
    required = dict(droid.EMBODIMENT.required)
    del required[droid.EXTERIOR_IMAGE_KEY]
    return required


def make_embodiment(
    robot: Embodiment, tool: droid.Tool, earlier_versions: Mapping[int, Embodiment]
) -> Embodiment:
    """Make the embodiment of the benchmark for one version of DROID's frames.

    Args:
        robot: the embodiment of DROID with this version.
        tool: the gripper whose end-effector frame policies of this version act in.
        earlier_versions: version → embodiment of the benchmark.
    """
    return Embodiment(
        required=_list_required_keys_without_exterior_image(),
        optional={
            EXTERIOR_IMAGE_1_KEY: f"{EXTERIOR_IMAGE_DESCRIPTION}; or as the next key",
            EXTERIOR_IMAGE_0_KEY: "the same, where cameras count from 0",
            ENDPOINT_KEY: '"infer"; or "reset", which needs nothing else',
            "observation/cartesian_position": "not looked at: the pose is that of the joints",
            "session_id": "not looked at",
            **robot.optional,
        },
        observe=functools.partial(convert_to_policy_observation, tool=tool),
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
        1: make_embodiment(
            droid.EMBODIMENT.earlier_versions[1], droid.FRANKA_HAND, earlier_versions={}
        )
    },
)
