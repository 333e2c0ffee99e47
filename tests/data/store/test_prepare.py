"""Preparing: a store of episodes, the same bytes however it is made, complete or not at all."""

import dataclasses
import fcntl
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tiny import assert_same, edit_json, make_episode, make_png, write_store
from processes import run_in_process
from refusals import refuses
from spear.data.actions import canonicalize_actions, derive_actions, resample_episode
from spear.data.normalize import SKETCHES_FILE, Normalizer
from spear.data.options import Conversion
from spear.data.readers.formats import find_format, read_episodes
from spear.data.store import prepare as preparing
from spear.data.store.episode_store import EpisodeStore, write_episodes
from spear.data.store.lerobot_write import write_lerobot
from spear.data.store.prepare import open_store, prepare
from spear.errors import Notice
from spear.util.images import decode_image, fit_image

COUNT = 11


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Episodes of 20 Hz and of 5 Hz, with and without actions of their own; one lacks a camera."""
    folder = tmp_path_factory.mktemp("recorded") / "arm"
    action = np.tile(np.array([0.01, 0, 0, 1, 0, 0, 0, 1], np.float32), (9, 1))
    wrist = {"wrist": make_episode(5, 9, size=(32, 32)).images["external"]}
    episodes = []
    for i in range(COUNT):
        changes: dict[str, Any] = (
            {"action": action, "success": i % 2 == 0} if i % 3 else {"rate_hz": 20.0}
        )
        episode = make_episode(i, 9, size=(60, 90), **changes)
        episodes.append(
            dataclasses.replace(episode, images=episode.images | (wrist if i != 4 else {}))
        )
    write_episodes(episodes, folder)
    return folder


@pytest.fixture(autouse=True, scope="module")
def shards_of_one_block() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "BLOCK_SIZE", 2)
        patch.setattr(preparing, "MAX_SHARD_MIB", 0.0)
        yield


def run(recorded: Path, out: Path, **changes: Any) -> tuple[int, list[str]]:
    how = Conversion(size=changes.pop("size", ("48x40", "wrist=24x24")))
    return prepare(recorded, out, conversion=how, **changes)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "arm"
    written, reasons = run(recorded, out)
    assert written == COUNT - 1 and len(reasons) == 1 and "no camera 'wrist': made#4" in reasons[0]
    assert json.loads((out / "skipped.json").read_text()) == reasons
    assert [p.name for p in out.parent.iterdir()] == ["arm"]
    return out


def test_the_same_episodes_are_in_it(recorded: Path, whole: Path) -> None:
    before = [e for e in read_episodes(recorded) if e.source != "made#4"]
    store = EpisodeStore(whole)
    assert find_format(whole) == "store" and len(store) == COUNT - 1
    assert (
        store.cameras == ["external", "wrist"]
        and store.is_complete
        and not store.subset([0]).is_complete
    )
    for i, (old, ours) in enumerate(zip(before, store, strict=True)):
        expected = resample_episode(old)
        action, mask = canonicalize_actions(expected)
        np.testing.assert_array_equal(store.num_known_actions[i], mask.sum())
        unseen = dataclasses.replace(expected, images={}, action=action, action_mask=mask)
        for got in (ours, store.without_images(i)):
            assert_same(dataclasses.replace(got, images={}), unseen, 1e-6)
        for camera, (width, height) in (("external", (48, 40)), ("wrist", (24, 24))):
            for step, encoded in enumerate(ours.images[camera]):
                assert encoded == store.image(i, step, camera) and encoded[:2] == b"\xff\xd8"
                for size in ((height, width), (width, height)):  # whatever the model takes
                    target = fit_image(decode_image(expected.images[camera][step]), *size)
                    assert (
                        np.abs(fit_image(decode_image(encoded), *size).astype(int) - target).mean()
                        < 1.5
                    )


def test_the_statistics_are_taken_once(whole: Path, tmp_path: Path) -> None:
    store = EpisodeStore(whole)
    assert Normalizer.fit([(store, 1.0)]) == Normalizer.fit(
        [(store.subset(range(len(store))), 1.0)]
    )
    assert (
        open_store(whole, tmp_path)[0].is_complete
        and not open_store(whole, tmp_path, "train[1:]")[0].is_complete
    )
    good = store.subset([i for i, episode in enumerate(store) if episode.success is not False])
    assert Normalizer.fit([(store.select_demonstrations(), 1.0)]) == Normalizer.fit([(good, 1.0)])
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    (copy / SKETCHES_FILE).write_bytes(b"no statistics")
    refuses(SKETCHES_FILE, Normalizer.fit, [(EpisodeStore(copy).select_demonstrations(), 1.0)])
    Normalizer.fit([(EpisodeStore(copy).subset([1]), 1.0)])  # a part of a dataset has its own
    shutil.copy(whole / SKETCHES_FILE, copy)
    for file in copy.glob(
        "episodes-00004.*"
    ):  # another shard in the place of one, of as many known steps
        shutil.copy(file, copy / f"episodes-00001{file.suffix}")
    other = EpisodeStore(copy).select_demonstrations()
    assert other.num_known_actions.sum() == store.select_demonstrations().num_known_actions.sum()
    assert Normalizer.fit([(other, 1.0)]) == Normalizer.fit(
        [(other.subset(range(len(other))), 1.0)]
    )
    for file in copy.glob("episodes-00000.*"):  # as who puts two datasets into one folder
        shutil.copy(file, copy / f"episodes-00006{file.suffix}")
    more = EpisodeStore(copy)
    assert len(more) == len(store) + 2 and more.is_complete
    assert Normalizer.fit([(more, 1.0)]) == Normalizer.fit([(more.subset(range(len(more))), 1.0)])


def test_episodes_that_all_failed_are_kept_with_one_notice(tmp_path: Path) -> None:
    """To be looked at and evaluated: the work is not thrown away at its end."""
    write_episodes([make_episode(i, success=False) for i in range(3)], tmp_path / "arm")
    with pytest.warns(Notice, match=f"{tmp_path / 'arm'}: .*failed") as said:
        assert prepare(tmp_path / "arm", tmp_path / "out") == (3, [])
    assert len(said) == 1 and not (tmp_path / "out" / SKETCHES_FILE).exists()
    refuses("failed", EpisodeStore(tmp_path / "out").select_demonstrations)


def test_any_number_of_workers_writes_the_same(recorded: Path, whole: Path, tmp_path: Path) -> None:
    assert run(recorded, tmp_path / "arm", workers=2)[0] == COUNT - 1
    assert files(tmp_path / "arm") == files(whole)


@pytest.mark.parametrize("kill_at", [0, 2, 3, 11, 24, 25])
def test_a_killed_run_ends_the_same(
    recorded: Path, whole: Path, tmp_path: Path, kill_at: int
) -> None:
    """Killed before or after any of its steps that others can see: a file renamed or written out."""
    out = tmp_path / "arm"

    def die() -> None:
        steps = 0

        def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any) -> Any:
                nonlocal steps
                steps += 1
                if steps > kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args)

            return wrapped

        os.fsync, os.link = deadly(os.fsync), deadly(os.link)
        preparing.save_sketches = deadly(preparing.save_sketches)
        Path.replace = deadly(Path.replace)  # type: ignore[method-assign]
        run(recorded, out)

    run_in_process(-signal.SIGKILL, die)
    assert not out.exists()
    finished = len(list((tmp_path / ".arm.part/dataset").glob("episodes-*.arrow")))
    assert finished == min(6, kill_at // 4)
    read = []
    with pytest.MonkeyPatch.context() as patch:
        real = preparing.prepare_block
        patch.setattr(
            preparing, "prepare_block", lambda *given: (read.append(given), real(*given))[1]
        )
        written, reasons = run(recorded, out)
    assert len(read) == 6 - finished  # nothing is done twice
    assert written == COUNT - 1 and len(reasons) == 1 and files(out) == files(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["arm"]


def test_a_full_disk_leaves_nothing_half_written(
    recorded: Path, whole: Path, tmp_path: Path
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    largest = max(p.stat().st_size for p in whole.glob("episodes-*"))
    out = tmp_path / "arm"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, limits[1]))
        refuses(r"\.arm\.part/dataset: cannot be written", run, recorded, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert not out.exists() and not list(tmp_path.rglob(".episodes-*"))
    assert run(recorded, out)[0] == COUNT - 1 and files(out) == files(whole)


def test_an_unfinished_preparation_of_something_else_is_kept(
    recorded: Path, tmp_path: Path
) -> None:
    out = tmp_path / "arm"

    def die() -> None:
        preparing.save_sketches = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
        run(recorded, out)

    run_in_process(-signal.SIGKILL, die)
    refuses(
        r"\.arm\.part: was begun with other settings: size is", run, recorded, out, size=("40x40",)
    )
    refuses("other settings: episodes is", run, recorded, out, split="train[:4]")
    with open(tmp_path / ".arm.part/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refuses("another process is preparing", run, recorded, out)
    assert run(recorded, out)[0] == COUNT - 1


def test_a_broken_shard_is_named(whole: Path, recorded: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    assert (
        open_store(copy, tmp_path / "unused")[0].path == copy and not (tmp_path / "unused").exists()
    )
    images = copy / "episodes-00001.images"
    os.truncate(images, images.stat().st_size - 1)
    refuses(r"truncated or changed: .*episodes-00001\.images", EpisodeStore, copy)
    images.unlink()
    refuses(r"missing file: .*episodes-00001\.images", EpisodeStore, copy)
    numbers = copy / "episodes-00001.arrow"
    for keep in (0.98, 0.7, 0.0):
        os.truncate(numbers, int(numbers.stat().st_size * keep))
        refuses(r"truncated shard: .*episodes-00001\.arrow.*write it again", EpisodeStore, copy)
    for lost, left, lacks in (
        (numbers, 8, 1),
        (copy / "episodes-00005.arrow", 7, 2),
    ):  # the last, too
        lost.unlink()
        with pytest.warns(Notice, match=f"{lacks} of its shards"):
            assert len(EpisodeStore(copy)) == run(recorded, copy)[0] == left
    edit_json(
        copy / "request.json", lambda told: told.pop("shards")
    )  # as before these were counted
    with pytest.warns(Notice, match="1 of its shards"):
        assert run(recorded, copy)[0] == 7


def test_bad_images_and_odd_episodes_are_skipped_by_name(tmp_path: Path) -> None:
    broken = make_episode(1)
    broken = dataclasses.replace(
        broken, images={"external": [*broken.images["external"][:5], b"\xff\xd8no"]}
    )
    write_episodes(
        [
            make_episode(0),
            broken,
            make_episode(2, size=(48, 48)),
            make_episode(3, 1),
            make_episode(4),
            make_episode(5),
        ],
        tmp_path / "arm",
    )
    written, reasons = prepare(tmp_path / "arm", tmp_path / "as_they_are")
    found = [number for reason in reasons for number in "0123" if f"made#{number}" in reason]
    assert written == 4 and sorted(found) == ["1", "3"]  # broken, a single step
    written, reasons = prepare(
        tmp_path / "arm", tmp_path / "fit", conversion=Conversion(size=("32x32",))
    )
    assert written == 4 and len(reasons) == 2
    said, how = (
        r"no good episode: .*'wirst': made#\d: .*external",
        Conversion(size=("wirst=32x32",)),
    )
    refuses(said, prepare, tmp_path / "arm", tmp_path / "no" / "data", how=how)
    write_lerobot([make_episode(0)], tmp_path / "set")
    refuses("val", open_store, tmp_path / "set", tmp_path / "no" / "data", "val")
    refuses("--size wrist=8x8", getattr, Conversion(size=("wrist=9x9", "wrist=8x8")), "sizes")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("opening", [[0, 1, 1, 0, 0, 1], [1, 1, 0, 0, 1, 1]])
@pytest.mark.parametrize("part", [0.01, 0.4, 0.55, -0.08])  # below 0: less than 1 when closed
def test_a_gripper_that_never_opens_is_noticed(
    opening: list[float], part: float, tmp_path: Path
) -> None:
    """Finger positions that were taken for widths: a policy that learns from them never opens again."""
    episode = make_episode(0, gripper=(part < 0) + part * np.array(opening))
    write_episodes(
        [dataclasses.replace(episode, position=episode.position / 1000)], tmp_path / "arm"
    )
    with pytest.warns(Notice, match="gripper_range"), pytest.warns(Notice, match="length_unit"):
        prepare(tmp_path / "arm", tmp_path / "out")


def test_commands_that_come_after_the_motion_are_noticed(tmp_path: Path) -> None:
    """A policy that sees the gripper closed before it is told to close never closes it."""
    action = derive_actions(
        make_episode(0).position, make_episode(0).rotation, make_episode(0).gripper
    )
    write_episodes([make_episode(0, action=action)], tmp_path / "arm")
    with pytest.warns(Notice, match="gripper command: 100%.*leave command out"):
        prepare(tmp_path / "arm", tmp_path / "out")


def test_a_camera_that_shows_nothing_is_none(tmp_path: Path) -> None:
    """Many datasets have black images where a camera was absent: the policy would take them for a view."""
    dark, seen = [make_png(0)] * 6, make_episode(0).images["external"]
    views = [
        {"external": seen, "wrist": dark},
        {"external": seen, "wrist": [*dark[1:], make_png(9)]},
        {"external": dark},
    ]
    write_episodes(
        [make_episode(i, images=images) for i, images in enumerate(views)], tmp_path / "arm"
    )
    frozen = {"external": seen, "wrist": seen[:1] * 6}
    moved = [
        make_episode(3, images=frozen, position=far * make_episode(3).position) for far in (2, 0.5)
    ]  # and hardly
    write_episodes(moved, tmp_path / "arm")
    written, reasons = prepare(tmp_path / "arm", tmp_path / "out")
    only, both = ["external"], ["external", "wrist"]
    assert [sorted(e.images) for e in EpisodeStore(tmp_path / "out")] == [only, both, only, both]
    assert written == 4 and len(reasons) == 1 and "made#2" in reasons[0]


def test_a_store_is_known_by_content(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = EpisodeStore(recorded)
    assert store.subset(range(3)).fingerprint() != store.subset(range(1, 4)).fingerprint()
    assert store.subset(range(COUNT)).fingerprint() == store.fingerprint()
    kinds: dict[str, Any] = {
        "words": {"instruction": "push"},
        "size": {"size": (48, 48)},
        "same": {},
    }
    words, size, same = (
        write_store([make_episode(0, **changes)], tmp_path / name)
        for name, changes in kinds.items()
    )
    assert words.fingerprint() == size.fingerprint() == same.fingerprint()  # the motions
    hand = write_store(
        [make_episode(0, images={"hand": make_episode(0).images["external"]})], tmp_path / "hand"
    )
    assert len({store.content_fingerprint() for store in (words, size, same, hand)}) == 4
    prepared = tmp_path / "hand-prepared"
    assert prepare(same.path, tmp_path / "again")[0] == prepare(hand.path, prepared)[0] == 1
    for other in (words, size):
        shutil.rmtree(same.path)
        shutil.copytree(other.path, same.path)
        refuses("other episodes", prepare, same.path, tmp_path / "again")
    write_lerobot([make_episode(0)], folder := tmp_path / "set")
    assert prepare(folder, tmp_path / "out")[0] == 1
    shutil.rmtree(folder)
    write_lerobot([make_episode(1)], folder)  # as many, at the same place
    refuses("other episodes", prepare, folder, tmp_path / "out")
    monkeypatch.setattr(preparing, "ACTION_RULES_VERSION", 0)
    refuses("rules is", prepare, hand.path, prepared)


def test_all_datasets_are_looked_at_before_one_is_made(
    tmp_path: Path, run_refused_command: Callable[..., str]
) -> None:
    folders = [str(write_store([make_episode(0)], tmp_path / name).path) for name in "ab"]
    (tmp_path / "out" / "b" / "mine").mkdir(parents=True)
    assert "not empty" in run_refused_command(
        "data", "prepare", *folders, "--out", str(tmp_path / "out")
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b"]
