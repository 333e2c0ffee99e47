"""From a robot dataset in any format to one that training reads at the speed of the decoder.

What is written is a store of episodes (`spear.data.store.episode_store`): canonical actions, 5 Hz, JPEGs in
the size that the model sees. Beside the shards lie `sketches.npz` (see `spear.data.normalize`),
`request.json`, for which request they were made, and `skipped.json`: which episodes were left out, and why.

Blocks of episodes are made ready by any number of processes and written in order: the bytes do not depend on
how many there are. Until all is done the folder is `.OUT.part/dataset`. The note of each shard says how far
the work was and what was left out since the one before, so a run that was killed continues behind the last.
"""

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from spear.checks.cameras import is_frozen
from spear.checks.gripper import (
    MIN_MOTION,
    check_command_timing,
    check_gripper,
    check_range,
)
from spear.checks.recording import Recording
from spear.checks.result import Check
from spear.checks.states import find_implausible_states
from spear.data.actions import ACTION_RULES_VERSION, add_actions, resample_episode
from spear.data.normalize import save_sketches
from spear.data.options import Conversion
from spear.data.readers import formats
from spear.data.readers.splits import parse_split
from spear.data.store.episode_store import (
    REQUEST_FILE,
    EpisodeStore,
    add_shard,
    list_shards,
    remove_unfinished_shards,
)
from spear.data.store.shard import open_shard
from spear.errors import SpearError, is_first_process, notice
from spear.types import Episode
from spear.util import processes
from spear.util.files import check_new_folder, read_json, write_text
from spear.util.images import decode_image, encode_jpeg, fit_image
from spear.util.progress import ProgressBar
from spear.util.run_lock import acquire_run_lock
from spear.util.run_settings import describe_difference, record_or_check_settings
from spear.util.skipped_items import SkippedItems

BLOCK, MAX_SHARD_MIB, MAX_BAD_SHARE = 16, 100, 0.5
"""Episodes that are made ready at a time, images in a shard, about, and the share of bad episodes above which
preparing is given up (our choice)."""
SKIPPED_FILE = "skipped.json"


def prepare(
    path: str | Path,
    out_dir: str | Path,
    split: str = "train",
    how: Conversion | None = None,
    workers: int = 0,
) -> tuple[int, list[str]]:
    """Make a dataset ready for training (see above); returns how many episodes it has, and why not the rest.

    path       in any format that `spear.data.readers.formats` knows; split says which of its episodes.
    how        what is made of them; by default at 5 Hz, images as they are.
    workers    processes that read and resize (0: this one). The result is the same, byte for byte.

    Skipped are broken records, what `check_episode` refuses, and what has no known action, picture or camera
    that `how` names. `out_dir` appears when all is in it; the same call then finds it. Raises SpearError when
    most are bad, `out_dir` holds something else, or the disk is full: the same call then continues.
    """
    path, out, how = Path(path), Path(out_dir), how or Conversion()
    request, todo, logged = plan_preparation(path, out, split, how)
    if (out / REQUEST_FILE).is_file():
        return len(EpisodeStore(out)), json.loads((out / SKIPPED_FILE).read_text("utf-8"))
    work = out.with_name(f".{out.name}.part")
    folder = work / "dataset"
    with acquire_run_lock(work, "preparing data in", REQUEST_FILE):
        folder.mkdir(exist_ok=True)
        record_or_check_settings(
            work / REQUEST_FILE, request, is_resuming=bool(list_shards(folder))
        )
        good, skipped = _write_shards(path, folder, todo, how, workers)
        formats.check_enough_good(good, skipped, path, split)
        store = EpisodeStore(folder)
        _notice_units(store, path, logged)
        if store.failed_mask().all():
            notice(
                f"{path}: no episode of {good} succeeded: {out} is to look at, nothing learns from it"
            )
        else:
            save_sketches(store)
        write_text(folder / SKIPPED_FILE, json.dumps(skipped.reasons, indent=4, ensure_ascii=False))
        write_text(
            folder / REQUEST_FILE,
            json.dumps(request | {"shards": len(list_shards(folder))}, indent=2),
        )
        folder.replace(out)
        shutil.rmtree(work, ignore_errors=True)
    return good, skipped.reasons


def plan_preparation(
    path: Path, out: Path, split: str, how: Conversion
) -> tuple[dict[str, Any], list[tuple[str, int]], bool]:
    """The request that `prepare` will note, the pieces of the split with their lengths, and whether gripper
    commands are logged. Writes nothing; raises `SpearError` for a layout, or an `out`, that does not fit."""
    source = formats.open_dataset(path)
    todo: list[
        tuple[str, int]
    ] = []  # pieces of the split as the readers take them, with their lengths
    for name, start, end in parse_split(formats.count_episodes(source), split, path):
        for first in range(start, end, BLOCK):
            last = min(first + BLOCK, end)
            todo.append((f"{name}[{first}:{last}]", last - first))
    # what its columns mean; and says what is wrong with that before anything is written
    layout = source.load_layout(how.layout) if isinstance(source, formats.Dataset) else None
    # The hashed text keeps the class name of earlier versions, so that their folders stay valid.
    meant = repr(layout and dataclasses.replace(layout, facts={}, weight=None))
    meant = meant.replace("DatasetLayout(", "DatasetSpec(", 1)
    request = {
        "path": str(path.resolve()),
        "data": formats.fingerprint_dataset(source),
        "episodes": hashlib.sha256("\n".join(block for block, _ in todo).encode()).hexdigest(),
        "layout": hashlib.sha256(meant.encode()).hexdigest(),
        "size": dict(sorted(how.sizes.items())),
        "rate": how.rate,
        "rules": ACTION_RULES_VERSION,
        "quality": how.quality,
        "shard_mb": MAX_SHARD_MIB,
    }
    if not (out / REQUEST_FILE).is_file():
        check_new_folder(out)
    else:
        made = read_json(out / REQUEST_FILE, "remove that folder") | {
            "shards": None
        }  # no part of the request
        if other := describe_difference(made, request):
            why = f"{out} was prepared from other episodes, or in another way ({other})"
            raise SpearError(f"{why}: remove that folder, or choose another --out")
    return request, todo, layout is not None and layout.command is not None


def _write_shards(
    path: Path, folder: Path, todo: Sequence[tuple[str, int]], how: Conversion, workers: int
) -> tuple[int, SkippedItems]:
    """Make the shards of all blocks (pieces of the split, each with its length) but for those that are there.
    Returns how many episodes are good, and why the others are not."""
    remove_unfinished_shards(folder)
    blocks, good, skipped, waiting = 0, 0, SkippedItems(MAX_BAD_SHARE), list[Episode]()
    for file in list_shards(folder):
        shard, note = open_shard(file)
        blocks, reasons = json.loads(note["done"])
        good, skipped.reasons = good + len(shard), skipped.reasons + reasons
    told = len(skipped.reasons)  # of them in the notes of shards
    left, before, total = todo[blocks:], sum(n for _, n in todo[:blocks]), sum(n for _, n in todo)
    bar = ProgressBar(f"preparing {path.name}", total, "episodes", before)
    advice = "use fewer --workers, and run the same command again: it continues"
    with bar, processes.open_worker_pool(workers, __name__, advice) as pool:
        splits = [block for block, _ in left]
        results = processes.map_in_order(pool, partial(prepare_block, path, how), splits, workers)
        for (_, length), (ready, reasons) in zip(left, results, strict=True):
            blocks, good = blocks + 1, good + len(ready)
            waiting += ready
            skipped.reasons += reasons
            skipped.check(good)
            bar.update(bar.done + length, f"{len(skipped.reasons)} skipped")
            images = (image for e in waiting for images in e.images.values() for image in images)
            if waiting and (blocks == len(todo) or sum(map(len, images)) >= MAX_SHARD_MIB * 2**20):
                add_shard(waiting, folder, {"done": json.dumps([blocks, skipped.reasons[told:]])})
                waiting, told = [], len(skipped.reasons)
    return good, skipped


def _notice_units(store: EpisodeStore, path: Path, logged: bool) -> None:
    """Says what is wrong with the first episodes' positions and gripper, whose commands may be `logged`."""
    first = [store.without_images(index) for index in range(min(len(store), 100))]
    for remark in find_implausible_states(first):
        notice(f"{path}: {remark}")
    arms = [Recording.from_episode(e) for e in first]
    checks = check_gripper(
        arms if logged else [dataclasses.replace(arm, command=None) for arm in arms]
    )
    wrong: list[Check | None] = [check for check in checks if check.verdict == "wrong"]
    seen, told = [e.gripper for e in first], [np.asarray(e.action)[:, 7] for e in first]
    ends, most = (max(map(np.max, seen)), 1 - min(map(np.min, seen))), max(map(np.ptp, seen))
    if not wrong and most > MIN_MOTION * min(ends):  # it may be in another unit
        wrong = [
            check_range(seen, told if most > MIN_MOTION else ())
            or check_command_timing([*zip(seen, told, strict=True)])
        ]
    for check in filter(None, wrong):
        notice(f"{path}: {check.name}: {check.words}")


def read_good_episodes(
    path: str | Path, split: str, layout: Path | None, skipped: SkippedItems
) -> Iterator[Episode]:
    """The good episodes of a dataset in any format; the others go to `skipped`.

    Raises SpearError when too many are bad, or nothing good is left.
    """
    count = 0
    for count, episode in enumerate(formats.read_episodes(path, split, layout, skipped), 1):
        skipped.check(count)
        yield episode
    formats.check_enough_good(count, skipped, path, split)


def prepare_block(path: Path, how: Conversion, split: str) -> tuple[list[Episode], list[str]]:
    """The good episodes of a split with their canonical actions, and why not the others."""
    good, reasons = list[Episode](), list[str]()
    for episode in formats.read_episodes(
        path, split, how.layout, lambda error: reasons.append(str(error))
    ):
        try:
            good.append(_ready(episode, how))
        except SpearError as error:
            reasons.append(str(error))
    return good, reasons


def _ready(episode: Episode, how: Conversion) -> Episode:
    if unknown := set(how.sizes) - {"", *episode.images}:
        known = ", ".join(sorted(episode.images))
        raise SpearError(f"no camera {min(unknown)!r}: {episode.source}: its cameras are {known}")
    episode = add_actions(resample_episode(episode, how.rate))
    if not np.any(episode.action_mask):
        raise SpearError(f"nothing to learn from: {episode.source}: none of its actions is known")
    images = {camera: fitted for camera in episode.images if (fitted := _fit(episode, camera, how))}
    if not images:
        raise SpearError(f"nothing to see: {episode.source}: its images are blank, or one picture")
    return dataclasses.replace(episode, images=images)


def _fit(episode: Episode, camera: str, how: Conversion) -> Sequence[bytes]:
    """A camera's images as JPEG in the size wanted, without bars: training adds its model's own, as acting
    does, and jitters none. One that is so already stays as it is, and so do all where no size is wanted.
    Of a blank camera (datasets have that where it was absent) or a frozen one none. Raises SpearError for a
    broken image."""
    size, fitted, levels = how.sizes.get(camera, how.sizes.get("")), list[bytes](), set[int]()
    for step, encoded in enumerate(episode.images[camera]):
        image = decode_image(encoded, f"{episode.source} step {step} camera {camera!r}")
        if len(levels) < 2:
            levels |= {int(image.min()), int(image.max())}
        small = image if size is None else fit_image(image, size[1], size[0], bars=False)
        if small.shape != image.shape or (size is not None and encoded[:2] != b"\xff\xd8"):
            encoded = encode_jpeg(small, how.quality)
        fitted.append(encoded)
    return (
        fitted
        if len(levels) > 1 and not is_frozen(episode.images[camera], episode.position)
        else ()
    )


def open_store(
    path: str | Path, work_dir: str | Path, split: str = "train"
) -> tuple[EpisodeStore, list[str]]:
    """The episodes of a split of a folder in any format, as training reads them, and why some were skipped.

    A store (recorded or prepared) is opened as it is. Anything else is prepared first, once, into a folder of
    `work_dir` whose name depends on path and split; of several processes by the first, and the others wait.
    """
    if isinstance(formats.open_dataset(path), EpisodeStore):
        return formats.open_store_split(path, split), []
    whole = Path(path).resolve()
    target = (
        Path(work_dir)
        / f"{whole.name}-{hashlib.sha256(f'{whole} {split}'.encode()).hexdigest()[:8]}"
    )
    reasons = prepare(path, target, split)[1] if is_first_process() else []
    while not target.is_dir():
        time.sleep(0.5)
    return EpisodeStore(target), reasons
