"""Labeling into a folder, which can be continued after any interruption.

    LABELS/labels-00000.parquet, …   shards: files of labeled images (see `spear.labels.store`)
    LABELS/skipped.parquet           skipped images: source, reason, and whether to retry them
    LABELS/run.json                  the settings, which every continuation must share
    LABELS/README.md                 dataset card with statistics

Shard n is made from the input's items with indices n · shard_size to (n + 1) · shard_size - 1, no
matter how often the run was interrupted. A shard's file appears only when the shard is finished. So
a continuation makes only the missing shards, each from its first item on.

A shard's footer contains a hash of its items' keys, the items' stamps and content hashes, and the
skipped images. A continuation refuses an input whose keys differ. It makes a shard again if the
content of one of its images has changed. To detect this, it reads the images whose stamps have
changed. `--retry-skipped` also makes shards again in which a skipped image is worth a retry.
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
from spear.labels.inputs import Item, hash_content, make_file_stamp, read_contents
from spear.labels.model_factories import resolve_factories, split_model_description
from spear.labels.models.ground_truth import GROUND_TRUTH
from spear.labels.options import LabelOptions, WorkOptions
from spear.labels.pipeline import NO_OBJECTS_REASON
from spear.labels.questions.statistics import write_dataset_card
from spear.labels.sources import ListScenes, list_items
from spear.labels.store import (
    SCHEMA,
    SKIPPED_FILE,
    ParquetWriter,
    read_shard_footer,
    remove_questions,
    remove_temporary_files,
)
from spear.util.files import check_empty_or_own_folder
from spear.util.options import list_changed_options
from spear.util.progress import ProgressBar
from spear.util.run_lock import acquire_run_lock
from spear.util.run_settings import record_or_check_settings
from spear.util.skipped_items import SkippedItems

FOOTER_KEY = "spear.labels"
"""A shard's footer has a JSON object under this key. The object contains `keys` (a hash of the keys
of the shard's items), `skipped` (a `SkippedImage` for each skipped image), `stamps` and `digests`
(the stamp and the `PendingImage.content_hash` of each item)."""
SETTINGS_FILE = "run.json"
OPTION_OF_SETTING = {
    "inputs": "PHOTOS",
    "vocabulary": "--vocabulary",
    "detector": "--detector",
    "segmenter": "--segmenter",
    "pointmap": "--pointmap",
    "size": "--max-size",
    "rate": "--fps",
    "per_episode": "--frames-per-episode",
    "shard_size": "--shard-size",
}
"""Key in the file of settings -> the option that sets it."""
MAX_FAILED_FRACTION = 0.5
"""The run stops when a larger fraction of the images fails. Images without objects are skipped, but
do not count as failures."""
MIN_JUDGED_IMAGES = 200  # an unfinished run is not stopped before this many images were processed

_SKIPPED_SCHEMA = pa.schema({"source": pa.string(), "reason": pa.string(), "retryable": pa.bool_()})


@dataclasses.dataclass(frozen=True)
class LabelingProgress:
    """How many images of a run are done.

    Attributes:
        num_total: Number of images in the input.
        num_before: Number of images that earlier commands labeled or skipped.
        num_done: Number of images that all commands together labeled or skipped.
        num_skipped: Number of images that all commands together skipped.
        num_retryable: Number of skipped images that are worth a retry.
        rate: How fast this command was, as a text with its unit. It differs from run to run, so two
            results with the same numbers are equal whatever their rates.
    """

    num_total: int
    num_before: int
    num_done: int
    num_skipped: int
    num_retryable: int = 0
    rate: str = dataclasses.field(default="", compare=False)


class PreparedRun(NamedTuple):
    """A run that is ready to start.

    Attributes:
        factories: Functions that make the three models.
        items: The items of the input. They are listed while you iterate.
        settings: Everything that the labels depend on, as JSON values.
    """

    factories: ModelFactories
    items: Iterator[Item]
    settings: dict[str, Any]


def label_photos(options: LabelOptions, list_scenes: ListScenes | None = None) -> LabelingProgress:
    """Label `options.photos` into the folder `options.out`, or continue its interrupted run.

    Args:
        options: Options of the command.
        list_scenes: Lists the scenes of `sim:` arguments (`spear.labels.sources.list_items`).

    Raises:
        SpearError: An option has no effect, or `label_into_folder` raises it.
    """
    run = prepare_run(options, list_scenes)
    work = options.work
    max_side_px = options.max_size or None  # 0 keeps the size of all images
    engine: Engine
    # `unused_options` lists the options that only the other engine uses and that you have set.
    if work.engine == "local":
        unused_options = list_changed_options(work, "replicas", "gpus")
        engine = partial(run_local, run.factories, work.workers, max_side_px=max_side_px)
    else:
        unused_options = list_changed_options(work, "workers")
        engine = partial(run_ray, run.factories, work, max_side_px=max_side_px)
    if unused_options:
        raise SpearError(
            f"{unused_options[0]} has no effect with the {work.engine} engine. Leave it out."
        )
    return label_into_folder(
        run.items, options.out, engine, run.settings, work, options.retry_skipped
    )


def prepare_run(options: LabelOptions, list_scenes: ListScenes | None = None) -> PreparedRun:
    """Check the options and prepare a run, without loading a model or reading an image.

    Args:
        options: Options of the command.
        list_scenes: Lists the scenes of `sim:` arguments (`spear.labels.sources.list_items`).

    Raises:
        SpearError: A model is unknown, an option has no effect, or ground truth was chosen as a
            model although an input has none.
    """
    factories = resolve_factories(options)
    inputs = [os.path.normpath(photo) for photo in options.photos]
    _check_inputs_have_ground_truth(options, inputs)
    items = list_items(
        inputs,
        rate=options.fps,
        per_episode=options.frames_per_episode,
        excluded_folder=options.out,
        list_scenes=list_scenes,
    )
    return PreparedRun(factories, items, _collect_settings(options, inputs))


def _check_inputs_have_ground_truth(options: LabelOptions, inputs: Sequence[str]) -> None:
    """Raise `SpearError` if ground truth was chosen as a model although an input has none."""
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
    """Collect everything that the labels depend on, to compare a continuation with its run.

    This includes hashes of the annotation files, and stamps of the folders of weights, from which
    the models are made.
    """
    settings: dict[str, Any] = {"inputs": inputs, "vocabulary": options.vocabulary_names}
    for name in ("detector", "segmenter", "pointmap"):
        settings[name] = getattr(options, name)
    # These keys are those of earlier versions, so that their folders can be continued.
    settings["size"] = options.max_size
    settings["rate"] = options.fps
    settings["per_episode"] = options.frames_per_episode

    # In "file:PATH+gemini", the part before "+" names an annotation file.
    annotations = {}
    for description in (options.detector, options.segmenter):
        name, path = split_model_description(description.partition("+")[0])
        if name == "file" and path:
            annotations[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if annotations:
        settings["annotations"] = annotations

    # In "NAME=PATH", PATH may be a folder of weights.
    for description in (options.detector, options.segmenter, options.pointmap):
        name, path = split_model_description(description.rpartition("+")[2])
        if name != "file" and path and os.path.exists(path):
            weights = Path(path)
            files = sorted(file for file in weights.rglob("*") if file.is_file())
            settings[f"files of {weights}"] = make_file_stamp(weights, *files)
    return settings


def label_into_folder(
    items: Iterable[Item],
    out: Path,
    engine: Engine,
    settings: Mapping[str, Any],
    work: WorkOptions,
    retry_skipped: bool = False,
) -> LabelingProgress:
    """Label items into a folder, or continue the folder's interrupted run.

    Args:
        items: The input. All items are kept in memory, half a kilobyte for each image.
        out: The folder.
        engine: Labels batches of items.
        settings: Everything that the labels depend on, as JSON values; recorded in run.json.
        work: Its `shard_size` and `batch_size` are used. A larger `shard_size` needs no more
            memory.
        retry_skipped: Whether to make shards again in which a skipped image is worth a retry.

    Returns:
        How many images are done.

    Raises:
        SpearError: The folder belongs to another run, another process writes to it, or the input
            has changed; the input is empty; too many images fail; the disk is full. Finished shards
            stay, so that the same call can continue the run.
    """
    shards = _split(list(items), work.shard_size)
    if not shards:
        raise SpearError("There is no image to label. Give photos, folders, videos or episodes.")
    check_empty_or_own_folder(out, SETTINGS_FILE, "label")

    with acquire_run_lock(out, "labeling into", SETTINGS_FILE):
        # Record the settings, or compare them with those of the run that is continued. Settings
        # of a run that was refused before it labeled anything may be overwritten.
        has_labels = any(out.glob("labels-*.parquet"))
        all_settings = {"spear": spear.__version__, **settings, "shard_size": work.shard_size}
        record_or_check_settings(out / SETTINGS_FILE, all_settings, has_labels, OPTION_OF_SETTING)

        # Find the shards that earlier commands finished.
        remove_temporary_files(out)
        skipped_by_shard = _read_skipped_images_of_finished_shards(out, shards, retry_skipped)
        if len(skipped_by_shard) < len(shards):
            remove_questions(out)

        # Label the other shards. `open_shards` maps their numbers to their items in batches.
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
            # The engine is a generator, so it starts only when the first result is requested. If
            # all shards are finished, no model is loaded.
            for number, shard_batches in open_shards.items():
                shard_path = out / f"labels-{number:05d}.parquet"
                skipped_by_shard[number] = _write_shard(
                    shard_path, shards[number], shard_batches, results, monitor
                )

        # Describe the whole folder.
        skipped = []
        for number in sorted(skipped_by_shard):
            skipped += skipped_by_shard[number]
        _write_skipped(out / SKIPPED_FILE, skipped)
        write_dataset_card(out)

    return LabelingProgress(
        num_total=num_total,
        num_before=num_before,
        num_done=monitor.bar.num_done,
        num_skipped=monitor.num_skipped,
        num_retryable=sum(image.retryable for image in skipped),
        rate=monitor.bar.format_rate(),
    )


class _RunMonitor:
    """Shows the progress of a run, and stops the run when too many images fail.

    Attributes:
        num_total: Number of images in the input.
        num_before: Number of images that earlier commands labeled or skipped.
        num_skipped: Number of images that were skipped so far, by all commands.
        bar: The progress bar; `bar.num_done` is the number of images that are done by now.
    """

    def __init__(self, num_total: int, num_before: int, num_skipped: int) -> None:
        self.num_total = num_total
        self.num_before = num_before
        self.num_skipped = num_skipped
        self.bar = ProgressBar("labeling", num_total, "images", num_before)
        self._failures = SkippedItems(MAX_FAILED_FRACTION, "images", patience=MIN_JUDGED_IMAGES)

    def record_batch_and_check_failures(self, labeled: LabeledBatch, num_images: int) -> None:
        """Count the `num_images` images of a batch, and repeat the batch's notices.

        Raises:
            SpearError: Too many images have failed.
        """
        for message in labeled.notices:
            notice(message)
        self.num_skipped += len(labeled.skipped)
        for source, reason, _ in labeled.skipped:
            if reason != NO_OBJECTS_REASON:
                has_source = source in reason
                # Calling `SkippedItems` adds the failure to it.
                self._failures(reason if has_source else f"in {source}, {reason}")
        self.bar.set_num_done(self.bar.num_done + num_images, f"{self.num_skipped:,} skipped")
        num_good = self.bar.num_done - self.num_before - len(self._failures.reasons)
        self._failures.check_limit(num_good, is_finished=self.bar.num_done == self.num_total)


def _write_shard(
    path: Path,
    items: Sequence[Item],
    batches: Sequence[Sequence[Item]],
    results: Iterator[LabeledBatch],
    monitor: _RunMonitor,
) -> list[SkippedImage]:
    """Write the labels of a shard.

    Args:
        path: The shard's file.
        items: The shard's items.
        batches: The same items, in batches.
        results: The labeled batches of all shards; those of this shard come next.
        monitor: Counts the batches.

    Returns:
        The skipped images of the shard.
    """
    skipped: list[SkippedImage] = []
    content_hashes: list[str] = []
    with ParquetWriter(path, SCHEMA) as writer:
        for batch in batches:
            labeled = next(results)
            writer.write(labeled.labels)
            skipped += labeled.skipped
            content_hashes += labeled.content_hashes
            monitor.record_batch_and_check_failures(labeled, len(batch))
        footer = {
            "keys": _hash_keys(items),
            "skipped": skipped,
            "stamps": [item.stamp for item in items],
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
    """Hash the keys of items, so that another list of images can be noticed."""
    return hashlib.sha256("\0".join(item.key for item in items).encode()).hexdigest()


def _read_skipped_images_of_finished_shards(
    out: Path, shards: Sequence[Sequence[Item]], retry_skipped: bool
) -> dict[int, list[SkippedImage]]:
    """Find the shards that need not be made again.

    Args:
        out: The folder of the shards.
        shards: The items of all shards of the run, whether finished or not.
        retry_skipped: Whether shards are made again in which a skipped image is worth a retry.

    Returns:
        The number of each such shard → its skipped images.

    Raises:
        SpearError: A file is not a shard of this run, or was made from other items.
    """
    skipped_of_finished = {}
    num_changed = 0
    for path in sorted(out.glob("labels-*.parquet")):
        footer = json.loads(read_shard_footer(path, FOOTER_KEY) or "{}")
        digits = path.stem.removeprefix("labels-")
        if "digests" not in footer or not digits.isdecimal():
            raise SpearError(f"{path} is not of this run. Move it elsewhere.")
        number = int(digits)
        if number >= len(shards) or footer["keys"] != _hash_keys(shards[number]):
            raise SpearError(
                f"In {out}, the input has changed since {path.name} was made. Use another --out."
            )
        num_changed_in_shard = _count_changed_images(shards[number], footer)
        num_changed += num_changed_in_shard
        skipped = [SkippedImage(*fields) for fields in footer["skipped"]]
        is_retried = retry_skipped and any(image.retryable for image in skipped)
        if num_changed_in_shard == 0 and not is_retried:
            skipped_of_finished[number] = skipped
    if num_changed:
        notice(
            f"{format_count(num_changed, 'images')} changed since they were labeled into {out}. "
            "They are labeled again, with all others in the same files."
        )
    return skipped_of_finished


def _count_changed_images(shard: Sequence[Item], footer: Mapping[str, Any]) -> int:
    """Count the images of a finished shard whose content has changed since they were labeled.

    Only images whose stamp has changed are read; the others cannot have changed.

    Args:
        shard: The shard's items.
        footer: The object that the shard's footer has under `FOOTER_KEY`.
    """
    doubtful_items = []
    old_hashes = []
    for item, stamp, content_hash in zip(shard, footer["stamps"], footer["digests"], strict=True):
        if item.stamp != stamp:
            doubtful_items.append(item)
            old_hashes.append(content_hash)
    contents = read_contents(doubtful_items)
    new_hashes = [hash_content(content) for content in contents]
    return sum(
        new_hash != old_hash for new_hash, old_hash in zip(new_hashes, old_hashes, strict=True)
    )


def _split(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Split items into consecutive groups of `size`; the last group may be smaller."""
    return [items[first : first + size] for first in range(0, len(items), size)]
