"""What a loader's order costs in randomness: how much more the means of batches vary than those of single
steps drawn at random from the whole dataset.

    python -m experiments.loader_randomness runs/episodes --batch-sizes 32 256 2048

Orders, of the steps of recorded or prepared episodes:

- ours: each step drawn from the whole dataset, with replacement (`spear.data.mixture`).
- buffer B: episodes in a shuffled order, step after step through a shuffle buffer of B steps, as tf.data
  reads RLDS.
- shards K: files of --shard-steps steps in a shuffled order, K of them read whole and shuffled together.

`variance` is that of a batch's mean over that of independent steps, averaged over the numbers of state and
action: with 2, a batch of 32 tells as much of the whole as one of 16. A batch of 2,048 is also what 64
batches of 32 in a row tell. Means of --seeds orders, with 95 % intervals (Student's t over the seeds). Only
numbers are read, no images.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from scipy import stats

from spear.data.store.episode_store import EpisodeStore

Array = np.ndarray


def ours(owner: Array, random: np.random.Generator) -> Array:
    return random.integers(0, len(owner), len(owner))


def shuffled(starts: Array, random: np.random.Generator) -> Iterator[Array]:
    """The rows of each part (between two starts), parts in a shuffled order."""
    for part in random.permutation(len(starts) - 1):
        yield np.arange(starts[part], starts[part + 1])


def through_buffer(owner: Array, random: np.random.Generator, size: int) -> Array:
    starts = np.flatnonzero(np.diff(owner, prepend=-1, append=-2))
    rows = np.concatenate(list(shuffled(starts, random)))
    size = min(size, len(rows))
    buffer, order = rows[:size].copy(), np.empty_like(rows)
    places = random.integers(0, size, len(rows) - size)
    for i, place in enumerate(places):
        order[i], buffer[place] = buffer[place], rows[size + i]
    order[len(places) :] = random.permutation(buffer)
    return order


def in_shards(owner: Array, random: np.random.Generator, steps: int, together: int) -> Array:
    starts = [0]
    for end in np.flatnonzero(np.diff(owner, append=-1)) + 1:  # a file holds whole episodes
        if end - starts[-1] >= steps:
            starts.append(int(end))
    if starts[-1] < len(owner):
        starts.append(len(owner))
    parts = list(shuffled(np.array(starts), random))
    groups = [np.concatenate(parts[i : i + together]) for i in range(0, len(parts), together)]
    return np.concatenate([random.permutation(group) for group in groups])


def variance(numbers: Array, order: Array, batch: int) -> float:
    """Of the batches' means, against that of independent steps."""
    batches = order[: len(order) // batch * batch].reshape(-1, batch)
    wrong = numbers[batches].mean(1) - numbers.mean(0)
    return float(np.mean((wrong**2).mean(0) * batch / numbers.var(0)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--buffers", type=int, nargs="*", default=[1_000, 10_000])
    parser.add_argument("--shards", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument(
        "--shard-steps", type=int, default=3_750, help="100 MB of two views (docs/speed.md)"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[32, 256, 2048])
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    store = EpisodeStore(given.folder)
    episodes = [store.without_images(i) for i in range(len(store))]
    columns = [
        np.column_stack([e.position, e.rotation, e.gripper, np.asarray(e.action)]) for e in episodes
    ]
    numbers = np.concatenate(columns).astype(np.float64)
    numbers = numbers[:, numbers.std(0) > 1e-6]
    owner = np.repeat(np.arange(len(episodes)), [len(e) for e in episodes])
    orders = {"ours": ours}
    orders |= {f"buffer {n:,}": partial(through_buffer, size=n) for n in given.buffers}
    orders |= {
        f"shards {n}": partial(in_shards, steps=given.shard_steps, together=n) for n in given.shards
    }
    print(f"{given.folder}: {len(owner):,} steps of {len(episodes):,} episodes")
    print("variance [95 %]  " + "  ".join(f"batches of {size:<10,}" for size in given.batch_sizes))
    for name, order in orders.items():
        rows = [order(owner, np.random.default_rng(seed)) for seed in range(given.seeds)]
        said = []
        for size in given.batch_sizes:
            found = [variance(numbers, row, size) for row in rows]
            centre, wide = np.mean(found), stats.t.ppf(0.975, given.seeds - 1) * stats.sem(found)
            said.append(f"{centre:.2f} [{centre - wide:.2f}, {centre + wide:.2f}]")
        print(f"{name:<16} " + "  ".join(f"{cell:<21}" for cell in said), flush=True)


if __name__ == "__main__":
    main()
