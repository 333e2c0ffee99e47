"""Training samples from a weighted mixture of stores.

Sample i of training step k is a function of (seed, k, i) alone. No state exists, so a resumed run
continues with exactly the samples it would have had, and any worker can make any batch.

Steps are drawn with replacement: first a dataset by its weight, then one of its valid steps, all
with the same probability. Memory grows with the number of episodes (16 bytes each), not of steps.
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

MAX_CACHED_EPISODES = 4096  # without images, in memory
NUM_JITTER_DRAWS = 5  # random numbers that `jitter_colors` takes: offset, contrast, three gains
MAX_OFFSET_LEVELS = 25.5  # brightness ± 10 % of the range, at strength 1
MAX_CONTRAST_CHANGE = 0.2  # contrast ± 20 %, at strength 1
MAX_GAIN_CHANGE = 0.05  # of each channel, ± 5 %, at strength 1


@dataclass(frozen=True)
class Sample:
    """A training sample: the indices of its dataset, episode and step, and its random numbers."""

    dataset: int
    episode: int
    step: int
    draws: Array


class Mixture:
    """Weighted stores from which single steps are drawn.

    Args:
        sources: (name, store, weight) of each dataset. Weights need not sum to one.
        seed: The seed of all draws.

    Raises:
        SpearError: For a weight that is not positive, a store without a valid step, or an episode
            that is not at 5 Hz.
    """

    def __init__(self, sources: Sequence[tuple[str, EpisodeStore, float]], seed: int = 0) -> None:
        if not sources:
            raise SpearError("empty mixture: give at least one dataset")
        for name, store, weight in sources:
            _check_source(name, store, weight)

        self.names = [name for name, _, _ in sources]
        self.stores = [store for _, store, _ in sources]
        self.seed = seed
        weights = np.array([weight for _, _, weight in sources], np.float64)
        self.weights = weights / weights.sum()

        # Per dataset: where each episode's valid steps begin among all valid steps of the dataset.
        self._episode_starts: list[Array] = []
        for store in self.stores:
            starts = np.concatenate([[0], np.cumsum(store.num_known_actions)])
            self._episode_starts.append(starts)
        cached = functools.lru_cache(MAX_CACHED_EPISODES)
        self._read_episode: Callable[[int, int], Episode] = cached(self._read_episode_uncached)

    def _read_episode_uncached(self, dataset: int, episode: int) -> Episode:
        return self.stores[dataset].without_images(episode)

    def __len__(self) -> int:
        """The number of distinct samples."""
        return sum(int(starts[-1]) for starts in self._episode_starts)

    def draw(self, training_step: int, batch_size: int) -> list[Sample]:
        """Draw the samples of a training step."""
        # Philox is counter based: the step is the counter, so no step depends on another.
        bits = np.random.Philox(key=self.seed, counter=[0, 0, 0, training_step])
        draws = np.random.Generator(bits).random((batch_size, 2 + NUM_JITTER_DRAWS))
        boundaries = np.cumsum(self.weights)[:-1]
        datasets = np.searchsorted(boundaries, draws[:, 0], side="right")

        samples: list[Sample] = []
        for dataset, row in zip(datasets.tolist(), draws, strict=True):
            starts = self._episode_starts[dataset]
            index = int(row[1] * starts[-1])  # among the dataset's valid steps
            episode = int(np.searchsorted(starts, index, side="right")) - 1
            is_known = np.asarray(self._read_episode(dataset, episode).action_mask)
            valid_steps = np.flatnonzero(is_known)
            step = int(valid_steps[index - int(starts[episode])])
            samples.append(Sample(dataset, episode, step, row[2:]))
        return samples

    def read_arrays(self, sample: Sample, horizon: int) -> tuple[Array, Array, Array]:
        """Read the state [8] of a sample, its action chunk [H, 8], and the chunk's mask [H]."""
        episode = self.episode(sample)
        step = sample.step
        assert episode.action is not None
        assert episode.action_mask is not None
        chunk, mask = extract_chunk(episode.action, episode.action_mask, step, horizon)
        state = np.concatenate([
            episode.position[step],
            episode.rotation[step],
            episode.gripper[step : step + 1],
        ])  # fmt: skip
        return state, chunk, mask

    def episode(self, sample: Sample) -> Episode:
        """The episode of a sample, without images."""
        return self._read_episode(sample.dataset, sample.episode)


def _check_source(name: str, store: EpisodeStore, weight: float) -> None:
    """Raise SpearError for a dataset that cannot be trained on."""
    if not (np.isfinite(weight) and weight > 0):
        raise SpearError(f"bad weight {weight}: dataset {name!r}: weights must be positive")
    index = find_first(~np.isclose(store.rates_hz, CONTROL_RATE_HZ))
    if index is not None:
        raise SpearError(
            f"wrong rate: dataset {name!r} ({store.source(index)}): "
            f"{store.rates_hz[index]:g} Hz, training is at {CONTROL_RATE_HZ:g}; prepare it"
        )
    if not store.num_known_actions.any():
        raise SpearError(
            f"nothing to learn from: dataset {name!r} has no valid action; leave it out"
        )


@dataclass(frozen=True)
class TrainingSamples:
    """Batches as the trainer takes them: a map from training step to a dict of arrays.

    views    camera → (height, width) in pixels, to which its images are resized, aspect unchanged.
    augment  strength of photometric jitter, 0 for none. Geometry is never augmented, because depth
             depends on it.

    A batch of B samples
        images       camera → [B, h, w, 3] uint8; zeros if an episode does not have the camera
        views        camera → [B] bool, whether the episode has it
        position     [B, 3] m, base frame
        rotation     [B, 4]
        gripper      [B] opening 0 … 1
        action       [B, H, 8] meters, as `Action.to_vector`
        action_mask  [B, H] bool
        instruction  list of B strings
        dataset      [B] int, index into `mixture.names`
    """

    mixture: Mixture
    views: Mapping[str, tuple[int, int]]
    horizon: int = HORIZON
    augment: float = 0.0

    def batch(self, training_step: int, batch_size: int) -> dict[str, Any]:
        """Make the batch of a training step. Raises SpearError for a broken image."""
        samples = self.mixture.draw(training_step, batch_size)
        states: list[Array] = []
        chunks: list[Array] = []
        masks: list[Array] = []
        for sample in samples:
            state, chunk, mask = self.mixture.read_arrays(sample, self.horizon)
            states.append(state)
            chunks.append(chunk)
            masks.append(mask)

        images: dict[str, Array] = {}
        has_image: dict[str, Array] = {}
        for camera, (height, width) in self.views.items():
            images[camera] = np.zeros((batch_size, height, width, 3), np.uint8)
            is_present: list[bool] = []
            for sample, out in zip(samples, images[camera], strict=True):
                is_present.append(self._decode_image(sample, camera, out))
            has_image[camera] = np.array(is_present)

        state_rows = np.stack(states)
        return {
            "images": images,
            "views": has_image,
            "position": state_rows[:, :3],
            "rotation": state_rows[:, 3:7],
            "gripper": state_rows[:, 7],
            "action": np.stack(chunks),
            "action_mask": np.stack(masks),
            "instruction": [self.mixture.episode(sample).instruction for sample in samples],
            "dataset": np.array([sample.dataset for sample in samples]),
        }

    def _decode_image(self, sample: Sample, camera: str, out: Array) -> bool:
        """Decode a sample's image into `out` [h, w, 3]; returns False if it has none."""
        store = self.mixture.stores[sample.dataset]
        encoded = store.image(sample.episode, sample.step, camera)
        if encoded is None:
            return False

        source = self.mixture.episode(sample).source
        image = decode_image(encoded, f"{source} step {sample.step} camera {camera!r}", out)
        height, width = out.shape[:2]
        fitted = fit_image(image, height, width)
        if fitted is not out:
            out[...] = fitted

        if self.augment:
            _, left_px, top_px, fitted_width, fitted_height = compute_placement(
                image.shape[1::-1], out.shape[1::-1]
            )
            # The bars at the sides stay black, as in acting.
            picture = out[top_px : top_px + fitted_height, left_px : left_px + fitted_width]
            jitter_colors(picture, sample.draws, self.augment, picture)
        return True


def jitter_colors(image: Array, draws: Array, strength: float, out: Array | None = None) -> Array:
    """Change brightness, contrast and color balance, like another exposure of the same scene.

    Args:
        image: [h, w, 3] uint8.
        draws: [5] random numbers in [0, 1).
        strength: At 1, brightness changes by ± 10 % of the range, contrast by ± 20 %, and the gain
            of each channel by ± 5 %.
        out: Where to write the result, which may be `image`; by default a new array.

    Returns:
        [h, w, 3] uint8.
    """
    offset, contrast, *gains = (2 * draws - 1) * strength
    level = np.arange(256, dtype=np.float32)[:, None]
    gain = 1 + MAX_GAIN_CHANGE * np.array(gains, np.float32)
    contrasted = (level - 128) * (1 + MAX_CONTRAST_CHANGE * contrast) + 128
    new_level = (contrasted + MAX_OFFSET_LEVELS * offset) * gain
    table = np.clip(np.rint(new_level), 0, 255).astype(np.uint8)  # [256, 3]
    if out is None:
        out = np.empty_like(image)
    for channel in range(3):
        np.take(table[:, channel], image[..., channel], out=out[..., channel], mode="clip")
    return out
