"""`--env.type=spear`: the embedded simulator for lerobot-eval.

`--env.task` is one of its task families.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gymnasium
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

CAMERA_SHAPES = {"external": (210, 280, 3), "wrist": (112, 112, 3)}  # height, width, channels


def make_tabletop(family: str) -> gymnasium.Env[Any, Any]:
    """Make the environment `spear/Tabletop-v0` with the keys that LeRobot reads."""
    from spear.sim.env import MAX_STEPS, TabletopEnv

    class LeRobotTabletop(TabletopEnv):
        _max_episode_steps = MAX_STEPS

        @property
        def task_description(self) -> str:
            return self.world.spec.instruction

        def observe(self) -> dict[str, Any]:
            return _rename_keys(super().observe())

        def _update_info(self, is_unreachable: bool) -> dict[str, Any]:
            info = super()._update_info(is_unreachable)
            return {**info, "is_success": info["success"]}

    env = LeRobotTabletop(family)
    spaces = _rename_keys(env.observation_space)
    images = gymnasium.spaces.Dict(spaces["pixels"])
    env.observation_space = gymnasium.spaces.Dict({**spaces, "pixels": images})
    return env


def _rename_keys(observation: Any) -> dict[str, Any]:
    """Return the entries of an observation, or of its space, under LeRobot's keys."""
    images = {
        "external": observation["observation/image"],
        "wrist": observation["observation/wrist_image"],
    }
    return {"pixels": images, "agent_pos": observation["observation/state"]}


def _make_features() -> dict[str, PolicyFeature]:
    """Describe the environment's keys: type and shape of each value."""
    features = {
        ACTION: PolicyFeature(FeatureType.ACTION, (8,)),
        "agent_pos": PolicyFeature(FeatureType.STATE, (8,)),
    }
    for camera, shape in CAMERA_SHAPES.items():
        features[f"pixels/{camera}"] = PolicyFeature(FeatureType.VISUAL, shape)
    return features


def _make_features_map() -> dict[str, str]:
    """Return the policy's key for each key of the environment."""
    features_map = {ACTION: ACTION, "agent_pos": OBS_STATE}
    for camera in CAMERA_SHAPES:
        features_map[f"pixels/{camera}"] = f"{OBS_IMAGES}.{camera}"
    return features_map


@EnvConfig.register_subclass("spear")
@dataclass
class SpearEnv(EnvConfig):
    """What LeRobot must know about the simulator.

    task          A task family.
    fps           Control rate.
    features      The environment's keys → type and shape.
    features_map  The environment's keys → the policy's.
    """

    task: str | None = "put_on"
    fps: int = 5
    features: dict[str, PolicyFeature] = field(default_factory=_make_features)
    features_map: dict[str, str] = field(default_factory=_make_features_map)

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """None, because `create_envs` makes the environments."""
        return {}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, Any]]:
        """Make a vector environment of `n_envs` scenes."""
        factories = [lambda: make_tabletop(str(self.task))] * n_envs
        mode = gymnasium.vector.AutoresetMode.SAME_STEP
        return {"spear": {0: gymnasium.vector.SyncVectorEnv(factories, autoreset_mode=mode)}}
