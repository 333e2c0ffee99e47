"""Prepares a robot dataset in any format for training.

The result is a store of episodes (`spear.data.store.episode_store`): a folder of shards, with
canonical actions at 5 Hz and JPEGs in the size that the model sees. Training then reads images as
fast as they can be decoded. The folder has three other files: `sketches.npz` (statistics, see
`spear.data.normalize`), `request.json`, which says what the store was made from, and
`skipped.json`, which says which episodes were skipped, and why.

The work is divided into blocks of 16 episodes. Worker processes prepare blocks, and one process
writes them in order, so the bytes of the result do not depend on the number of workers. Until the
result is complete, its folder is `.OUT.part/dataset`. Each shard has a note, which says how many
blocks were done when the shard was written, and which episodes were skipped since the shard before
it. After a kill, the same call therefore continues behind the last shard.
"""

import dataclasses
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
    examine_late_commands,
    examine_range,
    judge_gripper,
)
from spear.checks.instructions import explain_identifier_as_instruction
from spear.checks.recording import Recording
from spear.checks.result import Check
from spear.checks.states import find_state_problems
from spear.data.actions import ACTION_RULES_VERSION, resample_episode, with_canonical_actions
from spear.data.frames import (
    hash_layout_for_preparation,
    hash_text,
    merge_frame_versions,
    read_store_frame_versions,
)
from spear.data.normalize import make_and_write_sketches
from spear.data.options import ALL_OTHER_CAMERAS, Conversion
from spear.data.readers import formats
from spear.data.readers.bad_rows import Repairs, collect_repairs
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
from spear.util.files import check_new_or_empty_folder, read_json, write_text
from spear.util.images import decode_image, encode_jpeg, fit_image
from spear.util.progress import ProgressBar
from spear.util.run_lock import acquire_run_lock
from spear.util.run_settings import describe_difference, record_or_check_settings
from spear.util.skipped_items import SkippedItems

BLOCK_SIZE = 16  # the number of episodes that a worker prepares at a time
MAX_SHARD_MIB = 100  # when a shard has images of this size, the next shard begins
MAX_BAD_SHARE = 0.5  # if a larger fraction of the episodes is bad, preparing stops
NUM_CHECKED_EPISODES = 100  # at the end, the states and grippers of this many episodes are checked
POLL_INTERVAL_S = 0.5  # how often waiting processes look for the prepared folder
JPEG_START = b"\xff\xd8"  # the first bytes of every JPEG
SKIPPED_FILE = "skipped.json"
OPTION_OF_SETTING = {
    "path": "the folder",
    "episodes": "--split",
    "size": "--image-size",
    "rate": "--control-hz",
    "quality": "--quality",
}
"""Key of a request -> the option that sets it, for messages."""


class Block(NamedTuple):
    """The episodes that a worker prepares at a time.

    Attributes:
        split: These episodes in the split syntax: "train[0:16]".
        num_episodes: How many they are.
    """

    split: str
    num_episodes: int


class PreparedBlock(NamedTuple):
    """The result of preparing a block.

    Attributes:
        episodes: The good episodes, converted.
        skip_reasons: For each other episode, why it was skipped.
        repairs: What was dropped or changed in the good episodes.
    """

    episodes: list[Episode]
    skip_reasons: list[str]
    repairs: Repairs


class OpenedStore(NamedTuple):
    """What `open_or_prepare_store` returns.

    Attributes:
        store: The episodes.
        skip_reasons: For each episode that was skipped in preparing, the reason. Empty if the
            folder already was a store, and in processes that waited for the first one.
    """

    store: EpisodeStore
    skip_reasons: list[str]


class Preparation(NamedTuple):
    """What `prepare` returns.

    Attributes:
        num_good: The number of episodes in the result.
        skip_reasons: For each skipped episode, the reason.
    """

    num_good: int
    skip_reasons: list[str]


class PreparationPlan(NamedTuple):
    """What `prepare` will do.

    Attributes:
        request: Everything that the result depends on, to be recorded as `request.json`.
        blocks: The blocks of episodes to prepare.
        has_commands: Whether the dataset logs gripper commands.
        has_canonical_actions: Whether the dataset's openings and actions are canonical already, as
            `spear data export` writes them. No layout can then be wrong about the gripper.
    """

    request: dict[str, Any]
    blocks: list[Block]
    has_commands: bool
    has_canonical_actions: bool


def prepare(
    path: str | Path,
    out_dir: str | Path,
    split: str = "train",
    conversion: Conversion | None = None,
    workers: int = 0,
) -> Preparation:
    """Prepare a dataset for training.

    Bad episodes are skipped: broken records, episodes that `validate_episode` rejects, and episodes
    without a known action, without an image, or without a camera that `conversion` names.

    Args:
        path: A folder in any format that `spear.data.readers.formats` knows.
        out_dir: The folder of the result, which appears when it is complete. If the folder is
            already the result of the same call, nothing is done.
        split: Which episodes: "train", "train[:20%]", …
        conversion: Rate and image sizes; by default 5 Hz and unchanged images.
        workers: The number of worker processes that read and resize; with 0, this process does so.
            The result is the same, byte for byte.

    Returns:
        How many episodes are good, and why the others were skipped.

    Raises:
        SpearError: If most episodes are bad, `out_dir` contains something else, or the disk is
            full. After that is mended, the same call continues the work.
    """
    path = Path(path)
    out = Path(out_dir)
    conversion = conversion or Conversion()
    plan = plan_preparation(path, out, split, conversion)
    if (out / REQUEST_FILE).is_file():
        skip_reasons = json.loads((out / SKIPPED_FILE).read_text("utf-8"))
        return Preparation(len(EpisodeStore(out)), skip_reasons)

    work_dir = out.with_name(f".{out.name}.part")
    folder = work_dir / "dataset"
    with acquire_run_lock(work_dir, "preparing data in", REQUEST_FILE):
        # Write the shards that an earlier call did not write.
        folder.mkdir(exist_ok=True)
        record_or_check_settings(
            work_dir / REQUEST_FILE,
            plan.request,
            is_resuming=bool(list_shards(folder)),
            option_names=OPTION_OF_SETTING,
        )
        repairs = Repairs()  # `_prepare_and_write_shards` adds to these counts
        num_good, skipped = _prepare_and_write_shards(
            path, folder, plan.blocks, conversion, workers, repairs=repairs
        )
        formats.check_enough_good(num_good, skipped, path, split)

        # Check the result, and summarize its statistics.
        store = EpisodeStore(folder)
        _notice_repairs(repairs, path)
        _notice_implausible_values(store, path)
        if not plan.has_canonical_actions:
            _notice_wrong_gripper(store, path, plan.has_commands)
        if store.mark_failed_episodes().all():
            notice(
                f"no episode of the {num_good} in {path} succeeded, so nothing learns from "
                f"{out}. It is to look at."
            )
        else:
            make_and_write_sketches(store)

        # Complete the folder, and give it its name.
        skipped_text = json.dumps(skipped.reasons, indent=4, ensure_ascii=False)
        write_text(folder / SKIPPED_FILE, skipped_text)
        request = plan.request | {"shards": len(list_shards(folder))}
        write_text(folder / REQUEST_FILE, json.dumps(request, indent=2))
        folder.replace(out)
        shutil.rmtree(work_dir, ignore_errors=True)
    return Preparation(num_good, skipped.reasons)


def plan_preparation(path: Path, out: Path, split: str, conversion: Conversion) -> PreparationPlan:
    """Plan what `prepare` will do, without writing anything.

    Args:
        path: See `prepare`.
        out: The folder of the result.
        split: See `prepare`.
        conversion: See `prepare`.

    Raises:
        SpearError: If the layout or the split is bad, or `out` contains something else.
    """
    dataset = formats.open_dataset(path)
    blocks: list[Block] = []
    for episode_range in parse_split(formats.count_episodes(dataset), split, path):
        for block_start in range(episode_range.first, episode_range.end, BLOCK_SIZE):
            block_end = min(block_start + BLOCK_SIZE, episode_range.end)
            block_split = f"{episode_range.split}[{block_start}:{block_end}]"
            blocks.append(Block(block_split, num_episodes=block_end - block_start))

    layout = None  # a store of episodes needs none
    if isinstance(dataset, EpisodeStore):
        frames = dataset.frame_versions
    else:
        layout = dataset.load_layout(conversion.layout)
        frames = layout.frames
    request = {
        "path": str(path.resolve()),
        "data": formats.fingerprint_dataset(dataset),
        "episodes": hash_text("\n".join(block.split for block in blocks)),
        "layout": hash_layout_for_preparation(layout),
        "frames": dict(frames),
        "size": dict(sorted(conversion.sizes.items())),
        "rate": conversion.control_hz,
        "rules": ACTION_RULES_VERSION,
        "quality": conversion.quality,
        "shard_mb": MAX_SHARD_MIB,
    }
    _check_out_folder(out, request)
    # A store has no layout, so its gripper openings are checked as those of a foreign dataset are.
    has_commands = layout is not None and layout.command is not None
    has_canonical_actions = layout is not None and layout.action is not None
    return PreparationPlan(request, blocks, has_commands, has_canonical_actions)


def _check_out_folder(out: Path, request: dict[str, Any]) -> None:
    """Raise SpearError if the output folder contains anything but the result of this request."""
    if not (out / REQUEST_FILE).is_file():
        check_new_or_empty_folder(out)
        return

    earlier_request = read_json(out / REQUEST_FILE, "remove that folder")
    earlier_request["shards"] = None  # `prepare` adds this key, which is no part of the request
    # Other frames have an error message of their own, and an earlier store may lack this key.
    merge_frame_versions(
        [
            (str(out), read_store_frame_versions(earlier_request)),
            ("this dataset", request["frames"]),
        ]
    )
    earlier_request["frames"] = request["frames"]
    difference = describe_difference(earlier_request, request, OPTION_OF_SETTING)
    if difference:
        raise SpearError(
            f"{out} was prepared from other episodes, or in another way ({difference}). Remove "
            "that folder, or choose another --out."
        )


def _prepare_and_write_shards(
    path: Path,
    folder: Path,
    blocks: Sequence[Block],
    conversion: Conversion,
    workers: int,
    repairs: Repairs,
) -> tuple[int, SkippedItems]:
    """Prepare the blocks that the shards in `folder` do not cover yet, and write their shards.

    Args:
        path: The dataset.
        folder: The folder of the shards, in which an earlier call may have written some.
        blocks: All blocks of the split.
        conversion: Rate and image sizes.
        workers: The number of worker processes, or 0.
        repairs: The counts to which the repairs of the blocks are added that this call prepares.

    Returns:
        The number of good episodes, and why the others were skipped, both of all blocks.
    """
    # Read what the existing shards cover. The last one's note says how many blocks are done.
    remove_unfinished_shards(folder)
    num_done_blocks = 0
    num_good = 0
    skipped = SkippedItems(MAX_BAD_SHARE)
    for file in list_shards(folder):
        shard = open_shard(file)
        num_done_blocks, reasons = json.loads(shard.note["done"])
        num_good += len(shard)
        skipped.reasons += reasons

    num_noted_reasons = len(skipped.reasons)  # how many reasons are in the notes of shards
    done_blocks = blocks[:num_done_blocks]
    remaining_blocks = blocks[num_done_blocks:]
    bar = ProgressBar(
        f"preparing {path.name}",
        total=sum(block.num_episodes for block in blocks),
        unit="episodes",
        num_done_before=sum(block.num_episodes for block in done_blocks),
    )
    advice = "use fewer --workers, and run the same command again: it continues"
    with bar, processes.open_worker_pool(workers, preload=__name__, advice=advice) as pool:
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
            skipped.check_limit(num_good)
            bar.set_num_done(bar.num_done + block.num_episodes, f"{len(skipped.reasons)} skipped")

            # End the shard, with a note from which another call can continue.
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
    """Count the bytes of all encoded images of some episodes."""
    num_bytes = 0
    for episode in episodes:
        for images in episode.images.values():
            num_bytes += sum(len(image) for image in images)
    return num_bytes


def _notice_repairs(repairs: Repairs, path: Path) -> None:
    """Issue one notice that says how many rows were dropped and how many readings clipped."""
    remarks: list[str] = []
    if repairs.num_dropped_rows:
        rows = format_count(repairs.num_dropped_rows, "rows")
        remarks.append(f"dropped {rows} without a pose, or with a missing number")
    if repairs.num_clipped_readings:
        readings = format_count(repairs.num_clipped_readings, "gripper readings")
        remarks.append(f"clipped {readings} outside of gripper_range or command_range")
    if remarks:
        notice(f"In {path}, spear {' and '.join(remarks)}.")


def _read_first_episodes_without_images(store: EpisodeStore) -> list[Episode]:
    """Read the first `NUM_CHECKED_EPISODES` episodes of a store, without their images."""
    num_checked = min(len(store), NUM_CHECKED_EPISODES)
    return [store.without_images(index) for index in range(num_checked)]


def _notice_implausible_values(store: EpisodeStore, path: Path) -> None:
    """Issue notices about implausible states and instructions of the first episodes.

    Args:
        store: The prepared episodes.
        path: The dataset, for the notices.
    """
    episodes = _read_first_episodes_without_images(store)
    for remark in find_state_problems(episodes):
        notice(f"In {path}, {remark}.")
    doubt = explain_identifier_as_instruction([episode.instruction for episode in episodes])
    if doubt:
        notice(f"In {path}, {doubt}")


def _notice_wrong_gripper(store: EpisodeStore, path: Path, has_commands: bool) -> None:
    """Issue notices about what the layout may say wrongly about the gripper.

    Args:
        store: The prepared episodes.
        path: The dataset, for the notices.
        has_commands: Whether the dataset logs gripper commands.
    """
    for check in _find_wrong_gripper(_read_first_episodes_without_images(store), has_commands):
        notice(f"The check of {check.name} in {path} fails, because {check.words}.")


def _find_wrong_gripper(episodes: Sequence[Episode], has_commands: bool) -> list[Check]:
    """Find what is wrong with the gripper's openings and commands; see `spear.checks.gripper`.

    Args:
        episodes: Episodes with canonical actions.
        has_commands: Whether the dataset logs gripper commands. Otherwise the commands in the
            actions were derived from the openings, and say nothing about them.
    """
    recordings = [Recording.from_episode(episode) for episode in episodes]
    if not has_commands:
        recordings = [dataclasses.replace(recording, command=None) for recording in recordings]
    wrong_checks = [check for check in judge_gripper(recordings) if check.verdict == "wrong"]
    if wrong_checks:
        return wrong_checks

    # If openings run from 0.00 to 0.02, their unit may be wrong. So the motion is compared with how
    # far openings get from the nearer end of 0 … 1. A gripper that still moves little is at rest.
    openings = [episode.gripper for episode in episodes]
    commands = [np.asarray(episode.action)[:, 7] for episode in episodes]
    largest_opening = max(opening.max() for opening in openings)
    smallest_opening = min(opening.min() for opening in openings)
    largest_motion = max(np.ptp(opening) for opening in openings)
    reach_from_nearer_end = min(largest_opening, 1 - smallest_opening)
    if largest_motion <= MIN_MOTION * reach_from_nearer_end:
        return []

    has_clear_motion = largest_motion > MIN_MOTION
    compared_commands = commands if has_clear_motion else ()
    check = examine_range(openings, compared_commands)
    if check is None:
        check = examine_late_commands(openings, commands)
    return [] if check is None else [check]


def read_good_episodes(
    path: str | Path, split: str, layout_file: Path | None, skipped: SkippedItems
) -> Iterator[Episode]:
    """Read the good episodes of a dataset in any format.

    Args:
        path: The folder.
        split: Which episodes.
        layout_file: The file that describes the dataset's layout, or None.
        skipped: The collection to which the errors of bad episodes are added.

    Raises:
        SpearError: If too many episodes are bad, or none is good.
    """
    num_good = 0
    for episode in formats.read_episodes(path, split, layout_file, skipped):
        num_good += 1
        skipped.check_limit(num_good)
        yield episode
    formats.check_enough_good(num_good, skipped, path, split)


def prepare_block(path: Path, conversion: Conversion, split: str) -> PreparedBlock:
    """Prepare the episodes of one block; `split` names them ("train[0:16]")."""
    good_episodes: list[Episode] = []
    reasons: list[str] = []

    def skip(error: SpearError) -> None:
        reasons.append(str(error))

    with collect_repairs() as repairs:
        for episode in formats.read_episodes(path, split, conversion.layout, skip):
            try:
                good_episodes.append(_convert_episode(episode, conversion))
            except SpearError as error:
                skip(error)
    return PreparedBlock(good_episodes, reasons, repairs)


def _convert_episode(episode: Episode, conversion: Conversion) -> Episode:
    """Convert an episode to canonical actions at the new rate, and its images to their new sizes.

    Raises SpearError if the episode cannot be learned from.
    """
    unknown_cameras = set(conversion.sizes) - {ALL_OTHER_CAMERAS, *episode.images}
    if unknown_cameras:
        raise SpearError(
            f"{episode.source} has no camera {min(unknown_cameras)!r}. Its cameras are "
            f"{', '.join(sorted(episode.images))}."
        )

    episode = with_canonical_actions(resample_episode(episode, conversion.control_hz))
    if not np.any(episode.action_mask):
        raise SpearError(
            f"no action of {episode.source} is known, so nothing can be learned from it. Leave "
            "it out."
        )

    images: dict[str, Sequence[bytes]] = {}
    for camera in episode.images:
        converted_images = _convert_images_unless_blank_or_frozen(episode, camera, conversion)
        if converted_images is not None:
            images[camera] = converted_images
    if not images:
        raise SpearError(
            f"the images of {episode.source} are blank, or the same at every step. Leave it out."
        )
    return dataclasses.replace(episode, images=images)


def _convert_images_unless_blank_or_frozen(
    episode: Episode, camera: str, conversion: Conversion
) -> list[bytes] | None:
    """Convert a camera's images to JPEG so that they fit into their new size.

    Images keep their aspect ratio and get no black bars at their sides. Training and acting add the
    bars later, and training must not change the bars' color when it jitters the image. An image
    that is already a JPEG of the right size stays unchanged. So do all images of a camera for which
    `conversion` has no size.

    Returns:
        The images; None if all images of the camera are blank, which is how some datasets write an
        absent camera, or if they are frozen (the same picture although the arm moves).

    Raises:
        SpearError: If an image is broken.
    """
    default_size = conversion.sizes.get(ALL_OTHER_CAMERAS)
    size = conversion.sizes.get(camera, default_size)
    converted_images: list[bytes] = []
    levels: set[int] = set()  # darkest and brightest values of images, until two differ
    for step, encoded in enumerate(episode.images[camera]):
        image = decode_image(encoded, f"{episode.source} step {step} camera {camera!r}")
        if len(levels) < 2:
            levels |= {int(image.min()), int(image.max())}
        if size is not None:
            width, height = size
            resized = fit_image(image, height, width, has_bars=False)
            has_new_size = resized.shape != image.shape
            is_jpeg = encoded.startswith(JPEG_START)
            if has_new_size or not is_jpeg:
                encoded = encode_jpeg(resized, conversion.quality)
        converted_images.append(encoded)

    is_blank = len(levels) < 2
    if is_blank or is_frozen(episode.images[camera], episode.position):
        return None
    return converted_images


def open_or_prepare_store(
    path: str | Path, work_dir: str | Path, split: str = "train"
) -> OpenedStore:
    """Open the episodes of a split as a store, whatever the format of the folder.

    If the folder is a store, it is opened unchanged. Any other dataset is first prepared into a
    folder in `work_dir`, whose name depends on path and split, unless an earlier call did so. If
    training runs in several processes, the first one prepares the dataset, and the others wait.
    """
    if isinstance(formats.open_dataset(path), EpisodeStore):
        return OpenedStore(formats.open_store_split(path, split), skip_reasons=[])

    source = Path(path).resolve()
    suffix = hash_text(f"{source} {split}")[:8]
    target = Path(work_dir) / f"{source.name}-{suffix}"
    skip_reasons: list[str] = []
    if is_first_process():
        skip_reasons = prepare(path, target, split).skip_reasons
    while not target.is_dir():
        time.sleep(POLL_INTERVAL_S)
    return OpenedStore(EpisodeStore(target), skip_reasons)
