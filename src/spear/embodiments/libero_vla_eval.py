"""LIBERO's Franka, with the observations of AllenAI's vla-eval harness.

Facts, read in vla-eval 0.8 (`benchmarks/libero`):

- The images, the state and the commands are those of openpi's LIBERO client (`libero.py`), under
  other keys. The images of both cameras are in one map.
- The wrist image and the state are sent only if the benchmark's parameters ask for them.
- The harness sends one command to the controller per observation, 20 per second.

A policy therefore answers with 20 rows for 5 actions, of which `--replan-steps` says how many are
executed before the next inference: 4 rows are one action.
"""

from typing import Any

from spear.embodiments import Embodiment, Observation, libero
from spear.embodiments.observations import (
    IMAGE_KEY,
    PROMPT_KEY,
    WRIST_IMAGE_KEY,
    extract_images_from_map,
)

IMAGES_KEY = "images"
STATES_KEY = "states"
DESCRIPTION_KEY = "task_description"
CAMERA_OF_KEY = {IMAGE_KEY: "agentview", WRIST_IMAGE_KEY: "wrist"}
"""Key of a camera in `spear.types.Policy` → its name in the harness's map of images."""


def convert_to_policy_observation(observation: Observation) -> dict[str, Any]:
    """Convert the harness's observation to one of `spear.types.Policy`."""
    with_images = extract_images_from_map(
        observation,
        IMAGES_KEY,
        CAMERA_OF_KEY.values(),
        advice="Set send_wrist_image and send_state to true in the parameters of the benchmark, as "
        "examples/libero.yaml does.",
    )
    return libero.convert_client_observation(
        with_images,
        image_keys={key: f"{IMAGES_KEY}/{camera}" for key, camera in CAMERA_OF_KEY.items()},
        state_key=STATES_KEY,
        prompt_key=DESCRIPTION_KEY,
    )


def _make_example() -> dict[str, Any]:
    """Make an observation as the harness sends it."""
    example = libero.EMBODIMENT.example()
    images = {camera: example[key] for key, camera in CAMERA_OF_KEY.items()}
    return {
        IMAGES_KEY: images,
        STATES_KEY: example[libero.OBSERVED_STATE_KEY],
        DESCRIPTION_KEY: example[PROMPT_KEY],
    }


EMBODIMENT = Embodiment(
    required={
        IMAGES_KEY: "a map of the images 'agentview' and 'wrist', turned by 180°, uint8 [height, "
        "width, 3] (the benchmark's send_wrist_image: true)",
        STATES_KEY: libero.EMBODIMENT.required[libero.OBSERVED_STATE_KEY]
        + " (the benchmark's send_state: true)",
        DESCRIPTION_KEY: "the instruction in words",
    },
    optional={"controller_states": "not looked at"},
    observe=convert_to_policy_observation,
    controls={"osc_pose": libero.EMBODIMENT.controls["osc_pose"]},
    example=_make_example,
)
