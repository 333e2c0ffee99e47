"""Recording goes on where it was stopped, and mixes nothing up."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tiny import assert_same, edit
from refusals import refuses
from spear.data.store.episode_store import SHARD_GLOB, EpisodeStore, write_episodes
from spear.sim.record import InterveningPolicy
from spear.sim_data.demonstrations import SETTINGS_FILE, record_demonstrations
from spear.util.run_lock import hold_lock

SIZES = {"external": (96, 72), "wrist": (48, 48)}
FAMILIES = "put_on", "spoon_on_towel", "put_on"  # twice, which changes nothing


def record(
    out: Path,
    episodes: int = 2,
    first_seed: int = 10_000,
    policy: InterveningPolicy | None = None,
    **changed: object,
) -> tuple[int, int]:
    return record_demonstrations(
        out, FAMILIES, episodes, first_seed, {**SIZES, **changed}, workers=0, policy=policy
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demonstrations")
    assert record(out) == (4, 4)
    return out


def test_a_stopped_recording_continues_behind_its_last_shard(whole: Path, tmp_path: Path) -> None:
    write_episodes([EpisodeStore(whole)[i] for i in range(3)], out := tmp_path / "stopped")
    shutil.copy(whole / SETTINGS_FILE, out)
    before = {path: path.stat().st_mtime_ns for path in out.glob(SHARD_GLOB)}
    (out / "episodes-00001.images").touch()  # stopped between the two files of a shard
    assert record(out) == (4, 4) and (out / "episodes-00001.arrow").is_file()
    for one, other in zip(EpisodeStore(out), EpisodeStore(whole), strict=True):
        assert_same(one, other)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert record(out) == (4, 4)  # everything is there
    assert record(out, episodes=3) == (6, 6)  # more of the same
    assert [EpisodeStore(out).source(i) for i in (4, 5)] == [
        "sim/put_on/10002",
        "sim/spoon_on_towel/10002",
    ]
    edit(out / SETTINGS_FILE, lambda told: told.update(simulator="MuJoCo 3.7.0"))
    refuses("simulator is", record, out, episodes=4)


def test_a_demonstration_that_failed_is_not_missed(whole: Path, tmp_path: Path) -> None:
    """It is not in the folder, and what comes after it shows that it had its turn."""
    write_episodes([EpisodeStore(whole)[i] for i in (0, 2, 3)], out := tmp_path / "failed")
    shutil.copy(whole / SETTINGS_FILE, out)
    assert record(out) == (3, 4)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"first_seed": 10_001}, "other settings .sim/put_on/10000 "),
        ({"episodes": 1}, "other settings .sim/put_on/10001 "),
        ({"wrist": (32, 32)}, r"wrist: \(48, 48\), not \(32, 32\)"),
        ({"first_seed": 9_999}, "kept for testing"),
    ],
)
def test_a_folder_with_others_stays(whole: Path, changed: dict[str, object], words: str) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in whole.iterdir())
    refuses(words, record, whole, **changed)
    assert sorted((path, path.stat().st_mtime_ns) for path in whole.iterdir()) == before


def test_one_recording_at_a_time(whole: Path) -> None:
    with hold_lock(whole / ".lock"):
        refuses("another process is recording", record, whole, episodes=3)
    assert len(EpisodeStore(whole)) == 4


def still(folder: Path, observation: object, seed: int, step: int) -> Any:
    return np.array([0, 0, 0, 1, 0, 0, 0, 1], np.float32)


def test_a_recording_with_a_policy_continues_with_the_same_weights_only(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    out = tmp_path / "out"
    kept, _ = record(out, 1, policy=InterveningPolicy(tmp_path / "one", still))
    assert kept and record(out, 1, policy=InterveningPolicy(tmp_path / "moved", still)) == (kept, 2)
    refuses("policy", record, out, 2, policy=InterveningPolicy(tmp_path / "other", still))
    assert len(EpisodeStore(out)) == kept
