"""Preparing a robot dataset in any format for training.

The result is a store of episodes (`spear.data.store.episode_store`) with canonical actions at 5 Hz
and JPEGs in the size that the model sees, so that training reads it at the speed of the decoder.
Next to its shards are three files: `sketches.npz` (see `spear.data.normalize`), `request.json`,
which says what the store was made from, and `skipped.json`, which says which episodes were skipped,
and why.

Any number of processes prepare blocks of episodes, which are written in order, so the bytes do not
depend on the number of processes. Until the work is finished its folder is `.OUT.part/dataset`. The
note of each shard says how many blocks are done, and which episodes were skipped since the shard
before. After a kill, the same call therefore continues behind the last shard.
"""

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spear.checks.cameras import is_frozen
from spear.checks.gripper import (
    MIN_MOTION,
    check_command_timing,
    check_gripper,
    check_range,
)
from spear.checks.instructions import find_doubtful_instruction
from spear.checks.recording import Recording
from spear.checks.result import Check
from spear.checks.states import find_implausible_states
from spear.data.actions import ACTION_RULES_VERSION, add_actions, resample_episode
from spear.data.normalize import save_sketches
from spear.data.options import Conversion
from spear.data.readers import formats
from spear.data.readers.bad_rows import Repairs, count_repairs
from spear.data.readers.dataset_layout import DatasetLayout
from spear.data.readers.splits import parse_split
from spear.data.store.episode_store import (
    REQUEST_FILE,
    EpisodeStore,
    add_shard,
    list_shards,
    remove_unfinished_shards,
)
from spear.data.store.shard import open_shard
from spear.errors import SpearError, format_count, is_first_process, notice
from spear.types import Episode
from spear.util import processes
from spear.util.files import check_new_folder, read_json, write_text
from spear.util.images import decode_image, encode_jpeg, fit_image
from spear.util.progress import ProgressBar
from spear.util.run_lock import acquire_run_lock
from spear.util.run_settings import describe_difference, record_or_check_settings
from spear.util.skipped_items import SkippedItems

BLOCK_SIZE = 16  # episodes that a worker prepares at a time
MAX_SHARD_MIB = 100  # of images, after which the next shard begins
MAX_BAD_SHARE = 0.5  # of the episodes; with more, preparing stops
NUM_CHECKED_EPISODES = 100  # whose units and grippers are checked at the end
POLL_INTERVAL_S = 0.5  # at which other processes look for the prepared folder
UNHASHED_FIELDS: dict[str, Any] = {
    "logged_rotation_frame": None,
    "logged_translation_unit": None,
    "logged_rotation_unit": None,
}
"""Values that replace those of fields of layouts on which no prepared episode depends."""
LATER_FIELDS = ("base_rotation", "gripper_opening", *UNHASHED_FIELDS)
"""Fields of layouts that are not part of the hash unless they differ from their defaults."""
LAYOUT_DEFAULTS = {field.name: field.default for field in dataclasses.fields(DatasetLayout)}
JPEG_START = b"\xff\xd8"
SKIPPED_FILE = "skipped.json"


class Block(NamedTuple):
    """A part of the split that is prepared at a time, as the readers take it ("train[0:16]")."""

    split: str
    num_episodes: int


class PreparedBlock(NamedTuple):
    """The good episodes of a block, why the others were skipped, and what was repaired."""

    episodes: list[Episode]
    skip_reasons: list[str]
    repairs: Repairs


class PreparationPlan(NamedTuple):
    """What `prepare` will do.

    request       what the result depends on; it is recorded as `request.json`.
    has_commands  whether the dataset logs gripper commands.
    """

    request: dict[str, Any]
    blocks: list[Block]
    has_commands: bool


def prepare(
    path: str | Path,
    out_dir: str | Path,
    split: str = "train",
    conversion: Conversion | None = None,
    workers: int = 0,
) -> tuple[int, list[str]]:
    """Prepare a dataset for training.

    Broken records are skipped, as is what `validate_episode` rejects, and what has no known action,
    no image, or not the cameras that `conversion` names.

    Args:
        path: A folder in any format that `spear.data.readers.formats` knows.
        out_dir: The folder of the result. It appears when it is complete; the same call then finds
            it and returns at once.
        split: Which episodes: "train", "train[:20%]", …
        conversion: Rate and image sizes; by default 5 Hz and unchanged images.
        workers: The number of processes that read and resize; 0 for this one. The result is the
            same, byte for byte.

    Returns:
        The number of episodes, and why the others were skipped.

    Raises:
        SpearError: If most episodes are bad, `out_dir` contains something else, or the disk is
            full. The same call continues the work.
    """
    path = Path(path)
    out = Path(out_dir)
    conversion = conversion or Conversion()
    plan = plan_preparation(path, out, split, conversion)
    if (out / REQUEST_FILE).is_file():
        return len(EpisodeStore(out)), json.loads((out / SKIPPED_FILE).read_text("utf-8"))

    work_dir = out.with_name(f".{out.name}.part")
    folder = work_dir / "dataset"
    with acquire_run_lock(work_dir, "preparing data in", REQUEST_FILE):
        # Write the shards that an earlier call did not write.
        folder.mkdir(exist_ok=True)
        record_or_check_settings(
            work_dir / REQUEST_FILE, plan.request, is_resuming=bool(list_shards(folder))
        )
        repairs = Repairs()
        num_good, skipped = _write_shards(
            path, folder, plan.blocks, conversion, workers, repairs=repairs
        )
        formats.check_enough_good(num_good, skipped, path, split)

        # Check the result, and summarize its statistics.
        store = EpisodeStore(folder)
        _notice_repairs(repairs, path)
        _notice_implausible_values(store, path, plan.has_commands)
        if store.failed_mask().all():
            notice(
                f"{path}: no episode of {num_good} succeeded: {out} is to look at, "
                "nothing learns from it"
            )
        else:
            save_sketches(store)

        # Complete the folder, and give it its name.
        skipped_text = json.dumps(skipped.reasons, indent=4, ensure_ascii=False)
        write_text(folder / SKIPPED_FILE, skipped_text)
        request = plan.request | {"shards": len(list_shards(folder))}
        write_text(folder / REQUEST_FILE, json.dumps(request, indent=2))
        folder.replace(out)
        shutil.rmtree(work_dir, ignore_errors=True)
    return num_good, skipped.reasons


def plan_preparation(path: Path, out: Path, split: str, conversion: Conversion) -> PreparationPlan:
    """Plan what `prepare` will do. Writes nothing.

    Raises:
        SpearError: If the layout or the split is bad, or `out` contains something else.
    """
    source = formats.open_dataset(path)
    blocks: list[Block] = []
    for name, start, end in parse_split(formats.count_episodes(source), split, path):
        for first in range(start, end, BLOCK_SIZE):
            last = min(first + BLOCK_SIZE, end)
            blocks.append(Block(f"{name}[{first}:{last}]", last - first))

    layout = None
    if isinstance(source, formats.Dataset):
        layout = source.load_layout(conversion.layout)
    request = {
        "path": str(path.resolve()),
        "data": formats.fingerprint_dataset(source),
        "episodes": _hash_text("\n".join(block.split for block in blocks)),
        "layout": _hash_layout(layout),
        "size": dict(sorted(conversion.sizes.items())),
        "rate": conversion.control_hz,
        "rules": ACTION_RULES_VERSION,
        "quality": conversion.quality,
        "shard_mb": MAX_SHARD_MIB,
    }
    _check_out_folder(out, request)
    has_commands = layout is not None and layout.command is not None
    return PreparationPlan(request, blocks, has_commands)


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_layout(layout: DatasetLayout | None) -> str:
    """Hash what a layout says of the columns."""
    if layout is None:
        return _hash_text("None")

    layout = dataclasses.replace(layout, facts={}, weight=None, **UNHASHED_FIELDS)
    # The text is that of earlier versions, so that their folders stay valid: with the old name of
    # the class, and without the fields that came later.
    text = repr(layout).replace("DatasetLayout(", "DatasetSpec(", 1)
    for name in LATER_FIELDS:
        default = LAYOUT_DEFAULTS[name]
        text = text.replace(f", {name}={default!r}", "", 1)
    return _hash_text(text)


def _check_out_folder(out: Path, request: dict[str, Any]) -> None:
    """Raise SpearError if the output folder contains anything but the result of this request."""
    if not (out / REQUEST_FILE).is_file():
        check_new_folder(out)
        return

    earlier_request = read_json(out / REQUEST_FILE, "remove that folder")
    earlier_request["shards"] = None  # no part of the request
    difference = describe_difference(earlier_request, request)
    if difference:
        raise SpearError(
            f"{out} was prepared from other episodes, or in another way ({difference}): "
            "remove that folder, or choose another --out"
        )


def _write_shards(
    path: Path,
    folder: Path,
    blocks: Sequence[Block],
    conversion: Conversion,
    workers: int,
    repairs: Repairs,
) -> tuple[int, SkippedItems]:
    """Prepare all blocks, and write the shards that the folder does not have yet.

    `repairs` collects the repairs of the blocks that this call prepares.

    Returns the number of good episodes, and why the others were skipped.
    """
    # Continue behind the last shard.
    remove_unfinished_shards(folder)
    num_done_blocks = 0
    num_good = 0
    skipped = SkippedItems(MAX_BAD_SHARE)
    for file in list_shards(folder):
        shard, note = open_shard(file)
        num_done_blocks, reasons = json.loads(note["done"])
        num_good += len(shard)
        skipped.reasons += reasons

    num_noted_reasons = len(skipped.reasons)  # that are in the notes of shards
    remaining_blocks = blocks[num_done_blocks:]
    bar = ProgressBar(
        f"preparing {path.name}",
        sum(block.num_episodes for block in blocks),
        "episodes",
        sum(block.num_episodes for block in blocks[:num_done_blocks]),
    )
    advice = "use fewer --workers, and run the same command again: it continues"
    with bar, processes.open_worker_pool(workers, __name__, advice) as pool:
        results = processes.map_in_order(
            pool,
            partial(prepare_block, path, conversion),
            [block.split for block in remaining_blocks],
            workers,
        )
        shard_episodes: list[Episode] = []
        for block, prepared in zip(remaining_blocks, results, strict=True):
            num_done_blocks += 1
            num_good += len(prepared.episodes)
            shard_episodes += prepared.episodes
            skipped.reasons += prepared.skip_reasons
            repairs.add(prepared.repairs)
            skipped.check(num_good)
            bar.update(bar.done + block.num_episodes, f"{len(skipped.reasons)} skipped")

            is_last_block = num_done_blocks == len(blocks)
            is_full = _count_image_bytes(shard_episodes) >= MAX_SHARD_MIB * 2**20
            if shard_episodes and (is_last_block or is_full):
                new_reasons = skipped.reasons[num_noted_reasons:]
                note = {"done": json.dumps([num_done_blocks, new_reasons])}
                add_shard(shard_episodes, folder, note)
                shard_episodes = []
                num_noted_reasons = len(skipped.reasons)
    return num_good, skipped


def _count_image_bytes(episodes: Sequence[Episode]) -> int:
    num_bytes = 0
    for episode in episodes:
        for images in episode.images.values():
            num_bytes += sum(len(image) for image in images)
    return num_bytes


def _notice_repairs(repairs: Repairs, path: Path) -> None:
    """Notice in one message how many rows were dropped and how many readings clipped."""
    remarks: list[str] = []
    if repairs.num_dropped_rows:
        rows = format_count(repairs.num_dropped_rows, "rows")
        remarks.append(f"dropped {rows} without a rotation")
    if repairs.num_clipped_readings:
        readings = format_count(repairs.num_clipped_readings, "gripper readings")
        remarks.append(f"clipped {readings} outside of gripper_range or command_range")
    if remarks:
        notice(f"{path}: {'; '.join(remarks)}")


def _notice_implausible_values(store: EpisodeStore, path: Path, has_commands: bool) -> None:
    """Notice what is wrong with positions, instructions and gripper of the first episodes."""
    num_checked = min(len(store), NUM_CHECKED_EPISODES)
    episodes = [store.without_images(index) for index in range(num_checked)]
    for remark in find_implausible_states(episodes):
        notice(f"{path}: {remark}")
    doubt = find_doubtful_instruction([episode.instruction for episode in episodes])
    if doubt:
        notice(f"{path}: {doubt}")
    for check in _find_wrong_gripper(episodes, has_commands):
        notice(f"{path}: {check.name}: {check.words}")


def _find_wrong_gripper(episodes: Sequence[Episode], has_commands: bool) -> list[Check]:
    """Find what is wrong with the gripper's openings and commands."""
    recordings = [Recording.from_episode(episode) for episode in episodes]
    if not has_commands:
        recordings = [dataclasses.replace(recording, command=None) for recording in recordings]
    wrong = [check for check in check_gripper(recordings) if check.verdict == "wrong"]
    if wrong:
        return wrong

    # A gripper that moves little, compared with its distance from both ends, may have another unit.
    openings = [episode.gripper for episode in episodes]
    commands = [np.asarray(episode.action)[:, 7] for episode in episodes]
    largest_opening = max(opening.max() for opening in openings)
    smallest_opening = min(opening.min() for opening in openings)
    largest_motion = max(np.ptp(opening) for opening in openings)
    if largest_motion <= MIN_MOTION * min(largest_opening, 1 - smallest_opening):
        return []
    check = check_range(openings, commands if largest_motion > MIN_MOTION else ())
    if check is None:
        check = check_command_timing(list(zip(openings, commands, strict=True)))
    return [] if check is None else [check]


def read_good_episodes(
    path: str | Path, split: str, layout_file: Path | None, skipped: SkippedItems
) -> Iterator[Episode]:
    """Read the good episodes of a dataset in any format; `skipped` collects the errors.

    Raises SpearError if too many episodes are bad, or none is good.
    """
    num_good = 0
    for episode in formats.read_episodes(path, split, layout_file, skipped):
        num_good += 1
        skipped.check(num_good)
        yield episode
    formats.check_enough_good(num_good, skipped, path, split)


def prepare_block(path: Path, conversion: Conversion, split: str) -> PreparedBlock:
    """Prepare the episodes of a block."""
    good_episodes: list[Episode] = []
    reasons: list[str] = []

    def skip(error: SpearError) -> None:
        reasons.append(str(error))

    with count_repairs() as repairs:
        for episode in formats.read_episodes(path, split, conversion.layout, skip):
            try:
                good_episodes.append(_convert_episode(episode, conversion))
            except SpearError as error:
                skip(error)
    return PreparedBlock(good_episodes, reasons, repairs)


def _convert_episode(episode: Episode, conversion: Conversion) -> Episode:
    """Convert an episode to canonical actions at the new rate, with images in their new sizes."""
    unknown_cameras = set(conversion.sizes) - {"", *episode.images}
    if unknown_cameras:
        raise SpearError(
            f"no camera {min(unknown_cameras)!r}: {episode.source}: "
            f"its cameras are {', '.join(sorted(episode.images))}"
        )

    episode = add_actions(resample_episode(episode, conversion.control_hz))
    if not np.any(episode.action_mask):
        raise SpearError(f"nothing to learn from: {episode.source}: none of its actions is known")

    images: dict[str, Sequence[bytes]] = {}
    for camera in episode.images:
        converted_images = _convert_images(episode, camera, conversion)
        if converted_images is not None:
            images[camera] = converted_images
    if not images:
        raise SpearError(f"nothing to see: {episode.source}: its images are blank, or one picture")
    return dataclasses.replace(episode, images=images)


def _convert_images(episode: Episode, camera: str, conversion: Conversion) -> list[bytes] | None:
    """Convert a camera's images to JPEG in their new size, without bars at their sides.

    Training adds the bars of its model, as acting does, and does not jitter them. An image that
    has its size and format already stays unchanged, as do all images without a new size.

    Returns None for a camera that is blank, as datasets have it for an absent one, or frozen.
    Raises SpearError for a broken image.
    """
    size = conversion.sizes.get(camera, conversion.sizes.get(""))
    converted_images: list[bytes] = []
    levels: set[int] = set()  # brightness, until there are two of them
    for step, encoded in enumerate(episode.images[camera]):
        image = decode_image(encoded, f"{episode.source} step {step} camera {camera!r}")
        if len(levels) < 2:
            levels |= {int(image.min()), int(image.max())}
        if size is not None:
            width, height = size
            resized = fit_image(image, height, width, bars=False)
            if resized.shape != image.shape or not encoded.startswith(JPEG_START):
                encoded = encode_jpeg(resized, conversion.quality)
        converted_images.append(encoded)

    is_blank = len(levels) < 2
    if is_blank or is_frozen(episode.images[camera], episode.position):
        return None
    return converted_images


def open_store(
    path: str | Path, work_dir: str | Path, split: str = "train"
) -> tuple[EpisodeStore, list[str]]:
    """Open the episodes of a split of a folder in any format, as training reads them.

    A store is opened unchanged. Any other dataset is first prepared, once, into a folder of
    `work_dir` whose name depends on path and split. Of several processes the first one prepares it,
    and the others wait.

    Returns:
        The store, and why episodes were skipped in this call.
    """
    if isinstance(formats.open_dataset(path), EpisodeStore):
        return formats.open_store_split(path, split), []

    source = Path(path).resolve()
    suffix = _hash_text(f"{source} {split}")[:8]
    target = Path(work_dir) / f"{source.name}-{suffix}"
    reasons: list[str] = []
    if is_first_process():
        _, reasons = prepare(path, target, split)
    while not target.is_dir():
        time.sleep(POLL_INTERVAL_S)
    return EpisodeStore(target), reasons
