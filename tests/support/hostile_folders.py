"""Good folders of every kind, and how each is read, for the fuzz of folders."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tiny import LAYOUT, copy_dataset, make_episode, write_store
from folder_fuzz import FolderFuzz
from labels_boxes import make_labeled_image
from spear.data.readers.formats import read_episodes
from spear.errors import SpearError
from spear.labels.inputs import read_contents
from spear.labels.sources import list_items
from spear.labels.store import read_labels, write_labels
from spear.policy import Spear1Policy, locate_checkpoint
from spear.util.images import decode_image

NUM_READ_EPISODES = 2
OWN_KINDS = ("model", "labels", "recording", "rgbd")
"""The kinds of folders that are made here."""
SAMPLES: dict[str, tuple[str, dict[str, Any]]] = {
    "rlds": ("data/bridge_v2_sample/1.0.0", {"like": "bridge_dataset"}),
    "lerobot-v2": ("data/lerobot/v2.1_video", LAYOUT),
    "lerobot-v3": ("data/lerobot/v3.0_image", LAYOUT),
}
"""The kinds of folders that are samples of real data → their folder in the shared data, and their
layout.
"""
KINDS = (*OWN_KINDS, *SAMPLES)


def open_fuzz(kind: str, workspace: Path, shared: Path | None = None) -> FolderFuzz:
    """Make a good folder of a kind, and the fuzz that changes it.

    shared: the folder of real data, which the kinds of `SAMPLES` need.
    """
    folder = workspace / kind
    if kind in SAMPLES:
        assert shared is not None, f"{kind} needs the shared data"
        source, layout = SAMPLES[kind]
        copy_dataset(shared / source, folder, layout)
        return FolderFuzz(kind, folder, read_first_episodes, workspace)
    make, read = MAKERS_AND_READERS[kind]
    make(folder)
    return FolderFuzz(kind, folder, read, workspace)


def make_model(folder: Path) -> None:
    """Copy the shipped policy with all of its files."""
    shutil.copytree(locate_checkpoint("nano"), folder)
    # The installed weights may be read-only, and the fuzz changes the copies.
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def read_model(folder: Path) -> None:
    """Load a policy."""
    Spear1Policy.load(folder)


def make_labels(folder: Path) -> None:
    """Write two files of labeled images."""
    folder.mkdir()
    write_labels([make_labeled_image(0), make_labeled_image(1)], folder / "labels-0.parquet")
    write_labels([make_labeled_image(2)], folder / "labels-1.parquet")


def read_all_labels(folder: Path) -> None:
    """Read all labeled images and their pixels."""
    for label in read_labels(folder):
        decode_image(label.image, str(folder))


def make_recording(folder: Path) -> None:
    """Write two recorded episodes."""
    write_store([make_episode(0), make_episode(1)], folder)


def read_first_episodes(folder: Path) -> None:
    """Read the first episodes of a dataset or recording, and decode an image of each."""
    for episode in itertools.islice(read_episodes(folder), NUM_READ_EPISODES):
        for images in episode.images.values():
            decode_image(images[0], str(folder))


def make_rgbd(folder: Path) -> None:
    """Write two frames with depth and the intrinsics of their camera."""
    rng = np.random.default_rng(0)
    for name in ("color", "depth"):
        (folder / name).mkdir(parents=True)
    for index in range(2):
        color = rng.integers(0, 256, (24, 32, 3), np.uint8)
        depth_mm = rng.integers(500, 1500, (24, 32)).astype(np.uint16)
        Image.fromarray(color).save(folder / "color" / f"{index}.png")
        Image.fromarray(depth_mm).save(folder / "depth" / f"{index}.png")
    (folder / "intrinsics.json").write_text('{"fx": 30, "fy": 30, "cx": 16, "cy": 12}')


def read_rgbd_scene(folder: Path) -> None:
    """Read all frames of an RGB-D scene."""
    for content in read_contents(list_items([f"rgbd:{folder}"])):
        if isinstance(content, SpearError):
            raise content


MAKERS_AND_READERS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "model": (make_model, read_model),
    "labels": (make_labels, read_all_labels),
    "recording": (make_recording, read_first_episodes),
    "rgbd": (make_rgbd, read_rgbd_scene),
}
