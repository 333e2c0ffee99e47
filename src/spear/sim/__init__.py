"""The embedded simulator: an arm at a table with everyday things, on MuJoCo, registered with Gymnasium."""

from spear.sim.env import TabletopEnv
from spear.sim.record import Disturbance, record, record_episode
from spear.sim.render import Renderer, clutter_frame, frame_of
from spear.sim.scene import FAMILIES, TRAIN_SEED, SceneSpec, clutter_scene, sample_scene
from spear.sim.world import World

__all__ = [
    "FAMILIES",
    "TRAIN_SEED",
    "Disturbance",
    "Renderer",
    "SceneSpec",
    "TabletopEnv",
    "World",
    "clutter_frame",
    "clutter_scene",
    "frame_of",
    "record",
    "record_episode",
    "sample_scene",
]
