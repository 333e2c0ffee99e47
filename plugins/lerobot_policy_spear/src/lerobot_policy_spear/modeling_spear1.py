"""SPEAR-1 behind LeRobot's `PreTrainedPolicy`; networks, statistics and sampling are spear's.

A saved policy is LeRobot's config.json and a folder `spear` beside it, which is a checkpoint as spear's own
commands take it (`spear serve .../pretrained_model/spear`).
"""

from __future__ import annotations

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
from spear.embodiments.observations import camera_key
from spear.errors import SpearError, notice
from spear.monitor.distribution import NUM_SAMPLES, TrainingDistribution
from spear.train.optimize import apply_freeze, make_optimizer
from spear.train.tasks import encode_robot_batch
from spear.types import Action, Array

from .configuration_spear1 import Spear1Config
from .robots import Pace, Robot, columns, counting, demonstrated, doubt_units

FOLDER = "spear"
"""Beside LeRobot's own file."""


class Spear1Policy(PreTrainedPolicy):
    """`config` says where it starts from; folder: a spear checkpoint to use instead.

    With a dataset, which only training gives, the statistics are those of it, as after `spear train`.
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
        super().__init__(config)
        self.robot, self.views = config.robot(), config.views()
        if dataset_meta is not None and dataset_meta.fps != config.fps:
            raise SpearError(
                f"--policy.fps={config.fps}, but the dataset has {dataset_meta.fps}: give that"
            )
        self.spear = spear.Spear1Policy.load(
            folder or config.checkpoint, steps=config.steps, seed=config.seed
        )
        self.model, self.mask = self.spear.model, None
        self._begins: float | None = None  # known, while batches of a training are kept
        self._batches: list[dict[str, Any]] = []
        if dataset_meta is not None:
            self.mask = counting(dataset_meta, self.robot)
            mode = self.spear.normalizer.mode
            fitted, begins = fit(Path(dataset_meta.root), self.robot, config, self.mask, mode)
            if folder is None or fitted != self.spear.normalizer:
                if folder is not None:
                    notice(f"{folder} has another dataset's statistics: this one's replace them")
                self.spear.normalizer, self._begins, self.spear.training_distribution = (
                    fitted,
                    begins,
                    None,
                )
        apply_freeze(self.model, config.optimization)
        self.reset()

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
        """From a folder that `save_pretrained` wrote, or a repository of the Hub with its files."""
        name, path = str(pretrained_name_or_path), Path(pretrained_name_or_path)
        if not path.is_dir():
            own = ["config.json", f"{FOLDER}/*"]  # not the checkpoints of its training
            path = Path(snapshot_download(name, revision=revision, allow_patterns=own))
        config = config or PreTrainedConfig.from_pretrained(path)
        policy = cls(config, dataset_meta=dataset_meta, folder=path / FOLDER)
        return policy.to(config.device).eval()

    def _save_pretrained(
        self, save_directory: Path, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """state_dict: the weights, where they are spread over several processes (FSDP)."""
        self.config._save_pretrained(save_directory)
        folder = save_directory / FOLDER
        whole = state_dict and {
            key.removeprefix("model."): weight for key, weight in state_dict.items()
        }
        self.model.save_pretrained(folder, state_dict=whole)
        self.spear.processor.save(folder)
        self.spear.normalizer.save(folder / "normalizer.json")
        if known := self._known():
            known.save(folder / "seen.json")

    def _known(self) -> TrainingDistribution | None:
        """What it saw in training, as far as that has come."""
        if self._begins is None or not self._batches:
            return self.spear.training_distribution
        return TrainingDistribution.from_batches(self._batches, self._begins)

    def get_optim_params(self) -> list[dict[str, Any]]:
        """The recipe's groups."""
        groups = make_optimizer(self.model, self.config.optimization).param_groups
        return [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in groups]

    def wrap_with_peft(self, *_: Any, **__: Any) -> Any:
        """No: adapters are saved without the dataset's statistics. Always raises `SpearError`."""
        raise SpearError(
            "--peft: not with spear1: leave it out, or use `spear train finetune-lora`"
        )

    def reset(self) -> None:
        """A new episode: no actions wait, and the noise begins anew."""
        self._pace = Pace(self.config.fps)
        self.spear.reset()

    def forward(
        self, batch: dict[str, Any], reduction: str = "mean"
    ) -> tuple[Tensor, dict[str, float]]:
        """The flow loss of a batch of the dataset, and its parts."""
        if reduction != "mean":
            raise SpearError(f"reduction {reduction!r}: leave sample_weighting out")
        states = np.stack([self.robot.state(values) for values in _numpy(batch[OBS_STATE])])
        beyond = _numpy(batch[f"{ACTION}_is_pad"])
        pairs = [
            self.robot.chunk(*row)
            for row in zip(states, _numpy(batch[ACTION]), beyond, strict=True)
        ]
        actions, known = (np.stack(column) for column in zip(*pairs, strict=True))
        if self.mask is not None:
            known &= demonstrated(self.mask, _numpy(batch["index"]).reshape(-1))
        images = self._images(batch)
        raw = {
            "position": np.float32(states[:, :3]),
            "rotation": np.float32(states[:, 3:7]),
            "gripper": np.float32(states[:, 7]),
            "action": np.float32(actions),
            "action_mask": known,
            "images": images,
            "views": {view: np.ones(len(states), bool) for view in images},
            "instruction": batch["task"],
            "dataset": np.zeros(len(states), int),
        }
        if self._begins is not None:
            self._batches.append(raw)
            if len(self._batches) * len(states) >= NUM_SAMPLES:
                self.spear.training_distribution, self._begins, self._batches = (
                    self._known(),
                    None,
                    [],
                )
        inputs = encode_robot_batch(self.spear.processor, self.spear.normalizer, raw)
        put = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(self.model.device), inputs)
        put["actions"] = Action.from_vector(put["actions"])
        output = self.model(**put, flow_samples=self.config.stage.flow_samples)
        return output.loss, {name: float(part) for name, part in output.parts.items()}

    def _state(self, batch: dict[str, Any]) -> Tensor:
        """The robots' numbers [B, d]. Raises `SpearError` for others than the policy was trained on."""
        names, found = self.config.state_names, batch.get(OBS_STATE, torch.zeros(1, 0))
        if found.shape[1] != len(names):
            known = f"the policy knows {len(names)}: {' '.join(names)}"
            raise SpearError(
                f"{OBS_STATE} has {found.shape[1]} numbers, {known}: is it this robot's?"
            )
        return found

    def _images(self, batch: dict[str, Any]) -> dict[str, Array]:
        """View → images [B, h, w, 3]. A wrist camera may be missing, as with spear's own commands."""
        if missing := [
            key for key, view in self.views.items() if view == "external" and key not in batch
        ]:
            raise SpearError(f"no {missing[0]}: give its camera this name, or --rename_map")
        there = {view: _numpy(batch[key]) for key, view in self.views.items() if key in batch}
        return {view: images.transpose(0, 2, 3, 1) for view, images in there.items()}

    @torch.compiler.disable  # --use_torch_compile could not see through kinematics
    @torch.no_grad()
    def predict_action_chunk(
        self, batch: dict[str, Any], last: Tensor | None = None, **_: Any
    ) -> Tensor:
        """[B, rows, d]: the whole chunk as the robot takes it; last [B, d]: the rows that came before."""
        state = self._state(batch)
        values = _numpy(state)
        images = {camera_key(view): shown for view, shown in self._images(batch).items()}
        tasks = [batch["task"]] * len(values) if isinstance(batch["task"], str) else batch["task"]
        if not all(tasks):
            raise SpearError("no instruction: give --task")
        seen = [
            {"observation/state": self.robot.state(numbers), "prompt": task}
            | {key: shown[i] for key, shown in images.items()}
            for i, (numbers, task) in enumerate(zip(values, tasks, strict=True))
        ]
        chunks = [result["actions"] for result in self.spear.infer_batch(seen)]
        before = [None] * len(values) if last is None else _numpy(last)
        rows = [self.robot.rows(*each) for each in zip(chunks, values, before, strict=True)]
        return torch.from_numpy(np.stack(rows)).to(state.device)

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """[B, d]: the next row; looks when those of `replan` actions are used up. One robot's come no faster
        than `fps`; several are a simulator's."""
        count = self.config.replan * self.config.stride

        def look(last: Tensor | None) -> Tensor:
            return self.predict_action_chunk(batch, last)[:, :count].transpose(0, 1)

        return self._pace.row(look, one=len(self._state(batch)) == 1)


def fit(
    root: Path, robot: Robot, config: Spear1Config, mask: Array, mode: Mode
) -> tuple[Normalizer, float]:
    """The statistics of a dataset's translations and positions, of all its episodes, and the mean opening
    with which these begin; mask: of these frames [frames]."""
    state, action, episode, index = columns(root, OBS_STATE, ACTION, "episode_index", "index")
    doubt_units(robot, state)
    counts = mask[index]
    ahead = np.array(config.action_delta_indices)
    moves, places, begins = [], [], []
    for number in np.unique(episode):
        states, commands = (x[episode == number].astype(np.float32) for x in (state, action))
        count = counts[episode == number]
        begins.append(robot.state(states[0])[7])
        for at in range(0, len(states), config.stride):
            here, when = robot.state(states[at]), at + ahead
            rows = commands[np.minimum(when, len(states) - 1)]
            actions, known = robot.chunk(here, rows, when >= len(states))
            if known[0] and count[at]:
                moves.append(actions[0, :3])
                places.append(here[:3])
    if not moves:
        raise SpearError(f"{root}: no frame that counts: check its action_mask and lengths")
    seen = np.hstack([moves, places]).astype(np.float64)
    ends = (0.01, 0.99) if mode == "quantile" else (0, 1)
    low, high = np.quantile(seen, ends, axis=0)
    if mode == "meanstd":
        low, high = seen.mean(0) - seen.std(0), seen.mean(0) + seen.std(0)
    offset = tuple(((high + low) / 2).tolist())
    scale = tuple(np.maximum((high - low) / 2, MIN_SCALES).tolist())
    normalizer = Normalizer(mode, offset[:3], scale[:3], offset[3:], scale[3:], len(moves))
    return normalizer, float(np.mean(begins))


def _numpy(values: Tensor) -> Array:
    return values.detach().cpu().numpy()
