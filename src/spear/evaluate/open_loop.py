"""Open loop: how far a policy's predicted actions are from the recorded ones, on held-out episodes.

Open-loop errors do not predict success, because an error of a centimeter may let the gripper grasp
or miss. But they need no robot, so they are the first check of a policy that was fine-tuned on real
episodes. Two baselines need no images. The first always predicts the mean action of the training
episodes, and the second repeats the last action.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from spear.data.actions import (
    HORIZON,
    extract_chunk_up_to_unknown,
    get_or_derive_actions,
    resample_episode,
)
from spear.data.store.episode_store import EpisodeStore
from spear.embodiments.observations import DEFAULT_IMAGE_SIZES, get_camera_key, get_image_sizes
from spear.errors import SpearError
from spear.evaluate.stats import Estimate, bootstrap
from spear.geometry import quat_distance
from spear.gripper import binarize_gripper
from spear.types import Array, Episode, Policy
from spear.util.images import decode_image
from spear.util.progress import ProgressBar, track_progress

GRIPPER_HALF_OPEN = 0.5
"""A command above this gripper opening means "open", a command below means "close"."""


@dataclass(frozen=True)
class OpenLoopErrors:
    """One policy's open-loop errors on some episodes.

    name       name of the policy, or of the baseline.
    episodes   for each episode: name of the error → its values, see `_compute_errors`.
    predicted  for each episode: the first action of each predicted chunk, [T, 8].
    truth      for each episode: the recorded actions [T, 8], NaN where they are not known.
    """

    name: str
    episodes: Sequence[Mapping[str, Array]]
    predicted: Sequence[Array]
    truth: Sequence[Array]

    def estimate_mean_errors(self) -> dict[str, Estimate]:
        """Average each error over all steps.

        The intervals come from a bootstrap over whole episodes, because the steps of one episode
        depend on each other.

        Raises:
            SpearError: No episode has a whole chunk of known actions.
        """
        if not any(len(errors["chunk_end_mm"]) for errors in self.episodes):
            raise SpearError(
                "no held-out episode has a whole chunk of known actions. Give longer episodes."
            )
        summary = {}
        for name in self.episodes[0]:
            summary[name] = bootstrap([errors[name] for errors in self.episodes], np.mean)
        return summary


def build_observations(
    episode: Episode, views: Collection[str] = tuple(DEFAULT_IMAGE_SIZES)
) -> list[dict[str, Any]]:
    """Build the observations that a policy would see at each of the T steps of an episode.

    Args:
        episode: The recorded episode, with encoded images.
        views: The policy's cameras.

    Returns:
        T observations (`spear.types.Policy`).

    Raises:
        SpearError: The episode has none of these cameras.
    """
    if not set(views) & set(episode.images):
        recorded_views = ", ".join(episode.images) or "none"
        raise SpearError(
            f"{episode.source} has the cameras {recorded_views}, but the policy sees "
            f"{', '.join(views)}. Name them alike in spear.json."
        )
    columns = [episode.position, episode.rotation, episode.gripper[:, None]]
    states = np.concatenate(columns, 1, dtype=np.float32)  # [T, 8]
    observations: list[dict[str, Any]] = [
        {"observation/state": state, "prompt": episode.instruction} for state in states
    ]
    for view in views:
        for step, encoded in enumerate(episode.images.get(view, ())):
            source = f"{episode.source} step {step} camera {view!r}"
            observations[step][get_camera_key(view)] = decode_image(encoded, source)
    return observations


def measure_policy_errors(
    name: str, policy: Policy, store: EpisodeStore, batch: int = 32
) -> OpenLoopErrors:
    """Compare a policy's predictions with the recorded actions of every episode of a store.

    Episodes are resampled to 5 Hz. At each step, the policy predicts a chunk, and the whole chunk
    is compared.

    Args:
        name: The name of the result.
        policy: The policy. The number of the step is the seed of its noise.
        store: Held-out episodes.
        batch: Number of observations that are answered at once.
    """

    def predict() -> Iterator[tuple[Episode, Array]]:
        bar = ProgressBar(f"asking {name}", len(store), "episodes")
        for episode in track_progress(map(resample_episode, store), bar):
            observations = build_observations(episode, get_image_sizes(policy))
            for step, observation in enumerate(observations):
                observation["seed"] = step
            chunks: list[Array] = []  # [H, 8] each
            for start in range(0, len(observations), batch):
                results = policy.infer_batch(observations[start : start + batch])
                chunks += [result["actions"] for result in results]
            yield episode, np.stack(chunks)

    return _measure_prediction_errors(name, predict())


def compute_mean_action(actions: Array) -> Array:
    """Compute the mean action [8] of many actions [N, 8].

    It has their mean translation and gripper value, and their chordal mean rotation. The chordal
    mean on S³ is the eigenvector of Σ q qᵀ with the largest eigenvalue, which does not depend on
    the signs of the quaternions.
    """
    actions = np.asarray(actions, np.float64)
    mean = actions.mean(axis=0)
    quats = actions[:, 3:7]
    _, eigenvectors = np.linalg.eigh(quats.T @ quats)  # in ascending order of eigenvalues
    rotation = eigenvectors[:, -1]
    mean[3:7] = rotation if rotation[0] >= 0 else -rotation
    return mean.astype(np.float32)


def measure_constant_mean_action_errors(
    train: EpisodeStore, held_out: EpisodeStore, horizon: int = HORIZON
) -> OpenLoopErrors:
    """Score the baseline that always predicts the mean action of the training episodes.

    Args:
        train: The training episodes.
        held_out: The episodes on which the baseline is scored.
        horizon: Length of the policy's chunks, so that the errors are comparable.
    """
    known_actions = []
    for episode in _read_resampled_without_images(train):
        actions, is_known = get_or_derive_actions(episode)
        known_actions.append(actions[is_known])
    mean_action = compute_mean_action(np.concatenate(known_actions))

    predictions = []
    for episode in _read_resampled_without_images(held_out):
        chunks = np.tile(mean_action, (len(episode), horizon, 1))  # [T, H, 8]
        predictions.append((episode, chunks))
    return _measure_prediction_errors("mean action", predictions)


def measure_repeated_action_errors(
    held_out: EpisodeStore, horizon: int = HORIZON
) -> OpenLoopErrors:
    """Score the baseline that repeats the action of the previous step for a whole chunk.

    In an episode's first step, it predicts that the arm stands still and the gripper stays as it
    is.

    Args:
        held_out: The episodes on which the baseline is scored.
        horizon: Length of the policy's chunks, so that the errors are comparable.
    """
    predictions = []
    for episode in _read_resampled_without_images(held_out):
        gripper = binarize_gripper(episode.gripper[:1])[0]
        idle_action = np.array([[0, 0, 0, 1, 0, 0, 0, gripper]], np.float32)
        actions, _ = get_or_derive_actions(episode)
        last_actions = np.concatenate([idle_action, actions[:-1]])  # [T, 8]
        chunks = np.repeat(last_actions[:, None], horizon, axis=1)  # [T, H, 8]
        predictions.append((episode, chunks))
    return _measure_prediction_errors("last action", predictions)


def _read_resampled_without_images(store: EpisodeStore) -> list[Episode]:
    """Read all episodes of a store at 5 Hz, without their images."""
    return [resample_episode(store.without_images(index)) for index in range(len(store))]


def _measure_prediction_errors(
    name: str, predictions: Iterable[tuple[Episode, Array]]
) -> OpenLoopErrors:
    """Compute the errors of predictions.

    Args:
        name: The name of the result.
        predictions: (episode, predicted chunks [T, H, 8], one per step) of each episode.
    """
    errors = []
    predicted = []
    truth = []
    for episode, chunks in predictions:
        actions, is_known = get_or_derive_actions(episode)
        errors.append(_compute_errors(chunks, actions, is_known))
        predicted.append(chunks[:, 0])
        truth.append(np.where(is_known[:, None], actions, np.nan))
    return OpenLoopErrors(name, errors, predicted, truth)


def _compute_errors(chunks: Array, actions: Array, is_known: Array) -> dict[str, Array]:
    """Compare predicted chunks with the recorded actions of an episode.

    Every action of every chunk is compared with the recorded action of the same time, if this is
    known. There are N such comparisons. M chunks are compared as a whole, because all recorded
    actions of their time are known.

    Args:
        chunks: [T, H, 8] predicted chunks.
        actions: [T, 8] recorded actions.
        is_known: [T] whether each recorded action is known.

    Returns:
        translation_mm    [N] distance between predicted and recorded displacement.
        chunk_end_mm      [M] distance between the end points of predicted and recorded chunk.
        rotation_deg      [N] angle between predicted and recorded rotation.
        gripper_accuracy  [N] bool, whether both commands open or both close the gripper.
    """
    horizon = chunks.shape[1]
    target_chunks = []
    target_masks = []
    for step in range(len(chunks)):
        target, mask = extract_chunk_up_to_unknown(actions, is_known, step, horizon)
        target_chunks.append(target)
        target_masks.append(mask)
    targets = np.stack(target_chunks)  # [T, H, 8]
    is_target = np.stack(target_masks)  # [T, H]
    is_whole_chunk = is_target.all(1)  # [T]

    offset = chunks[..., :3] - targets[..., :3]
    translation_mm = 1000 * np.linalg.norm(offset, axis=-1)  # [T, H]
    chunk_end_mm = 1000 * np.linalg.norm(offset.sum(1), axis=-1)  # [T]
    angle = quat_distance(torch.as_tensor(chunks[..., 3:7]), torch.as_tensor(targets[..., 3:7]))
    opens = chunks[..., 7] > GRIPPER_HALF_OPEN
    should_open = targets[..., 7] > GRIPPER_HALF_OPEN
    return {
        "translation_mm": translation_mm[is_target],
        "chunk_end_mm": chunk_end_mm[is_whole_chunk],
        "rotation_deg": np.degrees(angle.numpy())[is_target],
        "gripper_accuracy": (opens == should_open)[is_target],
    }
