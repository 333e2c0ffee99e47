"""In how many held-out steps a policy notes that a robot sends otherwise than its training data had it.

    spear train nano-post --init nano --episodes bridge_v2_sample --split "train[:19]" --out runs/bridge
    python benchmarks/data/unlike.py runs/bridge bridge_v2_sample "train[19:]"

Each step is shown alone: as it is, and changed as mistakes in a robot's program change it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from spear.data.seen import Seen
from spear.data.store.prepare import open_store
from spear.evaluate.open_loop import observations
from spear.geometry import quat_multiply
from spear.models.processing import Processor
from spear.policy import locate
from spear.types import Array

HALF = np.sqrt(0.5)
Change = Callable[[Array, Array], tuple[Array, Array]]


def turned(state: Array) -> Array:
    """The end-effector frame turned by 90° about its z axis."""
    turn = quat_multiply(torch.tensor(state[3:7]), torch.tensor([HALF, 0.0, 0.0, HALF], dtype=torch.float64))
    return np.concatenate([state[:3], turn.numpy(), state[7:]])


CHANGES: dict[str, Change] = {
    "as it is": lambda state, image: (state, image),
    "BGR": lambda state, image: (state, image[..., ::-1]),
    "black images": lambda state, image: (state, 0 * image),
    "quaternion x y z w": lambda state, image: (state[[0, 1, 2, 4, 5, 6, 3, 7]], image),
    "end-effector frame turned by 90° about z": lambda state, image: (turned(state), image),
    "base frame 0.5 m further back": lambda state, image: (state + 0.5 * np.eye(8)[0], image),
    "x and y exchanged": lambda state, image: (state[[1, 0, 2, 3, 4, 5, 6, 7]], image),
    "decimetres": lambda state, image: (state * [10, 10, 10, 1, 1, 1, 1, 1], image),
}


def main(policy: str, data: str, split: str = "train") -> None:
    """Print the table."""
    folder = locate(policy)
    known, processor = Seen.load(folder / "seen.json"), Processor.load(folder)
    assert known is not None, f"{policy}: has no seen.json"
    noted: Counter[str] = Counter()
    count = 0
    with TemporaryDirectory() as scratch:
        store, _ = open_store(Path(data), Path(scratch), split)
        for step in (step for episode in store for step in observations(episode, ["external"])):
            count += 1
            for name, change in CHANGES.items():
                state, image = change(step["observation/state"].astype(np.float64), step["observation/image"])
                pixels = processor.image(np.ascontiguousarray(image), "external")[None].numpy()
                noted[name] += any(known.unlike(state[None], {"external": pixels}))
    for name in CHANGES:
        print(f"{name:<42} noted in {noted[name]} of {count} steps")


if __name__ == "__main__":
    main(*sys.argv[1:])
