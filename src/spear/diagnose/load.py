"""Reads what a diagnosis looks at: a rollout and training episodes, with small pictures."""

import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from spear.checks.rollout.episode import CameraPictures, RecordedEpisode, ServedTimes
from spear.checks.rollout.pictures import PICTURE_WIDTH_PX, PictureReferences
from spear.data.actions import get_or_derive_actions
from spear.data.readers.formats import find_format, find_stores_in_subfolders, open_dataset
from spear.data.store.episode_store import EpisodeStore
from spear.diagnose.policy_case import PolicyCase
from spear.embodiments import load as load_embodiment
from spear.errors import SpearError, suppress_notices
from spear.models.devices import prepare_device
from spear.policy import Spear1Policy
from spear.types import Array, WidthAndHeight
from spear.util.images import decode_image, fit_image

MAX_ROLLOUT_STEPS = 600  # two minutes at 5 Hz; the newest episodes are looked at
MAX_TRAINING_EPISODES = 80  # spread over the store
MAX_TRAINING_STEPS = 2000
# The control of a robot whose file computes poses from joint angles (examples/so101.py). Robots
# like DROID, which also take joint angles but report poses, give their controls other names.
JOINTS_CONTROL = "joints"

ImageSizes = Mapping[str, WidthAndHeight]
"""Camera → (width, height) in pixels of the images that the policy takes."""


def read_newest_episodes(store: EpisodeStore, image_sizes: ImageSizes) -> list[RecordedEpisode]:
    """Read the newest episodes of a store, about `MAX_ROLLOUT_STEPS` steps, the oldest first."""
    indices: list[int] = []
    num_steps = 0
    for index in reversed(range(len(store))):
        num_steps += int(store.lengths[index])
        if indices and num_steps > MAX_ROLLOUT_STEPS:
            break
        indices.insert(0, index)
    return [read_episode(store, index, image_sizes) for index in indices]


def sample_demonstrations(store: EpisodeStore, image_sizes: ImageSizes) -> list[RecordedEpisode]:
    """Read some episodes that are spread over a store, in a fixed random order."""
    num_episodes = min(len(store), MAX_TRAINING_EPISODES)
    spread = np.unique(np.linspace(0, len(store) - 1, num_episodes).round().astype(int))
    episodes = []
    num_steps = 0
    # A fixed random order, so that the limit of steps leaves out no end of the store.
    for index in np.random.default_rng(0).permutation(spread).tolist():
        episodes.append(read_episode(store, index, image_sizes))
        num_steps += len(episodes[-1])
        if num_steps > MAX_TRAINING_STEPS:
            break
    return episodes


def read_episode(store: EpisodeStore, index: int, image_sizes: ImageSizes) -> RecordedEpisode:
    """Read one episode of a store."""
    episode = store[index]
    action, is_known = get_or_derive_actions(episode)
    served = store.served_steps(index)
    times = None
    if served is not None:
        times = ServedTimes(served.arrival_s, served.answer_s, served.actions)
    pictures = {}
    for camera, encoded in episode.images.items():
        size = image_sizes.get(camera)
        pictures[camera] = _decode_and_shrink(list(encoded), size, f"{episode.source} {camera}")
    return RecordedEpisode(
        source=episode.source,
        instruction=episode.instruction,
        rate_hz=episode.rate_hz,
        position=episode.position,
        rotation=episode.rotation,
        opening=episode.gripper,
        action=action,
        is_known=np.asarray(is_known, bool),
        pictures=pictures,
        served=times,
    )


def _decode_and_shrink(
    encoded: list[bytes], size: WidthAndHeight | None, context: str
) -> CameraPictures:
    """Reduce a camera's encoded pictures, each different one once.

    Args:
        encoded: [T] encoded pictures.
        size: (width, height) of the view of the policy; None to keep the pictures' aspect.
        context: names episode and camera in errors.
    """
    fingerprints = [zlib.crc32(image) for image in encoded]
    small_by_fingerprint: dict[int, Array] = {}
    recorded_size = (0, 0)
    for step, (fingerprint, image) in enumerate(zip(fingerprints, encoded, strict=True)):
        if fingerprint in small_by_fingerprint:
            continue
        pixels = decode_image(image, f"{context} step {step}")
        recorded_size = (pixels.shape[1], pixels.shape[0])
        width, height = size or recorded_size
        small_height = max(2, round(PICTURE_WIDTH_PX * height / width))
        small_by_fingerprint[fingerprint] = fit_image(pixels, small_height, PICTURE_WIDTH_PX)
    return CameraPictures(
        small=np.stack([small_by_fingerprint[fingerprint] for fingerprint in fingerprints]),
        fingerprint=np.array(fingerprints),
        size=recorded_size,
    )


def load_case(
    policy_name: str,
    episodes: Path | None,
    rollout: Path | None,
    device: str = "auto",
    norm_stats: str | None = None,
    robot: str | None = None,
) -> PolicyCase:
    """Load a policy, its training episodes and a rollout.

    Args:
        policy_name: the policy.
        episodes: folder of the training episodes, in any format; None without them.
        rollout: folder of the rollout, an episode store; None without one.
        device: where the policy computes.
        norm_stats: the training dataset whose statistics the policy uses, if it has several.
        robot: an embodiment's name, or a robot's file; None for the one that the rollout names.

    Raises:
        SpearError: a folder cannot be read.
    """
    if robot is not None:
        load_embodiment(robot)  # raises an error for an unknown name
    return with_rollout(load_policy_case(policy_name, episodes, device, norm_stats), rollout, robot)


def load_policy_case(
    policy_name: str, episodes: Path | None, device: str = "auto", norm_stats: str | None = None
) -> PolicyCase:
    """Load a policy and its training episodes, to which several rollouts may be added.

    The arguments are those of `load_case`.
    """
    policy = Spear1Policy.load(policy_name, prepare_device(device), dataset=norm_stats)
    training = None
    demonstrations: list[RecordedEpisode] = []
    instructions: list[str] = []
    if episodes is not None:
        training = _open_demonstrations(episodes)
        demonstrations = sample_demonstrations(training, policy.image_sizes)
        indices = range(len(training))
        texts = [training.without_images(index).instruction for index in indices]
        instructions = list(dict.fromkeys(texts))
    return PolicyCase(
        demonstrations=demonstrations,
        instructions=instructions,
        references=PictureReferences(demonstrations),
        policy=policy,
        training=training,
    )


def with_rollout(case: PolicyCase, rollout: Path | None, robot: str | None = None) -> PolicyCase:
    """Return a case with a rollout, which shares all that does not depend on the rollout."""
    if rollout is None:
        return replace(case, robot=robot)
    store = EpisodeStore(rollout)
    session = _read_session(store)
    return replace(
        case,
        rollout=read_newest_episodes(store, case.get_policy().image_sizes),
        rollout_store=store,
        robot=robot or session.get("embodiment"),
        takes_joints=session.get("control") == JOINTS_CONTROL,
    )


def _read_session(store: EpisodeStore) -> Mapping[str, Any]:
    """Read which policy, embodiment and control a server recorded; empty if none recorded them."""
    served = store.served_steps(len(store) - 1)
    return {} if served is None else served.session


def _open_demonstrations(path: Path) -> EpisodeStore:
    """Open the demonstrations of a store, or of the only store in the folder `data` of a run.

    Raises:
        SpearError: the folder contains several stores, or episodes in another format than ours.
    """
    if find_format(path) is None:
        stores = find_stores_in_subfolders(path)
        path = stores[0] if len(stores) == 1 else path
    if not isinstance(open_dataset(path), EpisodeStore):
        raise SpearError(
            f"{path} is not prepared yet. Run spear data prepare {path} --out prepared, and give "
            "--episodes prepared."
        )
    with suppress_notices():
        return EpisodeStore(path).drop_failed_episodes()
