"""Labeling into a folder: whole runs, interrupted and killed runs, refused and failing runs.

However often a run is interrupted, and however many workers it has, the files are the same to the
byte. The models are stand-ins (`labels_stand_ins`): the detector "bright" finds one block in each
photo. Of the photos, 00003.png is broken, the detector refuses 00005.png, and 00007.png shows
nothing; these three are skipped.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from labels_stand_ins import make_engine, write_photos
from processes import wait_until
from refusals import refuses
from spear.errors import Notice, SpearError
from spear.labels.inputs import list_images
from spear.labels.options import LabelOptions, WorkOptions
from spear.labels.run import LabelingProgress, label_into_folder, prepare_run
from spear.labels.store import count_labeled_images, read_labels

SETTINGS = {"inputs": ["photos"], "detector": "bright"}
UNREACHED_FILES = ("00000.png", "00004.png", "00010.png", "00020.png")
UNREACHED = (0.0, "none", UNREACHED_FILES)
"""Arguments of a detector: delay in s, name of a photo at which it hangs, unreachable photos. It
fails for four photos as if the network were down. They are in shards 0, 0, 1 and 2."""


def run(
    source: Path,
    out: Path,
    workers: int = 0,
    detector: tuple[Any, ...] = (),
    shard_size: int = 8,
    stop_after: int | None = None,
    retry_skipped: bool = False,
) -> LabelingProgress:
    """Label a folder of photos, in batches of three photos.

    Args:
        source: The folder of photos.
        out: The folder of labels.
        workers: Number of worker processes.
        detector: Arguments of the detector.
        shard_size: Number of photos in a shard.
        stop_after: After this many batches the user interrupts the run (KeyboardInterrupt).
        retry_skipped: Whether shards with photos that are worth a retry are made again.
    """

    def run_engine(batches: Any) -> Any:
        yield from islice(make_engine(workers, *detector)(batches), stop_after)
        if stop_after is not None:
            raise KeyboardInterrupt

    work = WorkOptions(shard_size=shard_size, batch_size=3)
    return label_into_folder(
        list_images(str(source)), out, run_engine, SETTINGS, work, retry_skipped
    )


def read_files(folder: Path) -> dict[str, bytes]:
    """The contents of all files of a folder that are not hidden, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*"))}


def read_skipped(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "skipped.parquet").to_pylist()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 21 photos, of which three are skipped; they make shards of 8, 8 and 5."""
    return write_photos(tmp_path_factory.mktemp("input") / "photos", 21)


@pytest.fixture(scope="module")
def whole_run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of labels that a run without interruption makes."""
    out = tmp_path_factory.mktemp("whole") / "labels"
    run(source, out)
    return out


# A whole run


def test_a_run_counts_its_images(source: Path, tmp_path: Path) -> None:
    progress = run(source, tmp_path / "labels")

    assert progress == LabelingProgress(num_total=21, num_before=0, num_done=21, num_skipped=3)


def test_a_folder_has_shards_skipped_images_settings_and_a_card(whole_run: Path) -> None:
    shards = [f"labels-{number:05d}.parquet" for number in range(3)]

    assert list(read_files(whole_run)) == ["README.md", *shards, "run.json", "skipped.parquet"]
    assert json.loads((whole_run / "run.json").read_text())["detector"] == "bright"


def test_every_good_image_is_labeled_in_order(source: Path, whole_run: Path) -> None:
    labels = list(read_labels(whole_run))

    good_numbers = [number for number in range(21) if number not in (3, 5, 7)]
    expected_sources = [str(source / f"{number:05d}.png") for number in good_numbers]
    assert [label.source for label in labels] == expected_sources
    assert count_labeled_images(whole_run) == 18
    for label in labels:
        (block,) = label.objects
        assert block.box3d is not None
        assert block.box3d.center[2] == pytest.approx(1.15, abs=0.2)  # depth of the stand-in
        assert label.provenance == {"detector": "bright", "segmenter": "box", "pointmap": "slope"}


def test_skipped_images_are_recorded_with_their_reasons(whole_run: Path) -> None:
    reasons = {Path(row["source"]).stem: row["reason"] for row in read_skipped(whole_run)}

    assert list(reasons) == ["00003", "00005", "00007"]
    assert "not a readable image" in reasons["00003"]
    assert reasons["00005"] == "request refused"
    assert reasons["00007"] == "no object was found"


def test_the_card_counts_images_and_objects(whole_run: Path) -> None:
    card = (whole_run / "README.md").read_text()

    assert "18 images with 18 objects, 18 of them with an oriented 3D box; " in card
    assert "3 images were skipped (`skipped.parquet`)" in card


def test_labels_open_as_a_hugging_face_dataset_with_images(whole_run: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")

    labels = datasets.load_dataset(str(whole_run), cache_dir=str(tmp_path))["train"]

    assert isinstance(labels.features["image"], datasets.Image)
    assert len(labels) == 18
    assert labels[4]["image"].size == (60, 40)
    assert labels[0]["objects"][0]["name"] == "block"


def test_skipped_images_open_as_a_hugging_face_dataset(whole_run: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")

    skipped = datasets.load_dataset(str(whole_run), "skipped", cache_dir=str(tmp_path))["train"]

    assert "no object was found" in skipped["reason"]


def test_a_shard_opens_as_a_hugging_face_dataset_with_images(
    whole_run: Path, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")

    shard = str(whole_run / "labels-00001.parquet")
    labels = datasets.load_dataset("parquet", data_files=shard, cache_dir=str(tmp_path))["train"]

    assert isinstance(labels.features["image"], datasets.Image)


# Images that are worth a retry


@pytest.fixture
def partial_out(source: Path, tmp_path: Path) -> Path:
    """The folder of a finished run in which the detector could not be reached for four photos."""
    out = tmp_path / "labels"
    run(source, out, detector=UNREACHED)
    return out


def test_images_for_which_a_model_was_unreachable_are_retryable(partial_out: Path) -> None:
    retryable = [Path(row["source"]).name for row in read_skipped(partial_out) if row["retryable"]]

    assert tuple(retryable) == UNREACHED_FILES


def make_progress(num_before: int, num_skipped: int, num_retryable: int = 0) -> LabelingProgress:
    """The progress of a finished run of all 21 photos."""
    return LabelingProgress(
        num_total=21,
        num_before=num_before,
        num_done=21,
        num_skipped=num_skipped,
        num_retryable=num_retryable,
    )


def test_nothing_is_retried_unless_asked(source: Path, partial_out: Path) -> None:
    files = read_files(partial_out)

    progress = run(source, partial_out)

    assert progress == make_progress(num_before=21, num_skipped=7, num_retryable=4)
    assert read_files(partial_out) == files


def test_retried_images_that_get_through_are_labeled(
    source: Path, whole_run: Path, partial_out: Path
) -> None:
    one_unreached = (0.0, "none", ("00004.png",))

    first_retry = run(source, partial_out, detector=one_unreached, retry_skipped=True)
    second_retry = run(source, partial_out, workers=2, retry_skipped=True)
    third_retry = run(source, partial_out, retry_skipped=True)

    # First all shards are made again, then the first shard (8 photos), then none.
    assert first_retry == make_progress(num_before=0, num_skipped=4, num_retryable=1)
    assert second_retry == make_progress(num_before=13, num_skipped=3)
    assert third_retry == make_progress(num_before=21, num_skipped=3)
    assert read_files(partial_out) == read_files(whole_run)


@pytest.mark.filterwarnings("ignore:.*questions.parquet")
def test_a_retry_may_be_interrupted(source: Path, tmp_path: Path) -> None:
    """The old shard stays until the retry has finished it.

    The shards have 17 photos (in two row groups) and 4 photos. The first run is interrupted in the
    second shard, the retry in the first shard.
    """
    run(source, tmp_path / "whole", shard_size=17)
    out = tmp_path / "labels"
    with pytest.raises(KeyboardInterrupt):
        run(source, out, detector=UNREACHED, shard_size=17, stop_after=7)
    (out / "questions.parquet").touch()  # outdated when labels are made again
    first_shard = (out / "labels-00000.parquet").read_bytes()

    with pytest.raises(KeyboardInterrupt):
        run(source, out, shard_size=17, retry_skipped=True, stop_after=2)

    assert (out / "labels-00000.parquet").read_bytes() == first_shard
    assert not list(out.glob(".*.tmp"))

    progress = run(source, out, shard_size=17, retry_skipped=True)

    assert progress == make_progress(num_before=0, num_skipped=3)
    assert read_files(out) == read_files(tmp_path / "whole")


# Runs that are killed


def label_in_a_process(source: str, out: str, workers: int) -> None:
    """Label photos in a process that is to be killed.

    The detector takes 20 ms per photo and hangs at 00017.png, in the last shard, so that the
    process never ends by itself. The process and its workers are a process group of their own.
    """
    os.setpgid(0, 0)
    run(Path(source), Path(out), workers, detector=(0.02, "00017.png"))


def test_a_run_that_is_killed_again_and_again_loses_nothing(
    source: Path, whole_run: Path, tmp_path: Path
) -> None:
    """The run is killed at least six times, until it has finished a shard."""
    out = tmp_path / "labels"
    rng = random.Random(0)
    num_kills = 0
    num_shards = 0
    while num_kills < 6 or num_shards == 0:
        # Only the third process has a worker. It must not be forked, because a forked process would
        # use its parent's fork server.
        num_workers = 1 if num_kills == 2 else 0
        context: Any = multiprocessing.get_context("forkserver" if num_workers else "fork")
        arguments = (str(source), str(out), num_workers)
        process = context.Process(target=label_in_a_process, args=arguments)
        process.start()

        # Kill the process at a random time after it has begun. From the sixth kill on it gets more
        # and more time, so that it finishes a shard on slow computers, too.
        wait_until((out / "run.json").is_file, "a run", process)
        time.sleep(rng.uniform(0, 0.4 * max(1, num_kills - 4)))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL

        # Shards that exist are complete.
        shards = list(out.glob("labels-*.parquet"))
        for shard in shards:
            assert shard.read_bytes() == (whole_run / shard.name).read_bytes()
        num_kills += 1
        num_shards = len(shards)
    assert not (out / "README.md").exists()

    run(source, out)

    assert read_files(out) == read_files(whole_run)


def test_workers_end_with_the_process_that_is_killed(source: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    arguments = (str(source), str(tmp_path / "out"), 2)
    process = context.Process(target=label_in_a_process, args=arguments)
    process.start()
    members = list_process_group(process.pid)
    while len(members) < 4:  # the process, its server that forks workers, and two workers
        time.sleep(0.05)
        members = list_process_group(process.pid)

    os.kill(process.pid, signal.SIGKILL)

    process.join()
    wait_until(lambda: not list_process_group(process.pid), f"the end of {members}")


def list_process_group(leader: int | None) -> list[int]:
    """The ids of the processes in the group of this leader's id, without zombies."""
    members = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:  # the process has ended
            continue
        # After the name in parentheses come the state, the parent and the group.
        state, _, group = text.rpartition(")")[2].split()[:3]
        if int(group) == leader and state != "Z":
            members.append(int(path.parent.name))
    return members


# Other settings, other inputs


def get_refusal(
    source: Path, out: Path, settings: dict[str, Any] | None = None, shard_size: int = 8
) -> str:
    """Start a run that must be refused; returns the message."""
    items = list_images(str(source))
    work = WorkOptions(shard_size=shard_size, batch_size=3)
    return refuses("", label_into_folder, items, out, make_engine(), settings or SETTINGS, work)


def test_a_finished_run_is_not_done_again(source: Path, whole_run: Path) -> None:
    files = read_files(whole_run)

    progress = run(source, whole_run)

    assert progress == LabelingProgress(num_total=21, num_before=21, num_done=21, num_skipped=3)
    assert read_files(whole_run) == files


@pytest.mark.parametrize(
    ("changes", "shard_size", "difference"),  # "there": in the folder, "here": in the new run
    [
        ({"detector": "owlv2"}, 8, '"bright" there, "owlv2" here'),
        ({"rate": 2}, 8, "--fps is not set there, 2 here"),
        ({}, 9, "--shard-size is 8 there, 9 here"),
    ],
)
def test_other_settings_are_refused_and_named(
    source: Path, whole_run: Path, changes: dict[str, Any], shard_size: int, difference: str
) -> None:
    files = read_files(whole_run)

    assert difference in get_refusal(source, whole_run, {**SETTINGS, **changes}, shard_size)
    assert read_files(whole_run) == files


def test_a_shard_of_another_run_is_refused(source: Path, tmp_path: Path, whole_run: Path) -> None:
    out = tmp_path / "labels"
    shutil.copytree(whole_run, out)
    shutil.copy(out / "labels-00001.parquet", out / "labels-00001 (copy).parquet")

    assert "not of this run" in get_refusal(source, out)


def test_a_folder_with_other_files_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("words")

    assert "contains other files" in get_refusal(source, tmp_path)
    assert "contains other files" in get_refusal(source, Path(__file__).parent)


@pytest.mark.parametrize(
    ("detector", "changed_setting"),
    [
        ("file:{}/one+gemini", "annotations"),  # the file is one of annotations
        ("owlv2={}", "files of"),  # the file is in a folder of weights
    ],
)
def test_replaced_annotations_and_weights_are_other_settings(
    source: Path, tmp_path: Path, detector: str, changed_setting: str
) -> None:
    """The file model/one changes; in `detector`, {} stands for the folder model."""
    folder = tmp_path / "model"
    folder.mkdir()
    options = LabelOptions(
        photos=(str(source),), detector=detector.format(folder), vocabulary="mug"
    )

    def label() -> LabelingProgress:
        settings = prepare_run(options).settings
        items = list_images(str(source))
        work = WorkOptions(shard_size=8)
        return label_into_folder(items, tmp_path / "out", make_engine(0), settings, work)

    (folder / "one").write_text("first")
    label()
    assert label().num_before == 21

    (folder / "one").write_text("another")
    refuses(changed_setting, label)


# Changes to a folder of photos 00000.png to 00009.png; the last two are in labels-00001.parquet.
def add_one_image(folder: Path) -> None:
    shutil.copy(folder / "00009.png", folder / "00010.png")


def remove_two_images(folder: Path) -> None:
    (folder / "00008.png").unlink()
    (folder / "00009.png").unlink()


def rename_one_image(folder: Path) -> None:
    (folder / "00009.png").rename(folder / "10000.png")


@pytest.mark.parametrize("change", [add_one_image, remove_two_images, rename_one_image])
def test_a_list_of_images_that_has_changed_is_refused(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    folder = write_photos(tmp_path / "photos", 10, bad=False)
    run(folder, tmp_path / "labels")

    change(folder)

    message = get_refusal(folder, tmp_path / "labels")
    assert "the input has changed since labels-00001.parquet" in message


@pytest.mark.filterwarnings("ignore:.*questions.parquet")
def test_a_replaced_image_is_labeled_again_with_those_of_its_shard(tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos", 10, bad=False)
    out = tmp_path / "labels"
    run(folder, out)
    (out / "questions.parquet").touch()  # outdated when labels are made again
    shutil.copy(folder / "00008.png", folder / "00009.png")  # 00009.png keeps its size in bytes

    with pytest.warns(Notice, match="1 image changed"):
        progress = run(folder, out)

    # The first shard, with 8 of the 10 photos, stays.
    assert progress == LabelingProgress(num_total=10, num_before=8, num_done=10, num_skipped=0)
    run(folder, tmp_path / "anew", workers=2)
    assert read_files(out) == read_files(tmp_path / "anew")


def test_images_with_other_stamps_but_equal_contents_are_not_labeled_again(tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos", 10, bad=False)
    out = tmp_path / "labels"
    run(folder, out)
    for path in folder.iterdir():
        os.utime(path, (0, 0))  # another modification time, as a copy has

    progress = run(folder, out)

    assert progress == LabelingProgress(num_total=10, num_before=10, num_done=10, num_skipped=0)


# Runs that fail


def test_too_many_failures_stop_the_run_before_it_writes_anything(tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos", 8, bad=False)
    for path in sorted(folder.iterdir())[:5]:
        path.write_bytes(b"words")

    message = get_refusal(folder, tmp_path / "labels")

    assert "5 of 8" in message
    assert "photos" in message
    assert not (tmp_path / "labels").exists()


def test_without_images_there_is_no_run(tmp_path: Path) -> None:
    out = tmp_path / "labels"

    refuses(
        "no image to label",
        label_into_folder,
        iter(()),
        out,
        make_engine(),
        SETTINGS,
        WorkOptions(),
    )

    assert not out.exists()


def run_without_key(batches: Any) -> Iterator[Any]:
    """An engine whose detector has no key, so that it fails before it labels anything."""
    raise SpearError("no API key: set ONE")
    yield  # makes this function a generator


def test_the_settings_of_a_run_that_labeled_nothing_do_not_bind(tmp_path: Path) -> None:
    source = write_photos(tmp_path / "photos", 2, bad=False)
    out = tmp_path / "labels"
    settings = {"detector": "bright"}
    other_settings = {"detector": "other"}
    work = WorkOptions()

    items = list_images(str(source))
    refuses("no API key", label_into_folder, items, out, run_without_key, settings, work)
    label_into_folder(list_images(str(source)), out, make_engine(), other_settings, work)

    assert json.loads((out / "run.json").read_text())["detector"] == "other"
    difference = 'detector is "other" there, "bright" here'
    items = list_images(str(source))
    refuses(difference, label_into_folder, items, out, run_without_key, settings, work)
