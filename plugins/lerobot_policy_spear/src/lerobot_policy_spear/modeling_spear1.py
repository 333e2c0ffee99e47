"""SPEAR-1 as LeRobot's `PreTrainedPolicy`; networks, statistics and sampling are spear's.

A saved policy is LeRobot's config.json, and beside it a folder `spear`, which is a checkpoint for
spear's own commands (`spear serve .../pretrained_model/spear`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from spear import policy as spear
from spear.data.normalize import MIN_SCALES, Mode, Normalizer
from spear.embodiments.observations import get_camera_key
from spear.errors import SpearError, notice
from spear.monitor.distribution import NUM_SAMPLES, TrainingDistribution
from spear.train.optimize import apply_freeze, make_optimizer
from spear.train.parallel import gather, get_rank
from spear.train.tasks import encode_robot_batch
from spear.types import Action, Array

from .configuration_spear1 import Spear1Config
from .robots import (
    CommandPacer,
    Robot,
    find_demonstrated_actions,
    find_demonstrated_frames,
    notice_unlikely_units,
    read_columns,
)

CHECKPOINT_FOLDER = "spear"  # beside LeRobot's own file


class Spear1Policy(PreTrainedPolicy):
    """A SPEAR-1 policy for LeRobot.

    If it is given a dataset, which LeRobot only does in training, its statistics become those of
    the dataset, as after `spear train`.
    """

    config_class = Spear1Config
    name = "spear1"

    def __init__(
        self,
        config: Spear1Config,
        dataset_stats: Any = None,
        dataset_meta: Any = None,
        folder: Path | None = None,
    ) -> None:
        """folder: A spear checkpoint to start from instead of `config.checkpoint`."""
        super().__init__(config)
        self.robot = config.make_robot()
        self.views = config.map_views()
        if dataset_meta is not None and dataset_meta.fps != config.fps:
            raise SpearError(
                f"--policy.fps is {config.fps}, but the dataset has {dataset_meta.fps} frames per "
                f"second. Set --policy.fps={dataset_meta.fps}."
            )
        self.spear = spear.Spear1Policy.load(
            folder or config.checkpoint, steps=config.steps, seed=config.seed
        )
        self.model = self.spear.model

        # While the first batches of a training are collected for the training distribution summary,
        # `_mean_initial_opening` is set.
        self._mean_initial_opening: float | None = None
        self._batches: list[dict[str, Any]] = []
        self.is_demonstrated: Array | None = None
        if dataset_meta is not None:
            self._use_statistics_of(dataset_meta, folder)
        apply_freeze(self.model, config.optimization)
        self.reset()

    def _use_statistics_of(self, dataset_meta: Any, folder: Path | None) -> None:
        """Take over a dataset's statistics, unless the checkpoint in `folder` has the same ones.

        `folder` is the spear checkpoint that training starts from; None for `config.checkpoint`.
        """
        self.is_demonstrated = find_demonstrated_frames(dataset_meta, self.robot)
        root = Path(dataset_meta.root)
        normalizer, mean_initial_opening = fit_statistics(
            root, self.robot, self.config, self.is_demonstrated, self.spear.normalizer.mode
        )
        normalizer = dataclasses.replace(normalizer, frames=self.spear.frames)
        is_resumed = folder is not None and normalizer == self.spear.normalizer
        if is_resumed:
            return
        if folder is not None:
            notice(f"{folder} has statistics of another dataset. Those of {root} replace them.")
        self.spear.normalizer = normalizer
        self.spear.training_distribution = None
        self._mean_initial_opening = mean_initial_opening

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        revision: str | None = None,
        dataset_meta: Any = None,
        **_: Any,
    ) -> Spear1Policy:
        """Load a folder that `save_pretrained` wrote, or a repository of the Hub with its files."""
        path = Path(pretrained_name_or_path)
        if not path.is_dir():
            # Of the repository only these files are fetched, without checkpoints of its training.
            patterns = ["config.json", f"{CHECKPOINT_FOLDER}/*"]
            snapshot = snapshot_download(
                str(pretrained_name_or_path), revision=revision, allow_patterns=patterns
            )
            path = Path(snapshot)
        config = config or PreTrainedConfig.from_pretrained(path)
        policy = cls(config, dataset_meta=dataset_meta, folder=path / CHECKPOINT_FOLDER)
        return policy.to(config.device).eval()

    def _save_pretrained(
        self, save_directory: Path, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Write the policy.

        LeRobot 0.6 calls this in the main process, with the weights that it has gathered from all
        processes. LeRobot 0.7 calls it in all processes, without weights, and the main one writes.

        Args:
            save_directory: The folder to write to.
            state_dict: All weights, if LeRobot has gathered them from several processes.
        """
        weights = {}
        for key, weight in (state_dict or self.state_dict()).items():
            # Every process has to gather, also one that does not write.
            weights[key.removeprefix("model.")] = gather(weight)
        if get_rank() > 0:
            return
        self.config._save_pretrained(save_directory)
        folder = save_directory / CHECKPOINT_FOLDER
        self.model.save_pretrained(folder, state_dict=weights)
        self.spear.processor.save(folder)
        normalizer = dataclasses.replace(self.spear.normalizer, frames=self.spear.frames)
        normalizer.save(folder / "normalizer.json")
        distribution = self._summarize_training()
        if distribution is not None:
            distribution.save(folder / "seen.json")

    def _summarize_training(self) -> TrainingDistribution | None:
        """Summarize the training distribution, as far as training has come."""
        if self._mean_initial_opening is None or not self._batches:
            return self.spear.training_distribution
        return TrainingDistribution.from_batches(self._batches, self._mean_initial_opening)

    def get_optim_params(self) -> list[dict[str, Any]]:
        """The recipe's parameter groups."""
        groups = make_optimizer(self.model, self.config.optimization).param_groups
        return [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in groups]

    def wrap_with_peft(self, *_: Any, **__: Any) -> Any:
        """Always raises SpearError, because adapters are saved without the dataset's statistics."""
        raise SpearError(
            "spear1 does not work with --peft. Leave it out, or use `spear train finetune-lora`."
        )

    def reset(self) -> None:
        """Begin a new episode: forget the commands that are left, and restart the noise."""
        # By this name LeRobot 0.7 finds the commands that are not yet handed out. It clears them
        # when the task changes in the middle of an episode.
        self._action_queue = CommandPacer(self.config.fps)
        self.spear.reset()

    def forward(
        self, batch: dict[str, Any], reduction: str = "mean"
    ) -> tuple[Tensor, dict[str, float]]:
        """Compute the flow-matching loss of a batch of the dataset, and the parts of the loss."""
        if reduction != "mean":
            raise SpearError(
                f"reduction {reduction!r} is not supported. Leave sample_weighting out."
            )
        robot_batch = self._to_robot_batch(batch)
        if self._mean_initial_opening is not None:
            self._collect(robot_batch)
        inputs = encode_robot_batch(self.spear.processor, self.spear.normalizer, robot_batch)
        inputs = torch.utils._pytree.tree_map_only(
            Tensor, lambda tensor: tensor.to(self.model.device), inputs
        )
        inputs["actions"] = Action.from_vector(inputs["actions"])
        flow_samples = self.config.training_recipe.flow_samples
        output = self.model(**inputs, flow_samples=flow_samples)
        return output.loss, {name: float(part) for name, part in output.parts.items()}

    def _to_robot_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Convert a batch of LeRobot's dataset to one as spear's own training draws it."""
        states = []
        actions = []
        action_masks = []
        for values, commands, is_past_end in zip(
            _to_numpy(batch[OBS_STATE]),
            _to_numpy(batch[ACTION]),
            _to_numpy(batch[f"{ACTION}_is_pad"]),
            strict=True,
        ):
            state = self.robot.to_state(values)
            chunk, mask = self.robot.to_actions(state, commands, is_past_end)
            states.append(state)
            actions.append(chunk)
            action_masks.append(mask)
        state = np.stack(states)
        action_mask = np.stack(action_masks)
        if self.is_demonstrated is not None:
            index = _to_numpy(batch["index"]).reshape(-1)
            action_mask &= find_demonstrated_actions(self.is_demonstrated, index)
        images = self._read_images(batch)
        return {
            "position": np.float32(state[:, :3]),
            "rotation": np.float32(state[:, 3:7]),
            "gripper": np.float32(state[:, 7]),
            "action": np.float32(np.stack(actions)),
            "action_mask": action_mask,
            "images": images,
            "views": {view: np.ones(len(state), bool) for view in images},
            "instruction": batch["task"],
            "dataset": np.zeros(len(state), int),
        }

    def _collect(self, robot_batch: dict[str, Any]) -> None:
        """Collect a batch for the training distribution summary, and summarize when there are
        enough."""
        self._batches.append(robot_batch)
        num_samples = len(self._batches) * len(robot_batch["position"])
        if num_samples >= NUM_SAMPLES:
            self.spear.training_distribution = self._summarize_training()
            self._mean_initial_opening = None
            self._batches = []

    def _read_state(self, batch: dict[str, Any]) -> Tensor:
        """Read the robots' numbers [B, d].

        Raises SpearError if they are not as many as the policy was trained on.
        """
        names = self.config.state_names
        state = batch.get(OBS_STATE, torch.zeros(1, 0))
        if state.shape[1] != len(names):
            raise SpearError(
                f"{OBS_STATE} has {state.shape[1]} numbers, but the policy was trained on "
                f"{len(names)} ({' '.join(names)}). Use the policy with the robot that it was "
                "trained for."
            )
        return state

    def _read_images(self, batch: dict[str, Any]) -> dict[str, Array]:
        """Read the images of each view: view → [B, h, w, 3].

        The wrist camera may be missing, as with spear's own commands.
        """
        images = {}
        for key, view in self.views.items():
            if key in batch:
                images[view] = _to_numpy(batch[key]).transpose(0, 2, 3, 1)
            elif view == "external":
                raise SpearError(
                    f"the observation has no {key}. Give its camera this name, or use --rename_map."
                )
        return images

    @torch.compiler.disable  # --use_torch_compile could not see through kinematics
    @torch.no_grad()
    def predict_action_chunk(
        self, batch: dict[str, Any], last: Tensor | None = None, **_: Any
    ) -> Tensor:
        """Predict the whole chunk as the robot takes it: commands [B, N, d].

        Args:
            batch: LeRobot's observations of B robots.
            last: [B, d] the last command of each robot; None if it is not known.
        """
        state = self._read_state(batch)
        values = _to_numpy(state)
        images = self._read_images(batch)
        tasks = batch["task"]
        if isinstance(tasks, str):
            tasks = [tasks] * len(values)
        if not all(tasks):
            raise SpearError("there is no instruction. Add --task.")

        observations = []
        for index, (numbers, task) in enumerate(zip(values, tasks, strict=True)):
            observation = {"observation/state": self.robot.to_state(numbers), "prompt": task}
            for view, view_images in images.items():
                observation[get_camera_key(view)] = view_images[index]
            observations.append(observation)
        results = self.spear.infer_batch(observations)

        last_commands = [None] * len(values) if last is None else _to_numpy(last)
        commands = []
        for result, numbers, last_command in zip(results, values, last_commands, strict=True):
            commands.append(self.robot.to_commands(result["actions"], numbers, last_command))
        return torch.from_numpy(np.stack(commands)).to(state.device)

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """Return the next command [B, d].

        A new chunk is predicted when the commands of `replan` actions are used up. Commands of one
        robot come no faster than `fps`; several robots are a simulator's, which does not wait.
        """
        num_commands = self.config.replan * self.config.stride

        def predict(last: Tensor | None) -> Tensor:
            chunk = self.predict_action_chunk(batch, last)
            return chunk[:, :num_commands].transpose(0, 1)

        is_single_robot = len(self._read_state(batch)) == 1
        return self._action_queue.next_command(predict, is_single_robot)


def fit_statistics(
    root: Path, robot: Robot, config: Spear1Config, is_demonstrated: Array, mode: Mode
) -> tuple[Normalizer, float]:
    """Fit the statistics of a dataset's translations and positions, over all its episodes.

    Args:
        root: The dataset.
        robot: What its numbers mean.
        config: The policy's.
        is_demonstrated: [frames] bool, from `find_demonstrated_frames`.
        mode: Which statistics normalize.

    Returns:
        The normalizer, and the mean gripper opening at the beginning of episodes.
    """
    state, action, episode, index = read_columns(root, OBS_STATE, ACTION, "episode_index", "index")
    notice_unlikely_units(robot, state)
    is_demonstrated_row = is_demonstrated[index]  # in the order of the rows of the columns above
    chunk_offsets = np.array(config.action_delta_indices)
    translations = []
    positions = []
    initial_openings = []
    for episode_number in np.unique(episode):
        is_of_episode = episode == episode_number
        states = state[is_of_episode].astype(np.float32)
        commands = action[is_of_episode].astype(np.float32)
        is_demonstrated_frame = is_demonstrated_row[is_of_episode]
        initial_openings.append(robot.to_state(states[0])[7])
        for frame in range(0, len(states), config.stride):
            robot_state = robot.to_state(states[frame])
            chunk_frames = frame + chunk_offsets
            chunk_commands = commands[np.minimum(chunk_frames, len(states) - 1)]
            actions, action_mask = robot.to_actions(
                robot_state, chunk_commands, chunk_frames >= len(states)
            )
            if action_mask[0] and is_demonstrated_frame[frame]:
                translations.append(actions[0, :3])
                positions.append(robot_state[:3])
    if not translations:
        raise SpearError(
            f"{root} has no frame that is a demonstration. Check its action_mask and the lengths "
            "of its episodes."
        )

    samples = np.hstack([translations, positions]).astype(np.float64)  # [frames, 3 + 3]
    if mode == "meanstd":
        low = samples.mean(0) - samples.std(0)
        high = samples.mean(0) + samples.std(0)
    else:
        quantiles = (0.01, 0.99) if mode == "quantile" else (0, 1)
        low, high = np.quantile(samples, quantiles, axis=0)
    offset = tuple(((high + low) / 2).tolist())
    scale = tuple(np.maximum((high - low) / 2, MIN_SCALES).tolist())
    normalizer = Normalizer(mode, offset[:3], scale[:3], offset[3:], scale[3:], len(translations))
    return normalizer, float(np.mean(initial_openings))


def _to_numpy(values: Tensor) -> Array:
    """Return a tensor's values as an array on the CPU."""
    return values.detach().cpu().numpy()
