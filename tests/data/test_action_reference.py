"""Chunks as steps, and as motions from the observed pose: both lead the arm through the same poses.

The poses are computed with `apply_action`, one step after the other, as a robot executes a chunk.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from data_tiny import make_episode, write_store
from refusals import refuses
from spear.data.action_reference import (
    convert_motions_to_steps,
    convert_steps_to_motions_from_observed,
)
from spear.data.normalize import Normalizer
from spear.data.store.episode_store import EpisodeStore
from spear.geometry import apply_action
from spear.types import Action

NUM_CHUNKS = 50
HORIZON = 5  # actions in a chunk


def draw_quaternions(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Random unit quaternions (w, x, y, z) with w >= 0."""
    xyzw = Rotation.random(int(np.prod(shape)), random_state=seed).as_quat(canonical=True)
    wxyz = np.roll(xyzw, 1, axis=-1)
    return torch.from_numpy(wxyz).reshape(*shape, 4)


def draw_steps(seed: int = 0) -> Action:
    """Random chunks of steps, with large rotations."""
    generator = torch.Generator().manual_seed(seed)
    translation = torch.randn(NUM_CHUNKS, HORIZON, 3, generator=generator, dtype=torch.float64)
    gripper = torch.rand(NUM_CHUNKS, HORIZON, 1, generator=generator, dtype=torch.float64)
    return Action(translation, draw_quaternions((NUM_CHUNKS, HORIZON), seed), gripper)


def test_a_motion_from_the_observed_pose_leads_where_the_steps_lead() -> None:
    steps = draw_steps()
    motions = convert_steps_to_motions_from_observed(steps)
    observed_position = torch.ones(NUM_CHUNKS, 3, dtype=torch.float64)
    observed_rotation = draw_quaternions((NUM_CHUNKS,), seed=1)

    position = observed_position
    rotation = observed_rotation
    for i in range(HORIZON):
        position, rotation = apply_action(
            position, rotation, steps.translation[:, i], steps.rotation[:, i]
        )
        position_at_once, rotation_at_once = apply_action(
            observed_position,
            observed_rotation,
            motions.translation[:, i],
            motions.rotation[:, i],
        )

        torch.testing.assert_close(position_at_once, position)
        torch.testing.assert_close(rotation_at_once, rotation)


def test_steps_are_exactly_recovered() -> None:
    steps = draw_steps()

    recovered = convert_motions_to_steps(convert_steps_to_motions_from_observed(steps))

    torch.testing.assert_close(recovered.to_vector(), steps.to_vector(), rtol=0, atol=1e-12)


def test_rotations_stay_in_the_half_space_that_the_flow_learns() -> None:
    motions = convert_steps_to_motions_from_observed(draw_steps())

    assert (motions.rotation[..., 0] >= 0).all()
    torch.testing.assert_close(
        motions.rotation.norm(dim=-1), torch.ones(NUM_CHUNKS, HORIZON, dtype=torch.float64)
    )


def test_the_first_action_and_the_gripper_are_the_same_in_both() -> None:
    steps = draw_steps()
    motions = convert_steps_to_motions_from_observed(steps)

    torch.testing.assert_close(motions.translation[:, 0], steps.translation[:, 0])
    torch.testing.assert_close(motions.rotation[:, 0], steps.rotation[:, 0])
    assert torch.equal(motions.gripper, steps.gripper)


# Normalization


def make_steady_store(tmp_path: Path, num_steps: int) -> EpisodeStore:
    """An episode in which each step moves by 10 to 20 mm along x, and by nothing else."""
    action = np.zeros((num_steps, 8), np.float32)
    action[:, 0] = np.random.default_rng(0).uniform(0.01, 0.02, num_steps)
    action[:, 3] = 1
    images = {"external": [b"x"] * num_steps}
    episode = make_episode(0, num_steps, images=images, action=action)
    return write_store([episode], tmp_path)


@pytest.fixture(params=["quantile", "minmax", "meanstd"])
def normalizer(request: pytest.FixtureRequest, tmp_path: Path) -> Normalizer:
    """Statistics of the steady store, for motions from the observed pose, in each mode."""
    store = make_steady_store(tmp_path, 400)
    return Normalizer.fit([(store, 1.0)], request.param, action_reference="observed")


def test_each_action_of_a_chunk_has_its_own_scale(normalizer: Normalizer) -> None:
    """After k steps of 15 mm on average, the arm is k · 15 mm away."""
    offsets_x_m = [offset[0] for offset in normalizer.chunk_offset]
    scales_x_m = [scale[0] for scale in normalizer.chunk_scale]

    np.testing.assert_allclose(offsets_x_m, 0.015 * np.arange(1, HORIZON + 1), rtol=0.07)
    assert scales_x_m == sorted(scales_x_m)


def test_normalizing_and_back_gives_the_same_steps(normalizer: Normalizer) -> None:
    steps = draw_steps()

    normalized = normalizer.normalize_action(steps)
    recovered = normalizer.unnormalize_action(normalized)

    torch.testing.assert_close(recovered.to_vector(), steps.to_vector(), rtol=0, atol=1e-9)


def test_what_is_saved_is_read_back(normalizer: Normalizer, tmp_path: Path) -> None:
    path = tmp_path / "normalizer.json"
    normalizer.save(path)

    assert Normalizer.load(path) == normalizer


def test_bounds_say_what_becomes_one(tmp_path: Path) -> None:
    store = make_steady_store(tmp_path, 30)
    normalizer = Normalizer.fit([(store, 1.0)], "bounds", bounds_m=(0.05, 0.1, 0.2))
    longest = torch.tensor([[[0.05, 0.1, 0.2, 1, 0, 0, 0, 1]]])

    normalized = normalizer.normalize_action(Action.from_vector(longest))

    torch.testing.assert_close(normalized.translation, torch.ones(1, 1, 3))


def test_bounds_grow_along_a_chunk_that_is_measured_from_the_observed_pose(
    tmp_path: Path,
) -> None:
    store = make_steady_store(tmp_path, 30)
    normalizer = Normalizer.fit(
        [(store, 1.0)], "bounds", bounds_m=(0.05, 0.1, 0.2), action_reference="observed"
    )
    longest = torch.tensor([[[0.05, 0.1, 0.2, 1, 0, 0, 0, 1]] * HORIZON])

    normalized = normalizer.normalize_action(Action.from_vector(longest))

    # Each step is as long as the bound of a step. From the observed pose, action k is therefore k
    # times as long, and so is its bound: each action becomes 1.
    torch.testing.assert_close(normalized.translation, torch.ones(1, HORIZON, 3))


def test_bounds_without_lengths_are_refused(tmp_path: Path) -> None:
    store = make_steady_store(tmp_path, 30)

    refuses(r"bounds_m=\[0.05", Normalizer.fit, [(store, 1.0)], "bounds")


def test_episodes_shorter_than_a_chunk_can_be_normalized(tmp_path: Path) -> None:
    store = make_steady_store(tmp_path, 3)

    normalizer = Normalizer.fit([(store, 1.0)], action_reference="observed")

    assert len(normalizer.chunk_scale) == HORIZON
    assert normalizer.chunk_offset[4] == (0.0, 0.0, 0.0)  # no chunk has a fifth action
