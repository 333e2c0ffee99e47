"""The sample of BridgeData in RLDS, which the tests of the readers share."""

from pathlib import Path

import pytest

from data_tiny import copy_dataset


@pytest.fixture(scope="session")
def bridge(shared: Path) -> Path:
    """The folder with 25 episodes."""
    return shared / "data" / "bridge_v2_sample"


@pytest.fixture
def bridge_copy(bridge: Path, tmp_path: Path) -> Path:
    """A copy of the version folder that a test may change."""
    return copy_dataset(bridge / "1.0.0", tmp_path / "rlds", None)
