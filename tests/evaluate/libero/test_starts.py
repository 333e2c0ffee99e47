"""Starts of demonstrations in LIBERO: they differ from all official states, and nothing falls.

The official states here are made by the tests: a bowl, a plate and a mug on a table, and a box that
may stand on furniture.
"""

import numpy as np
import pytest

from refusals import refuses
from spear.evaluate.libero.starts import (
    MARGIN_M,
    MAX_JOINT_TURN_RAD,
    MAX_RAISED_SHIFT_M,
    MAX_SHIFT_M,
    MIN_GAP_M,
    measure_distance_from_nearest_official_state_m,
    sample_start,
)
from spear.types import Array

NUM_STATES = 50


def make_official(**position_of_object: tuple[float, float, float]) -> dict[str, Array]:
    """Official states, in which each object is within 1 cm of its position.

    Returns:
        Object → [NUM_STATES, 3], its position (m) in each official state.
    """
    rng = np.random.default_rng(0)
    official = {}
    for name, position in position_of_object.items():
        wobble = rng.uniform(-0.01, 0.01, (NUM_STATES, 3)) * (1, 1, 0)
        official[name] = np.array(position) + wobble
    return official


# Three objects that stand on a table at the height 0, at least 0.2 m apart.
TABLE = make_official(bowl=(0.0, 0.0, 0.0), plate=(0.2, 0.1, 0.0), mug=(-0.2, 0.1, 0.0))


def find_positions(official: dict[str, Array], seed: int) -> dict[str, Array]:
    """Find where the objects are in the start of a seed: object → horizontal position [2], m.

    A start shifts the objects of one of the official states.
    """
    start = sample_start(official, seed)
    position_of_object = {}
    for name, (shift_x, shift_y, _) in start.changes["objects"].items():
        position_of_object[name] = official[name][start.state_index, :2] + (shift_x, shift_y)
    return position_of_object


def test_a_start_differs_from_every_official_state() -> None:
    """At least one object is farther than the margin from where it is in the official state."""
    for seed in range(10_000, 10_100):
        position_of_object = find_positions(TABLE, seed)
        for state in range(NUM_STATES):
            distances = [
                np.linalg.norm(position_of_object[name] - TABLE[name][state, :2]) for name in TABLE
            ]
            assert max(distances) > MARGIN_M


def test_the_margin_is_to_the_most_similar_state() -> None:
    official = np.array([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.02], [1.0, 0.0]]])
    start = np.array([[0.0, 0.03], [1.0, 0.005]])

    # 30 mm from the first state, by the first object; 10 mm from the second.
    assert measure_distance_from_nearest_official_state_m(official, start) == pytest.approx(0.01)


def test_the_same_seed_gives_the_same_start_and_another_attempt_another_one() -> None:
    first = sample_start(TABLE, 10_001)
    repeated = sample_start(TABLE, 10_001)
    other_attempt = sample_start(TABLE, 10_001, attempt=1)

    assert first.changes["objects"] == repeated.changes["objects"]
    assert first.changes["objects"] != other_attempt.changes["objects"]
    assert first.state_index == other_attempt.state_index == 10_001 % NUM_STATES


def test_objects_keep_their_gaps() -> None:
    close = make_official(bowl=(0.0, 0.0, 0.0), mug=(0.13, 0.0, 0.0))

    for seed in range(10_000, 10_050):
        position_of_object = find_positions(close, seed)
        before = np.linalg.norm(close["bowl"][seed % NUM_STATES] - close["mug"][seed % NUM_STATES])
        gap = np.linalg.norm(position_of_object["bowl"] - position_of_object["mug"])
        assert gap >= min(before, MIN_GAP_M) - 1e-9


def test_what_stands_on_something_moves_with_it() -> None:
    stacked = make_official(ramekin=(0.0, 0.0, 0.0), bowl=(0.01, 0.0, 0.04), mug=(0.3, 0.0, 0.0))

    changes = sample_start(stacked, 10_000).changes["objects"]

    assert changes["bowl"] == changes["ramekin"]
    assert changes["bowl"] != changes["mug"]


def test_what_stands_on_furniture_hardly_moves() -> None:
    official = make_official(bowl=(0.0, 0.0, 0.0), box=(0.3, 0.0, 0.2))

    for seed in range(10_000, 10_020):
        x, y, _ = sample_start(official, seed).changes["objects"]["box"]
        assert np.hypot(x, y) <= MAX_RAISED_SHIFT_M + 1e-9


def test_objects_and_joints_stay_in_their_ranges() -> None:
    for seed in range(10_000, 10_050):
        changes = sample_start(TABLE, seed).changes
        shifts = [np.hypot(x, y) for x, y, _ in changes["objects"].values()]
        assert max(shifts) <= MAX_SHIFT_M
        assert np.abs(changes["joints"]).max() <= MAX_JOINT_TURN_RAD


def test_a_task_whose_objects_cannot_move_is_refused() -> None:
    """Seven objects stand so close together that none has room for a motion of its own."""
    angles = np.arange(7) * 2 * np.pi / 7
    crowded = {}
    for number, angle in enumerate(angles):
        position = 0.08 * np.array([np.cos(angle), np.sin(angle), 0])
        crowded[f"mug_{number}"] = np.tile(position, (NUM_STATES, 1))

    refuses("--tasks", sample_start, crowded, 10_000)
