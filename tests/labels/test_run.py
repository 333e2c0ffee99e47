"""Labelling into a folder: whole, resumable after any death, the same whatever made it."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from labels_stand_ins import engine, photos
from processes import wait_until
from refusals import refuses
from spear.errors import Notice, SpearError
from spear.labels.inputs import list_images
from spear.labels.options import LabelOptions, WorkOptions
from spear.labels.run import LabelingProgress, label_folder, prepare_run
from spear.labels.store import count_labels, read_labels

SETTINGS = {"inputs": ["photos"], "detector": "bright"}
UNREACHED = (0.0, "none", ("00000.png", "00004.png", "00010.png", "00020.png"))
"""A detector to which four images do not get through."""


def run(
    source: Path,
    out: Path,
    workers: int = 0,
    detector: tuple[Any, ...] = (),
    shard: int = 8,
    stop: int | None = None,
    retry_skipped: bool = False,
) -> LabelingProgress:
    """stop: the batches of three images after which the user does."""

    def stopped(batches: Any) -> Any:
        yield from islice(engine(workers, *detector)(batches), stop)
        if stop is not None:
            raise KeyboardInterrupt

    work = WorkOptions(shard_size=shard, batch_size=3)
    return label_folder(list_images(str(source)), out, stopped, SETTINGS, work, retry_skipped)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*"))}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("input") / "photos", 21)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that an undisturbed run makes."""
    out = tmp_path_factory.mktemp("whole") / "labels"
    assert run(source, out) == LabelingProgress(
        num_total=21, num_before=0, num_done=21, num_skipped=3
    )
    return out


def test_every_image_is_labelled_or_set_aside_with_its_reason(source: Path, whole: Path) -> None:
    shards = [f"labels-{number:05d}.parquet" for number in range(3)]
    assert list(contents(whole)) == ["README.md", *shards, "run.json", "skipped.parquet"]
    labels = list(read_labels(whole))
    good = [source / f"{i:05d}.png" for i in range(21) if i not in (3, 5, 7)]
    assert [label.source for label in labels] == [*map(str, good)] and count_labels(whole) == 18
    for label in labels:
        (block,) = label.objects
        assert block.box3d is not None and block.box3d.center[2] == pytest.approx(1.15, abs=0.2)
        assert label.provenance == {"detector": "bright", "segmenter": "box", "pointmap": "slope"}
    rows = pq.read_table(whole / "skipped.parquet").to_pylist()
    skipped = {Path(row["source"]).stem: row["reason"] for row in rows}
    assert (
        list(skipped) == ["00003", "00005", "00007"] and "not a readable image" in skipped["00003"]
    )
    assert skipped["00005"] == "request refused" and skipped["00007"] == "no object was found"
    card = (whole / "README.md").read_text()
    assert "18 images with 18 objects, 18 of them with an oriented 3D box; " in card
    assert "3 images were skipped (`skipped.parquet`)" in card
    assert json.loads((whole / "run.json").read_text())["detector"] == "bright"


def test_what_did_not_get_through_is_tried_again(source: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    assert run(source, out, detector=UNREACHED) == LabelingProgress(
        21, 0, 21, num_skipped=7, num_retryable=4
    )
    rows = pq.read_table(out / "skipped.parquet").to_pylist()
    assert tuple(Path(row["source"]).name for row in rows if row["retryable"]) == UNREACHED[2]
    before = contents(out)
    assert run(source, out) == LabelingProgress(21, 21, 21, num_skipped=7, num_retryable=4)
    assert contents(out) == before  # nothing is tried again unless asked
    done = run(source, out, detector=(0.0, "none", ("00004.png",)), retry_skipped=True)
    assert done == LabelingProgress(21, 0, 21, num_skipped=4, num_retryable=1)
    assert run(source, out, workers=2, retry_skipped=True) == LabelingProgress(
        21, 13, 21, num_skipped=3
    )
    assert contents(out) == contents(whole)
    assert run(source, out, retry_skipped=True) == LabelingProgress(21, 21, 21, num_skipped=3)


def test_trying_again_may_be_interrupted(source: Path, tmp_path: Path) -> None:
    """In one large shard, whose rows are stored in several groups; and with an unfinished shard after it."""
    run(source, tmp_path / "whole", shard=17)
    out = tmp_path / "labels"
    with pytest.raises(KeyboardInterrupt):
        run(source, out, detector=UNREACHED, shard=17, stop=7)
    (out / "questions.parquet").touch()  # about the labels so far
    first = (out / "labels-00000.parquet").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        run(source, out, shard=17, retry_skipped=True, stop=2)
    assert (out / "labels-00000.parquet").read_bytes() == first and not list(out.glob(".*.tmp"))
    assert run(source, out, shard=17, retry_skipped=True) == LabelingProgress(
        21, 0, 21, num_skipped=3
    )
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("detector", "key"), [("file:{}/one+gemini", "annotations"), ("owlv2={}", "files of")]
)
def test_what_was_replaced_since_is_found_out(
    source: Path, tmp_path: Path, detector: str, key: str
) -> None:
    """Annotations, or a model's weights."""
    (made := tmp_path / "made").mkdir()
    given = LabelOptions(photos=(str(source),), detector=detector.format(made), vocabulary="mug")

    def labelled() -> LabelingProgress:
        settings, work = prepare_run(given)[2], WorkOptions(shard_size=8)
        return label_folder(list_images(str(source)), tmp_path / "out", engine(0), settings, work)

    (made / "one").write_text("first")
    assert labelled().num_done == labelled().num_before == 21
    (made / "one").write_text("another")
    refuses(key, labelled)


def test_it_opens_as_a_hugging_face_dataset_with_images(whole: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    found = datasets.load_dataset(str(whole), cache_dir=str(tmp_path))["train"]
    assert isinstance(found.features["image"], datasets.Image)
    assert len(found) == 18 and found[4]["image"].size == (60, 40)
    assert found[0]["objects"][0]["name"] == "block"
    aside = datasets.load_dataset(str(whole), "skipped", cache_dir=str(tmp_path))["train"]
    assert aside["reason"][2] == "no object was found"
    one = str(whole / "labels-00001.parquet")
    single = datasets.load_dataset("parquet", data_files=one, cache_dir=str(tmp_path))
    assert isinstance(single["train"].features["image"], datasets.Image)


def _labels_in_a_process(source: str, out: str, workers: int) -> None:
    """In a process group of its own, 20 ms per image; it is stuck at one in the last shard."""
    os.setpgid(0, 0)
    run(Path(source), Path(out), workers, detector=(0.02, "00017.png"))


def test_killed_again_and_again_it_loses_nothing(source: Path, whole: Path, tmp_path: Path) -> None:
    out, chance = tmp_path / "labels", random.Random(0)
    deaths = shards = 0
    while (
        deaths < 6 or not shards
    ):  # on a slow computer, all may die young: then give them more time
        # A forked process has no workers: it would take its parent's fork server for its own.
        context: Any = multiprocessing.get_context("forkserver" if deaths == 2 else "fork")
        process = context.Process(
            target=_labels_in_a_process, args=(str(source), str(out), deaths == 2)
        )
        process.start()
        wait_until((out / "run.json").is_file, "a run", process)
        time.sleep(chance.uniform(0, 0.4 * max(1, deaths - 4)))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        there = list(out.glob("labels-*.parquet"))
        assert all(path.read_bytes() == (whole / path.name).read_bytes() for path in there)
        deaths, shards = deaths + 1, len(there)
    assert not (out / "README.md").exists()
    run(source, out)
    assert contents(out) == contents(whole)


def test_workers_end_with_the_process_that_is_killed(source: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    process = context.Process(
        target=_labels_in_a_process, args=(str(source), str(tmp_path / "out"), 2)
    )
    process.start()
    while (
        len(group := _group(process.pid)) < 4
    ):  # itself, the server that forks workers, two workers
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    wait_until(lambda: not _group(process.pid), f"the end of {group}")


def _group(leader: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(group) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


def refused(source: Path, out: Path, settings: dict[str, Any] | None = None, shard: int = 8) -> str:
    work = WorkOptions(shard_size=shard, batch_size=3)
    return refuses(
        "", label_folder, list_images(str(source)), out, engine(), settings or SETTINGS, work
    )


def test_the_difference_to_another_run_is_named(source: Path, whole: Path, tmp_path: Path) -> None:
    before = contents(whole)
    assert run(source, whole) == LabelingProgress(
        num_total=21, num_before=21, num_done=21, num_skipped=3
    )
    assert '"bright" there, "owlv2" here' in refused(
        source, whole, {**SETTINGS, "detector": "owlv2"}
    )
    assert "rate is null there, 2 here" in refused(source, whole, {**SETTINGS, "rate": 2})
    assert (
        "shard_size is 8 there, 9 here" in refused(source, whole, shard=9)
        and contents(whole) == before
    )
    copy = shutil.copy(whole / "labels-00001.parquet", whole / "labels-00001 (copy).parquet")
    assert "not of this run" in refused(source, whole)
    copy.unlink()
    (tmp_path / "thesis.txt").write_text("words")
    assert "holds other files" in refused(source, tmp_path)
    assert "holds other files" in refused(source, Path(__file__).parent)


@pytest.mark.parametrize(
    "change",
    [
        lambda at: shutil.copy(at / "00009.png", at / "00010.png"),
        lambda at: [(at / f"{number:05d}.png").unlink() for number in (8, 9)],
        lambda at: (at / "00009.png").rename(at / "10000.png"),
    ],
)
def test_an_input_that_has_changed_is_found_out(tmp_path: Path, change: Any) -> None:
    run(folder := photos(tmp_path / "photos", 10, bad=False), tmp_path / "labels")
    change(folder)
    assert "the input has changed since labels-00001.parquet" in refused(
        folder, tmp_path / "labels"
    )


def test_an_image_that_was_replaced_is_labelled_again_with_those_beside_it(tmp_path: Path) -> None:
    folder, out = photos(tmp_path / "photos", 10, bad=False), tmp_path / "labels"
    run(folder, out)
    (out / "questions.parquet").touch()  # about what is no longer there
    shutil.copy(folder / "00008.png", folder / "00009.png")  # which had as many bytes
    with pytest.warns(Notice, match="1 image changed"):
        assert run(folder, out) == LabelingProgress(10, 8, 10, 0)
    run(folder, tmp_path / "anew", workers=2)  # which change nothing
    assert contents(out) == contents(tmp_path / "anew")
    for path in folder.iterdir():
        os.utime(path, (0, 0))  # as in a copy
    assert run(folder, out) == LabelingProgress(10, 10, 10, 0)


def test_too_many_failures_stop_the_run_before_they_are_kept(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 8, bad=False)
    for path in sorted(folder.iterdir())[:5]:
        path.write_bytes(b"words")
    line = refused(folder, tmp_path / "labels")
    assert "5 of 8" in line and "photos" in line and not (tmp_path / "labels").exists()


def test_the_settings_of_a_run_that_was_refused_do_not_bind(tmp_path: Path) -> None:
    """Such as one whose detector has no key: the next may have another; nor is no input a run."""

    def no_key(batches: Any) -> Any:
        raise SpearError("no API key: set ONE")
        yield

    source, out = photos(tmp_path / "photos", 2, bad=False), tmp_path / "labels"
    refuses("no image to label", label_folder, iter(()), out, engine(), SETTINGS, WorkOptions())
    assert not out.exists()
    refuses(
        "no API key",
        label_folder,
        list_images(str(source)),
        out,
        no_key,
        {"detector": "bright"},
        WorkOptions(),
    )
    label_folder(list_images(str(source)), out, engine(), {"detector": "other"}, WorkOptions())
    assert json.loads((out / "run.json").read_text())["detector"] == "other"
    settings, there = {"detector": "bright"}, 'detector is "other" there, "bright" here'
    refuses(there, label_folder, list_images(str(source)), out, no_key, settings, WorkOptions())
