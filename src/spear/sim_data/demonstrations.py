"""Recording the scripted expert's demonstrations into an episode store.

If the process is killed, the same call continues the recording.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from spear.data.store.episode_store import (
    SHARD_GLOB,
    EpisodeStore,
    append_episodes,
    list_shards,
    remove_unfinished_shards,
)
from spear.errors import SpearError, check_known
from spear.sim.record import InterveningPolicy, format_episode_source, record_episodes
from spear.sim.scene import FAMILIES
from spear.sim.world import SIMULATOR_VERSION
from spear.sim.worlds import DEFAULT_WORLD, validate_world
from spear.types import Episode, WidthAndHeight
from spear.util.files import check_empty_or_own_folder
from spear.util.fingerprints import fingerprint_checkpoint
from spear.util.held_out import FIRST_TRAIN_SEED
from spear.util.images import decode_image
from spear.util.progress import ProgressBar, track_progress
from spear.util.run_lock import acquire_run_lock
from spear.util.run_settings import record_or_check_settings

SETTINGS_FILE = ".recorded.json"
"""The settings on which the demonstrations depend and which the episodes themselves do not contain:
the simulator's version and the intervening policy."""


class RecordingProgress(NamedTuple):
    """The progress of a recording.

    Attributes:
        num_recorded: Number of demonstrations in the store.
        num_tried: Number of episodes that were tried, including those in which the expert failed.
    """

    num_recorded: int
    num_tried: int


def record_demonstrations(  # noqa: PLR0913  the options of its command
    out: Path,
    families: Sequence[str],
    episodes_per_family: int,
    first_seed: int,
    image_sizes: Mapping[str, WidthAndHeight],
    workers: int = 2,
    policy: InterveningPolicy | None = None,
    world: str = "default",
) -> RecordingProgress:
    """Record demonstrations of task families with the scripted expert.

    The same call, or one with more episodes, continues after the last shard that was written.

    Args:
        out: The folder of the episode store.
        families: The task families; all if empty.
        episodes_per_family: How many demonstrations to try in each task family.
        first_seed: The seed of the first scene.
        image_sizes: Camera ("external", "wrist") → (width, height) of its images, in pixels.
        workers: The number of processes.
        policy: A policy that takes turns with the expert. The action mask excludes the policy's
            steps (`spear.sim.record`).
        world: The surroundings of the scenes (`spear.sim.worlds`).

    Raises:
        SpearError: A task family is unknown, scenes are held out for testing, or the folder has
            other demonstrations. Nothing is written then.
    """
    check_known("task family", FAMILIES, *families)
    check_training_seed(first_seed)
    validate_world(world)
    distinct_families = dict.fromkeys(families or FAMILIES)
    tasks: list[tuple[str, int]] = []
    for index in range(episodes_per_family):
        for family in distinct_families:
            tasks.append((family, first_seed + index))
    has_policy = policy is not None
    sources = [format_episode_source(family, seed, has_policy) for family, seed in tasks]

    def record_from(first_index: int) -> Iterator[Episode]:
        return record_episodes(
            tasks[first_index:],
            image_sizes,
            workers=workers,
            policy=policy,
            world=world,
        )

    simulator = (
        SIMULATOR_VERSION if world == DEFAULT_WORLD else f"{SIMULATOR_VERSION}, world {world}"
    )
    return record_successes(out, sources, record_from, image_sizes, policy, simulator)


def check_training_seed(first_seed: int) -> None:
    """Raise SpearError if scenes from this seed on include some that are held out for testing."""
    if first_seed < FIRST_TRAIN_SEED:
        raise SpearError(
            f"--first-seed {first_seed} is among the scenes below {FIRST_TRAIN_SEED}, which are "
            "kept for testing. Choose a larger one."
        )


def record_successes(
    out: Path,
    sources: Sequence[str],
    record_from: Callable[[int], Iterator[Episode]],
    image_sizes: Mapping[str, WidthAndHeight],
    policy: InterveningPolicy | None,
    simulator_version: str,
    shard_size: int = 256,
) -> RecordingProgress:
    """Record episodes, and write the successful ones to an episode store.

    Args:
        out: The folder of the episode store.
        sources: The sources (names) of all episodes to try, in order.
        record_from: Index of an episode in `sources` → the episodes from this one on, recorded
            while you iterate.
        image_sizes: Camera → (width, height) of its images, in pixels.
        policy: The policy that takes turns with the expert, if any.
        simulator_version: A text that changes whenever the simulator renders other images.
        shard_size: How many episodes a shard contains. If the process is killed, the episodes of
            the unfinished shard are lost.
    """
    check_empty_or_own_folder(out, SHARD_GLOB, action="record")
    with acquire_run_lock(out, "recording into", SETTINGS_FILE):
        remove_unfinished_shards(out)
        progress = RecordingProgress(num_recorded=0, num_tried=0)
        has_episodes = bool(list_shards(out))
        if has_episodes:
            progress = _read_progress(out, sources, image_sizes)
        settings = {
            "simulator": simulator_version,
            "policy": None if policy is None else fingerprint_checkpoint(policy.folder),
        }
        record_or_check_settings(out / SETTINGS_FILE, settings, is_resuming=has_episodes)

        bar = ProgressBar(
            "recording", len(sources), "demonstrations", num_done_before=progress.num_tried
        )
        episodes = track_progress(record_from(progress.num_tried), bar)
        successes = (episode for episode in episodes if episode.success)
        num_written = append_episodes(successes, out, shard_size)
        return RecordingProgress(progress.num_recorded + num_written, num_tried=len(sources))


def _read_progress(
    out: Path, sources: Sequence[str], image_sizes: Mapping[str, WidthAndHeight]
) -> RecordingProgress:
    """Find out how many of the episodes `sources` were tried and how many are in the store.

    Raises:
        SpearError: The store has other demonstrations, or images of other sizes.
    """
    store = EpisodeStore(out)
    positions = {source: position for position, source in enumerate(sources)}

    # The store has the sources of successful episodes, in the same order. Episodes up to the last
    # one in the store were tried.
    last_position = -1
    for index in range(len(store)):
        position = positions.get(store.source(index), -1)  # -1 for another demonstration
        if position <= last_position:
            raise SpearError(
                f"{out} contains demonstrations of other settings ({store.source(index)} is not "
                "the next of these). Give the same settings, or another folder."
            )
        last_position = position

    for camera, size in image_sizes.items():
        _check_image_size(store, out, camera, size)
    return RecordingProgress(num_recorded=len(store), num_tried=last_position + 1)


def _check_image_size(store: EpisodeStore, out: Path, camera: str, size: WidthAndHeight) -> None:
    """Raise SpearError if a store's images of a camera have another size."""
    encoded = store.image(0, 0, camera)  # of the first step of the first episode
    stored_size = None
    if encoded is not None:
        height, width = decode_image(encoded, store.source(0)).shape[:2]
        stored_size = (width, height)
    if stored_size == tuple(size):
        return

    stored_text = "none" if stored_size is None else f"{stored_size[0]} x {stored_size[1]}"
    raise SpearError(
        f"{out} contains demonstrations with other images ({camera} {stored_text}, not "
        f"{size[0]} x {size[1]}). Give the same --preset."
    )
