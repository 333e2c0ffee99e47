"""Preparing writes a store of episodes: complete or not at all, and always the same bytes.

Most tests prepare the same recording of 11 episodes (`recorded_folder`). One of them is skipped,
because it lacks a camera.
"""

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
from spear.data.actions import derive_actions, get_or_derive_actions, resample_episode
from spear.data.normalize import SKETCHES_FILE, Normalizer
from spear.data.options import Conversion
from spear.data.readers.formats import find_format, read_episodes
from spear.data.store import prepare as preparing
from spear.data.store.episode_store import EpisodeStore, append_episodes
from spear.data.store.lerobot_write import write_lerobot
from spear.data.store.prepare import open_or_prepare_store, prepare
from spear.errors import Notice
from spear.types import Episode
from spear.util.images import decode_image, fit_image

NUM_RECORDED = 11
NUM_PREPARED = 10  # all but episode 4
NUM_BLOCKS = 6  # five blocks of two episodes, and the last one of a single episode
JPEG_START = b"\xff\xd8"  # the first bytes of every JPEG
NEW_SIZES = {"external": (48, 40), "wrist": (24, 24)}  # width, height


def make_recorded_episode(number: int) -> Episode:
    """Make an episode of 9 steps of the recording.

    Every third episode is at 20 Hz and has no actions. The other ones are at 5 Hz, and have actions
    and an outcome. Episode 4 lacks the wrist camera.
    """
    fields: dict[str, Any] = {"rate_hz": 20.0}
    if number % 3:
        action = np.tile(np.array([0.01, 0, 0, 1, 0, 0, 0, 1], np.float32), (9, 1))
        fields = {"action": action, "success": number % 2 == 0}
    episode = make_episode(number, num_steps=9, size=(60, 90), **fields)
    if number == 4:
        return episode
    wrist_images = make_episode(5, num_steps=9, size=(32, 32)).images["external"]
    return dataclasses.replace(episode, images={**episode.images, "wrist": wrist_images})


@pytest.fixture(scope="module")
def recorded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recording: a store of 11 episodes."""
    folder = tmp_path_factory.mktemp("recorded") / "arm"
    append_episodes([make_recorded_episode(number) for number in range(NUM_RECORDED)], folder)
    return folder


@pytest.fixture(autouse=True, scope="module")
def shards_of_one_block() -> Iterator[None]:
    """In all tests of this file, a block has two episodes, and every block gets its own shard."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "BLOCK_SIZE", 2)
        patch.setattr(preparing, "MAX_SHARD_MIB", 0.0)
        yield


def run_prepare(
    recorded_folder: Path,
    out: Path,
    image_size: tuple[str, ...] = ("48x40", "wrist=24x24"),
    **options: Any,
) -> tuple[int, list[str]]:
    """Prepare a recording with images of `NEW_SIZES`, or of another `image_size`.

    `image_size` has the words after the command's option `--image-size`.
    """
    return prepare(recorded_folder, out, conversion=Conversion(image_size=image_size), **options)


def read_files(folder: Path) -> dict[str, bytes]:
    """Name -> content of all files below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def prepared(recorded_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recording, prepared: six shards."""
    out = tmp_path_factory.mktemp("prepared") / "arm"
    run_prepare(recorded_folder, out)
    return out


@pytest.fixture
def prepared_copy(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared folder that a test may change."""
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def test_an_episode_without_the_cameras_is_skipped_by_name(
    recorded_folder: Path, tmp_path: Path
) -> None:
    num_prepared, reasons = run_prepare(recorded_folder, tmp_path / "arm")

    assert num_prepared == NUM_PREPARED
    assert len(reasons) == 1
    assert "made#4 has no camera 'wrist'" in reasons[0]
    assert json.loads((tmp_path / "arm/skipped.json").read_text()) == reasons
    assert [path.name for path in tmp_path.iterdir()] == ["arm"]


def test_the_result_is_a_store(prepared: Path) -> None:
    store = EpisodeStore(prepared)

    assert find_format(prepared) == "store"
    assert len(store) == NUM_PREPARED
    assert store.cameras == ["external", "wrist"]


def test_only_a_subset_of_a_store_is_not_complete(prepared: Path, tmp_path: Path) -> None:
    store = open_or_prepare_store(prepared, tmp_path).store
    partial_store = open_or_prepare_store(prepared, tmp_path, "train[1:]").store

    assert store.is_complete
    assert not store.subset([0]).is_complete
    assert not partial_store.is_complete


def read_resampled_sources(recorded_folder: Path) -> list[Episode]:
    """The good episodes of the recording at 5 Hz, with their original images."""
    return [
        resample_episode(episode)
        for episode in read_episodes(recorded_folder)
        if episode.source != "made#4"
    ]


def test_prepared_states_and_actions_are_the_canonical_ones_at_5_hz(
    recorded_folder: Path, prepared: Path
) -> None:
    store = EpisodeStore(prepared)
    for index, source in enumerate(read_resampled_sources(recorded_folder)):
        action, mask = get_or_derive_actions(source)
        expected = dataclasses.replace(source, images={}, action=action, action_mask=mask)

        assert_same(store.without_images(index), expected, atol=1e-6)
        assert_same(dataclasses.replace(store[index], images={}), expected, atol=1e-6)
        assert store.num_known_actions[index] == mask.sum()


def test_prepared_images_are_jpegs_that_a_model_sees_as_before(
    recorded_folder: Path, prepared: Path
) -> None:
    """A model that takes images upright or sideways sees almost the same as in the recording.

    The mean difference is less than 1.5 levels, because JPEG loses a little.
    """
    store = EpisodeStore(prepared)
    for index, source in enumerate(read_resampled_sources(recorded_folder)):
        for camera, (width, height) in NEW_SIZES.items():
            for step, source_image in enumerate(source.images[camera]):
                encoded = store.image(index, step, camera)
                assert encoded is not None
                assert encoded.startswith(JPEG_START)
                for model_size in ((height, width), (width, height)):
                    expected = fit_image(decode_image(source_image), *model_size).astype(int)
                    image = fit_image(decode_image(encoded), *model_size).astype(int)
                    assert np.abs(image - expected).mean() < 1.5


# A sketch summarizes the numbers of a shard's episodes, from which the statistics of a whole store
# follow without reading the episodes again. A store has one file with the sketches of all shards.


def fit_without_sketches(store: EpisodeStore) -> Normalizer:
    """Fit statistics to the episodes themselves. A subset does not use the file of sketches."""
    all_episodes = store.subset(range(len(store)))
    return Normalizer.fit([(all_episodes, 1.0)])


def copy_shard(folder: Path, number: int, new_number: int) -> None:
    """Copy the two files of a shard to those of another number."""
    for file in folder.glob(f"episodes-{number:05d}.*"):
        shutil.copy(file, folder / f"episodes-{new_number:05d}{file.suffix}")


def test_the_sketches_give_the_same_statistics(prepared: Path) -> None:
    store = EpisodeStore(prepared).drop_failed_episodes()

    assert Normalizer.fit([(store, 1.0)]) == fit_without_sketches(store)


def test_the_statistics_are_those_of_all_episodes_where_failures_are_kept(prepared: Path) -> None:
    store = EpisodeStore(prepared)

    assert Normalizer.fit([(store, 1.0)]) == fit_without_sketches(store)


def test_the_statistics_of_demonstrations_leave_out_failures(prepared: Path) -> None:
    store = EpisodeStore(prepared)
    good_indices = [index for index, episode in enumerate(store) if episode.success is not False]

    statistics = Normalizer.fit([(store.drop_failed_episodes(), 1.0)])

    assert statistics == Normalizer.fit([(store.subset(good_indices), 1.0)])


def test_broken_sketches_are_named(prepared_copy: Path) -> None:
    (prepared_copy / SKETCHES_FILE).write_bytes(b"no statistics")
    store = EpisodeStore(prepared_copy)

    refuses(SKETCHES_FILE, Normalizer.fit, [(store.drop_failed_episodes(), 1.0)])


def test_a_part_of_a_dataset_does_not_need_its_sketches(prepared_copy: Path) -> None:
    (prepared_copy / SKETCHES_FILE).write_bytes(b"no statistics")
    part = EpisodeStore(prepared_copy).subset([1])

    assert Normalizer.fit([(part, 1.0)]).samples > 0


def test_sketches_of_another_shard_are_not_used(prepared: Path, prepared_copy: Path) -> None:
    """Shard 4 replaces shard 1, which has as many known steps."""
    copy_shard(prepared_copy, number=4, new_number=1)
    store = EpisodeStore(prepared_copy).drop_failed_episodes()
    original = EpisodeStore(prepared).drop_failed_episodes()

    assert store.num_known_actions.sum() == original.num_known_actions.sum()
    assert Normalizer.fit([(store, 1.0)]) == fit_without_sketches(store)


def test_sketches_of_fewer_shards_are_not_used(prepared_copy: Path) -> None:
    """A seventh shard with two episodes is added, as if two datasets were put into one folder."""
    copy_shard(prepared_copy, number=0, new_number=6)
    store = EpisodeStore(prepared_copy)

    assert len(store) == NUM_PREPARED + 2
    assert store.is_complete
    assert Normalizer.fit([(store, 1.0)]) == fit_without_sketches(store)


def test_episodes_that_all_failed_are_prepared_with_one_notice(tmp_path: Path) -> None:
    """They can be looked at and evaluated, although nothing can be learned from them."""
    recorded_folder = tmp_path / "arm"
    append_episodes([make_episode(number, success=False) for number in range(3)], recorded_folder)

    with pytest.warns(
        Notice, match=f"no episode of the 3 in {recorded_folder} succeeded"
    ) as notices:
        assert prepare(recorded_folder, tmp_path / "out") == (3, [])

    assert len(notices) == 1
    assert not (tmp_path / "out" / SKETCHES_FILE).exists()
    refuses("failed", EpisodeStore(tmp_path / "out").drop_failed_episodes)


def test_two_workers_write_the_same_bytes_as_none(
    recorded_folder: Path, prepared: Path, tmp_path: Path
) -> None:
    run_prepare(recorded_folder, tmp_path / "arm", workers=2)

    assert read_files(tmp_path / "arm") == read_files(prepared)


def prepare_until_killed(recorded_folder: Path, out: Path, num_steps: int) -> None:
    """Prepare the recording in a process that kills itself before step `num_steps` + 1.

    A step is something that other processes can see, such as renaming a file. Writing a shard takes
    four: its two files are flushed to the disk and then linked.
    """
    num_done = 0

    def count_and_kill(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            nonlocal num_done
            num_done += 1
            if num_done > num_steps:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args)

        return counted

    os.fsync = count_and_kill(os.fsync)
    os.link = count_and_kill(os.link)
    preparing.make_and_write_sketches = count_and_kill(preparing.make_and_write_sketches)
    Path.replace = count_and_kill(Path.replace)  # type: ignore[method-assign]
    run_prepare(recorded_folder, out)


@pytest.mark.parametrize("num_steps", [0, 2, 3, 11, 24, 25])
def test_a_killed_run_ends_the_same_and_repeats_no_block(
    recorded_folder: Path,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_steps: int,
) -> None:
    """The six shards take 24 steps. The next steps make the sketches and rename files.

    So the process is killed before its first step, twice within the first shard, within the third
    shard, when all shards are written, and when the sketches are made, too.
    """
    out = tmp_path / "arm"
    run_in_process(-signal.SIGKILL, lambda: prepare_until_killed(recorded_folder, out, num_steps))
    assert not out.exists()
    num_finished_shards = len(list((tmp_path / ".arm.part/dataset").glob("episodes-*.arrow")))
    assert num_finished_shards == min(NUM_BLOCKS, num_steps // 4)

    prepared_blocks: list[str] = []
    real_prepare_block = preparing.prepare_block

    def record_block(path: Path, conversion: Conversion, split: str) -> Any:
        prepared_blocks.append(split)
        return real_prepare_block(path, conversion, split)

    monkeypatch.setattr(preparing, "prepare_block", record_block)
    num_prepared, reasons = run_prepare(recorded_folder, out)

    assert len(prepared_blocks) == NUM_BLOCKS - num_finished_shards
    assert num_prepared == NUM_PREPARED
    assert len(reasons) == 1
    assert read_files(out) == read_files(prepared)
    assert [path.name for path in tmp_path.iterdir()] == ["arm"]


@pytest.fixture
def nearly_full_disk(prepared: Path) -> Iterator[Callable[[], None]]:
    """Limit the size of files to one byte less than the largest file of a shard.

    Returns a function that removes the limit.
    """
    largest_bytes = max(path.stat().st_size for path in prepared.glob("episodes-*"))
    original_limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    _, hard_limit = original_limits
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def make_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, original_limits)

    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_bytes - 1, hard_limit))
    try:
        yield make_room
    finally:
        make_room()
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_nothing_half_written(
    recorded_folder: Path, prepared: Path, tmp_path: Path, nearly_full_disk: Callable[[], None]
) -> None:
    """Once there is room, the same call ends as it would have without the full disk."""
    out = tmp_path / "arm"
    make_room = nearly_full_disk

    refuses(r"\.arm\.part/dataset cannot be written", run_prepare, recorded_folder, out)
    make_room()

    assert not out.exists()
    assert not list(tmp_path.rglob(".episodes-*"))
    run_prepare(recorded_folder, out)
    assert read_files(out) == read_files(prepared)


@pytest.fixture
def unfinished(recorded_folder: Path, tmp_path: Path) -> Path:
    """The output folder of a preparation that was killed before its end."""
    out = tmp_path / "arm"

    def prepare_and_die() -> None:
        preparing.make_and_write_sketches = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
        run_prepare(recorded_folder, out)

    run_in_process(-signal.SIGKILL, prepare_and_die)
    return out


def test_an_unfinished_preparation_of_other_settings_is_not_replaced(
    recorded_folder: Path, unfinished: Path
) -> None:
    other_size = r"\.arm\.part was begun with other settings \(--image-size is"
    refuses(other_size, run_prepare, recorded_folder, unfinished, image_size=("40x40",))
    refuses(
        r"other settings \(--split is", run_prepare, recorded_folder, unfinished, split="train[:4]"
    )

    num_prepared, _ = run_prepare(recorded_folder, unfinished)
    assert num_prepared == NUM_PREPARED


def test_one_preparation_at_a_time(recorded_folder: Path, unfinished: Path) -> None:
    """The test holds the lock, as another process would."""
    with open(unfinished.with_name(".arm.part") / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refuses("another process is preparing", run_prepare, recorded_folder, unfinished)


def test_a_store_is_opened_without_preparing_it(prepared: Path, tmp_path: Path) -> None:
    store = open_or_prepare_store(prepared, tmp_path / "unused").store

    assert store.path == prepared
    assert not (tmp_path / "unused").exists()


def test_truncated_images_are_named(prepared_copy: Path) -> None:
    images = prepared_copy / "episodes-00001.images"
    os.truncate(images, images.stat().st_size - 1)

    message = r"episodes-00001\.images has .* because its copy was interrupted"
    refuses(message, EpisodeStore, prepared_copy)


def test_images_of_another_shard_are_refused_with_a_cure(prepared_copy: Path) -> None:
    with (prepared_copy / "episodes-00001.images").open("ab") as file:
        file.write(b"more")

    message = r"episodes-00001\.images has .* Copy both files of this shard"
    refuses(message, EpisodeStore, prepared_copy)


def test_a_store_without_a_shard_in_the_middle_names_it(prepared_copy: Path) -> None:
    (prepared_copy / "episodes-00001.arrow").unlink()

    with pytest.warns(Notice, match=r"lacks 1 of its shards, the first .* episodes-00001\.arrow"):
        EpisodeStore(prepared_copy)


def test_missing_images_are_named(prepared_copy: Path) -> None:
    (prepared_copy / "episodes-00001.images").unlink()

    message = r"episodes-00001\.images is missing.*delete episodes-00001\.arrow"
    refuses(message, EpisodeStore, prepared_copy)


@pytest.mark.parametrize("fraction_kept", [0.98, 0.7, 0.0])
def test_a_truncated_shard_is_named(prepared_copy: Path, fraction_kept: float) -> None:
    shard = prepared_copy / "episodes-00001.arrow"
    os.truncate(shard, int(shard.stat().st_size * fraction_kept))

    message = r"shard .*episodes-00001\.arrow is corrupt or truncated.*Copy this one file again"
    refuses(message, EpisodeStore, prepared_copy)


def test_missing_shards_are_noticed_the_last_one_too(
    recorded_folder: Path, prepared_copy: Path
) -> None:
    """First shard 1 with two episodes is removed, then the last shard with one episode."""
    for number, num_left, num_missing in ((1, 8, 1), (5, 7, 2)):
        (prepared_copy / f"episodes-{number:05d}.arrow").unlink()

        with pytest.warns(Notice, match=f"{num_missing} of its shards"):
            store = EpisodeStore(prepared_copy)
        with pytest.warns(Notice, match=f"{num_missing} of its shards"):
            num_prepared, _ = run_prepare(recorded_folder, prepared_copy)

        assert len(store) == num_left
        assert num_prepared == num_left


def test_missing_shards_are_noticed_without_a_recorded_number_of_shards(
    recorded_folder: Path, prepared_copy: Path
) -> None:
    """Earlier versions did not record the number. The gap in the shards' numbers is noticed."""
    (prepared_copy / "episodes-00001.arrow").unlink()
    edit_json(prepared_copy / "request.json", lambda request: request.pop("shards"))

    with pytest.warns(Notice, match="1 of its shards"):
        num_prepared, _ = run_prepare(recorded_folder, prepared_copy)

    assert num_prepared == NUM_PREPARED - 2  # shard 1 had two episodes


@pytest.fixture
def recorded_with_bad_episodes(tmp_path: Path) -> Path:
    """A recording of six episodes.

    Episode 1 has a broken image, episode 2 images of another size, and episode 3 only one step.
    """
    episode_1 = make_episode(1)
    broken_images = [*episode_1.images["external"][:5], b"\xff\xd8no"]
    episodes = [
        make_episode(0),
        dataclasses.replace(episode_1, images={"external": broken_images}),
        make_episode(2, size=(48, 48)),
        make_episode(3, num_steps=1),
        make_episode(4),
        make_episode(5),
    ]
    append_episodes(episodes, tmp_path / "arm")
    return tmp_path / "arm"


@pytest.mark.parametrize("image_size", [(), ("32x32",)])  # without and with resizing
def test_broken_images_and_single_steps_are_skipped_by_name(
    recorded_with_bad_episodes: Path, tmp_path: Path, image_size: tuple[str, ...]
) -> None:
    """An episode of one step has no known action. Images of another size do no harm."""
    num_prepared, reasons = run_prepare(
        recorded_with_bad_episodes, tmp_path / "out", image_size=image_size
    )

    assert num_prepared == 4  # of six
    assert len(reasons) == 2
    assert any("made#1" in reason for reason in reasons)
    assert any("made#3" in reason for reason in reasons)


def test_a_camera_that_no_episode_has_is_refused(
    recorded_with_bad_episodes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "no" / "data"

    message = r"no episode of .* made#\d has no camera 'wirst'.*external"
    refuses(message, run_prepare, recorded_with_bad_episodes, out, image_size=("wirst=32x32",))
    assert not (tmp_path / "no").exists()


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    write_lerobot([make_episode(0)], tmp_path / "set")

    refuses("val", open_or_prepare_store, tmp_path / "set", tmp_path / "no" / "data", "val")
    assert not (tmp_path / "no").exists()


def test_two_sizes_of_one_camera_are_refused() -> None:
    conversion = Conversion(image_size=("wrist=9x9", "wrist=8x8"))

    refuses("--image-size wrist=8x8", getattr, conversion, "sizes")


@pytest.mark.parametrize("text", ["280", "280x", "0x210", "280x210x3", "9000x10"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    refuses("Write it as 280x210", getattr, Conversion(image_size=(text,)), "sizes")


@pytest.mark.parametrize("opening", [[0, 1, 1, 0, 0, 1], [1, 1, 0, 0, 1, 1]])
@pytest.mark.parametrize("span", [0.01, 0.4, 0.55, -0.08])
def test_a_gripper_that_never_opens_is_noticed(
    opening: list[float], span: float, tmp_path: Path
) -> None:
    """Openings run from 0 to `span`, or, if it is negative, from 1 down to 1 + `span`.

    That happens if finger positions in meters are taken for openings. A policy would then never
    open the gripper, or never close it. Positions in kilometers are noticed as well.
    """
    offset = 1 if span < 0 else 0
    episode = make_episode(0, gripper=offset + span * np.array(opening))
    episode_in_km = dataclasses.replace(episode, position=episode.position / 1000)
    append_episodes([episode_in_km], tmp_path / "arm")

    with pytest.warns(Notice, match="gripper_range"), pytest.warns(Notice, match="length_unit"):
        prepare(tmp_path / "arm", tmp_path / "out")


def test_commands_that_come_after_the_motion_are_noticed(tmp_path: Path) -> None:
    """Each command is the opening of its own step, so it comes when the gripper has moved already.

    A policy would then learn to close a gripper only if it sees that it is closed.
    """
    episode = make_episode(0)
    action = derive_actions(episode.position, episode.rotation, episode.gripper)
    append_episodes([dataclasses.replace(episode, action=action)], tmp_path / "arm")

    with pytest.warns(Notice, match="gripper command .* 100%.*leave command out"):
        prepare(tmp_path / "arm", tmp_path / "out")


BLACK = make_png(0)
TEXTURED_IMAGES = make_episode(0).images["external"]


@pytest.mark.parametrize(
    ("wrist", "distance", "expected_cameras"),  # distance: a factor of the arm's motion
    [
        ([BLACK] * 6, 1, ["external"]),
        ([*[BLACK] * 5, make_png(9)], 1, ["external", "wrist"]),
        ([TEXTURED_IMAGES[0]] * 6, 2, ["external"]),
        ([TEXTURED_IMAGES[0]] * 6, 0.5, ["external", "wrist"]),
    ],
    ids=["black", "not always black", "frozen while the arm moves", "the arm hardly moves"],
)
def test_a_camera_that_shows_nothing_is_left_out(
    tmp_path: Path, wrist: list[bytes], distance: float, expected_cameras: list[str]
) -> None:
    """Many datasets have black images where a camera was absent. A frozen camera shows one image
    although the arm moves, so a policy learns nothing from it."""
    episode = make_episode(3, images={"external": TEXTURED_IMAGES, "wrist": wrist})
    moved = dataclasses.replace(episode, position=distance * episode.position)
    append_episodes([moved], tmp_path / "arm")

    prepare(tmp_path / "arm", tmp_path / "out")

    assert sorted(EpisodeStore(tmp_path / "out")[0].images) == expected_cameras


def test_an_episode_that_shows_nothing_is_skipped_by_name(tmp_path: Path) -> None:
    black = make_episode(2, images={"external": [BLACK] * 6})
    append_episodes([make_episode(0), black], tmp_path / "arm")

    num_prepared, reasons = prepare(tmp_path / "arm", tmp_path / "out")

    assert num_prepared == 1
    assert len(reasons) == 1
    assert "made#2" in reasons[0]


def test_the_fingerprint_depends_on_the_episodes_of_the_store(recorded_folder: Path) -> None:
    store = EpisodeStore(recorded_folder)

    assert (
        store.subset(range(3)).fingerprint_states_and_actions()
        != store.subset(range(1, 4)).fingerprint_states_and_actions()
    )
    assert (
        store.subset(range(NUM_RECORDED)).fingerprint_states_and_actions()
        == store.fingerprint_states_and_actions()
    )


@pytest.fixture
def plain_store(tmp_path: Path) -> EpisodeStore:
    """A store of one episode, from which the next three stores differ in one thing."""
    return write_store([make_episode(0)], tmp_path / "plain")


@pytest.fixture
def other_words_store(tmp_path: Path) -> EpisodeStore:
    """The same episode with another instruction."""
    return write_store([make_episode(0, instruction="push")], tmp_path / "words")


@pytest.fixture
def other_size_store(tmp_path: Path) -> EpisodeStore:
    """The same episode with images of another size."""
    return write_store([make_episode(0, size=(48, 48))], tmp_path / "size")


@pytest.fixture
def hand_camera_store(tmp_path: Path) -> EpisodeStore:
    """The same episode with another name of the camera."""
    images = {"hand": make_episode(0).images["external"]}
    return write_store([make_episode(0, images=images)], tmp_path / "hand")


def test_the_fingerprint_of_motions_ignores_words_and_images(
    plain_store: EpisodeStore, other_words_store: EpisodeStore, other_size_store: EpisodeStore
) -> None:
    assert (
        plain_store.fingerprint_states_and_actions()
        == other_words_store.fingerprint_states_and_actions()
    )
    assert (
        plain_store.fingerprint_states_and_actions()
        == other_size_store.fingerprint_states_and_actions()
    )


def test_the_fingerprint_of_contents_depends_on_words_images_and_cameras(
    plain_store: EpisodeStore,
    other_words_store: EpisodeStore,
    other_size_store: EpisodeStore,
    hand_camera_store: EpisodeStore,
) -> None:
    fingerprints = {
        plain_store.fingerprint_image_lengths_and_instructions(),
        other_words_store.fingerprint_image_lengths_and_instructions(),
        other_size_store.fingerprint_image_lengths_and_instructions(),
        hand_camera_store.fingerprint_image_lengths_and_instructions(),
    }

    assert len(fingerprints) == 4


@pytest.mark.parametrize("other_store", ["other_words_store", "other_size_store"])
def test_other_contents_at_the_same_place_are_not_taken_for_prepared(
    plain_store: EpisodeStore, tmp_path: Path, request: pytest.FixtureRequest, other_store: str
) -> None:
    prepare(plain_store.path, tmp_path / "out")
    shutil.rmtree(plain_store.path)
    shutil.copytree(request.getfixturevalue(other_store).path, plain_store.path)

    refuses("other episodes", prepare, plain_store.path, tmp_path / "out")


def test_a_lerobot_dataset_of_other_episodes_is_not_taken_for_prepared(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_lerobot([make_episode(0)], folder)
    prepare(folder, tmp_path / "out")
    shutil.rmtree(folder)
    write_lerobot([make_episode(1)], folder)

    refuses("other episodes", prepare, folder, tmp_path / "out")


def test_the_hash_of_a_layout_is_the_one_of_earlier_versions(tmp_path: Path) -> None:
    """Otherwise folders that earlier versions prepared would be refused."""
    write_lerobot([make_episode(0)], tmp_path / "set")
    prepare(tmp_path / "set", tmp_path / "out")

    request = json.loads((tmp_path / "out/request.json").read_text())

    # The hash that earlier versions recorded.
    expected = "890a0190d3a5ac33ed986d683d598a32fc05915778213f5910f24e05c45a3aa3"
    assert request["layout"] == expected


def test_what_was_prepared_by_other_rules_is_refused(
    plain_store: EpisodeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(plain_store.path, tmp_path / "out")
    monkeypatch.setattr(preparing, "ACTION_RULES_VERSION", 0)

    refuses("rules is", prepare, plain_store.path, tmp_path / "out")


def test_all_datasets_are_checked_before_one_is_prepared(
    tmp_path: Path, run_refused_command: Callable[..., str]
) -> None:
    """The folder of the second result is not empty, so the first dataset is not prepared either."""
    first = write_store([make_episode(0)], tmp_path / "a")
    second = write_store([make_episode(0)], tmp_path / "b")
    out = tmp_path / "out"
    (out / "b" / "mine").mkdir(parents=True)

    message = run_refused_command(
        "data", "prepare", str(first.path), str(second.path), "--out", str(out)
    )

    assert "not empty" in message
    assert [path.name for path in out.iterdir()] == ["b"]  # no folder "a"


EARLIER_BRIDGE_HASH = "ec8c1d1b0cb9a654a51a6e97eb8070ee2a30675d6cd7d48ed8dc1cc0a45b30b6"
"""The hash that earlier versions recorded for the layout of BridgeData."""


def hash_bridge_layout(shared: Path, tmp_path: Path, fields: dict[str, Any]) -> str:
    """Hash the layout of BridgeData, with some fields replaced, as preparing records it."""
    layout_file = tmp_path / "layout.json"
    layout_file.write_text(json.dumps({"like": "bridge_dataset", **fields}))
    plan = preparing.plan_preparation(
        shared / "data" / "bridge_v2_sample",
        tmp_path / "out",
        "train",
        Conversion(layout=layout_file),
    )
    return str(plan.request["layout"])


@pytest.mark.parametrize("fields", [{}, {"logged_rotation_frame": "ee"}])
def test_folders_that_earlier_versions_prepared_stay_valid(
    shared: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    """A field that only the audit reads does not change the hash."""
    assert hash_bridge_layout(shared, tmp_path, fields) == EARLIER_BRIDGE_HASH


@pytest.mark.parametrize(
    "fields",
    [
        {"base_rotation": [0.0, 0.0, 0.0, 1.0]},
        {"tool_offset": [0.0, 0.0, 0.1]},
        {"autonomous": "observation/state[6]"},
    ],
)
def test_other_frames_or_targets_are_prepared_again(
    shared: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    assert hash_bridge_layout(shared, tmp_path, fields) != EARLIER_BRIDGE_HASH


def prepare_bridge(shared: Path, folder: Path) -> Path:
    """Prepare the first episodes of BridgeData."""
    prepare(shared / "data" / "bridge_v2_sample", folder, "train[:2]")
    return folder


def test_a_prepared_store_records_the_versions_of_its_frames(shared: Path, tmp_path: Path) -> None:
    store = EpisodeStore(prepare_bridge(shared, tmp_path / "bridge"))

    assert store.frame_versions == {"bridge_dataset": 1}


def test_a_store_of_earlier_frames_is_not_continued(shared: Path, tmp_path: Path) -> None:
    """The folder is changed to say that other frames were known when it was prepared."""
    folder = prepare_bridge(shared, tmp_path / "bridge")
    edit_json(folder / "request.json", lambda request: request.update(frames={"bridge_dataset": 9}))

    message = "bridge has version 9 of the frames of bridge_dataset, but this dataset has version 1"
    refuses(message, prepare_bridge, shared, folder)


def test_a_store_without_recorded_frames_stays_valid(shared: Path, tmp_path: Path) -> None:
    folder = prepare_bridge(shared, tmp_path / "bridge")
    edit_json(folder / "request.json", lambda request: request.pop("frames"))

    assert prepare_bridge(shared, folder) == folder


def test_an_export_carries_the_frames_of_its_store(shared: Path, tmp_path: Path) -> None:
    """Preparing the export gives a store with the same version of frames."""
    store = EpisodeStore(prepare_bridge(shared, tmp_path / "bridge"))
    write_lerobot(list(store), tmp_path / "exported", frames=store.frame_versions)

    prepare(tmp_path / "exported", tmp_path / "again")

    assert EpisodeStore(tmp_path / "again").frame_versions == {"bridge_dataset": 1}
