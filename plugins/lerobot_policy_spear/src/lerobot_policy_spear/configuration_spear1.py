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
from spear.train.optimize import compute_learning_rate_factor
from spear.train.options import Optimization, Recipe
from spear.train.recipes import get_recipe
from spear.types import CONTROL_RATE_HZ

from .robots import Robot, choose_robot


@LRSchedulerConfig.register_subclass("spear1")
@dataclass
class Spear1SchedulerConfig(LRSchedulerConfig):
    """The recipe's learning-rate schedule, over all `--steps` of lerobot-train.

    If these are fewer than the recipe's, the warmup is shorter, too.
    """

    num_warmup_steps: int
    recipe: str

    def build(self, optimizer: Optimizer, num_training_steps: int) -> LambdaLR:
        """Make the scheduler of an optimizer; LeRobot calls this."""
        recipe_optimization = get_recipe(self.recipe).optimization
        fraction = min(1.0, num_training_steps / recipe_optimization.steps)
        optimization = dataclasses.replace(
            recipe_optimization,
            steps=num_training_steps,
            warmup=round(self.num_warmup_steps * fraction),
        )
        return LambdaLR(optimizer, lambda step: compute_learning_rate_factor(step, optimization))


def _disable_normalization() -> dict[str, NormalizationMode]:
    """Return LeRobot's setting for no normalization, because SPEAR-1 normalizes by itself."""
    return dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)


@PreTrainedConfig.register_subclass("spear1")
@dataclass
class Spear1Config(PreTrainedConfig):
    """A SPEAR-1, how it is trained, and how it reads the robot.

    checkpoint  Where it starts from: a name that ships with spear, or a folder of spear's.
    recipe      One of `spear recipes`: what learns, the optimizer, draws of noise per observation.
    lr          Peak learning rate; the recipe's by default.
    fps         Frames per second of the dataset and of the robot's loop: a multiple of 5, SPEAR-1's
                rate.
    replan      Number of the 5 predicted actions that are executed before the next inference.
    cameras     The dataset's name of a camera → "external" or "wrist"; without it, cameras go by
                their names.
    urdf        For joint angles: the arm's URDF.
    tip         For joint angles: the URDF's link that is the end-effector.
    steps       Euler steps of the flow; the model's by default.
    seed        Random seed of the noise that actions come from.
    state_names           What the state's numbers are; LeRobot sets them from the dataset.
    action_feature_names  What the action's numbers are; LeRobot sets them from the dataset.
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
        default_factory=_disable_normalization
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fps < CONTROL_RATE_HZ or self.fps % CONTROL_RATE_HZ:
            raise SpearError(
                f"--policy.fps={self.fps} is not a multiple of SPEAR-1's control rate. Use a "
                f"multiple of {CONTROL_RATE_HZ:g}."
            )
        if not 1 <= self.replan <= HORIZON:
            raise SpearError(
                f"--policy.replan={self.replan} is out of range. Use a number from 1 to {HORIZON}."
            )
        if self.training_recipe.kind != "vla" or self.training_recipe.lora_rank:
            raise SpearError(
                f"--policy.recipe={self.recipe} does not train all of a SPEAR-1. Use a recipe of "
                "kind vla without LoRA."
            )

    @property
    def training_recipe(self) -> Recipe:
        """The recipe of that name."""
        return get_recipe(self.recipe)

    @property
    def optimization(self) -> Optimization:
        """The recipe's optimization, with the learning rate of this config."""
        optimization = self.training_recipe.optimization
        if self.lr is None:
            return optimization
        return dataclasses.replace(optimization, lr=self.lr)

    @property
    def stride(self) -> int:
        """Frames of the dataset per action of SPEAR-1."""
        return round(self.fps / CONTROL_RATE_HZ)

    def make_robot(self) -> Robot:
        """Make the object that converts the numbers of the dataset's robot.

        Raises SpearError for numbers that are no end-effector's pose.
        """
        return choose_robot(
            self.state_names, self.action_feature_names, self.stride, self.urdf, self.tip
        )

    def map_views(self) -> dict[str, str]:
        """Return a map from image feature to view of SPEAR-1.

        Raises SpearError if the view of a camera cannot be known.
        """
        camera_names = {key: key.rpartition(".")[2] for key in self.image_features}
        views: dict[str, str] = {}
        for key, camera_name in camera_names.items():
            view = self.cameras.get(camera_name, "") if self.cameras else camera_name
            if view:
                views[key] = view

        has_one_camera_per_view = sorted(views.values()) in (["external"], ["external", "wrist"])
        unknown_cameras = set(self.cameras) - set(camera_names.values())
        if not has_one_camera_per_view or unknown_cameras:
            names = ", ".join(camera_names.values()) or "none"
            raise SpearError(
                f"the dataset's cameras are {names}. Say which of them are SPEAR-1's views with"
                " --policy.cameras='{NAME: external, NAME: wrist}'."
            )
        return views

    def set_dataset_feature_metadata(self, features: dict[str, dict[str, Any]]) -> None:
        """Take the names of the numbers from the dataset's features; LeRobot calls this."""
        self.state_names = _list_number_names(features.get(OBS_STATE, {}))
        self.action_feature_names = _list_number_names(features.get(ACTION, {}))

    def validate_features(self) -> None:
        """Raises SpearError for a robot or cameras that SPEAR-1 cannot be used with."""
        self.make_robot()
        self.map_views()

    def get_optimizer_preset(self) -> AdamWConfig:
        """The recipe's optimizer."""
        optimization = self.optimization
        return AdamWConfig(
            lr=optimization.lr,
            betas=optimization.betas,
            weight_decay=optimization.weight_decay,
            grad_clip_norm=optimization.grad_clip,
        )

    def get_scheduler_preset(self) -> Spear1SchedulerConfig:
        """The recipe's learning-rate schedule."""
        return Spear1SchedulerConfig(self.optimization.warmup, self.recipe)

    @property
    def observation_delta_indices(self) -> None:
        """None: one observation is enough."""

    @property
    def action_delta_indices(self) -> list[int]:
        """The frames of a training sample, counted from its first frame, as LeRobot asks for them.

        They are the last frame of each of the 5 actions, and the frame after these, which shows
        whether the episode has ended.
        """
        ends = [(action + 1) * self.stride for action in range(HORIZON)]
        return [*(end - 1 for end in ends), ends[-1]]

    @property
    def reward_delta_indices(self) -> None:
        """None: no rewards are used."""


def _list_number_names(feature: dict[str, Any]) -> list[str]:
    """Return the names of a feature's numbers, which datasets have as a list or a map of lists."""
    names = feature.get("names") or []
    if isinstance(names, dict):
        all_names = []
        for group in names.values():
            all_names += group
        names = all_names
    return [str(name) for name in names]
