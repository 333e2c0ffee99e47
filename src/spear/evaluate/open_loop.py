"""Open loop: how far a policy's predicted actions are from what the demonstrator did, on held-out episodes.

This says nothing about success (an error of a centimetre may grasp or miss), but it needs no robot: it is
the first check of a fine-tuning on real episodes. Two references need no images: the mean action of the
training episodes, which is the best constant one, and the last action, repeated.
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


@dataclass(frozen=True)
class OpenLoopErrors:
    """One policy's open-loop errors on some episodes.

    episodes   of each its errors by name, see `_errors`.
    predicted, truth  per episode [T, 8]: the first action of each chunk, and what was done (NaN where that is
                      not known).
    """

    name: str
    episodes: Sequence[Mapping[str, Array]]
    predicted: Sequence[Array]
    truth: Sequence[Array]

    def summarize(self) -> dict[str, Estimate]:
        """Means with intervals that resample whole episodes (steps of one episode depend on each other).
        Raises SpearError where there is nothing to take a mean of."""
        if not any(len(e["chunk_end_mm"]) for e in self.episodes):
            raise SpearError(
                "no held-out episode has a whole chunk of known actions: give longer ones"
            )
        names = self.episodes[0]
        return {name: bootstrap([e[name] for e in self.episodes], np.mean) for name in names}


def build_observations(
    episode: Episode, views: Collection[str] = tuple(DEFAULT_IMAGE_SIZES)
) -> list[dict[str, Any]]:
    """What a policy with these cameras would have seen at each of the T steps (`spear.types.Policy`)."""
    if not set(views) & set(episode.images):
        there = ", ".join(episode.images) or "none"
        raise SpearError(
            f"{episode.source}: cameras are {there}, the policy sees {', '.join(views)}"
        )
    parts = [episode.position, episode.rotation, episode.gripper[:, None]]
    state = np.concatenate(parts, 1, dtype=np.float32)
    seen: list[dict[str, Any]] = [
        {"observation/state": s, "prompt": episode.instruction} for s in state
    ]
    for camera in views:
        for step, encoded in enumerate(episode.images.get(camera, ())):
            where = f"{episode.source} step {step} camera {camera!r}"
            seen[step][camera_key(camera)] = decode_image(encoded, where)
    return seen


def score_policy(name: str, policy: Policy, store: EpisodeStore, batch: int = 32) -> OpenLoopErrors:
    """A policy against the actions of every episode of a store, at 5 Hz, each step's whole chunk."""

    def predictions() -> Iterator[tuple[Episode, Array]]:
        for episode in track_progress(
            map(resample_episode, store), ProgressBar(f"asking {name}", len(store), "episodes")
        ):
            seen = [
                {**o, "seed": step}
                for step, o in enumerate(build_observations(episode, get_image_sizes(policy)))
            ]
            chunks: list[Array] = []
            for start in range(0, len(seen), batch):
                chunks += [r["actions"] for r in policy.infer_batch(seen[start : start + batch])]
            yield episode, np.stack(chunks)

    return _score(name, predictions())


def mean_action(actions: Array) -> Array:
    """The one action [8] nearest to many [N, 8]: mean translation and gripper, chordal mean rotation.

    The chordal mean on S³ is the top eigenvector of Σ q qᵀ, which does not depend on the signs of the
    quaternions.
    """
    actions = np.asarray(actions, np.float64)
    mean, quats = actions.mean(axis=0), actions[:, 3:7]
    rotation = np.linalg.eigh(quats.T @ quats)[1][:, -1]
    mean[3:7] = rotation if rotation[0] >= 0 else -rotation
    return mean.astype(np.float32)


def score_mean_action(
    train: EpisodeStore, held_out: EpisodeStore, horizon: int = HORIZON
) -> OpenLoopErrors:
    """The same errors for always predicting the mean action of `train`, in chunks as long as the policy's."""
    known = [action[valid] for action, valid in map(canonicalize_actions, _without_images(train))]
    constant = mean_action(np.concatenate(known))
    chunks = ((e, np.tile(constant, (len(e), horizon, 1))) for e in _without_images(held_out))
    return _score("mean action", chunks)


def score_last_action(held_out: EpisodeStore, horizon: int = HORIZON) -> OpenLoopErrors:
    """The same errors for doing again, a whole chunk long, what was done in the step before; in an episode's
    first step, for standing still, the gripper as it is."""

    def repeated(episode: Episode) -> tuple[Episode, Array]:
        still = np.array(
            [[0, 0, 0, 1, 0, 0, 0, binarize_gripper(episode.gripper[:1])[0]]], np.float32
        )
        before = np.concatenate([still, canonicalize_actions(episode)[0][:-1]])
        return episode, np.repeat(before[:, None], horizon, axis=1)

    return _score("last action", map(repeated, _without_images(held_out)))


def _without_images(store: EpisodeStore) -> list[Episode]:
    return [resample_episode(store.without_images(i)) for i in range(len(store))]


def _score(name: str, predictions: Iterable[tuple[Episode, Array]]) -> OpenLoopErrors:
    """From episodes with the chunks [T, H, 8] that are predicted at each of their steps."""
    errors, predicted, truth = [], [], []
    for episode, chunks in predictions:
        actions, valid = canonicalize_actions(episode)
        errors.append(_errors(chunks, actions, valid))
        predicted.append(chunks[:, 0])
        truth.append(np.where(valid[:, None], actions, np.nan))
    return OpenLoopErrors(name, errors, predicted, truth)


def _errors(chunks: Array, actions: Array, valid: Array) -> dict[str, Array]:
    """Chunks [T, H, 8] against an episode's actions [T, 8], of which those that are `valid` [T] are known.

    translation_mm    [N] length of the difference of one step's displacements, for N known actions.
    chunk_end_mm      [M] distance between where the M whole chunks lead and where the actions lead.
    rotation_deg      [N] angle between the two step rotations.
    gripper_accuracy  [N] bool, both commands on the same side of half open.
    """
    targets = [extract_chunk(actions, valid, step, chunks.shape[1]) for step in range(len(chunks))]
    truth, known = np.stack([t for t, _ in targets]), np.stack([k for _, k in targets])
    apart = chunks[..., :3] - truth[..., :3]
    angle = quat_distance(torch.as_tensor(chunks[..., 3:7]), torch.as_tensor(truth[..., 3:7]))
    return {
        "translation_mm": (1000 * np.linalg.norm(apart, axis=-1))[known],
        "chunk_end_mm": (1000 * np.linalg.norm(apart.sum(1), axis=-1))[known.all(1)],
        "rotation_deg": np.degrees(angle.numpy())[known],
        "gripper_accuracy": ((chunks[..., 7] > 0.5) == (truth[..., 7] > 0.5))[known],
    }
