"""A folder of labels: begun, continued after any interruption, finished.

    LABELS/labels-00000.parquet, …   labelled images (see `spear.labels.store`)
    LABELS/skipped.parquet           skipped images: source, reason, and whether the reason may pass
    LABELS/run.json                  the settings, which every continuation must share
    LABELS/README.md                 dataset card with statistics

Shard n is made from items n · shard_size … of the input, no matter how often the run was stopped, so a shard
that is there is finished and one that is not is made again. Its footer names the skipped images, and holds a
hash of the keys of its items, by which another input is refused, and their stamps and digests. A shard of
which an image is another one by now is made again; to see that, images are read where stamps have changed.
So can a shard be of which images were skipped for a reason that may pass.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import groupby, tee
from pathlib import Path
from typing import Any

import pyarrow as pa

import spear
from spear.errors import SpearError, format_count, notice
from spear.labels.engine import Engine, ModelFactories, SkippedImage, run_local, run_ray
from spear.labels.inputs import Item, compute_stamp, hash_content, read_contents
from spear.labels.model_factories import resolve_factories, split_description
from spear.labels.models.ground_truth import GROUND_TRUTH
from spear.labels.options import LabelOptions, WorkOptions
from spear.labels.pipeline import NO_OBJECTS_REASON
from spear.labels.questions.statistics import write_dataset_card
from spear.labels.sources import ListScenes
from spear.labels.sources import list_items as find_items
from spear.labels.store import (
    SCHEMA,
    SKIPPED_FILE,
    ParquetWriter,
    read_footer,
    remove_outdated_questions,
    remove_temporary_files,
)
from spear.util.files import check_no_foreign_files
from spear.util.options import list_changed_options
from spear.util.progress import ProgressBar
from spear.util.run_lock import acquire_run_lock
from spear.util.run_settings import record_or_check_settings
from spear.util.skipped_items import SkippedItems

FOOTER_KEY = "spear.labels"
"""Key in a shard's footer of a JSON object: a hash of the `keys` of its items, `skipped`, a `SkippedImage`
for each skipped image, and `stamps` and `digests` (`Work.digest`) of all items."""
SETTINGS_FILE = "run.json"
MAX_FAILED_FRACTION = 0.5
"""The run stops when a larger share of the images fail; images without objects do not count."""


@dataclasses.dataclass(frozen=True)
class LabelingProgress:
    """How far a run came, in images: `done` of `total`, `before` of them by earlier commands; `skipped`, and
    of these `retryable` for a reason that may pass. rate: of this command, in words."""

    total: int
    before: int
    done: int
    skipped: int
    retryable: int = 0
    rate: str = dataclasses.field(default="", compare=False)


def label_photos(options: LabelOptions, list_scenes: ListScenes | None = None) -> LabelingProgress:
    """Label `options.photos`; how far it came. `SpearError`: an idle option, or as in `label_folder`."""
    chosen, listing, settings = prepare_run(options, list_scenes)
    work = options.work
    if idle := list_changed_options(
        work, *(("copies", "gpus") if work.engine == "local" else ("workers",))
    ):
        raise SpearError(f"{idle[0]} says nothing to the {work.engine} engine: leave it out")
    local, ray = partial(run_local, chosen, work.workers), partial(run_ray, chosen, work)
    engine: Engine = partial(local if work.engine == "local" else ray, longest=options.size or None)
    return label_folder(listing, options.out, engine, settings, work, options.retry_skipped)


def prepare_run(
    options: LabelOptions, list_scenes: ListScenes | None = None
) -> tuple[ModelFactories, Iterator[Item], dict[str, Any]]:
    """What makes the components, the listing of `options.photos`, and the settings; nothing is loaded.
    Raises `SpearError`: an unknown component, an option that says nothing, an input without its truth."""
    chosen = resolve_factories(options)
    inputs = [os.path.normpath(photo) for photo in options.photos]
    true = next(
        (p for p in ("detector", "segmenter", "pointmap") if getattr(options, p) == GROUND_TRUTH),
        "",
    )
    bare = next((given for given in inputs if not given.startswith(("rgbd:", "sim:"))), "")
    if true and bare:
        ways = f"give rgbd:FOLDER with measured depth, or sim:SEED, or leave --{true} out"
        raise SpearError(f"--{true} {GROUND_TRUTH}: {bare} comes without it: {ways}")
    kept = ("detector", "segmenter", "pointmap", "size", "rate", "per_episode")
    settings = {"inputs": inputs, "vocabulary": options.names} | {
        n: getattr(options, n) for n in kept
    }
    parts = (
        split_description(said.partition("+")[0]) for said in (options.detector, options.segmenter)
    )
    if files := {path: Path(path).read_bytes() for name, path in parts if name == "file" and path}:
        settings["annotations"] = {
            path: hashlib.sha256(text).hexdigest() for path, text in files.items()
        }
    ends = (
        split_description(s.rpartition("+")[2])
        for s in (options.detector, options.segmenter, options.pointmap)
    )
    local = [Path(path) for name, path in ends if name != "file" and path and os.path.exists(path)]
    settings |= {
        f"files of {p}": compute_stamp(p, *sorted(filter(Path.is_file, p.rglob("*"))))
        for p in local
    }
    return (
        chosen,
        find_items(inputs, options.rate, options.per_episode, options.out, list_scenes),
        settings,
    )


def label_folder(
    items: Iterable[Item],
    out: Path,
    engine: Engine,
    settings: Mapping[str, Any],
    work: WorkOptions,
    retry_skipped: bool = False,
) -> LabelingProgress:
    """Label items into a folder, or finish what was begun there.

    items     the input; all of it is kept in memory, half a kilobyte for each image.
    settings  all that decides what the labels are, JSON-able; kept in run.json.
    work      its `shard_size`, on which memory does not depend, and `batch_size`.

    Raises `SpearError`: the folder is of another run, is being written to, or its input has changed; no
    input; too many failures; the disk is full. What is finished stays, and the same call finishes the rest.
    """
    if not (shards := _chunks(list(items), work.shard_size)):
        raise SpearError("no image to label: give photos, folders, videos or episodes")
    check_no_foreign_files(out, SETTINGS_FILE, "label")
    with acquire_run_lock(out, "labelling into", SETTINGS_FILE):
        begun = any(out.glob("labels-*.parquet"))  # a run that was refused has labelled nothing
        whole = {"spear": spear.__version__, **settings, "shard_size": work.shard_size}
        record_or_check_settings(out / SETTINGS_FILE, whole, begun)
        remove_temporary_files(out)
        kept = _kept(out, shards, retry_skipped)
        if len(kept) < len(shards):
            remove_outdated_questions(out)
        total, before = sum(map(len, shards)), sum(len(shards[number]) for number in kept)
        skipped = sum(map(len, kept.values()))
        bad = SkippedItems(MAX_FAILED_FRACTION, "images", patience=200)
        bar = ProgressBar("labelling", total, "images", before)
        todo = (pair for pair in enumerate(shards) if pair[0] not in kept)
        ours, theirs = tee(
            (n, batch) for n, members in todo for batch in _chunks(members, work.batch_size)
        )
        with bar, closing(engine(batch for _, batch in theirs)) as labelled:
            # In this order an engine that has nothing to do is not begun.
            results = zip(ours, labelled, strict=False)
            for number, group in groupby(results, key=lambda result: result[0][0]):
                with ParquetWriter(out / f"labels-{number:05d}.parquet", SCHEMA) as writer:
                    refused, hashes = list[SkippedImage](), list[str]()
                    for (_, batch), done in group:
                        writer.write(done.labels)
                        refused += done.skipped
                        hashes += done.digests
                        for note in done.notes:
                            notice(note)
                        skipped += len(done.skipped)
                        for source, why, _ in done.skipped:
                            if why != NO_OBJECTS_REASON:
                                bad(why if source in why else f"{source}: {why}")
                        bar.update(bar.done + len(batch), f"{skipped:,} skipped")
                        bad.check(bar.done - before - len(bad.reasons), finished=bar.done == total)
                    kept[number], stamps = refused, [item.stamp for item in shards[number]]
                    said = {"keys": _keys(shards[number]), "skipped": refused}
                    writer.commit(
                        {FOOTER_KEY: json.dumps({**said, "stamps": stamps, "digests": hashes})}
                    )
        schema = pa.schema({"source": pa.string(), "reason": pa.string(), "retryable": pa.bool_()})
        with ParquetWriter(out / SKIPPED_FILE, schema, rows_per_group=4096) as writer:
            aside = [image for number in sorted(kept) for image in kept[number]]
            writer.write(pa.Table.from_pylist([image._asdict() for image in aside], schema))
            writer.commit()
        write_dataset_card(out)
    return LabelingProgress(
        total, before, bar.done, skipped, sum(i.retryable for i in aside), bar.rate()
    )


def _keys(members: Sequence[Item]) -> str:
    return hashlib.sha256("\0".join(item.key for item in members).encode()).hexdigest()


def _kept(
    out: Path, shards: Sequence[Sequence[Item]], retry_skipped: bool
) -> dict[int, list[SkippedImage]]:
    """What was skipped of the finished shards that stay, by number."""
    kept, changed = {}, 0
    for path in sorted(out.glob("labels-*.parquet")):
        said, digits = (
            json.loads(read_footer(path, FOOTER_KEY) or "{}"),
            path.stem.removeprefix("labels-"),
        )
        if "digests" not in said or not digits.isdecimal():
            raise SpearError(f"{path}: not of this run: move it elsewhere")
        number, skipped = int(digits), [SkippedImage(*image) for image in said["skipped"]]
        if number >= len(shards) or said["keys"] != _keys(shards[number]):
            raise SpearError(
                f"{out}: the input has changed since {path.name} was made: give another folder"
            )
        parts = zip(shards[number], said["stamps"], said["digests"], strict=True)
        doubtful = [(item, then) for item, stamp, then in parts if item.stamp != stamp]
        found = read_contents([item for item, _ in doubtful])
        others = sum(
            hash_content(now) != then for now, (_, then) in zip(found, doubtful, strict=True)
        )
        if not others and not (retry_skipped and any(image.retryable for image in skipped)):
            kept[number] = skipped
        changed += others
    if changed:
        notice(
            f"{out}: {format_count(changed, 'images')} changed since: made again, with all in the same files"
        )
    return kept


def _chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[first : first + size] for first in range(0, len(items), size)]
