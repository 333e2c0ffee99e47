"""Where a rollout leaves the training distribution: in poses, in pictures and in words.

A distance is that to the nearest state of training. A step departs where its distance is larger
than any distance between the two halves of the training episodes (`_measure_limit_between_halves`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spear.checks.rollout.episode import RecordedEpisode
from spear.checks.rollout.unseen_instruction import split_words
from spear.types import Array

MAX_REFERENCES = 1500  # training steps that are compared


@dataclass(frozen=True)
class Departure:
    """The first step of an episode whose distance from training is larger than the limit.

    episode   index of the episode.
    step      the step.
    quantity  what departs.
    amount    the distance and the largest one of training, in words.
    """

    episode: int
    step: int
    quantity: str
    amount: str


@dataclass(frozen=True)
class Departures:
    """All distances of a rollout from training.

    distances  quantity → [N] distance of each step of all episodes.
    limits     quantity → the largest distance from one half of the training episodes to the other.
    first      the first departures of each episode, in time order.
    """

    distances: Mapping[str, Array]
    limits: Mapping[str, float]
    first: Sequence[Departure]


def measure_departures(
    rollout: Sequence[RecordedEpisode],
    demonstrations: Sequence[RecordedEpisode],
    training_instructions: Sequence[str],
) -> Departures:
    """Measure how far each step of a rollout is from training."""
    # Name of a quantity → what `_extract_vectors` reads: a part of the state, or a camera.
    quantities = {"position, m": "position", "orientation, degrees": "rotation"}
    cameras = set(rollout[0].pictures)
    for episode in [*rollout, *demonstrations]:
        cameras &= set(episode.pictures)
    for camera in sorted(cameras):
        quantities[f"pictures of {camera}, gray levels"] = camera

    distances: dict[str, Array] = {}
    limits: dict[str, float] = {}
    first: list[Departure] = []
    for quantity, part_or_camera in quantities.items():
        vectors = [_extract_vectors(episode, part_or_camera) for episode in demonstrations]
        limits[quantity] = _measure_limit_between_halves(vectors, part_or_camera)
        references = _thin_out(np.concatenate(vectors))
        values = []
        for number, episode in enumerate(rollout):
            distance = _measure_nearest_distances(
                _extract_vectors(episode, part_or_camera), references, part_or_camera
            )
            values.append(distance)
            is_outside = distance > limits[quantity]
            if is_outside.any():
                step = int(is_outside.argmax())
                amount = f"{distance[step]:.3g}, in training at most {limits[quantity]:.3g}"
                first.append(Departure(number, step, quantity, amount))
        distances[quantity] = np.concatenate(values)
    first += _find_new_words(rollout, training_instructions)
    first.sort(key=lambda departure: (departure.episode, departure.step))
    return Departures(distances, limits, first)


def _extract_vectors(episode: RecordedEpisode, part_or_camera: str) -> Array:
    """Return what is compared, [T, D]: positions, orientations, or small pictures of a camera."""
    if part_or_camera == "position":
        return np.asarray(episode.position, np.float32)
    if part_or_camera == "rotation":
        return np.asarray(episode.rotation, np.float32)
    # Every second row and column is enough.
    pictures = episode.pictures[part_or_camera].small[:, ::2, ::2].astype(np.float32)
    return pictures.reshape(len(episode), -1)


def _measure_limit_between_halves(vectors: Sequence[Array], part_or_camera: str) -> float:
    """Return the largest distance of a state in one half of training to the nearest in the other.

    A single episode is compared with itself, so its limit is 0.
    """
    first_half = _thin_out(np.concatenate(vectors[::2]))
    other_episodes = vectors[1::2] if len(vectors) > 1 else vectors
    second_half = _thin_out(np.concatenate(other_episodes))
    return float(_measure_nearest_distances(second_half, first_half, part_or_camera).max())


def _thin_out(vectors: Array) -> Array:
    """Keep at most `MAX_REFERENCES` of the vectors, spread over all."""
    stride = math.ceil(len(vectors) / MAX_REFERENCES)
    return vectors[::stride]


def _measure_nearest_distances(vectors: Array, references: Array, part_or_camera: str) -> Array:
    """Return the distance from each vector [T, D] to the nearest reference [N, D].

    Distances are in meters for positions, in degrees for orientations, and for pictures in gray
    levels (root mean square over the pixels).
    """
    if part_or_camera == "rotation":
        cosines = np.abs(vectors @ references.T).max(1)
        return np.degrees(2 * np.arccos(np.minimum(cosines, 1.0)))
    # |v - r|² = |v|² + |r|² - 2 v r, for every pair: [T, N]
    squares = (vectors**2).sum(1)[:, None] + (references**2).sum(1) - 2 * vectors @ references.T
    distances = np.sqrt(np.maximum(squares.min(1), 0.0))
    if part_or_camera == "position":
        return distances
    return distances / np.sqrt(vectors.shape[1])  # per pixel


def _find_new_words(
    rollout: Sequence[RecordedEpisode], training_instructions: Sequence[str]
) -> list[Departure]:
    """List the episodes whose instruction has words that training never had."""
    vocabulary: set[str] = set()
    for text in training_instructions:
        vocabulary |= split_words(text)
    departures = []
    for number, episode in enumerate(rollout):
        new_words = sorted(split_words(episode.instruction) - vocabulary)
        if new_words:
            departures.append(Departure(number, 0, "words", ", ".join(new_words)))
    return departures
