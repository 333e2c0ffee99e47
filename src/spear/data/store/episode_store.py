"""The store of episodes: random access to episodes and images of a folder, by memory mapping.

A store is a folder of shards, each of which has many episodes (`spear.data.store.shard`). It is
either recorded (`append_episodes`, with which several processes may append to one folder) or
prepared for training (`spear.data.store.prepare`). The episodes of a store may differ in rate,
cameras and image sizes.
"""

import bisect
import contextlib
import copy
import hashlib
import itertools
import os
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spear.data.store.shard import ServedSteps, Shard, open_shard, write_shard_files
from spear.errors import SpearError, format_count, notice, to_sentence
from spear.types import Array, Episode
from spear.util.files import convert_write_errors, notice_missing_shards, read_json

SHARD_GLOB = "episodes-*.arrow"
REQUEST_FILE = "request.json"  # in a prepared folder, says what made it and its number of shards
MAX_HASHED_EPISODES = 1000  # the fingerprints of a store read the steps of this many episodes
POSE_DECIMALS = 4  # to which an episode's fingerprint rounds poses, so that float noise is ignored


def append_episodes(episodes: Iterable[Episode], folder: Path, shard_size: int = 256) -> int:
    """Check episodes, add their canonical actions, and append them to a store, as new shards.

    A shard appears complete or not at all, and takes the next free number. Several processes may
    therefore append to one folder.

    Args:
        episodes: The episodes.
        folder: The folder of the store, which is made if it does not exist.
        shard_size: The number of episodes in a shard.

    Returns:
        The number of episodes written.

    Raises:
        SpearError: If an episode is bad or the disk is full. The shards written before stay
            readable.
    """
    # Imported here, so that reading a store does not load PyTorch.
    from spear.data.actions import validate_episode, with_canonical_actions

    folder.mkdir(parents=True, exist_ok=True)
    checked_episodes = (with_canonical_actions(validate_episode(episode)) for episode in episodes)
    num_written = 0
    while shard_episodes := list(itertools.islice(checked_episodes, shard_size)):
        add_shard(shard_episodes, folder, note={})
        num_written += len(shard_episodes)
    return num_written


def add_shard(episodes: Sequence[Episode], folder: Path, note: Mapping[str, str]) -> None:
    """Write episodes as a shard with the next free number.

    Args:
        episodes: At least one checked episode, with canonical actions.
        folder: The folder of the store.
        note: Key → text, to be kept with the shard.

    Raises:
        SpearError: If the shard cannot be written.
    """
    temporary = folder / f".episodes-{uuid.uuid4().hex}.arrow"
    temporary_images = temporary.with_suffix(".images")
    try:
        with convert_write_errors(folder):
            write_shard_files(temporary, episodes, note)  # and its images, beside it
            # Linking fails if the name exists, so no two processes get the same number.
            for number in itertools.count(len(list_shards(folder))):
                target = folder / f"episodes-{number:05d}.arrow"
                with contextlib.suppress(FileExistsError):
                    # A shard counts once its Arrow file exists, so the images are linked first.
                    os.link(temporary_images, target.with_suffix(".images"))
                    os.link(temporary, target)
                    break
    finally:
        temporary_images.unlink(missing_ok=True)
        temporary.unlink(missing_ok=True)


def remove_unfinished_shards(folder: Path) -> None:
    """Remove the partial shards that killed writers left behind.

    Call this only while no other process writes to the folder.
    """
    for file in list(folder.glob(".episodes-*")):
        file.unlink()
    for images in list(folder.glob("episodes-*.images")):
        if not images.with_suffix(".arrow").is_file():
            images.unlink()


def list_shards(folder: Path) -> list[Path]:
    """List the shards of a folder, in order."""
    return sorted(folder.glob(SHARD_GLOB))


class EpisodeStore:
    """The episodes of a folder, which are read when they are asked for.

    Every episode has canonical actions, and a mask that says which of them are known. E is the
    number of episodes.

    Attributes:
        path: The folder.
        is_complete: Whether these are all episodes of the folder that can be learned from; False
            for a `subset`.
        lengths: [E] number of steps of each episode.
        num_known_actions: [E] number of steps of each episode that have a known action.
        rates_hz: [E] steps per second of each episode.

    Raises:
        SpearError: If the folder has no episodes, or a file of it is broken.

    Example:
        >>> store = EpisodeStore("runs/episodes")  # doctest: +SKIP
        >>> len(store), store[0].instruction  # doctest: +SKIP
        (32, 'put the carrot on the plate')
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.is_complete = True
        files = list_shards(self.path)
        if not files:
            raise SpearError(
                f"{path} contains no episodes ({SHARD_GLOB}). Record some with `spear record`, "
                "or convert some with `spear data prepare`."
            )
        notice_missing_shards(
            self.path,
            files,
            "copy those that are missing, with the same command as the others",
            self._read_num_expected_shards(),
        )

        self._shards = [open_shard(file) for file in files]
        shard_lengths = [len(shard) for shard in self._shards]
        # The folder's episodes are numbered through all shards. Here are the number of each shard's
        # first episode and, as the last entry, the count of all these episodes.
        self._shard_starts = np.cumsum([0, *shard_lengths]).tolist()
        # [E] the number, in the folder, of each episode of this store; a subset has only some.
        self._episode_numbers = np.arange(self._shard_starts[-1])
        self.lengths: Array = np.concatenate([np.diff(shard.offsets) for shard in self._shards])
        self.num_known_actions: Array = np.concatenate(
            [shard.num_known_actions for shard in self._shards]
        )
        self.rates_hz: Array = np.concatenate([shard.rates_hz for shard in self._shards])

    def _read_num_expected_shards(self) -> int:
        """Read how many shards a prepared folder should have; 0 for a recorded folder."""
        return int(self._read_request().get("shards", 0))

    def _read_request(self) -> dict[str, Any]:
        """Read what a prepared folder was made from; an empty dict for a recorded folder."""
        request_file = self.path / REQUEST_FILE
        if not request_file.is_file():
            return {}
        return read_json(request_file, "copy this small file, or prepare the folder, again")

    @property
    def frame_versions(self) -> Mapping[str, int]:
        """Name of a dataset or robot → version of the frames of its poses (`spear.data.frames`).

        The mapping is empty for a recorded store.
        """
        # Imported here, because few callers need it, and it loads pydantic.
        from spear.data.frames import read_store_frame_versions

        request = self._read_request()
        return read_store_frame_versions(request) if request else {}

    def subset(self, indices: Sequence[int]) -> "EpisodeStore":
        """Make a store of some of the episodes, which shares the mapped files.

        Args:
            indices: The numbers of the episodes, in the order of the new store.

        Returns:
            The store of these episodes.
        """
        indices_array = np.asarray(indices, np.int64)
        store = copy.copy(self)
        store.is_complete = False
        store._episode_numbers = self._episode_numbers[indices_array]
        store.lengths = self.lengths[indices_array]
        store.num_known_actions = self.num_known_actions[indices_array]
        store.rates_hz = self.rates_hz[indices_array]
        return store

    def drop_failed_episodes(self) -> "EpisodeStore":
        """Leave out the episodes that are known to have failed, with a notice.

        Raises SpearError if no episode is left.
        """
        return self._drop(self.mark_failed_episodes(), reason="failed", advice="give others")

    def select_episodes_with_any_camera(self, cameras: Collection[str]) -> "EpisodeStore":
        """Leave out the episodes that have no images of any of these cameras, with a notice.

        If the store lacks one of these cameras but has others, which would not be used, another
        notice names both: they may be the same camera. Raises SpearError if no episode is left.
        """
        names = " or ".join(cameras)
        lacks_cameras = ~self._mark_episodes_with_any_camera(cameras)  # [E]
        store = self._drop(
            lacks_cameras,
            reason=f"have no camera {names}, but {', '.join(self.cameras)}",
            advice="name them so in its spear.json",
        )

        absent = sorted(set(cameras) - set(self.cameras))
        unused = sorted(set(self.cameras) - set(cameras))
        if absent and unused:
            notice(
                f"{self.path} has no camera {' or '.join(absent)}, but {', '.join(unused)}, "
                "which nothing learns from. If it is the same camera, name it so in its "
                "spear.json."
            )
        return store

    def _mark_episodes_with_any_camera(self, cameras: Collection[str]) -> Array:
        """Say of each episode whether it has images of at least one of these cameras: [E] bool."""
        masks: list[Array] = []
        for shard in self._shards:
            mask = np.zeros(len(shard), bool)
            first_steps = shard.offsets[:-1]  # the first step of each of the shard's episodes
            for camera in cameras:
                if camera in shard.image_places:
                    # An image of 0 bytes means that its episode does not have the camera.
                    first_image_bytes = shard.image_places[camera][first_steps, 1]
                    mask |= first_image_bytes > 0
            masks.append(mask)
        mask_of_folder = np.concatenate(masks)
        return mask_of_folder[self._episode_numbers]

    def _drop(self, is_dropped: Array, reason: str, advice: str) -> "EpisodeStore":
        """Leave out the episodes of a mask, with a notice.

        Args:
            is_dropped: [E] bool, which episodes to leave out.
            reason: What these episodes have in common, for the notice.
            advice: What to do about it if no episode is left.

        Raises:
            SpearError: If no episode is left.
        """
        num_episodes = format_count(len(self), "episodes")
        message = f"{is_dropped.sum()} of {num_episodes} of {self.path} {reason}"
        if is_dropped.all():
            raise SpearError(f"{message}, so nothing can be learned from it. {to_sentence(advice)}")
        if not is_dropped.any():
            return self

        notice(f"{message}. They are left out.")
        remaining_indices = np.flatnonzero(~is_dropped).tolist()
        store = self.subset(remaining_indices)
        store.is_complete = self.is_complete
        return store

    def mark_failed_episodes(self) -> Array:
        """Say of each episode whether it is known to have failed: [E] bool."""
        outcomes: list[bool | None] = []
        for shard in self._shards:
            outcomes.extend(shard.episode_columns["success"].to_pylist())
        mask_of_folder = np.array([outcome is False for outcome in outcomes])
        return mask_of_folder[self._episode_numbers]

    def __len__(self) -> int:
        return len(self._episode_numbers)

    def __getitem__(self, index: int) -> Episode:
        """Read episode `index`, with its images as encoded bytes."""
        shard, row = self._find_shard_and_row(index)
        return shard.episode(row, with_images=True)

    def __iter__(self) -> Iterator[Episode]:
        return (self[index] for index in range(len(self)))

    def _find_shard_and_row(self, index: int) -> tuple[Shard, int]:
        """Find the shard of episode `index`, and the episode's row in this shard."""
        number = int(self._episode_numbers[index])
        shard_index = bisect.bisect_right(self._shard_starts, number) - 1
        return self._shards[shard_index], number - self._shard_starts[shard_index]

    @property
    def cameras(self) -> list[str]:
        """The names of all cameras that any episode of the folder has."""
        names: set[str] = set()
        for shard in self._shards:
            names.update(shard.image_places)
        return sorted(names)

    def image(self, index: int, step: int, camera: str) -> bytes | None:
        """Read the encoded image of a step.

        Args:
            index: The number of the episode.
            step: The number of the step in the episode.
            camera: The camera's name.

        Returns:
            The encoded image; None if the episode has no such camera.
        """
        shard, row = self._find_shard_and_row(index)
        return shard.image(row, step, camera)

    def source(self, index: int) -> str:
        """Read where an episode came from.

        Args:
            index: The number of the episode.

        Returns:
            The dataset and the episode's number in the dataset; or, for an episode of the
            simulator, the task and the seed.
        """
        shard, row = self._find_shard_and_row(index)
        return str(shard.episode_columns["source"][row].as_py())

    def served_steps(self, index: int) -> ServedSteps | None:
        """Read the times and answers of an episode that a server recorded.

        Args:
            index: The number of the episode.

        Returns:
            The times and answers; None if no server recorded the episode.
        """
        shard, row = self._find_shard_and_row(index)
        return shard.served_steps(row)

    def without_images(self, index: int) -> Episode:
        """Read an episode with its states and actions only, which is cheap.

        Args:
            index: The number of the episode.

        Returns:
            The episode, with empty `images`.
        """
        shard, row = self._find_shard_and_row(index)
        return shard.episode(row, with_images=False)

    def fingerprint_states_and_actions(self) -> str:
        """Hash the states and actions of these episodes, to recognize other motions.

        The hash covers the sources and lengths of all episodes, and the states and actions of at
        most 1,000 episodes.
        """
        digest = self._begin_hash_with_texts("source")
        for shard, steps in self._iterate_steps_of_sampled_episodes():
            for rows in (
                shard.position,
                shard.rotation,
                shard.gripper,
                shard.action,
                shard.action_mask,
            ):
                digest.update(rows[steps].tobytes())
        return digest.hexdigest()

    def fingerprint_image_lengths_and_instructions(self) -> str:
        """Hash the images and instructions of these episodes, to recognize other ones.

        The hash covers the instructions of all episodes, the cameras, and the lengths of the
        encoded images of at most 1,000 episodes.
        """
        digest = self._begin_hash_with_texts("instruction")
        digest.update("\0".join(self.cameras).encode())
        for shard, steps in self._iterate_steps_of_sampled_episodes():
            for _, image_places in sorted(shard.image_places.items()):
                image_lengths = image_places[:, 1]
                digest.update(image_lengths[steps].tobytes())
        return digest.hexdigest()

    def _begin_hash_with_texts(self, column: str) -> "hashlib._Hash":
        """Begin a hash with the lengths of all episodes and their texts in a column."""
        digest = hashlib.sha256(self.lengths.tobytes())
        texts: list[str] = []  # of all episodes of the folder
        for shard in self._shards:
            texts.extend(shard.episode_columns[column].to_pylist())  # faster than cell by cell
        joined_texts = "".join(f"{texts[number]}\0" for number in self._episode_numbers)
        digest.update(joined_texts.encode())
        return digest

    def _iterate_steps_of_sampled_episodes(self) -> Iterator[tuple[Shard, slice]]:
        """Yield the shard and the steps in it of at most 1,000 episodes, evenly spread."""
        evenly_spread = np.linspace(0, len(self) - 1, MAX_HASHED_EPISODES).astype(int)
        indices = np.unique(evenly_spread)  # a small store has fewer episodes
        for index in indices.tolist():
            shard, row = self._find_shard_and_row(index)
            start, end = shard.offsets[row : row + 2]
            yield shard, slice(start, end)

    def list_episode_fingerprints(self) -> list[str]:
        """Hash each episode by its length and its first, middle and last pose.

        The hash does not depend on the folder in which the episode is stored. Episodes without
        steps are left out.
        """
        fingerprints: list[str] = []
        for index in range(len(self)):
            episode = self.without_images(index)
            length = len(episode)
            if not length:
                continue
            poses = np.hstack([episode.position, episode.rotation])  # [T, 7]
            sampled_poses = poses[[0, length // 2, -1]]  # [3, 7]
            rounded_poses = sampled_poses.round(POSE_DECIMALS) + 0.0  # -0.0 becomes 0.0
            text = f"{length} {rounded_poses.tolist()}"
            fingerprints.append(hashlib.sha256(text.encode()).hexdigest()[:12])
        return fingerprints


class WeightedStore(NamedTuple):
    """A dataset among those that are trained on together.

    Attributes:
        name: The dataset's name.
        store: Its episodes.
        weight: Its sampling weight: how often it is drawn, relative to the other datasets.
    """

    name: str
    store: EpisodeStore
    weight: float
