"""The Ray engine makes what the local one makes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from labels_stand_ins import BoxSegmenter, SlopePointMap, engine, graph, listing, photos
from spear.errors import SpearError
from spear.labels.engine import Graph, run_ray
from spear.labels.options import WorkOptions
from spear.labels.run import label_folder

pytestmark = pytest.mark.xdist_group("ray")  # two Rays at a time starve each other
WORK = WorkOptions(shard_size=8, batch_size=3)


@pytest.fixture(autouse=True)
def cluster() -> Iterator[None]:
    """A Ray of two CPUs whose workers can import the tests' own modules."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    tests = str(Path(__file__).parents[1] / "support")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", tests, prepend=":")
        ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        yield
        ray.shutdown()


def test_ray_makes_the_same_bytes_as_the_local_engine_and_finishes_what_it_began(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos", 21)
    label_folder(listing(source), tmp_path / "labels", engine(), {}, WORK)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "labels").iterdir()}
    broken = partial(run_ray, Graph(no_key, BoxSegmenter, SlopePointMap), WORK)
    with pytest.raises(SpearError, match=r"^no API key: set ONE$"):
        label_folder(listing(source), tmp_path / "none", broken, {}, WORK)
    assert not (tmp_path / "none").exists()
    for number in (0, 2):
        (tmp_path / "labels" / f"labels-{number:05d}.parquet").unlink()
    done = label_folder(listing(source), tmp_path / "labels", partial(run_ray, graph(), WORK), {}, WORK)
    assert (done.before, done.done) == (8, 21)
    assert {path.name: path.read_bytes() for path in (tmp_path / "labels").iterdir()} == whole


def no_key() -> Any:
    """A component that cannot be made."""
    raise SpearError("no API key: set ONE")
