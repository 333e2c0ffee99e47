"""Fixtures that all tests of training share."""

from collections.abc import Iterator

import pytest

from spear.monitor import distribution


@pytest.fixture(autouse=True, scope="module")
def few_summarized_steps() -> Iterator[None]:
    """Summarizes 16 steps of the demonstrations in seen.json instead of 512, to save time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distribution, "NUM_SAMPLES", 16)
        yield
