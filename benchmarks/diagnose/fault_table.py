"""The table of planted faults (`faults.toml`), and the function that makes each of them."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plant_pictures as pictures
import plant_robot as robot
import plant_scenes as scenes
from plant_policies import POLICY_CHANGES, TRAINED_FAULTS
from planted import PlantedFault

FACTORIES: Mapping[str, Callable[..., PlantedFault]] = {
    "action-frame": robot.exchange_frame,
    "action-sign": robot.invert_sign,
    "translation-unit": robot.scale_translation,
    "angle-unit": robot.scale_angle,
    "quaternion-order": robot.reorder_quaternion,
    "euler-order": robot.reorder_euler,
    "gripper-inverted": robot.invert_gripper,
    "gripper-scale": robot.scale_gripper,
    "gripper-late": robot.delay_gripper,
    "controller-short": robot.shorten_motion,
    "actions-repeated": robot.repeat_actions,
    "actions-dropped": robot.drop_actions,
    "control-rate": robot.change_rate,
    "latency": robot.delay_answers,
    "seam-jumps": robot.join_to_old_pose,
    "cameras-exchanged": pictures.exchange_cameras,
    "camera-mirrored": pictures.mirror_camera,
    "camera-turned": pictures.turn_camera,
    "camera-cropped": pictures.crop_camera,
    "camera-stretched": pictures.stretch_camera,
    "camera-bgr": pictures.exchange_colors,
    "camera-exposure": pictures.expose_camera,
    "camera-frozen": pictures.freeze_camera,
    "camera-late": pictures.delay_camera,
    "camera-missing": pictures.lose_camera,
    "padding-bars": pictures.add_bars,
    "unseen-instruction": scenes.change_instruction,
    "start-outside": scenes.start_outside,
    "object-not-in-view": scenes.hide_object,
}
"""Fault → the function that makes it from the settings of a strength. The other faults of the table
are faults of the policy (`plant_policies`)."""

_TABLE: Mapping[str, Any] = tomllib.loads(
    Path(__file__).with_name("faults.toml").read_text("utf-8")
)
STRENGTHS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    name: entry["strengths"] for name, entry in _TABLE.items()
}
"""Fault → the settings of its strengths."""


@dataclass(frozen=True)
class Planting:
    """A fault of one strength, which is its index in `STRENGTHS`."""

    fault: str
    strength: int

    @property
    def settings(self) -> Mapping[str, Any]:
        return STRENGTHS[self.fault][self.strength]

    @property
    def is_of_policy(self) -> bool:
        """Whether the fault is one of the policy's folder."""
        return self.fault in POLICY_CHANGES or self.is_trained

    @property
    def is_trained(self) -> bool:
        """Whether a policy is trained for this fault."""
        return self.fault in TRAINED_FAULTS

    def make(self) -> PlantedFault:
        """Make the fault for one episode."""
        if self.is_of_policy:
            return PlantedFault()
        return FACTORIES[self.fault](**self.settings)

    def __str__(self) -> str:
        return f"{self.fault}-{self.strength}"
