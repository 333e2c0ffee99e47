"""A folder of labels: begun, continued after any interruption, finished.

    LABELS/labels-00000.parquet, …   labeled images (see `spear.labels.store`)
    LABELS/skipped.parquet           skipped images: source, reason, and whether the reason may pass
    LABELS/run.json                  the settings, which every continuation must share
    LABELS/README.md                 dataset card with statistics

Shard n is made from items n · shard_size … of the input, no matter how often the run was stopped.
So a shard that exists is finished, and one that does not exist is made from its first item on. A
shard's footer names the skipped images and contains a hash of the keys of its items, by which
another input is refused, with the items' stamps and content hashes. A shard is made again if one of
its images is another one by now; to see that, the images are read whose stamps have changed.
`--retry-skipped` also makes the shards again in which images were skipped for a reason that may
pass.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

import spear
from spear.errors import SpearError, format_count, notice
from spear.labels.engine import (
    Engine,
    LabeledBatch,
    ModelFactories,
    SkippedImage,
    run_local,
    run_ray,
)
from spear.labels.inputs import Item, compute_stamp, hash_content, read_contents
from spear.labels.model_factories import parse_description, resolve_factories
from spear.labels.models.ground_truth import GROUND_TRUTH
from spear.labels.options import LabelOptions, WorkOptions
from spear.labels.pipeline import NO_OBJECTS_REASON
from spear.labels.questions.statistics import write_dataset_card
from spear.labels.sources import ListScenes, list_items
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
"""Key in a shard's footer of a JSON object: `keys`, a hash of the keys of its items; `skipped`, a
`SkippedImage` for each skipped image; `stamps` and `digests` (`PendingImage.content_hash`) of all
items."""
SETTINGS_FILE = "run.json"
MAX_FAILED_FRACTION = 0.5
"""The run stops when a larger fraction of the images fails; images without objects are no
failures."""
MIN_JUDGED_IMAGES = 200  # images to see before the fraction of an unfinished run is judged

_SKIPPED_SCHEMA = pa.schema({"source": pa.string(), "reason": pa.string(), "retryable": pa.bool_()})


@dataclasses.dataclass(frozen=True)
class LabelingProgress:
    """How far a run came.

    Attributes:
        num_total: Images in the input.
        num_before: Images that earlier commands did.
        num_done: Images that are done by now, skipped ones included.
        num_skipped: Images that were skipped.
        num_retryable: Skipped images whose reason may pass.
        rate: How fast this command was, in words.
    """

    num_total: int
    num_before: int
    num_done: int
    num_skipped: int
    num_retryable: int = 0
    rate: str = dataclasses.field(default="", compare=False)


class PreparedRun(NamedTuple):
    """What `prepare_run` has found out.

    Attributes:
        factories: Make the three models.
        items: The images behind the inputs, not listed yet.
        settings: What the labels depend on, JSON-able.
    """

    factories: ModelFactories
    items: Iterator[Item]
    settings: dict[str, Any]


def label_photos(options: LabelOptions, list_scenes: ListScenes | None = None) -> LabelingProgress:
    """Label `options.photos` into `options.out`, or finish what was begun there.

    Args:
        options: Options of the command.
        list_scenes: As in `spear.labels.sources.list_items`.

    Raises:
        SpearError: An option has no effect, or as in `label_folder`.
    """
    run = prepare_run(options, list_scenes)
    work = options.work
    max_side_px = options.max_size or None
    engine: Engine
    if work.engine == "local":
        unused = list_changed_options(work, "replicas", "gpus")
        engine = partial(run_local, run.factories, work.workers, longest=max_side_px)
    else:
        unused = list_changed_options(work, "workers")
        engine = partial(run_ray, run.factories, work, longest=max_side_px)
    if unused:
        raise SpearError(f"{unused[0]} has no effect with the {work.engine} engine. Leave it out.")
    return label_folder(run.items, options.out, engine, run.settings, work, options.retry_skipped)


def prepare_run(options: LabelOptions, list_scenes: ListScenes | None = None) -> PreparedRun:
    """Check the options and find out what a run is made from; no model is loaded and no image read.

    Args:
        options: Options of the command.
        list_scenes: As in `spear.labels.sources.list_items`.

    Raises:
        SpearError: A model is unknown, an option has no effect, or an input comes without the
            ground truth that is asked for.
    """
    factories = resolve_factories(options)
    inputs = [os.path.normpath(photo) for photo in options.photos]
    _check_ground_truth(options, inputs)
    items = list_items(
        inputs,
        rate=options.fps,
        per_episode=options.frames_per_episode,
        excluded_folder=options.out,
        list_scenes=list_scenes,
    )
    return PreparedRun(factories, items, _collect_settings(options, inputs))


def _check_ground_truth(options: LabelOptions, inputs: Sequence[str]) -> None:
    """Raise `SpearError` where ground truth is asked for of an input that has none."""
    for role in ("detector", "segmenter", "pointmap"):
        if getattr(options, role) != GROUND_TRUTH:
            continue
        for path in inputs:
            if not path.startswith(("rgbd:", "sim:")):
                raise SpearError(
                    f"--{role} {GROUND_TRUTH} needs ground truth, which {path} comes without. Give "
                    f"rgbd:FOLDER with measured depth, or sim:SEED, or leave --{role} out."
                )


def _collect_settings(options: LabelOptions, inputs: Sequence[str]) -> dict[str, Any]:
    """What the labels depend on, with hashes or stamps of the files that the models are made
    from."""
    settings: dict[str, Any] = {"inputs": inputs, "vocabulary": options.vocabulary_names}
    for name in ("detector", "segmenter", "pointmap"):
        settings[name] = getattr(options, name)
    # The keys of earlier versions, so that their folders can be continued.
    settings["size"] = options.max_size
    settings["rate"] = options.fps
    settings["per_episode"] = options.frames_per_episode

    annotations = {}
    for description in (options.detector, options.segmenter):
        name, path = parse_description(description.partition("+")[0])
        if name == "file" and path:
            annotations[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if annotations:
        settings["annotations"] = annotations

    for description in (options.detector, options.segmenter, options.pointmap):
        name, path = parse_description(description.rpartition("+")[2])
        if name != "file" and path and os.path.exists(path):
            weights = Path(path)
            files = sorted(file for file in weights.rglob("*") if file.is_file())
            settings[f"files of {weights}"] = compute_stamp(weights, *files)
    return settings


def label_folder(
    items: Iterable[Item],
    out: Path,
    engine: Engine,
    settings: Mapping[str, Any],
    work: WorkOptions,
    retry_skipped: bool = False,
) -> LabelingProgress:
    """Label items into a folder, or finish what was begun there.

    Args:
        items: The input; all of it is kept in memory, half a kilobyte for each image.
        out: The folder.
        engine: Labels batches of items.
        settings: Everything that the labels depend on, JSON-able; recorded in run.json.
        work: Its `shard_size`, on which memory does not depend, and `batch_size` are used.
        retry_skipped: Whether to make shards again in which images were skipped for a reason that
            may pass.

    Returns:
        How far the run came.

    Raises:
        SpearError: The folder is of another run, another process writes to it, or its input has
            changed; there is no input; too many images fail; the disk is full. What is finished
            stays, and the same call finishes the rest.
    """
    shards = _split(list(items), work.shard_size)
    if not shards:
        raise SpearError("There is no image to label. Give photos, folders, videos or episodes.")
    check_no_foreign_files(out, SETTINGS_FILE, "label")

    with acquire_run_lock(out, "labeling into", SETTINGS_FILE):
        # Record the settings, or compare them with those of the run that is continued
        has_labels = any(out.glob("labels-*.parquet"))  # a run that was refused has labeled nothing
        all_settings = {"spear": spear.__version__, **settings, "shard_size": work.shard_size}
        record_or_check_settings(out / SETTINGS_FILE, all_settings, has_labels)

        # See what earlier commands finished
        remove_temporary_files(out)
        skipped_by_shard = _find_finished_shards(out, shards, retry_skipped)
        if len(skipped_by_shard) < len(shards):
            remove_outdated_questions(out)

        # Label the other shards
        num_total = sum(len(shard) for shard in shards)
        num_before = sum(len(shards[number]) for number in skipped_by_shard)
        num_skipped_before = sum(len(skipped) for skipped in skipped_by_shard.values())
        monitor = _RunMonitor(num_total, num_before, num_skipped_before)
        open_shards = {
            number: _split(shard, work.batch_size)
            for number, shard in enumerate(shards)
            if number not in skipped_by_shard
        }
        batches = chain.from_iterable(open_shards.values())
        with monitor.bar, closing(engine(batches)) as results:
            # Results are asked for shard by shard, so an engine without work never starts.
            for number, shard_batches in open_shards.items():
                shard_path = out / f"labels-{number:05d}.parquet"
                skipped_by_shard[number] = _label_shard(
                    shard_path, shards[number], shard_batches, results, monitor
                )

        # Describe the whole folder
        skipped = []
        for number in sorted(skipped_by_shard):
            skipped += skipped_by_shard[number]
        _write_skipped(out / SKIPPED_FILE, skipped)
        write_dataset_card(out)

    return LabelingProgress(
        num_total=num_total,
        num_before=num_before,
        num_done=monitor.bar.done,
        num_skipped=monitor.num_skipped,
        num_retryable=sum(image.retryable for image in skipped),
        rate=monitor.bar.format_rate(),
    )


class _RunMonitor:
    """Shows how far a run is, and ends it when too many images fail."""

    def __init__(self, num_total: int, num_before: int, num_skipped: int) -> None:
        self.num_total = num_total
        self.num_before = num_before
        self.num_skipped = num_skipped
        self.bar = ProgressBar("labeling", num_total, "images", num_before)
        self._failures = SkippedItems(MAX_FAILED_FRACTION, "images", patience=MIN_JUDGED_IMAGES)

    def record(self, labeled: LabeledBatch, num_images: int) -> None:
        """Count a batch, repeat its notices, and raise `SpearError` when too many images have
        failed."""
        for message in labeled.notices:
            notice(message)
        self.num_skipped += len(labeled.skipped)
        for source, reason, _ in labeled.skipped:
            if reason != NO_OBJECTS_REASON:
                self._failures(reason if source in reason else f"{source}: {reason}")
        self.bar.update(self.bar.done + num_images, f"{self.num_skipped:,} skipped")
        num_good = self.bar.done - self.num_before - len(self._failures.reasons)
        self._failures.check(num_good, finished=self.bar.done == self.num_total)


def _label_shard(
    path: Path,
    shard: Sequence[Item],
    batches: Sequence[Sequence[Item]],
    results: Iterator[LabeledBatch],
    monitor: _RunMonitor,
) -> list[SkippedImage]:
    """Write the labels of a shard, whose batches come next in `results`; returns its skipped
    images."""
    skipped: list[SkippedImage] = []
    content_hashes: list[str] = []
    with ParquetWriter(path, SCHEMA) as writer:
        for batch in batches:
            labeled = next(results)
            writer.write(labeled.labels)
            skipped += labeled.skipped
            content_hashes += labeled.content_hashes
            monitor.record(labeled, len(batch))
        footer = {
            "keys": _hash_keys(shard),
            "skipped": skipped,
            "stamps": [item.stamp for item in shard],
            "digests": content_hashes,
        }
        writer.commit({FOOTER_KEY: json.dumps(footer)})
    return skipped


def _write_skipped(path: Path, skipped: Sequence[SkippedImage]) -> None:
    rows = [image._asdict() for image in skipped]
    with ParquetWriter(path, _SKIPPED_SCHEMA, rows_per_group=4096) as writer:
        writer.write(pa.Table.from_pylist(rows, _SKIPPED_SCHEMA))
        writer.commit()


def _hash_keys(items: Sequence[Item]) -> str:
    return hashlib.sha256("\0".join(item.key for item in items).encode()).hexdigest()


def _find_finished_shards(
    out: Path, shards: Sequence[Sequence[Item]], retry_skipped: bool
) -> dict[int, list[SkippedImage]]:
    """The numbers of the finished shards that stay as they are, with the skipped images of each.

    Raises:
        SpearError: A shard is not of this run, or was made from other items.
    """
    finished = {}
    num_changed = 0
    for path in sorted(out.glob("labels-*.parquet")):
        footer = json.loads(read_footer(path, FOOTER_KEY) or "{}")
        digits = path.stem.removeprefix("labels-")
        if "digests" not in footer or not digits.isdecimal():
            raise SpearError(f"{path} is not of this run. Move it elsewhere.")
        number = int(digits)
        if number >= len(shards) or footer["keys"] != _hash_keys(shards[number]):
            raise SpearError(
                f"In {out}, the input has changed since {path.name} was made. Use another --out."
            )
        num_changed_here = _count_changed_images(shards[number], footer)
        skipped = [SkippedImage(*fields) for fields in footer["skipped"]]
        is_retried = retry_skipped and any(image.retryable for image in skipped)
        if num_changed_here == 0 and not is_retried:
            finished[number] = skipped
        num_changed += num_changed_here
    if num_changed:
        notice(
            f"{format_count(num_changed, 'images')} changed since they were labeled into {out}. "
            "They are labeled again, with all others in the same files."
        )
    return finished


def _count_changed_images(shard: Sequence[Item], footer: Mapping[str, Any]) -> int:
    """How many images of a finished shard are other ones by now. Those with the same stamp are not
    read."""
    doubtful_items = []
    hashes_then = []
    for item, stamp, content_hash in zip(shard, footer["stamps"], footer["digests"], strict=True):
        if item.stamp != stamp:
            doubtful_items.append(item)
            hashes_then.append(content_hash)
    contents = read_contents(doubtful_items)
    hashes_now = [hash_content(content) for content in contents]
    return sum(now != then for now, then in zip(hashes_now, hashes_then, strict=True))


def _split(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[first : first + size] for first in range(0, len(items), size)]
