"""How much randomness does a loader lose by its order of reading?

    python -m experiments.loader_randomness runs/episodes --batch-sizes 32 256 2048

Orders, of the steps of recorded or prepared episodes:

- ours: each step is drawn from the whole dataset, with replacement (`spear.data.mixture`).
- buffer B: episodes in a shuffled order, step after step through a shuffle buffer of B steps, as
  tf.data reads RLDS.
- shards K: files of --shard-steps steps in a shuffled order, K of them read whole and shuffled
  together.

`variance` is the variance of a batch's mean relative to that of independent steps, averaged over
the numbers of state and action: with 2, a batch of 32 tells as much about the dataset as one of 16.
A batch of 2,048 also stands for 64 successive batches of 32. Printed are means over --seeds orders
with 95 % intervals (Student's t over the seeds). Only numbers are read, no images.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from scipy import stats

from spear.data.store.episode_store import EpisodeStore
from spear.types import Array

MIN_STD = 1e-6  # numbers that vary less are left out

Order = Callable[[Array, np.random.Generator], Array]
"""(the episode of each step, random numbers) → the steps in the order of reading."""


def draw_from_all(episode_of_step: Array, rng: np.random.Generator) -> Array:
    num_steps = len(episode_of_step)
    return rng.integers(0, num_steps, num_steps)


def shuffle_parts(starts: Sequence[int] | Array, rng: np.random.Generator) -> list[Array]:
    """The steps of each part (between two starts), with the parts in a shuffled order."""
    pieces = []
    for piece_index in rng.permutation(len(starts) - 1):
        pieces.append(np.arange(starts[piece_index], starts[piece_index + 1]))
    return pieces


def shuffle_through_buffer(
    episode_of_step: Array, rng: np.random.Generator, buffer_size: int
) -> Array:
    starts = np.flatnonzero(np.diff(episode_of_step, prepend=-1, append=-2))
    steps = np.concatenate(shuffle_parts(starts, rng))
    buffer_size = min(buffer_size, len(steps))
    buffer = steps[:buffer_size].copy()
    order = np.empty_like(steps)
    slots = rng.integers(0, buffer_size, len(steps) - buffer_size)
    for position, slot in enumerate(slots):
        order[position] = buffer[slot]
        buffer[slot] = steps[buffer_size + position]
    order[len(slots) :] = rng.permutation(buffer)
    return order


def shuffle_in_shards(
    episode_of_step: Array, rng: np.random.Generator, shard_steps: int, num_together: int
) -> Array:
    starts = [0]
    for end in np.flatnonzero(np.diff(episode_of_step, append=-1)) + 1:
        if end - starts[-1] >= shard_steps:  # a file contains whole episodes
            starts.append(int(end))
    if starts[-1] < len(episode_of_step):
        starts.append(len(episode_of_step))
    shards = shuffle_parts(starts, rng)
    order = []
    for first in range(0, len(shards), num_together):
        order.append(rng.permutation(np.concatenate(shards[first : first + num_together])))
    return np.concatenate(order)


def compute_variance(numbers: Array, order: Array, batch_size: int) -> float:
    """The variance of the batches' means, relative to that of independent steps."""
    num_batches = len(order) // batch_size
    batches = order[: num_batches * batch_size].reshape(-1, batch_size)
    error = numbers[batches].mean(1) - numbers.mean(0)
    return float(np.mean((error**2).mean(0) * batch_size / numbers.var(0)))


def read_numbers(folder: Path) -> tuple[Array, Array]:
    """The varying numbers of state and action of all steps [n, d], and the episode of each step
    [n].
    """
    store = EpisodeStore(folder)
    numbers = []
    lengths = []
    for index in range(len(store)):
        episode = store.without_images(index)
        action = np.asarray(episode.action)
        columns = [episode.position, episode.rotation, episode.gripper, action]
        numbers.append(np.column_stack(columns))
        lengths.append(len(episode))
    all_numbers = np.concatenate(numbers).astype(np.float64)
    is_varying = all_numbers.std(0) > MIN_STD
    return all_numbers[:, is_varying], np.repeat(np.arange(len(lengths)), lengths)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--buffers", type=int, nargs="*", default=[1_000, 10_000])
    parser.add_argument("--shards", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument(
        "--shard-steps", type=int, default=3_750, help="100 MB of two views (docs/results/speed.md)"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[32, 256, 2048])
    parser.add_argument("--seeds", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    """Measure every order, and print a table."""
    options = parse_options()
    numbers, episode_of_step = read_numbers(options.folder)

    orders: dict[str, Order] = {"ours": draw_from_all}
    for size in options.buffers:
        orders[f"buffer {size:,}"] = partial(shuffle_through_buffer, buffer_size=size)
    for count in options.shards:
        orders[f"shards {count}"] = partial(
            shuffle_in_shards, shard_steps=options.shard_steps, num_together=count
        )

    num_episodes = episode_of_step[-1] + 1
    print(f"{options.folder}: {len(episode_of_step):,} steps of {num_episodes:,} episodes")
    headers = [f"batches of {size:<10,}" for size in options.batch_sizes]
    print(f"variance [95 %]  {'  '.join(headers)}")
    quantile = stats.t.ppf(0.975, options.seeds - 1)
    for name, order in orders.items():
        seeds = range(options.seeds)
        step_orders = [order(episode_of_step, np.random.default_rng(seed)) for seed in seeds]
        cells = []
        for size in options.batch_sizes:
            variances = [compute_variance(numbers, steps, size) for steps in step_orders]
            mean = np.mean(variances)
            half_width = quantile * stats.sem(variances)
            cell = f"{mean:.2f} [{mean - half_width:.2f}, {mean + half_width:.2f}]"
            cells.append(f"{cell:<21}")
        print(f"{name:<16} {'  '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
