"""Training samples from a weighted mixture of stores: sample i of step k is a function of (seed, k, i) alone.

No state is kept, so a killed run continues with exactly the samples it would have had, and any worker can
make any batch. Steps are drawn with replacement: first a dataset by weight, then one of its valid steps
uniformly. What is in memory grows with the number of episodes, not of steps: 16 bytes each.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spear.data.actions import HORIZON, extract_chunk, find_first
from spear.data.store.episode_store import EpisodeStore
from spear.errors import SpearError
from spear.types import CONTROL_RATE_HZ, Array, Episode
from spear.util.images import compute_placement, decode_image, fit_image

EPISODES_KEPT = 4096
"""Episodes, without images, that are kept in memory (our choice)."""
JITTER_DRAWS = 5
"""Random numbers that `jitter` takes."""


@dataclass(frozen=True)
class Sample:
    """Where a sample is: its dataset, episode and step; and its random numbers."""

    source: int
    episode: int
    step: int
    draws: Array


class Mixture:
    """Weighted stores to draw single steps from: (name, store, weight) triples; weights need not sum to one.

    Raises SpearError for a weight that is not positive, a store without a valid step, or one not at 5 Hz.
    """

    def __init__(self, sources: Sequence[tuple[str, EpisodeStore, float]], seed: int = 0) -> None:
        if not sources:
            raise SpearError("empty mixture: give at least one dataset")
        self.names = [name for name, _, _ in sources]
        self.stores = [store for _, store, _ in sources]
        self.seed = seed
        for name, store, weight in sources:
            if not (np.isfinite(weight) and weight > 0):
                raise SpearError(f"bad weight {weight}: dataset {name!r}: weights must be positive")
            if (index := find_first(~np.isclose(store.rates_hz, CONTROL_RATE_HZ))) is not None:
                rates = f"{store.rates_hz[index]:g} Hz, training is at {CONTROL_RATE_HZ:g}"
                raise SpearError(
                    f"wrong rate: dataset {name!r} ({store.source(index)}): {rates}; prepare it"
                )
            if not store.num_known_actions.any():
                raise SpearError(
                    f"nothing to learn from: dataset {name!r} has no valid action; leave it out"
                )
        weights = np.array([weight for _, _, weight in sources], np.float64)
        self.weights = weights / weights.sum()
        # Where each episode's valid steps begin among all of its dataset: nothing is kept for each step.
        self._begin = [
            np.concatenate([[0], np.cumsum(store.num_known_actions)]) for store in self.stores
        ]
        read = lambda source, episode: self.stores[source].without_images(episode)  # noqa: E731
        self._episode: Callable[[int, int], Episode] = functools.lru_cache(EPISODES_KEPT)(read)

    def __len__(self) -> int:
        """Number of distinct samples."""
        return sum(int(begin[-1]) for begin in self._begin)

    def draw(self, step: int, batch_size: int) -> list[Sample]:
        """The samples of training step `step`."""
        # Philox is counter based: the step is the counter, so no step depends on another.
        random = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, step]))
        draws = random.random((batch_size, 2 + JITTER_DRAWS))
        sources = np.searchsorted(np.cumsum(self.weights)[:-1], draws[:, 0], side="right")
        samples = []
        for source, row in zip(sources.tolist(), draws, strict=True):
            begin = self._begin[source]
            index = int(row[1] * begin[-1])  # among the dataset's valid steps
            episode = int(np.searchsorted(begin, index, side="right")) - 1
            known = np.asarray(self._episode(source, episode).action_mask)
            step = int(np.flatnonzero(known)[index - int(begin[episode])])
            samples.append(Sample(source, episode, step, row[2:]))
        return samples

    def arrays(self, sample: Sample, horizon: int) -> tuple[Array, Array, Array]:
        """State [8], action chunk [H, 8] and its mask [H] of a sample."""
        episode, t = self.episode(sample), sample.step
        assert episode.action is not None and episode.action_mask is not None  # a store has them
        acted, mask = extract_chunk(episode.action, episode.action_mask, t, horizon)
        state = np.concatenate(
            [episode.position[t], episode.rotation[t], episode.gripper[t : t + 1]]
        )
        return state, acted, mask

    def episode(self, sample: Sample) -> Episode:
        """The episode that a sample is of, without images."""
        return self._episode(sample.source, sample.episode)


@dataclass(frozen=True)
class TrainingSamples:
    """Batches as the trainer takes them: a map from step to a dict of arrays.

    views    camera name -> (height, width) in pixels; images are brought to it, aspect kept.
    augment  strength of photometric jitter, 0 for none (never geometric: depth depends on it).

    A batch of B samples
        images       camera -> [B, h, w, 3] uint8; zeros where an episode lacks it
        views        camera -> [B] bool, whether it has it
        position     [B, 3] m, base frame       rotation  [B, 4]       gripper  [B] opening 0 … 1
        action       [B, H, 8] metres, as `Action.to_vector`
        action_mask  [B, H] bool
        instruction  list of B strings          dataset   [B] int, index into `mixture.names`
    """

    mixture: Mixture
    views: Mapping[str, tuple[int, int]]
    horizon: int = HORIZON
    augment: float = 0.0

    def batch(self, step: int, batch_size: int) -> dict[str, Any]:
        """The batch of training step `step`. Raises SpearError, naming it, for a broken image."""
        samples = self.mixture.draw(step, batch_size)
        arrays = [self.mixture.arrays(sample, self.horizon) for sample in samples]
        states, actions, masks = (np.stack(column) for column in zip(*arrays, strict=True))
        images, present = {}, {}
        for camera, (height, width) in self.views.items():
            images[camera] = np.zeros((batch_size, height, width, 3), np.uint8)
            pairs = zip(samples, images[camera], strict=True)
            present[camera] = np.array([self._decode(sample, camera, out) for sample, out in pairs])
        return {
            "images": images,
            "views": present,
            "position": states[:, :3],
            "rotation": states[:, 3:7],
            "gripper": states[:, 7],
            "action": actions,
            "action_mask": masks,
            "instruction": [self.mixture.episode(s).instruction for s in samples],
            "dataset": np.array([s.source for s in samples]),
        }

    def _decode(self, sample: Sample, camera: str, out: Array) -> bool:
        """Put a sample's image into `out` [h, w, 3]; returns whether it has one."""
        encoded = self.mixture.stores[sample.source].image(sample.episode, sample.step, camera)
        if encoded is None:
            return False
        source = self.mixture.episode(sample).source
        image = decode_image(encoded, f"{source} step {sample.step} camera {camera!r}", out)
        fitted = fit_image(image, *out.shape[:2])
        if fitted is not out:
            out[...] = fitted
        if self.augment:
            _, left, top, across, down = compute_placement(image.shape[1::-1], out.shape[1::-1])
            seen = out[
                top : top + down, left : left + across
            ]  # what pads it stays black, as in acting
            jitter(seen, sample.draws, self.augment, seen)
        return True


def jitter(image: Array, draws: Array, strength: float, out: Array | None = None) -> Array:
    """Another exposure of the same scene: brightness, contrast and colour balance, by five draws in [0, 1).

    It alone keeps geometry true. image [h, w, 3] uint8 -> the same shape (in `out`, if given). At strength 1
    (our choice): brightness ± 10 % of the range, contrast ± 20 %, the gain of each channel ± 5 %.
    """
    offset, contrast, *gains = (2 * draws - 1) * strength
    level = np.arange(256, dtype=np.float32)[:, None]
    gain = 1 + 0.05 * np.array(gains, np.float32)
    table = ((level - 128) * (1 + 0.2 * contrast) + 128 + 25.5 * offset) * gain
    of_value = np.clip(np.rint(table), 0, 255).astype(np.uint8)  # [256, 3]
    out = np.empty_like(image) if out is None else out
    for channel in range(3):
        np.take(of_value[:, channel], image[..., channel], out=out[..., channel], mode="clip")
    return out
