"""Recording demonstrations: continuing after a stop, and refusing folders of other recordings.

Episodes are recorded in this order: the first seed of each task family, the next seed of each, ….
The tests use two task families, so two seeds are four episodes.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tiny import assert_same, edit_json
from refusals import refuses
from spear.data.store.episode_store import SHARD_GLOB, EpisodeStore, append_episodes
from spear.sim.record import InterveningPolicy
from spear.sim_data.demonstrations import SETTINGS_FILE, record_demonstrations
from spear.util.run_lock import try_to_hold_lock

SIZES = {"external": (96, 72), "wrist": (48, 48)}  # width and height, in pixels
FAMILIES = ("put_on", "spoon_on_towel", "put_on")  # a repeated family counts once


def record(
    out: Path,
    episodes: int = 2,
    first_seed: int = 10_000,
    policy: InterveningPolicy | None = None,
    **changed_sizes: object,
) -> tuple[int, int]:
    """Record `episodes` demonstrations per task family; returns how many succeeded and were tried.

    `changed_sizes` (external, wrist) replace image sizes.
    """
    sizes = {**SIZES, **changed_sizes}
    return record_demonstrations(
        out, FAMILIES, episodes, first_seed, sizes, workers=0, policy=policy
    )


def get_modification_times(folder: Path, pattern: str = "*") -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob(pattern)}


def copy_episodes(recorded_folder: Path, out: Path, indices: list[int]) -> Path:
    """Make a folder with the settings and some of the demonstrations of a recording."""
    store = EpisodeStore(recorded_folder)
    append_episodes([store[index] for index in indices], out)
    shutil.copy(recorded_folder / SETTINGS_FILE, out)
    return out


@pytest.fixture(scope="module")
def recorded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished recording of four demonstrations, all of which succeeded."""
    out = tmp_path_factory.mktemp("demonstrations")
    assert record(out) == (4, 4)
    return out


def test_a_stopped_recording_continues_behind_its_last_shard(
    recorded_folder: Path, tmp_path: Path
) -> None:
    out = copy_episodes(recorded_folder, tmp_path / "stopped", [0, 1, 2])
    times_before = get_modification_times(out, SHARD_GLOB)
    (out / "episodes-00001.images").touch()  # stopped before the shard's other file was written

    assert record(out) == (4, 4)

    assert (out / "episodes-00001.arrow").is_file()
    for episode, expected in zip(EpisodeStore(out), EpisodeStore(recorded_folder), strict=True):
        assert_same(episode, expected)
    times_after = get_modification_times(out, SHARD_GLOB)
    for path, time_before in times_before.items():
        assert times_after[path] == time_before


def test_a_complete_recording_continues_with_more_episodes(
    recorded_folder: Path, tmp_path: Path
) -> None:
    out = copy_episodes(recorded_folder, tmp_path / "complete", [0, 1, 2, 3])

    assert record(out) == (4, 4)
    assert record(out, episodes=3) == (6, 6)

    store = EpisodeStore(out)
    assert store.source(4) == "sim/put_on/10002"
    assert store.source(5) == "sim/spoon_on_towel/10002"


def test_a_recording_of_another_simulator_is_not_continued(
    recorded_folder: Path, tmp_path: Path
) -> None:
    out = copy_episodes(recorded_folder, tmp_path / "complete", [0, 1, 2, 3])
    edit_json(out / SETTINGS_FILE, lambda settings: settings.update(simulator="MuJoCo 3.7.0"))

    refuses("simulator is", record, out, episodes=3)


def test_a_failed_demonstration_is_not_tried_again(recorded_folder: Path, tmp_path: Path) -> None:
    """The second demonstration is not in the folder. Since later ones are, it was tried before."""
    out = copy_episodes(recorded_folder, tmp_path / "failed", [0, 2, 3])

    assert record(out) == (3, 4)


@pytest.mark.parametrize(
    ("changed", "message"),  # arguments of `record`
    [
        ({"first_seed": 10_001}, "other settings .sim/put_on/10000 "),
        ({"episodes": 1}, "other settings .sim/put_on/10001 "),  # fewer than the folder has
        ({"wrist": (32, 32)}, r"wrist 48 x 48, not 32 x 32"),
        ({"first_seed": 9_999}, "kept for testing"),
    ],
)
def test_a_folder_with_other_demonstrations_stays_unchanged(
    recorded_folder: Path, changed: dict[str, object], message: str
) -> None:
    times_before = get_modification_times(recorded_folder)

    refuses(message, record, recorded_folder, **changed)

    assert get_modification_times(recorded_folder) == times_before


def test_one_recording_at_a_time(recorded_folder: Path) -> None:
    with try_to_hold_lock(recorded_folder / ".lock"):
        refuses("another process is recording", record, recorded_folder, episodes=3)

    assert len(EpisodeStore(recorded_folder)) == 4


def stand_still(folder: Path, observation: object, seed: int, step: int) -> Any:
    """A policy whose action is the identity: no translation, no rotation, an open gripper."""
    return np.array([0, 0, 0, 1, 0, 0, 0, 1], np.float32)


def test_a_recording_with_a_policy_continues_with_the_same_weights_only(tmp_path: Path) -> None:
    """The policies are in three folders, of which "one" and "copy" have the same weights."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    policy = InterveningPolicy(tmp_path / "one", stand_still)
    copied_policy = InterveningPolicy(tmp_path / "copy", stand_still)
    other_policy = InterveningPolicy(tmp_path / "other", stand_still)
    out = tmp_path / "out"

    num_recorded, _ = record(out, episodes=1, policy=policy)
    continued = record(out, episodes=1, policy=copied_policy)

    assert num_recorded > 0
    assert continued == (num_recorded, 2)  # two episodes were tried, one of each task family
    refuses("policy", record, out, episodes=2, policy=other_policy)
    assert len(EpisodeStore(out)) == num_recorded
