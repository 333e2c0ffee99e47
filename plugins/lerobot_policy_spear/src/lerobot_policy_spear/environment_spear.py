"""`--env.type=spear`: the embedded simulator for lerobot-eval; `--env.task` is a task family of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gymnasium
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

CAMERAS = {"external": (210, 280, 3), "wrist": (112, 112, 3)}


def tabletop(family: str) -> gymnasium.Env[Any, Any]:
    """`spear/Tabletop-v0` under the keys that LeRobot reads."""
    from spear.sim.env import MAX_STEPS, TabletopEnv

    class Tabletop(TabletopEnv):
        _max_episode_steps = MAX_STEPS

        @property
        def task_description(self) -> str:
            return self.world.spec.instruction

        def observe(self) -> dict[str, Any]:
            return _renamed(super().observe())

        def _info(self, motion: Any) -> dict[str, Any]:
            info = super()._info(motion)
            return {**info, "is_success": info["success"]}

    made = Tabletop(family)
    named = _renamed(made.observation_space)
    images = gymnasium.spaces.Dict(named["pixels"])
    made.observation_space = gymnasium.spaces.Dict({**named, "pixels": images})
    return made


def _renamed(seen: Any) -> dict[str, Any]:
    images = {"external": seen["observation/image"], "wrist": seen["observation/wrist_image"]}
    return {"pixels": images, "agent_pos": seen["observation/state"]}


@EnvConfig.register_subclass("spear")
@dataclass
class SpearEnv(EnvConfig):
    """What LeRobot must know of it."""

    task: str | None = "put_on"
    fps: int = 5
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            ACTION: PolicyFeature(FeatureType.ACTION, (8,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (8,)),
            **{
                f"pixels/{name}": PolicyFeature(FeatureType.VISUAL, size)
                for name, size in CAMERAS.items()
            },
        }
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            ACTION: ACTION,
            "agent_pos": OBS_STATE,
            **{f"pixels/{name}": f"{OBS_IMAGES}.{name}" for name in CAMERAS},
        }
    )

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """None: `create_envs` does it."""
        return {}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, Any]]:
        """So many scenes at a time."""
        make = [lambda: tabletop(str(self.task))] * n_envs
        mode = gymnasium.vector.AutoresetMode.SAME_STEP
        return {"spear": {0: gymnasium.vector.SyncVectorEnv(make, autoreset_mode=mode)}}
