"""RoboArena's evaluation of policies on DROID robots: `droid` under that benchmark's keys and greeting.

Facts (robo-arena/roboarena, policy_server.py and policy_client.py): the server's first message is what it
wants to be sent, these six keys and no others; "endpoint" in a request is "infer" or "reset"; all rows of an
answer are executed, at 15 Hz, before the next request. The template's test counts exterior cameras from 0,
the evaluators' client from 1 (pranavatreya/roboarena_evaluator, 5992b26, main.py).

Ours: images of 512 x 288 pixels, because DROID's cameras are 16:9, which therefore nobody stretches or pads,
and because the model sees no more of them. Nothing is remembered between requests, so a reset is confirmed
and changes nothing; a request without "endpoint" is one to infer.
"""

from typing import Any

from spear.embodiments import Embodiment, Observation, droid
from spear.errors import SpearError, check_known

EXTERIOR = "observation/exterior_image_0_left", droid.IMAGE
"""The exterior camera's key, counted from 0 or from 1; of two cameras the first is used."""
ABOUT = droid.EMBODIMENT.required[droid.IMAGE]
"""What it is, in words."""
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


def observe(observation: Observation) -> dict[str, Any]:
    """As `droid`, from the first exterior camera."""
    sent = [key for key in EXTERIOR if key in observation]
    if not sent:
        raise SpearError(f"observation without {EXTERIOR[1]!r} or {EXTERIOR[0]!r}: send {ABOUT}")
    return droid.observe(observation, sent[0])


EMBODIMENT = Embodiment(
    required={key: about for key, about in droid.EMBODIMENT.required.items() if key != droid.IMAGE},
    optional={
        EXTERIOR[1]: f"{ABOUT}; or as the next key",
        EXTERIOR[0]: "the same, where cameras count from 0",
        ENDPOINT: '"infer"; or "reset", which needs nothing else',
        "observation/cartesian_position": "not looked at: the pose is that of the joints",
        "session_id": "not looked at",
    },
    observe=observe,
    controls={
        name: droid.EMBODIMENT.controls[name]
        for name in ("joint_position", "joint_velocity", "cartesian_position")
    },
    example=lambda: {**droid.EMBODIMENT.example(), ENDPOINT: "infer"},
    greeting=greeting,
    direct_reply=direct_reply,
)
