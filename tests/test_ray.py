"""Ray labels images as the local engine does, and Ray Train trains with two workers.

An engine runs the labeling models over many images. Ray is started once for all tests of this file.
"""

import os
import runpy
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from data_tiny import make_episode
from labels_stand_ins import BoxSegmenter, SlopePointMap, make_engine, make_factories, write_photos
from refusals import refuses
from spear.data.store.episode_store import append_episodes
from spear.errors import SpearError
from spear.labels.engine import run_ray
from spear.labels.inputs import list_images
from spear.labels.options import WorkOptions
from spear.labels.run import label_into_folder
from spear.policy import Spear1Policy
from train_tiny import read_log

EXAMPLE = Path(__file__).parents[1] / "examples" / "cluster" / "ray_train.py"
NUM_PHOTOS = 21  # three shards of at most 8
WORK = WorkOptions(shard_size=8, batch_size=3)
NO_SETTINGS: dict[str, Any] = {}  # which a folder of labels would record
pytestmark = [
    pytest.mark.slow,  # a minute: Ray starts, and its workers import PyTorch
    pytest.mark.xdist_group("ray"),  # two Rays at a time starve each other
]


@pytest.fixture(autouse=True, scope="module")
def cluster() -> Iterator[None]:
    """Starts Ray with two CPUs. Its workers can import the same modules as the tests."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.train.torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_worker_niceness", "0")  # Ray's 15 starves workers beside tests
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            "local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False
        )
        yield
        ray.shutdown()


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the contents of the files in a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_ray_finishes_what_the_local_engine_began_with_the_same_bytes(tmp_path: Path) -> None:
    """The local engine labels all photos. Two of the three shards are removed and made by Ray."""
    source = str(write_photos(tmp_path / "photos", NUM_PHOTOS))
    labels = tmp_path / "labels"
    label_into_folder(list_images(source), labels, make_engine(), NO_SETTINGS, WORK)
    expected = read_files(labels)
    for number in (0, 2):
        (labels / f"labels-{number:05d}.parquet").unlink()

    done = label_into_folder(
        list_images(source), labels, partial(run_ray, make_factories(), WORK), NO_SETTINGS, WORK
    )

    assert done.num_before == 8  # in the shard that was there
    assert done.num_done == NUM_PHOTOS
    assert read_files(labels) == expected


def make_detector_without_key() -> Any:
    """Fail as a detector does whose service needs a key."""
    raise SpearError("no API key: set ONE")


def test_an_error_in_a_ray_worker_is_one_line_and_leaves_no_folder(tmp_path: Path) -> None:
    source = str(write_photos(tmp_path / "photos", NUM_PHOTOS))
    makers = (make_detector_without_key, BoxSegmenter, SlopePointMap)
    out = tmp_path / "labels"

    refuses(
        "set ONE",
        label_into_folder,
        list_images(source),
        out,
        partial(run_ray, makers, WORK),
        NO_SETTINGS,
        WORK,
    )

    assert not out.exists()


def test_the_example_trains_with_two_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append_episodes([make_episode(0), make_episode(1)], tmp_path / "made")
    command = "spear train nano-post --init nano --episodes made --out run --steps 2 --device cpu"
    changes = "--set batch_size=4 flow_samples=1 warmup=1"
    script = [str(EXAMPLE), "--storage", str(tmp_path / "ray"), "--workers", "2"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [*script, *command.split(), *changes.split()])

    runpy.run_path(str(EXAMPLE), run_name="__main__")

    assert [row["step"] for row in read_log(tmp_path / "run")] == [2]
    assert Spear1Policy.load(tmp_path / "run").model is not None
    assert '"processes": 2' in (tmp_path / "run" / "final" / "recipe.json").read_text()
