"""What the ablations learn from: given folders, or ones that are made as for the shipped weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from spear.ablations.rows import AblationOptions
from spear.data.demonstrations import demonstrate
from spear.data.store.episode_store import EpisodeStore
from spear.labels.scenes import label_scenes
from spear.labels.store import LabelStore
from spear.models.presets import preset
from spear.sim.scene import FAMILIES, TRAIN_SEED, check_families
from spear.util.ledger import add_files, lock

SCENES = 13_056
FIRST_SCENE = 200_000
DEMONSTRATIONS = 2000
"""Labelled scenes, and demonstrations per task family (from the first seed that is not kept for testing), as
in scripts/train_nano.sh."""
PRESET = "nano"


@dataclass(frozen=True)
class Data:
    """What is learned from: folders of labels and episodes, and the number of labelled images per view.

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


def obtain(options: AblationOptions, say: Callable[[str], None] = print) -> Data:
    """What is given, or made in OUT as for the shipped weights: by one process, while others wait."""
    families = settle(options.families)
    labels, episodes = _folders(options)
    with lock(options.out / "locks" / "data", wait=True):
        complete = labels / "complete"
        if options.labels is None and not complete.is_file():
            say(f"labelling {SCENES:,} scenes into {labels}")
            label_scenes(labels, SCENES, dict(preset(PRESET).image_sizes), FIRST_SCENE, 2)
            complete.touch()
        if options.episodes is None and not episodes.is_dir():
            say(f"recording {DEMONSTRATIONS:,} demonstrations of each family into {episodes}")
            record(episodes, families, DEMONSTRATIONS)
        return look_at(labels, episodes)


def expected(options: AblationOptions) -> Data:
    """What `obtain` gives, as far as it can be known without making anything."""
    labels, episodes = _folders(options)
    if (options.labels or (labels / "complete").is_file()) and episodes.is_dir():
        return look_at(labels, episodes)
    return Data(labels, episodes, SCENES, "", "")


def record(folder: Path, families: Sequence[str], each: int, workers: int = 2) -> None:
    """Records so many demonstrations of each family, without the failures, into `folder`: all or none.

    It goes on where an earlier call was killed.
    """
    part = folder.with_name(f".part-{folder.name}")
    demonstrate(part, families, each, TRAIN_SEED, preset(PRESET).image_sizes, workers)
    part.replace(folder)


def settle(families: Sequence[str]) -> tuple[str, ...]:
    """Task families in the simulator's order; all where none is asked for. `SpearError` for unknown ones."""
    check_families(families)
    return tuple(family for family in FAMILIES if family in families) or FAMILIES


def _folders(options: AblationOptions) -> tuple[Path, Path]:
    """Of labels and of episodes: those that are given, or where they are made."""
    chosen = settle(options.families)
    made = "-".join(("episodes", *(() if chosen == FAMILIES else chosen)))
    return options.labels or options.out / "labels", options.episodes or options.out / made
