"""Labelled scenes of the simulator that nothing is trained on."""

from __future__ import annotations

from collections.abc import Iterator

from spear.errors import SpearError
from spear.labels.scenes import label_frames
from spear.sim.frames import clutter_frame
from spear.sim.render import Renderer, Size
from spear.sim.scene import TRAIN_SEED
from spear.types import Frame, LabeledImage


def held_out_frames(scenes: int, first_seed: int, size: Size, camera: str = "external") -> Iterator[Frame]:
    """Scenes first_seed, first_seed + 1, … as seen by a camera of `size` (width, height), with their truth.

    Raises SpearError for seeds that training uses (10,000 and above).
    """
    if scenes < 1 or first_seed < 0 or first_seed + scenes > TRAIN_SEED:
        raise SpearError(
            f"scenes {first_seed} … {first_seed + scenes - 1}: held-out seeds are 0 … {TRAIN_SEED - 1}: "
            "choose --scenes and --first-seed within them"
        )
    renderer = Renderer()
    for seed in range(first_seed, first_seed + scenes):
        yield clutter_frame(seed, camera, size, renderer)


def held_out_labels(scenes: int, first_seed: int, size: Size, camera: str = "external") -> list[LabeledImage]:
    """The same scenes with 3D labels."""
    return list(label_frames(held_out_frames(scenes, first_seed, size, camera)))
