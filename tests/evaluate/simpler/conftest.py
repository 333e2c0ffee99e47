"""SIMPLER's simulator for tests; tests that use it are skipped where it cannot run."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from spear.evaluate.options import SimplerOptions
from spear.evaluate.simpler.run import Simpler
from spear.evaluate.simpler.world import NoRenderer, SimplerProcess

CUBE_TASK = "StackGreenCubeOnYellowCubeBakedTexInScene-v1"


@pytest.fixture(scope="session")
def simpler(shared: Path) -> Iterator[Simpler]:
    """The simulator, with one process; skips without ManiSkill, its assets or a renderer."""
    pytest.importorskip("mani_skill")
    assets = shared / "assets" / "simpler"
    if not assets.is_dir():
        pytest.skip(f"SIMPLER's assets not found at {assets}")
    simulator = Simpler(SimplerOptions(batch_size=1, assets=assets))
    try:
        simulator.ensure_processes(CUBE_TASK, 1)[0].reset(0, image=True)
    except NoRenderer as error:
        pytest.skip(str(error))
    yield simulator
    simulator.close()


@pytest.fixture
def process(simpler: Simpler) -> SimplerProcess:
    """The process of the simulator, for the task with the cubes."""
    return simpler.ensure_processes(CUBE_TASK, 1)[0]
