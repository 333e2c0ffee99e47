"""The example of a robot without an arm: its recording shows the fault."""

import importlib.util
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import numpy as np
import pytest

from serve_here import HomingPolicy, run_server
from spear import embodiments
from spear.data.store.episode_store import EpisodeStore
from spear.serve.client import RemotePolicy
from spear.serve.recorder import claim_folder, open_recorder
from spear.serve.service import Service
from spear.types import Episode
from spear.util.images import encode_jpeg

EXAMPLE_FILE = Path(__file__).parents[2] / "examples" / "replay_client.py"
NUM_STEPS = 3
START_M = np.array([0.4, 0.2, 0.1])
MAX_BYTES = 2**30  # of all recordings


class HomingPolicyWithCamera(HomingPolicy):
    """A `HomingPolicy` that takes a camera."""

    image_sizes: ClassVar = {"external": (32, 24)}


@pytest.fixture
def example() -> ModuleType:
    """The example's module."""
    spec = importlib.util.spec_from_file_location("replay_client", EXAMPLE_FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_episode() -> Episode:
    """Make an episode of an arm that stands still; the left half of its pictures is white."""
    picture = np.zeros((24, 32, 3), np.uint8)
    picture[:, :16] = 255
    return Episode(
        images={"external": [encode_jpeg(picture)] * NUM_STEPS},
        position=np.tile(START_M, (NUM_STEPS, 1)),
        rotation=np.tile([1.0, 0, 0, 0], (NUM_STEPS, 1)),
        gripper=np.ones(NUM_STEPS),
        instruction="go home",
        rate_hz=5.0,
        source="made/0",
    )


def record_replay(example: ModuleType, fault: str, folder: Path) -> EpisodeStore:
    """Replay an episode with a fault to a server that records, and open the recording."""
    policy = HomingPolicyWithCamera()
    service = Service(policy, embodiments.load("generic"), "test", "generic")
    with (
        claim_folder(folder),
        open_recorder(folder, service, MAX_BYTES) as recorder,
        run_server(policy, recorder=recorder) as server,
        closing(RemotePolicy(f"ws://127.0.0.1:{server.port}")) as remote_policy,
    ):
        example.replay_episode(make_episode(), remote_policy, example.FAULTS[fault])
    return EpisodeStore(folder)


def test_without_a_fault_the_arm_goes_where_it_is_sent(example: ModuleType, tmp_path: Path) -> None:
    recording = record_replay(example, "none", tmp_path / "recordings")

    position = recording[0].position
    assert len(position) == NUM_STEPS
    np.testing.assert_allclose(position[1], 0.9 * START_M, atol=1e-6)  # a tenth of the way home
    assert recording[0].instruction == "go home"


def test_in_a_turned_base_the_arm_goes_elsewhere(example: ModuleType, tmp_path: Path) -> None:
    recording = record_replay(example, "turned-base", tmp_path / "recordings")

    position = recording[0].position
    motion = position[1] - position[0]
    # The action is a tenth of -START_M; a quarter turn makes (-y, x) of (x, y).
    np.testing.assert_allclose(motion, [0.02, -0.04, -0.01], atol=1e-6)
