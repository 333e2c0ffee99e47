"""The scripted expert's demonstrations → a store of episodes. Killed at any moment, the same call goes on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from spear.data.store.episode_store import (
    SHARD_GLOB,
    EpisodeStore,
    list_shards,
    remove_unfinished_shards,
    write_episodes,
)
from spear.errors import SpearError, check_known
from spear.sim.record import InterveningPolicy, format_episode_source, record_episodes
from spear.sim.render import ImageSize
from spear.sim.scene import FAMILIES
from spear.sim.world import SIMULATOR_VERSION
from spear.types import Episode
from spear.util.files import check_no_foreign_files
from spear.util.fingerprints import fingerprint_checkpoint
from spear.util.held_out import FIRST_TRAIN_SEED
from spear.util.images import decode_image
from spear.util.progress import ProgressBar, track_progress
from spear.util.run_lock import acquire_run_lock
from spear.util.run_settings import record_or_check_settings

SETTINGS_FILE = ".recorded.json"
"""What the demonstrations depend on that no episode tells."""


def record_demonstrations(
    out: Path,
    families: Sequence[str],
    episodes: int,
    first_seed: int,
    sizes: Mapping[str, ImageSize],
    workers: int = 2,
    policy: InterveningPolicy | None = None,
) -> tuple[int, int]:
    """Record `episodes` demonstrations of each task family (none: all); how many succeeded, and of how many.

    sizes  camera ("external", "wrist") → (width, height) of its images, in pixels.
    policy takes turns with the expert; its steps are masked (`spear.sim.record`).

    The same call, or one with more episodes, continues behind the last shard that was written. Raises
    `SpearError`, before it writes, for an unknown family, scenes kept for testing, and a folder of others.
    """
    check_known("task family", FAMILIES, *families)
    check_training_seed(first_seed)
    each = dict.fromkeys(families or FAMILIES)  # once
    tasks = [(family, first_seed + i) for i in range(episodes) for family in each]
    sources = [format_episode_source(*task, policy is not None) for task in tasks]

    def make(first: int) -> Iterator[Episode]:
        return record_episodes(
            tasks[first:], sizes["external"], sizes["wrist"], workers=workers, policy=policy
        )

    return record_successes(out, sources, make, sizes, policy, SIMULATOR_VERSION)


def check_training_seed(first: int) -> None:
    """Raises `SpearError` for scenes that are kept for testing."""
    if first < FIRST_TRAIN_SEED:
        raise SpearError(
            f"--first-seed {first}: below {FIRST_TRAIN_SEED} are scenes kept for testing"
        )


def record_successes(
    out: Path,
    sources: Sequence[str],
    make: Callable[[int], Iterator[Episode]],
    sizes: Mapping[str, ImageSize],
    policy: InterveningPolicy | None,
    simulator: str,
    shard_size: int = 256,
) -> tuple[int, int]:
    """Write the successful ones of these episodes; the rest is as in `record_demonstrations`.

    sources     the episodes' names, in order; make(i) makes them from number i on.
    shard_size  how many are written at once: fewer are lost when it is killed.
    simulator   what tells it, or what it shows, from others.
    """
    check_no_foreign_files(out, SHARD_GLOB, "record")
    with acquire_run_lock(out, "recording into", SETTINGS_FILE):
        remove_unfinished_shards(out)
        kept, first = _look(out, sources, sizes) if list_shards(out) else (0, 0)
        told = {"simulator": simulator, "policy": policy and fingerprint_checkpoint(policy.folder)}
        record_or_check_settings(out / SETTINGS_FILE, told, bool(list_shards(out)))
        bar = ProgressBar("recording", len(sources), "demonstrations", first)
        good = (episode for episode in track_progress(make(first), bar) if episode.success)
        return kept + write_episodes(good, out, shard_size), len(sources)


def _look(out: Path, sources: Sequence[str], sizes: Mapping[str, ImageSize]) -> tuple[int, int]:
    """How many of these demonstrations are there, and how many sources they are done with."""
    store = EpisodeStore(out)
    places = {source: place for place, source in enumerate(sources)}
    last = -1
    for index in range(len(store)):
        place = places.get(store.source(index), -1)
        if place <= last:
            why = f"other settings ({store.source(index)} is not the next of these)"
            raise SpearError(
                f"{out} holds demonstrations of {why}: give the same ones, or another folder"
            )
        last = place
    for camera, (width, height) in sizes.items():
        image = store.image(0, 0, camera)
        shape = None if image is None else decode_image(image, store.source(0)).shape[1::-1]
        if shape != (width, height):
            why = f"other images ({camera}: {shape}, not {(width, height)})"
            raise SpearError(f"{out} holds demonstrations with {why}: give the same --preset")
    return len(store), last + 1
