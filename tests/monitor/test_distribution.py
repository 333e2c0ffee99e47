"""The training distribution summary: its numbers, and its file `seen.json`."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from data_tiny import make_episode, write_store
from refusals import refuses
from spear.data.mixture import Mixture, TrainingSamples
from spear.data.store.episode_store import WeightedStore
from spear.monitor.distribution import TrainingDistribution

NUM_EPISODES = 3


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> TrainingDistribution:
    """A summary of three small episodes (`make_episode`), drawn with image augmentation."""
    folder = tmp_path_factory.mktemp("episodes")
    store = write_store([make_episode(index) for index in range(NUM_EPISODES)], folder)
    samples = TrainingSamples(
        Mixture([WeightedStore("it", store, 1.0)]), {"external": (40, 50)}, augment=1.0
    )
    return TrainingDistribution.from_samples(samples, batch_size=32)


def test_limits_are_those_of_all_positions(distribution: TrainingDistribution) -> None:
    # The last step of an episode has no action, so it is no sample.
    positions = [make_episode(index).position[:-1] for index in range(NUM_EPISODES)]

    np.testing.assert_allclose(distribution.min_position_m, np.min(positions, (0, 1)), atol=1e-6)
    np.testing.assert_allclose(distribution.max_position_m, np.max(positions, (0, 1)), atol=1e-6)


def test_max_rotation_is_measured_from_the_mean_orientation(
    distribution: TrainingDistribution,
) -> None:
    quaternions = np.concatenate(
        [make_episode(index).rotation[:-1] for index in range(NUM_EPISODES)]
    )
    rotations = Rotation.from_quat(quaternions, scalar_first=True)
    expected_rad = (rotations.mean().inv() * rotations).magnitude().max()

    # The summary averages the steps that were drawn, some of them several times. So its mean
    # orientation differs a little from the mean over all steps.
    assert distribution.max_rotation_rad == pytest.approx(expected_rad, abs=0.05)


def test_colors_are_those_of_images_without_augmentation(
    distribution: TrainingDistribution,
) -> None:
    mean_difference, _ = distribution.red_minus_blue["external"]

    # `make_episode` gives its images a blue of 90, and a red that grows from 20 to 140.
    mean_red = 80
    blue = 90
    assert mean_difference == pytest.approx(mean_red - blue, abs=3)


def test_grippers_that_are_opened_and_closed_in_turn_are_opposite_to_their_commands(
    distribution: TrainingDistribution,
) -> None:
    """The gripper of `make_episode` is open in every second step, and its command is the next
    opening.
    """
    assert distribution.opposite_gripper_share == 1


def test_initial_opening_is_that_of_the_episodes(distribution: TrainingDistribution) -> None:
    assert distribution.mean_initial_opening == make_episode(0).gripper[0]


def test_the_policy_relies_on_a_camera_of_every_step(distribution: TrainingDistribution) -> None:
    assert distribution.camera_shares == {"external": 1.0}
    assert distribution.usual_cameras == ["external"]


# The share of steps that have the wrist camera, and the cameras on which the policy then relies.
@pytest.mark.parametrize(("share", "cameras"), [(0.6, ["external"]), (0.99, ["external", "wrist"])])
def test_the_policy_does_not_rely_on_a_camera_that_many_steps_lack(
    distribution: TrainingDistribution, share: float, cameras: list[str]
) -> None:
    colors = {"external": (0.0, 1.0), "wrist": (0.0, 1.0)}
    shares = {"external": 1.0, "wrist": share}

    changed = dataclasses.replace(distribution, red_minus_blue=colors, camera_shares=shares)

    assert changed.usual_cameras == cameras


def test_a_summary_without_shares_has_all_its_cameras_in_every_step(
    distribution: TrainingDistribution,
) -> None:
    old = dataclasses.replace(distribution, camera_shares={})

    assert old.usual_cameras == ["external"]


def test_a_saved_summary_is_loaded_again(
    distribution: TrainingDistribution, tmp_path: Path
) -> None:
    distribution.save(tmp_path / "seen.json")

    assert TrainingDistribution.load(tmp_path / "seen.json") == distribution


def test_the_file_has_the_keys_that_older_versions_wrote(
    distribution: TrainingDistribution, tmp_path: Path
) -> None:
    distribution.save(tmp_path / "seen.json")

    keys = list(json.loads((tmp_path / "seen.json").read_text()))
    assert keys == [
        "low", "high", "facing", "turned", "redder", "opposite", "begins", "looks", "mistaken",
        "shown",
    ]  # fmt: skip


def test_a_missing_file_is_no_summary(tmp_path: Path) -> None:
    assert TrainingDistribution.load(tmp_path / "none.json") is None


def test_a_quaternion_of_three_numbers_is_refused(
    distribution: TrainingDistribution, tmp_path: Path
) -> None:
    broken = dataclasses.replace(distribution, mean_rotation=distribution.mean_rotation[:3])
    broken.save(tmp_path / "seen.json")

    refuses("seen.json.*facing", TrainingDistribution.load, tmp_path / "seen.json")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "seen.json").write_text("{}")

    refuses("seen.json.*low", TrainingDistribution.load, tmp_path / "seen.json")
