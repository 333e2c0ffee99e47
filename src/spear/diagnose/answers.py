"""Asks a policy what it would do if something of its observations were another."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from spear.data.store.episode_store import EpisodeStore
from spear.embodiments.observations import get_camera_key, is_camera_key
from spear.errors import suppress_notices
from spear.policy import Spear1Policy
from spear.types import Array
from spear.util.images import decode_image

NUM_OBSERVATIONS = 16  # of different episodes, if there are that many
SEED = 0  # of the noise of every answer, so that only the observations differ

Observation = dict[str, Any]


def sample_observations(store: EpisodeStore, policy: Spear1Policy) -> list[Observation]:
    """Draw observations from the episodes of a store, one from each as long as there are enough."""
    rng = np.random.default_rng(0)
    order = rng.permutation(len(store))
    observations = []
    for number in range(NUM_OBSERVATIONS):
        index = int(order[number % len(order)])
        step = int(rng.integers(store.lengths[index]))
        observations.append(build_observation(store, policy, index, step))
    return observations


def build_observation(
    store: EpisodeStore, policy: Spear1Policy, index: int, step: int
) -> Observation:
    """Build the observation of a step of an episode."""
    episode = store.without_images(index)
    state = np.concatenate(
        [episode.position[step], episode.rotation[step], episode.gripper[step : step + 1]]
    )
    observation: Observation = {
        "observation/state": state.astype(np.float32),
        "prompt": episode.instruction,
        "seed": SEED,
    }
    for camera in policy.image_sizes:
        encoded = store.image(index, step, camera)
        if encoded:
            observation[get_camera_key(camera)] = decode_image(
                encoded, f"{episode.source} {camera}"
            )
    return observation


def predict_chunk_displacements(policy: Spear1Policy, observations: Sequence[Observation]) -> Array:
    """Return the displacement [B, 3] (m) that each chunk [B, H, 8] of an answer commands in all."""
    with suppress_notices():
        results = policy.infer_batch(observations)
    return np.stack([result["actions"][:, :3].sum(0) for result in results]).astype(np.float64)


def exchange_pictures(observations: Sequence[Observation]) -> list[Observation]:
    """Give each observation the pictures of the next one, if both have the same cameras."""
    exchanged = []
    for number, observation in enumerate(observations):
        donor = observations[(number + 1) % len(observations)]
        pictures = {key: value for key, value in donor.items() if is_camera_key(key)}
        own_values = {key: value for key, value in observation.items() if not is_camera_key(key)}
        exchanged.append({**own_values, **pictures})
    return exchanged


def exchange_instructions(
    observations: Sequence[Observation], instructions: Sequence[str], policy: Spear1Policy
) -> list[Observation]:
    """Give each observation another instruction, of the same number of tokens if there is one.

    Even a policy that reads no word answers differently to a longer instruction, because the
    number of tokens shifts the positions of all that follow.
    """
    exchanged = []
    lengths = dict(
        zip(instructions, count_tokens_that_policy_reads(instructions, policy), strict=True)
    )
    prompts = [observation["prompt"] for observation in observations]
    prompt_lengths = count_tokens_that_policy_reads(prompts, policy)
    for number, observation in enumerate(observations):
        distances = {}
        for text, length in lengths.items():
            if text != observation["prompt"]:
                distances[text] = abs(length - prompt_lengths[number])
        smallest = min(distances.values())
        candidates = [text for text, distance in distances.items() if distance == smallest]
        prompt = candidates[number % len(candidates)]
        exchanged.append({**observation, "prompt": prompt})
    return exchanged


def count_tokens_that_policy_reads(instructions: Sequence[str], policy: Spear1Policy) -> list[int]:
    """Count the tokens of each instruction."""
    mask = policy.processor.encode_instructions(list(instructions), cut=True)["attention_mask"]
    return [int(count) for count in mask.sum(1)]


def compute_mean_distance_m(first: Array, second: Array) -> float:
    """Return the mean distance between displacements [B, 3], row by row."""
    return float(np.linalg.norm(first - second, axis=1).mean())
