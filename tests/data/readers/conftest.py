"""A sample of BridgeData in RLDS, which several tests of the readers use."""

from pathlib import Path

import pytest

from data_tiny import copy_dataset


@pytest.fixture(scope="session")
def bridge(shared: Path) -> Path:
    """The dataset's folder, with 25 episodes. Its one version is in the folder 1.0.0."""
    return shared / "data" / "bridge_v2_sample"


@pytest.fixture
def bridge_copy(bridge: Path, tmp_path: Path) -> Path:
    """A copy of the folder 1.0.0 that a test may change, without a `spear.json`."""
    return copy_dataset(bridge / "1.0.0", tmp_path / "rlds", layout=None)
