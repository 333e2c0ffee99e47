"""Any robot that speaks SPEAR-1's own language: `spear.types.Policy` observations in, actions [5, 8] out."""

from __future__ import annotations

from typing import Any

import numpy as np

from spear.embodiments import Control, Embodiment, Observation
from spear.embodiments import tools as read
from spear.types import Array

STATE = "observation/state"


def observe(observation: Observation) -> dict[str, Any]:
    """Checks alone: the keys are ours."""
    values = read.numbers(observation, STATE, 8)
    ours: dict[str, Any] = {
        "observation/image": read.image(observation, "observation/image"),
        STATE: read.state(
            read.position(values[:3], f"{STATE}[0:3]"),
            read.quaternion(values[3:7], f"{STATE}[3:7]"),
            read.opening(observation, f"{STATE}[7]", values[7]),
        ),
        "prompt": read.prompt(observation),
    }
    if "observation/wrist_image" in observation:
        ours["observation/wrist_image"] = read.image(observation, "observation/wrist_image")
    if "seed" in observation:
        ours["seed"] = read.seed(observation)
    return ours


def example() -> dict[str, Any]:
    """An arm in front of its base, gripper open and pointing down."""
    return {
        "observation/image": read.example_image(280, 210),
        "observation/wrist_image": read.example_image(112, 112),
        STATE: np.array([0.45, 0.0, 0.2, 1.0, 0.0, 0.0, 0.0, 1.0], np.float32),
        "prompt": "put the carrot on the plate",
    }


def _unchanged(actions: Array, state: Array, observation: Observation) -> Array:
    return actions


EMBODIMENT = Embodiment(
    about="SPEAR-1's own observations and actions",
    required={
        "observation/image": "the external camera's image, uint8 [height, width, 3]",
        STATE: "end-effector position (m, base frame), quaternion (w x y z), gripper opening 0 … 1: 8 numbers",
        "prompt": "the instruction in words",
    },
    optional={
        "observation/wrist_image": "the wrist camera's image, uint8 [height, width, 3]",
        "seed": "a whole number that fixes what is random in the answer",
    },
    observe=observe,
    controls={
        "delta_pose": Control(
            "translation 3 (m, base frame), rotation quaternion 4 (w x y z, end-effector frame), gripper opening "
            "(1 open, 0 closed), per step",
            5.0,
            _unchanged,
        )
    },
    example=example,
)
