"""Draws training samples from a weighted mixture of stores of episodes.

Two things are called steps. A training step takes one batch of samples. A sample is one step of an
episode, from which an action chunk begins.

Samples are drawn with replacement: first a dataset by its weight, then one of its valid steps, all
with the same probability. A step is valid if its action is known.

Sample i of training step k depends only on (seed, k, i). Drawing keeps no state, so a resumed run
continues with exactly the samples that it would have had, and any worker can make any batch. Memory
grows with the number of episodes (16 bytes each), not with the number of steps.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from spear.data.actions import HORIZON, extract_chunk_up_to_unknown, find_first
from spear.data.store.episode_store import EpisodeStore, WeightedStore
from spear.errors import SpearError
from spear.types import CONTROL_RATE_HZ, Array, Episode
from spear.util.images import compute_placement, decode_image, fit_image

MAX_CACHED_EPISODES = 4096  # how many episodes, without images, stay in memory
NUM_JITTER_DRAWS = 5  # the random numbers of `jitter_colors`: offset, contrast, three gains
MAX_OFFSET_LEVELS = 25.5  # at strength 1, brightness changes by ± 10 % of the 255 levels
MAX_CONTRAST_CHANGE = 0.2  # at strength 1, contrast changes by ± 20 %
MAX_GAIN_CHANGE = 0.05  # at strength 1, the gain of each channel changes by ± 5 %


@dataclass(frozen=True)
class Sample:
    """A training sample.

    Attributes:
        dataset: The index of its dataset in the mixture.
        episode: The index of its episode in the dataset.
        step: The step of the episode.
        draws: [5] its random numbers in [0, 1), for `jitter_colors`.
    """

    dataset: int
    episode: int
    step: int
    draws: Array


class StateAndChunk(NamedTuple):
    """What a policy learns from at a sample, but for images and instruction.

    Attributes:
        state: [8] position (m, base frame), unit quaternion and gripper opening.
        chunk: [H, 8] the action chunk, as `Action.to_vector`.
        mask: [H] bool, which actions of the chunk are training targets.
    """

    state: Array
    chunk: Array
    mask: Array


class Mixture:
    """A weighted mixture of stores.

    Args:
        sources: The datasets. Weights need not sum to one.
        seed: The seed of all random numbers.

    Raises:
        SpearError: If a weight is not positive, a store has no valid step, or an episode is not at
            5 Hz.
    """

    def __init__(self, sources: Sequence[WeightedStore], seed: int = 0) -> None:
        if not sources:
            raise SpearError("the mixture is empty. Give at least one dataset.")
        for source in sources:
            _check_source(source.name, source.store, source.weight)

        self.names = [source.name for source in sources]
        self.stores = [source.store for source in sources]
        self.seed = seed
        weights = np.array([source.weight for source in sources], np.float64)
        self.weights = weights / weights.sum()

        # The valid steps of a dataset with E episodes have indices through all its episodes. For
        # each dataset: the index of the first valid step of each episode, and as the last entry
        # the count of the dataset's valid steps, [E + 1].
        self._episode_starts: list[Array] = []
        for store in self.stores:
            starts = np.concatenate([[0], np.cumsum(store.num_known_actions)])
            self._episode_starts.append(starts)
        add_cache = functools.lru_cache(MAX_CACHED_EPISODES)
        self._read_episode_without_images: Callable[[int, int], Episode] = add_cache(
            self._read_uncached_episode_without_images
        )

    def _read_uncached_episode_without_images(self, dataset: int, episode: int) -> Episode:
        return self.stores[dataset].without_images(episode)

    def __len__(self) -> int:
        """The number of valid steps of all datasets."""
        return sum(int(starts[-1]) for starts in self._episode_starts)

    def sample(self, training_step: int, batch_size: int) -> list[Sample]:
        """Draw the samples of a training step."""
        # Philox is a counter-based generator. With the training step as the high part of its
        # counter, the numbers of one step never depend on those of another.
        bits = np.random.Philox(key=self.seed, counter=[0, 0, 0, training_step])
        num_draws = 2 + NUM_JITTER_DRAWS  # for the dataset, the step, and the jitter
        draws = np.random.Generator(bits).random((batch_size, num_draws))

        # The weights divide 0 … 1 into one interval per dataset.
        boundaries = np.cumsum(self.weights)[:-1]
        datasets = np.searchsorted(boundaries, draws[:, 0], side="right")  # [batch_size]

        samples: list[Sample] = []
        for dataset, sample_draws in zip(datasets.tolist(), draws, strict=True):
            starts = self._episode_starts[dataset]
            num_valid_steps = starts[-1]
            index_in_dataset = int(sample_draws[1] * num_valid_steps)
            # The last episode that starts at this index or before has the step.
            episode = int(np.searchsorted(starts, index_in_dataset, side="right")) - 1
            index_in_episode = index_in_dataset - int(starts[episode])
            action_mask = self._read_episode_without_images(dataset, episode).action_mask
            is_known = np.asarray(action_mask)
            valid_steps = np.flatnonzero(is_known)
            step = int(valid_steps[index_in_episode])
            samples.append(Sample(dataset, episode, step, draws=sample_draws[2:]))
        return samples

    def read_state_and_chunk(self, sample: Sample, horizon: int) -> StateAndChunk:
        """Read the state of a sample, and the chunk of `horizon` actions that begins there."""
        episode = self.read_episode_without_images(sample)
        step = sample.step
        assert episode.action is not None
        assert episode.action_mask is not None
        chunk, mask = extract_chunk_up_to_unknown(
            episode.action, episode.action_mask, step, horizon
        )
        state = np.concatenate([
            episode.position[step],
            episode.rotation[step],
            episode.gripper[step : step + 1],
        ])  # fmt: skip
        return StateAndChunk(state, chunk, mask)

    def read_episode_without_images(self, sample: Sample) -> Episode:
        """Read the episode of a sample with empty `images`, from the cache if it is there."""
        return self._read_episode_without_images(sample.dataset, sample.episode)


def _check_source(name: str, store: EpisodeStore, weight: float) -> None:
    """Raise SpearError for a dataset that cannot be trained on."""
    if not (np.isfinite(weight) and weight > 0):
        raise SpearError(
            f"dataset {name!r} has the sampling weight {weight}. Give a number above 0."
        )
    index = find_first(~np.isclose(store.rates_hz, CONTROL_RATE_HZ))
    if index is not None:
        raise SpearError(
            f"dataset {name!r} ({store.source(index)}) has {store.rates_hz[index]:g} Hz, but "
            f"training runs at {CONTROL_RATE_HZ:g} Hz. Prepare it with `spear data prepare`."
        )
    if not store.num_known_actions.any():
        raise SpearError(
            f"dataset {name!r} has no valid action, so nothing can be learned from it. Leave it "
            "out."
        )


@dataclass(frozen=True)
class TrainingSamples:
    """Makes the batches of a training from a mixture.

    Attributes:
        mixture: The mixture from which samples are drawn.
        image_shapes: Camera → (height, width) in pixels of the images in a batch. An image is
            scaled to fit, with its aspect ratio unchanged, and gets black bars.
        horizon: H, the number of actions in a chunk.
        augment: Strength of the photometric jitter, 0 for none. Images are never rotated, cropped
            or scaled at random, because depth depends on their geometry.

    A batch of B samples is a dict:
        images       camera → [B, h, w, 3] uint8; zeros if the episode does not have the camera
        views        camera → [B] bool, whether the episode has the camera
        position     [B, 3] m, base frame
        rotation     [B, 4] unit quaternion
        gripper      [B] opening 0 … 1
        action       [B, H, 8] translations in m, as `Action.to_vector`
        action_mask  [B, H] bool
        instruction  list of B strings
        dataset      [B] int, index into `mixture.names`
    """

    mixture: Mixture
    image_shapes: Mapping[str, tuple[int, int]]
    horizon: int = HORIZON
    augment: float = 0.0

    def batch(self, training_step: int, batch_size: int) -> dict[str, Any]:
        """Make the batch of a training step. Raises SpearError if an image is broken."""
        samples = self.mixture.sample(training_step, batch_size)
        states: list[Array] = []
        chunks: list[Array] = []
        masks: list[Array] = []
        for sample in samples:
            state, chunk, mask = self.mixture.read_state_and_chunk(sample, self.horizon)
            states.append(state)
            chunks.append(chunk)
            masks.append(mask)

        images: dict[str, Array] = {}
        has_image: dict[str, Array] = {}
        for camera, (height, width) in self.image_shapes.items():
            images[camera] = np.zeros((batch_size, height, width, 3), np.uint8)
            is_present: list[bool] = []
            for sample, out in zip(samples, images[camera], strict=True):
                has_camera = self._decode_and_jitter_image_if_present(
                    sample, camera, out
                )  # writes into `out`
                is_present.append(has_camera)
            has_image[camera] = np.array(is_present)

        state_rows = np.stack(states)  # [B, 8]
        return {
            "images": images,
            "views": has_image,
            "position": state_rows[:, :3],
            "rotation": state_rows[:, 3:7],
            "gripper": state_rows[:, 7],
            "action": np.stack(chunks),
            "action_mask": np.stack(masks),
            "instruction": [
                self.mixture.read_episode_without_images(sample).instruction for sample in samples
            ],
            "dataset": np.array([sample.dataset for sample in samples]),
        }

    def _decode_and_jitter_image_if_present(self, sample: Sample, camera: str, out: Array) -> bool:
        """Decode a sample's image into `out` [h, w, 3], and jitter its colors if `augment` says so.

        `out` is black before. Returns whether the sample's episode has the camera. If not, `out`
        stays black.
        """
        store = self.mixture.stores[sample.dataset]
        encoded = store.image(sample.episode, sample.step, camera)
        if encoded is None:
            return False

        source = self.mixture.read_episode_without_images(sample).source
        image = decode_image(encoded, f"{source} step {sample.step} camera {camera!r}", out)
        height, width = out.shape[:2]
        fitted = fit_image(image, height, width)
        # `decode_image` fills and returns `out` if the image is a plain JPEG of that size. Every
        # other image is a new array, which is copied into `out`.
        was_decoded_into_out = fitted is out
        if not was_decoded_into_out:
            out[...] = fitted

        if self.augment:
            # Jitter all but the bars at the sides, which stay black, as they are when acting.
            image_height, image_width = image.shape[:2]
            _, left_px, top_px, fitted_width, fitted_height = compute_placement(
                (image_width, image_height), (width, height)
            )
            picture = out[top_px : top_px + fitted_height, left_px : left_px + fitted_width]
            jitter_colors(picture, sample.draws, self.augment, out=picture)
        return True


def jitter_colors(image: Array, draws: Array, strength: float, out: Array | None = None) -> Array:
    """Change brightness, contrast and color balance, like another exposure of the same scene.

    Args:
        image: [h, w, 3] uint8.
        draws: [5] random numbers in [0, 1), which determine the changes.
        strength: At 1, brightness changes by up to ± 10 % of the range, contrast by up to ± 20 %,
            and the gain of each channel by up to ± 5 %.
        out: Where to write the result, which may be `image`; by default a new array.

    Returns:
        [h, w, 3] uint8.
    """
    # Relative changes from -strength to strength.
    brightness_change, contrast_change, *gain_changes = (2 * draws - 1) * strength
    contrast = 1 + MAX_CONTRAST_CHANGE * contrast_change
    gain = 1 + MAX_GAIN_CHANGE * np.array(gain_changes, np.float32)  # [3]

    # A table of the new level for each level and channel, which is faster than a computation.
    level = np.arange(256, dtype=np.float32)[:, None]  # [256, 1]
    contrasted = (level - 128) * contrast + 128
    new_level = (contrasted + MAX_OFFSET_LEVELS * brightness_change) * gain  # [256, 3]
    table = np.clip(np.rint(new_level), 0, 255).astype(np.uint8)
    if out is None:
        out = np.empty_like(image)
    for channel in range(3):
        np.take(table[:, channel], image[..., channel], out=out[..., channel], mode="clip")
    return out
