"""Fixtures that all tests of training share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from spear.monitor import distribution


@pytest.fixture(autouse=True, scope="module")
def few_summarized_steps() -> Iterator[None]:
    """Summarizes 16 steps of the demonstrations in seen.json instead of 512, to save time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distribution, "NUM_SAMPLES", 16)
        yield


@pytest.fixture(scope="module")
def episodes(shared: Path) -> str:
    """The path of the 25 real episodes; a test is skipped if they are missing."""
    path = shared / "data" / "bridge_v2_sample"
    if not path.is_dir():
        pytest.skip(f"no real episodes at {path}")
    return str(path)
