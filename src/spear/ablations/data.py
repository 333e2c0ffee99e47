"""What the ablations learn from: given folders, or folders that are made as those of the shipped weights
are."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from spear.data.demonstrations import demonstrate
from spear.data.store.episode_store import EpisodeStore
from spear.labels.scenes import label_scenes
from spear.labels.store import LabelStore
from spear.models.presets import preset
from spear.sim.scene import FAMILIES, TRAIN_SEED, check_families
from spear.util.ledger import add_files

SCENES = 13_056
FIRST_SCENE = 200_000
DEMONSTRATIONS = 2000
"""Labelled scenes, and demonstrations per task family (from the first seed that is not kept for testing), as
in scripts/train_nano.sh."""
PRESET = "nano"


@dataclass(frozen=True)
class Data:
    """What is learned from. labels, episodes: folders. images: labelled images per view.

    key  a hash of the files of both; labels_key: of the labels alone.
    """

    labels: Path
    episodes: Path
    images: int
    key: str
    labels_key: str


def look_at(labels: Path, episodes: Path) -> Data:
    """What is in two folders, known by the names, sizes and ends of their files.

    Raises `SpearError` for a folder without labelled images or episodes.
    """
    EpisodeStore(episodes)
    view = labels / "external"
    images = len(LabelStore(view if view.is_dir() else labels))
    digest = hashlib.sha256()
    keys = []
    for folder in (labels, episodes):
        add_files(digest, folder, ("*.parquet", "*.arrow", "*.txt"))
        keys.append(digest.hexdigest()[:12])
    return Data(labels, episodes, images, keys[1], keys[0])


def make_labels(
    folder: Path, scenes: int = SCENES, workers: int = 2, say: Callable[[str], None] = print
) -> Path:
    """Labels that many clutter scenes of the simulator into `folder`; goes on where an earlier call was
    killed."""
    complete = folder / "complete"
    if not complete.is_file():
        say(f"labelling {scenes:,} scenes into {folder}")
        label_scenes(folder, scenes, dict(preset(PRESET).image_sizes), FIRST_SCENE, workers)
        complete.touch()
    return folder


def settle(families: Sequence[str]) -> tuple[str, ...]:
    """Task families as asked for, in the simulator's order; all where none is. Raises `SpearError` for one
    unknown."""
    check_families(families)
    return tuple(family for family in FAMILIES if family in families) or FAMILIES


def episodes_folder(out: Path, families: Sequence[str]) -> Path:
    """Where demonstrations of these families are made."""
    chosen = settle(families)
    return out / "-".join(("episodes", *(() if chosen == FAMILIES else chosen)))


def make_episodes(
    folder: Path,
    families: Sequence[str] = FAMILIES,
    each: int = DEMONSTRATIONS,
    workers: int = 2,
    say: Callable[[str], None] = print,
) -> Path:
    """Records that many demonstrations of each family into `folder`, whole or not at all, without failures.

    It goes on where an earlier call was killed.
    """
    if not folder.is_dir():
        say(f"recording {each:,} demonstrations of each family into {folder}")
        sizes = preset(PRESET).image_sizes
        part = folder.with_name(f".part-{folder.name}")
        demonstrate(part, families, each, TRAIN_SEED, sizes, workers)
        part.replace(folder)
    return folder


def stand_in(folder: Path, labels: Path | None, episodes: Path | None) -> Data:
    """A few scenes and demonstrations for what is not there yet, to time steps on: they take as long as on
    all data."""
    small = look_at(
        labels or make_labels(folder / "labels", 64, 1, lambda _: None),
        episodes or make_episodes(folder / "episodes", FAMILIES, 1, 1, lambda _: None),
    )
    return dataclasses.replace(small, images=small.images if labels else SCENES)
