"""Recording continues where it was stopped, and mixes nothing up."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tiny import assert_same, edit_json
from refusals import refuses
from spear.data.store.episode_store import SHARD_GLOB, EpisodeStore, write_episodes
from spear.sim.record import InterveningPolicy
from spear.sim_data.demonstrations import SETTINGS_FILE, record_demonstrations
from spear.util.run_lock import hold_lock

SIZES = {"external": (96, 72), "wrist": (48, 48)}
FAMILIES = "put_on", "spoon_on_towel", "put_on"  # the repetition changes nothing


def record(
    out: Path,
    episodes: int = 2,
    first_seed: int = 10_000,
    policy: InterveningPolicy | None = None,
    **changed_sizes: object,
) -> tuple[int, int]:
    sizes = {**SIZES, **changed_sizes}
    return record_demonstrations(
        out, FAMILIES, episodes, first_seed, sizes, workers=0, policy=policy
    )


def modification_times(folder: Path, pattern: str = "*") -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob(pattern)}


def copy_episodes(recorded: Path, out: Path, indices: list[int]) -> Path:
    """A folder that has only some of the recorded demonstrations, and the settings."""
    store = EpisodeStore(recorded)
    write_episodes([store[index] for index in indices], out)
    shutil.copy(recorded / SETTINGS_FILE, out)
    return out


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demonstrations")
    assert record(out) == (4, 4)
    return out


def test_a_stopped_recording_continues_behind_its_last_shard(
    recorded: Path, tmp_path: Path
) -> None:
    out = copy_episodes(recorded, tmp_path / "stopped", [0, 1, 2])
    times_before = modification_times(out, SHARD_GLOB)
    (out / "episodes-00001.images").touch()  # stopped between the two files of a shard

    assert record(out) == (4, 4)

    assert (out / "episodes-00001.arrow").is_file()
    for episode, expected in zip(EpisodeStore(out), EpisodeStore(recorded), strict=True):
        assert_same(episode, expected)
    times_after = modification_times(out, SHARD_GLOB)
    assert {path: times_after[path] for path in times_before} == times_before


def test_a_complete_recording_continues_with_more_episodes_of_the_same_simulator(
    recorded: Path, tmp_path: Path
) -> None:
    out = copy_episodes(recorded, tmp_path / "complete", [0, 1, 2, 3])

    assert record(out) == (4, 4)
    assert record(out, episodes=3) == (6, 6)

    store = EpisodeStore(out)
    assert store.source(4) == "sim/put_on/10002"
    assert store.source(5) == "sim/spoon_on_towel/10002"
    edit_json(out / SETTINGS_FILE, lambda settings: settings.update(simulator="MuJoCo 3.7.0"))
    refuses("simulator is", record, out, episodes=4)


def test_a_failed_demonstration_is_not_tried_again(recorded: Path, tmp_path: Path) -> None:
    """It is not in the folder, and what comes after it shows that it had its turn."""
    out = copy_episodes(recorded, tmp_path / "failed", [0, 2, 3])

    assert record(out) == (3, 4)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"first_seed": 10_001}, "other settings .sim/put_on/10000 "),
        ({"episodes": 1}, "other settings .sim/put_on/10001 "),
        ({"wrist": (32, 32)}, r"wrist: 48 x 48, not 32 x 32"),
        ({"first_seed": 9_999}, "kept for testing"),
    ],
)
def test_a_folder_with_others_stays(recorded: Path, changed: dict[str, object], words: str) -> None:
    times_before = modification_times(recorded)

    refuses(words, record, recorded, **changed)

    assert modification_times(recorded) == times_before


def test_one_recording_at_a_time(recorded: Path) -> None:
    with hold_lock(recorded / ".lock"):
        refuses("another process is recording", record, recorded, episodes=3)

    assert len(EpisodeStore(recorded)) == 4


def stay(folder: Path, observation: object, seed: int, step: int) -> Any:
    return np.array([0, 0, 0, 1, 0, 0, 0, 1], np.float32)


def test_a_recording_with_a_policy_continues_with_the_same_weights_only(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    out = tmp_path / "out"

    num_recorded, _ = record(out, 1, policy=InterveningPolicy(tmp_path / "one", stay))
    continued = record(out, 1, policy=InterveningPolicy(tmp_path / "moved", stay))

    assert num_recorded > 0
    assert continued == (num_recorded, 2)
    refuses("policy", record, out, 2, policy=InterveningPolicy(tmp_path / "other", stay))
    assert len(EpisodeStore(out)) == num_recorded
