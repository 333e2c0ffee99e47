"""The store of episodes: random access to episodes and images of a folder, by memory mapping.

A store is a folder of shards (`spear.data.store.shard`). It is either recorded (`write_episodes`,
with which several processes may append) or prepared for training (`spear.data.store.prepare`). Its
episodes may differ in rate, cameras and image sizes.
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

import numpy as np

from spear.data.store.shard import Shard, open_shard, write_shard
from spear.errors import SpearError, format_count, notice
from spear.types import Array, Episode
from spear.util.files import notice_missing_shards, read_json, report_write_errors

SHARD_GLOB = "episodes-*.arrow"
REQUEST_FILE = "request.json"  # of a prepared folder: what made it, and how many shards it has
MAX_HASHED_EPISODES = 1000  # whose numbers the fingerprints of a store read
POSE_DECIMALS = 4  # of the poses that the fingerprint of an episode hashes


def write_episodes(episodes: Iterable[Episode], folder: Path, shard_size: int = 256) -> int:
    """Append episodes to a store, checked and with canonical actions.

    A shard appears complete or not at all, and takes the next free number. Several processes may
    therefore append to one folder.

    Args:
        episodes: The episodes.
        folder: The folder of the store; it is made if it does not exist.
        shard_size: The number of episodes in a shard.

    Returns:
        The number of episodes written.

    Raises:
        SpearError: If an episode is bad or the disk is full. The shards written before stay
            readable.
    """
    from spear.data.actions import add_actions, validate_episode  # here: reading takes no PyTorch

    folder.mkdir(parents=True, exist_ok=True)
    checked = (add_actions(validate_episode(episode)) for episode in episodes)
    num_written = 0
    while shard := list(itertools.islice(checked, shard_size)):
        add_shard(shard, folder, {})
        num_written += len(shard)
    return num_written


def add_shard(episodes: Sequence[Episode], folder: Path, note: Mapping[str, str]) -> None:
    """Write a shard under the next free number.

    Raises SpearError if it cannot be written.
    """
    temporary = folder / f".episodes-{uuid.uuid4().hex}.arrow"
    temporary_images = temporary.with_suffix(".images")
    try:
        with report_write_errors(folder):
            write_shard(temporary, episodes, note)
            for number in itertools.count(len(list_shards(folder))):
                target = folder / f"episodes-{number:05d}.arrow"
                with contextlib.suppress(FileExistsError):
                    # The images come first, because the other file makes the shard count.
                    os.link(temporary_images, target.with_suffix(".images"))
                    os.link(temporary, target)
                    break
    finally:
        temporary_images.unlink(missing_ok=True)
        temporary.unlink(missing_ok=True)


def remove_unfinished_shards(folder: Path) -> None:
    """Remove partial shards of killed writers; no other process may be writing to the folder."""
    for file in list(folder.glob(".episodes-*")):
        file.unlink()
    for images in list(folder.glob("episodes-*.images")):
        if not images.with_suffix(".arrow").is_file():
            images.unlink()


def list_shards(folder: Path) -> list[Path]:
    """List the shards of a folder, in order."""
    return sorted(folder.glob(SHARD_GLOB))


class EpisodeStore:
    """The episodes of a folder. Nothing is loaded until asked for.

    Every episode has canonical actions, and a mask of those that are known.

    Attributes:
        path: The folder.
        is_complete: False for a `subset`.
        lengths: [E] number of steps of each episode.
        num_known_actions: [E] number of steps of each episode that have a known action.
        rates_hz: [E] steps per second of each episode.

    Raises:
        SpearError: If the folder has no episodes, or a file of it is broken.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.is_complete = True
        files = list_shards(self.path)
        if not files:
            raise SpearError(f"no episodes: {path}: no {SHARD_GLOB} in it; record or convert some")
        notice_missing_shards(self.path, files, "copy it again", self._read_num_shards())

        self._shards = [open_shard(file)[0] for file in files]
        shard_lengths = [len(shard) for shard in self._shards]
        self._shard_starts = np.cumsum([0, *shard_lengths]).tolist()
        # This store's episodes, as numbers in the folder
        self._episode_numbers = np.arange(self._shard_starts[-1])
        self.lengths: Array = np.concatenate([np.diff(shard.offsets) for shard in self._shards])
        self.num_known_actions: Array = np.concatenate(
            [shard.num_known_actions for shard in self._shards]
        )
        self.rates_hz: Array = np.concatenate([shard.rates_hz for shard in self._shards])

    def _read_num_shards(self) -> int:
        """Read how many shards a prepared folder should have; 0 for a recorded one."""
        request_file = self.path / REQUEST_FILE
        if not request_file.is_file():
            return 0
        return int(read_json(request_file, "copy it again").get("shards", 0))

    def subset(self, indices: Sequence[int]) -> "EpisodeStore":
        """Make a store of only these episodes, in this order, which shares the mapped files."""
        indices_array = np.asarray(indices, np.int64)
        store = copy.copy(self)
        store.is_complete = False
        store._episode_numbers = self._episode_numbers[indices_array]
        store.lengths = self.lengths[indices_array]
        store.num_known_actions = self.num_known_actions[indices_array]
        store.rates_hz = self.rates_hz[indices_array]
        return store

    def select_demonstrations(self) -> "EpisodeStore":
        """Leave out the episodes that are known to have failed, with a notice.

        Raises SpearError if none is left.
        """
        return self._drop(self.failed_mask(), reason="failed", advice="give others")

    def select_cameras(self, cameras: Collection[str]) -> "EpisodeStore":
        """Leave out the episodes that have no images of any of these cameras, with a notice.

        Another notice names cameras of the store that would not be used. Raises SpearError if no
        episode is left.
        """
        names = " or ".join(cameras)
        store = self._drop(
            ~self._has_any_camera(cameras),
            reason=f"with no camera {names} (there: {', '.join(self.cameras)})",
            advice="name them so in its spear.json",
        )

        absent = sorted(set(cameras) - set(self.cameras))
        unused = sorted(set(self.cameras) - set(cameras))
        if absent and unused:
            notice(
                f"{self.path}: has no camera {' or '.join(absent)}, but {', '.join(unused)}, which "
                "is not learned from: if it is the same, name it so in its spear.json"
            )
        return store

    def _has_any_camera(self, cameras: Collection[str]) -> Array:
        """[E] bool: which episodes have images of at least one of these cameras."""
        masks: list[Array] = []
        for shard in self._shards:
            mask = np.zeros(len(shard), bool)
            for camera in cameras:
                if camera in shard.image_places:
                    first_image_bytes = shard.image_places[camera][shard.offsets[:-1], 1]
                    mask |= first_image_bytes > 0
            masks.append(mask)
        return np.concatenate(masks)[self._episode_numbers]

    def _drop(self, dropped: Array, reason: str, advice: str) -> "EpisodeStore":
        """Leave out the episodes of a mask [E], with a notice or, if none is left, an error."""
        message = f"{self.path}: {dropped.sum()} of {format_count(len(self), 'episodes')} {reason}"
        if dropped.all():
            raise SpearError(f"{message}: nothing to learn from: {advice}")
        if not dropped.any():
            return self

        notice(f"{message}: left out")
        store = self.subset(np.flatnonzero(~dropped).tolist())
        store.is_complete = self.is_complete
        return store

    def failed_mask(self) -> Array:
        """[E] bool: which episodes are known to have failed."""
        outcomes: list[bool | None] = []
        for shard in self._shards:
            outcomes.extend(shard.episode_columns["success"].to_pylist())
        return np.array([outcome is False for outcome in outcomes])[self._episode_numbers]

    def __len__(self) -> int:
        return len(self._episode_numbers)

    def __getitem__(self, index: int) -> Episode:
        """Read episode `index`, with its images as encoded bytes."""
        shard, row = self._locate(index)
        return shard.episode(row, with_images=True)

    def __iter__(self) -> Iterator[Episode]:
        return (self[index] for index in range(len(self)))

    def _locate(self, index: int) -> tuple[Shard, int]:
        """Find the shard of an episode, and its row there."""
        number = int(self._episode_numbers[index])
        shard_index = bisect.bisect_right(self._shard_starts, number) - 1
        return self._shards[shard_index], number - self._shard_starts[shard_index]

    @property
    def cameras(self) -> list[str]:
        """The names of all cameras that occur."""
        names: set[str] = set()
        for shard in self._shards:
            names.update(shard.image_places)
        return sorted(names)

    def image(self, index: int, step: int, camera: str) -> bytes | None:
        """Read the encoded image of one step; None if the episode has no such camera."""
        shard, row = self._locate(index)
        return shard.image(row, step, camera)

    def source(self, index: int) -> str:
        """Read where episode `index` came from."""
        shard, row = self._locate(index)
        return str(shard.episode_columns["source"][row].as_py())

    def without_images(self, index: int) -> Episode:
        """Read episode `index` with its states and actions only, which is cheap."""
        shard, row = self._locate(index)
        return shard.episode(row, with_images=False)

    def fingerprint(self) -> str:
        """Hash what distinguishes the motions of these episodes from others.

        It covers all sources and lengths, and states and actions of at most 1,000 episodes.
        """
        digest = self._hash_texts("source")
        for shard, steps in self._iterate_sampled_steps():
            for rows in (
                shard.position,
                shard.rotation,
                shard.gripper,
                shard.action,
                shard.action_mask,
            ):
                digest.update(rows[steps].tobytes())
        return digest.hexdigest()

    def content_fingerprint(self) -> str:
        """Hash what distinguishes the images and instructions of these episodes from others.

        It covers all instructions, the cameras, and the lengths of the encoded images of at most
        1,000 episodes.
        """
        digest = self._hash_texts("instruction")
        digest.update("\0".join(self.cameras).encode())
        for shard, steps in self._iterate_sampled_steps():
            for _, image_places in sorted(shard.image_places.items()):
                image_lengths = image_places[:, 1]
                digest.update(image_lengths[steps].tobytes())
        return digest.hexdigest()

    def _hash_texts(self, column: str) -> "hashlib._Hash":
        """Begin a hash with the lengths of all episodes and a column of their texts."""
        digest = hashlib.sha256(self.lengths.tobytes())
        texts: list[str] = []
        for shard in self._shards:
            texts.extend(shard.episode_columns[column].to_pylist())  # faster than one by one
        digest.update("".join(f"{texts[number]}\0" for number in self._episode_numbers).encode())
        return digest

    def _iterate_sampled_steps(self) -> Iterator[tuple[Shard, slice]]:
        """Yield shard and steps of at most `MAX_HASHED_EPISODES` episodes, evenly spread."""
        indices = np.unique(np.linspace(0, len(self) - 1, MAX_HASHED_EPISODES).astype(int))
        for index in indices.tolist():
            shard, row = self._locate(index)
            yield shard, slice(*shard.offsets[row : row + 2])

    def episode_fingerprints(self) -> list[str]:
        """Hash what identifies each episode, in whatever folder it is stored.

        It covers the episode's length and its first, middle and last pose.
        """
        fingerprints: list[str] = []
        for index in range(len(self)):
            episode = self.without_images(index)
            length = len(episode)
            if not length:
                continue
            poses = np.hstack([episode.position, episode.rotation])[[0, length // 2, -1]]
            rounded = poses.round(POSE_DECIMALS) + 0.0  # no negative zeros
            text = f"{length} {rounded.tolist()}"
            fingerprints.append(hashlib.sha256(text.encode()).hexdigest()[:12])
        return fingerprints
