"""Faults of what the robot is asked to do, and where: start, words and objects."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from planted import PlantedFault
from spear.sim.scene import (
    NOMINAL_START_POSITION_M,
    SOURCE_INDEX,
    TARGET_INDEX,
    SceneSpec,
)
from spear.sim.shifts import TRAINING_START_RANGE_M, TRAINING_YAW_DEG, Shift, shift_scene

UNSEEN_POSITION_M = (3.0, 0.0, 0.3)
"""A place behind the external camera, where no camera sees an object."""
ROLES: Mapping[str, tuple[int, ...]] = {
    "source": (SOURCE_INDEX,),
    "target": (TARGET_INDEX,),
    "both": (SOURCE_INDEX, TARGET_INDEX),
}


def start_outside(distance_m: float, turn_deg: float) -> PlantedFault:
    """Start farther away, and turned further, than training ever did.

    The start is beyond training's box to the left or the right, by the scene's seed.
    """

    def move_start(scene: SceneSpec) -> SceneSpec:
        sign = 1 if scene.seed % 2 else -1
        x, y, z = NOMINAL_START_POSITION_M
        if distance_m:
            y += sign * (TRAINING_START_RANGE_M + distance_m)
        else:
            x, y, z = scene.ee_position
        rotation = scene.ee_rotation
        if turn_deg:
            yaw_rad = sign * math.radians(TRAINING_YAW_DEG + turn_deg)
            rotation = (math.cos(yaw_rad / 2), 0.0, 0.0, math.sin(yaw_rad / 2))
        position = (float(x), float(y), float(z))
        return replace(scene, ee_position=position, ee_rotation=rotation)

    return PlantedFault(change_scene=move_start)


def rephrase(level: int) -> PlantedFault:
    """Ask with words that training does not have (`spear.sim.shifts`)."""
    shift = Shift("language", level)
    return PlantedFault(change_scene=lambda scene: shift_scene(scene, shift))


def ask_for_other_task(text: str) -> PlantedFault:
    """Ask for something that no demonstration shows."""
    return PlantedFault(change_scene=lambda scene: replace(scene, instruction=text))


def change_instruction(level: int = 0, text: str = "") -> PlantedFault:
    """Ask with unseen words of a level, or with this text."""
    return ask_for_other_task(text) if text else rephrase(level)


def hide_object(which: str) -> PlantedFault:
    """Put the source, the target, or both where no camera sees them."""

    def hide(scene: SceneSpec) -> SceneSpec:
        objects = list(scene.objects)
        for offset, index in enumerate(ROLES[which]):
            x, y, z = UNSEEN_POSITION_M
            objects[index] = replace(objects[index], position=(x, y + 0.4 * offset, z))
        return replace(scene, objects=tuple(objects))

    return PlantedFault(change_scene=hide)
