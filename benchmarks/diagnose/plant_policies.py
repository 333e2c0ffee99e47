"""Faults of the policy itself: a folder with other statistics, weights or training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from spear.cli import main as run_command
from spear.data.store.episode_store import EpisodeStore, append_episodes
from spear.models.weights.folders import locate_checkpoint

NUM_TEXT_TOKENS = 1762
"""Rows of nano's token embeddings before the 3D tokens."""


def copy_policy(policy: str, target: Path) -> None:
    """Copy a policy's folder, in order to change it."""
    shutil.copytree(locate_checkpoint(policy), target)


def change_statistics(target: Path, **factors: float) -> None:
    """Exchange the normalization statistics for those of another robot.

    Args:
        target: the copy of the policy.
        factors: `scale` multiplies the scale of translations, and `position_shift_m` moves the
            middle of positions along all axes.
    """
    file = target / "normalizer.json"
    statistics = json.loads(file.read_text("utf-8"))
    scale = factors.get("scale", 1.0)
    statistics["translation_scale"] = [scale * value for value in statistics["translation_scale"]]
    shift_m = factors.get("position_shift_m", 0.0)
    statistics["position_offset"] = [shift_m + value for value in statistics["position_offset"]]
    file.write_text(json.dumps(statistics), "utf-8")


def ignore_images(target: Path, fraction: float) -> None:
    """Make a policy see only a fraction of what its image encoders see.

    Args:
        target: the copy of the policy.
        fraction: the factor on the weights of both projections of image features.
    """
    weights = _read_weights(target)
    for name in ("vlm.multi_modal_projector.linear.weight", "vlm.moge_projector.linear.weight"):
        weights[name] = fraction * weights[name]
    _write_weights(weights, target)


def ignore_words(target: Path) -> None:
    """Give all words the same embedding."""
    weights = _read_weights(target)
    name = "vlm.language_model.embed_tokens.weight"
    embeddings = weights[name].clone()  # [vocabulary, width]
    embeddings[:NUM_TEXT_TOKENS] = embeddings[:NUM_TEXT_TOKENS].mean(dim=0)
    weights[name] = embeddings
    _write_weights(weights, target)


def train_on_few(
    target: Path, episodes: Path, num_demonstrations: int, steps: int, lr: float
) -> None:
    """Train the shipped policy further on a few demonstrations.

    Args:
        target: the folder of the policy, which must not exist.
        episodes: the folder of all training episodes.
        num_demonstrations: how many of the training episodes there are.
        steps: number of training steps.
        lr: the learning rate.
    """
    run_folder = target.with_name(f"{target.name}-run")
    arguments = ["train", "nano-post", "--init", "nano", "--episodes", str(episodes)]
    arguments += ["--split", f"train[:{num_demonstrations}]", "--steps", str(steps)]
    arguments += ["--out", str(run_folder), "--set", f"lr={lr}"]
    if run_command(arguments) != 0:
        raise SystemExit(f"spear {' '.join(arguments)} failed")
    shutil.copytree(run_folder / "final", target)


def select_demonstrations(episodes: Path, target: Path, num_demonstrations: int) -> None:
    """Write the first episodes of a store to a store of their own, unless it is there."""
    if not target.is_dir():
        store = EpisodeStore(episodes)
        append_episodes([store[index] for index in range(num_demonstrations)], target)


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _write_weights(weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})


POLICY_CHANGES: Mapping[str, Callable[..., None]] = {
    "wrong-statistics": change_statistics,
    "ignores-images": ignore_images,
    "ignores-words": ignore_words,
}
"""Fault → the function that changes a copy of the policy."""
TRAINED_FAULTS = ("few-demonstrations", "overfitting")
"""Faults of a policy that is trained for them (`train_on_few`)."""
