"""Open loop: how far a policy's predicted actions are from the recorded ones, on held-out episodes.

Open-loop errors do not predict success (an error of a centimeter may grasp or miss), but they need
no robot, so they are the first check of a fine-tuning on real episodes. Two baselines need no
images: the mean action of the training episodes, which is the best constant one, and the last
action, repeated.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from spear.data.actions import HORIZON, canonicalize_actions, extract_chunk, resample_episode
from spear.data.store.episode_store import EpisodeStore
from spear.embodiments.observations import DEFAULT_IMAGE_SIZES, camera_key, get_image_sizes
from spear.errors import SpearError
from spear.evaluate.stats import Estimate, bootstrap
from spear.geometry import quat_distance
from spear.gripper import binarize_gripper
from spear.types import Array, Episode, Policy
from spear.util.images import decode_image
from spear.util.progress import ProgressBar, track_progress

GRIPPER_HALF_OPEN = 0.5
"""Commands on either side of this opening mean "open" and "close"."""


@dataclass(frozen=True)
class OpenLoopErrors:
    """One policy's open-loop errors on some episodes.

    name       of the policy, or of the baseline.
    episodes   per episode its errors by name, see `_compute_errors`.
    predicted  per episode [T, 8]: the first action of each predicted chunk.
    truth      per episode [T, 8]: the recorded actions, NaN where they are not known.
    """

    name: str
    episodes: Sequence[Mapping[str, Array]]
    predicted: Sequence[Array]
    truth: Sequence[Array]

    def summarize(self) -> dict[str, Estimate]:
        """The mean of each error, with intervals that resample whole episodes.

        Steps of one episode depend on each other. Raises `SpearError` if there is nothing to
        average.
        """
        if not any(len(errors["chunk_end_mm"]) for errors in self.episodes):
            raise SpearError(
                "no held-out episode has a whole chunk of known actions: give longer ones"
            )
        summary = {}
        for name in self.episodes[0]:
            summary[name] = bootstrap([errors[name] for errors in self.episodes], np.mean)
        return summary


def build_observations(
    episode: Episode, views: Collection[str] = tuple(DEFAULT_IMAGE_SIZES)
) -> list[dict[str, Any]]:
    """The observations of a policy with these cameras at each of the T steps of an episode.

    Args:
        episode: Its images are decoded.
        views: The policy's cameras.

    Returns:
        T observations (`spear.types.Policy`).

    Raises:
        SpearError: The episode has none of these cameras.
    """
    if not set(views) & set(episode.images):
        recorded_views = ", ".join(episode.images) or "none"
        raise SpearError(
            f"{episode.source}: cameras are {recorded_views}, the policy sees {', '.join(views)}"
        )
    columns = [episode.position, episode.rotation, episode.gripper[:, None]]
    states = np.concatenate(columns, 1, dtype=np.float32)
    observations: list[dict[str, Any]] = [
        {"observation/state": state, "prompt": episode.instruction} for state in states
    ]
    for view in views:
        for step, encoded in enumerate(episode.images.get(view, ())):
            source = f"{episode.source} step {step} camera {view!r}"
            observations[step][camera_key(view)] = decode_image(encoded, source)
    return observations


def score_policy(name: str, policy: Policy, store: EpisodeStore, batch: int = 32) -> OpenLoopErrors:
    """Compare a policy with the actions of every episode of a store, at 5 Hz, each step's whole
    chunk.

    Args:
        name: How the result is labeled.
        policy: Its noise is fixed by the step.
        store: Held-out episodes.
        batch: Observations that are answered at once.
    """

    def predict() -> Iterator[tuple[Episode, Array]]:
        bar = ProgressBar(f"asking {name}", len(store), "episodes")
        for episode in track_progress(map(resample_episode, store), bar):
            observations = build_observations(episode, get_image_sizes(policy))
            for step, observation in enumerate(observations):
                observation["seed"] = step
            chunks: list[Array] = []
            for start in range(0, len(observations), batch):
                results = policy.infer_batch(observations[start : start + batch])
                chunks += [result["actions"] for result in results]
            yield episode, np.stack(chunks)

    return _score_predictions(name, predict())


def mean_action(actions: Array) -> Array:
    """The action [8] nearest to many [N, 8]: mean translation and gripper, chordal mean rotation.

    The chordal mean on S³ is the top eigenvector of Σ q qᵀ, which does not depend on the signs of
    the quaternions.
    """
    actions = np.asarray(actions, np.float64)
    mean = actions.mean(axis=0)
    quats = actions[:, 3:7]
    _, eigenvectors = np.linalg.eigh(quats.T @ quats)
    rotation = eigenvectors[:, -1]
    mean[3:7] = rotation if rotation[0] >= 0 else -rotation
    return mean.astype(np.float32)


def score_mean_action(
    train: EpisodeStore, held_out: EpisodeStore, horizon: int = HORIZON
) -> OpenLoopErrors:
    """The errors of always predicting the mean action of `train`.

    horizon  length of the policy's chunks, so that the errors are comparable.
    """
    known_actions = []
    for episode in _read_without_images(train):
        actions, is_known = canonicalize_actions(episode)
        known_actions.append(actions[is_known])
    constant = mean_action(np.concatenate(known_actions))

    predictions = []
    for episode in _read_without_images(held_out):
        predictions.append((episode, np.tile(constant, (len(episode), horizon, 1))))
    return _score_predictions("mean action", predictions)


def score_last_action(held_out: EpisodeStore, horizon: int = HORIZON) -> OpenLoopErrors:
    """The errors of repeating the action of the step before for a whole chunk.

    In an episode's first step the prediction is to stand still, with the gripper as it is.
    """
    predictions = []
    for episode in _read_without_images(held_out):
        gripper = binarize_gripper(episode.gripper[:1])[0]
        idle_action = np.array([[0, 0, 0, 1, 0, 0, 0, gripper]], np.float32)
        actions, _ = canonicalize_actions(episode)
        last_actions = np.concatenate([idle_action, actions[:-1]])
        predictions.append((episode, np.repeat(last_actions[:, None], horizon, axis=1)))
    return _score_predictions("last action", predictions)


def _read_without_images(store: EpisodeStore) -> list[Episode]:
    return [resample_episode(store.without_images(index)) for index in range(len(store))]


def _score_predictions(name: str, predictions: Iterable[tuple[Episode, Array]]) -> OpenLoopErrors:
    """The errors of episodes with the chunks [T, H, 8] that are predicted at each of their
    steps.
    """
    errors = []
    predicted = []
    truth = []
    for episode, chunks in predictions:
        actions, is_known = canonicalize_actions(episode)
        errors.append(_compute_errors(chunks, actions, is_known))
        predicted.append(chunks[:, 0])
        truth.append(np.where(is_known[:, None], actions, np.nan))
    return OpenLoopErrors(name, errors, predicted, truth)


def _compute_errors(chunks: Array, actions: Array, is_known: Array) -> dict[str, Array]:
    """Compare chunks [T, H, 8] with an episode's actions [T, 8], of which some are known [T].

    translation_mm    [N] length of the difference of one step's displacements, for N known actions.
    chunk_end_mm      [M] distance between where the M whole chunks lead and where the actions lead.
    rotation_deg      [N] angle between the two step rotations.
    gripper_accuracy  [N] bool, both commands on the same side of half open.
    """
    horizon = chunks.shape[1]
    target_chunks = []
    target_masks = []
    for step in range(len(chunks)):
        target, mask = extract_chunk(actions, is_known, step, horizon)
        target_chunks.append(target)
        target_masks.append(mask)
    targets = np.stack(target_chunks)
    is_target = np.stack(target_masks)

    offset = chunks[..., :3] - targets[..., :3]
    angle = quat_distance(torch.as_tensor(chunks[..., 3:7]), torch.as_tensor(targets[..., 3:7]))
    opens = chunks[..., 7] > GRIPPER_HALF_OPEN
    should_open = targets[..., 7] > GRIPPER_HALF_OPEN
    is_whole_chunk = is_target.all(1)
    return {
        "translation_mm": (1000 * np.linalg.norm(offset, axis=-1))[is_target],
        "chunk_end_mm": (1000 * np.linalg.norm(offset.sum(1), axis=-1))[is_whole_chunk],
        "rotation_deg": np.degrees(angle.numpy())[is_target],
        "gripper_accuracy": (opens == should_open)[is_target],
    }
