"""`--policy.type=spear1`: the options."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig, LRSchedulerConfig
from lerobot.utils.constants import ACTION, OBS_STATE
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from spear.data.actions import HORIZON
from spear.errors import SpearError
from spear.train.optimize import learning_rate
from spear.train.options import Optimization, Recipe
from spear.train.recipes import get_recipe
from spear.types import CONTROL_RATE_HZ

from .robots import Robot, choose


@LRSchedulerConfig.register_subclass("spear1")
@dataclass
class Spear1SchedulerConfig(LRSchedulerConfig):
    """The recipe's learning rate over all `--steps` of lerobot-train; fewer than the recipe's shorten its
    warmup, too."""

    num_warmup_steps: int
    recipe: str

    def build(self, optimizer: Optimizer, num_training_steps: int) -> LambdaLR:
        """For the optimiser's groups."""
        own = get_recipe(self.recipe).optimization
        warmup = round(self.num_warmup_steps * min(1.0, num_training_steps / own.steps))
        opt = dataclasses.replace(own, steps=num_training_steps, warmup=warmup)
        return LambdaLR(optimizer, lambda step: learning_rate(step, opt))


@PreTrainedConfig.register_subclass("spear1")
@dataclass
class Spear1Config(PreTrainedConfig):
    """A SPEAR-1, how it is trained, and how it reads the robot.

    checkpoint  where it starts from: a name that ships with spear, or a folder of spear's.
    recipe      of `spear train list`: what learns, the optimiser, draws of noise per observation.
    lr          peak learning rate; None: the recipe's.
    fps         of the dataset and of the robot's loop: a multiple of 5, SPEAR-1's rate.
    replan      of the 5 predicted actions, so many are executed before the next look.
    cameras     the dataset's name of a camera → "external" or "wrist"; empty: by the names themselves.
    urdf, tip   for joint angles: the arm's URDF and the link that is its end-effector.
    steps, seed of the flow that actions come from; None: the model's steps.
    state_names, action_feature_names  what the numbers are: LeRobot fills them in from the dataset.
    """

    checkpoint: str = "nano"
    recipe: str = "nano-post"
    lr: float | None = None
    fps: int = 5
    replan: int = 1
    cameras: dict[str, str] = field(default_factory=dict)
    urdf: str = ""
    tip: str = "gripper_frame_link"
    steps: int | None = None
    seed: int = 0
    state_names: list[str] = field(default_factory=list)
    action_feature_names: list[str] = field(default_factory=list)
    license: str | None = "apache-2.0"
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys(
            ("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY
        )
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fps < CONTROL_RATE_HZ or self.fps % CONTROL_RATE_HZ:
            raise SpearError(
                f"--policy.fps={self.fps}: give a multiple of {CONTROL_RATE_HZ:g}, SPEAR-1's rate"
            )
        if not 1 <= self.replan <= HORIZON:
            raise SpearError(f"--policy.replan={self.replan}: give 1 … {HORIZON}")
        if self.stage.kind != "vla" or self.stage.lora_rank:
            raise SpearError(
                f"--policy.recipe={self.recipe}: give a recipe of SPEAR-1 without LoRA"
            )

    @property
    def stage(self) -> Recipe:
        """The recipe."""
        return get_recipe(self.recipe)

    @property
    def optimization(self) -> Optimization:
        """How weights move."""
        found = self.stage.optimization
        return found if self.lr is None else dataclasses.replace(found, lr=self.lr)

    @property
    def stride(self) -> int:
        """Frames of the dataset in one action of SPEAR-1."""
        return round(self.fps / CONTROL_RATE_HZ)

    def robot(self) -> Robot:
        """What the numbers mean. Raises `SpearError` for those that are no end-effector's pose."""
        return choose(self.state_names, self.action_feature_names, self.stride, self.urdf, self.tip)

    def views(self) -> dict[str, str]:
        """Image feature → view of SPEAR-1. Raises `SpearError` where a camera's view cannot be known."""
        names = {key: key.rpartition(".")[2] for key in self.image_features}
        views = {
            key: self.cameras.get(name, "") if self.cameras else name for key, name in names.items()
        }
        views = {key: view for key, view in views.items() if view}
        known = sorted(views.values()) in (
            ["external"],
            ["external", "wrist"],
        )  # each from one camera
        if not known or not {*self.cameras} <= {*names.values()}:
            given, how = ", ".join(names.values()) or "none", "{NAME: external, NAME: wrist}"
            raise SpearError(f"cameras {given}: say which are SPEAR-1's: --policy.cameras='{how}'")
        return views

    def set_dataset_feature_metadata(self, features: dict[str, dict[str, Any]]) -> None:
        """LeRobot calls this with the dataset's features."""
        self.state_names, self.action_feature_names = (
            _names(features.get(key, {})) for key in (OBS_STATE, ACTION)
        )

    def validate_features(self) -> None:
        """Raises `SpearError` for a robot or cameras that SPEAR-1 cannot be used with."""
        self.robot()
        self.views()

    def get_optimizer_preset(self) -> AdamWConfig:
        """The recipe's."""
        opt = self.optimization
        return AdamWConfig(
            lr=opt.lr, betas=opt.betas, weight_decay=opt.weight_decay, grad_clip_norm=opt.grad_clip
        )

    def get_scheduler_preset(self) -> Spear1SchedulerConfig:
        """The recipe's."""
        return Spear1SchedulerConfig(self.optimization.warmup, self.recipe)

    @property
    def observation_delta_indices(self) -> None:
        """One observation."""

    @property
    def action_delta_indices(self) -> list[int]:
        """The last frame of each of the 5 actions; and one more, which tells where an episode ends."""
        ends = [(k + 1) * self.stride for k in range(HORIZON)]
        return [*(end - 1 for end in ends), ends[-1]]

    @property
    def reward_delta_indices(self) -> None:
        """None."""


def _names(feature: dict[str, Any]) -> list[str]:
    """The names of a feature's numbers, which datasets keep as a list or in a map."""
    names = feature.get("names") or []
    return [
        str(n)
        for n in (names if isinstance(names, list) else [m for v in names.values() for m in v])
    ]
