"""From a robot dataset in any format to one that training reads at the speed of the decoder.

What is written is a LeRobot v3.0 dataset (`spear.data.store.lerobot_write`): canonical actions, 5 Hz, JPEGs
in the size that the model sees. Beside it lie `index.arrow`, by which `EpisodeStore` finds every image
without decoding Parquet, `sketches.npz` (see `spear.data.normalize`), and `set_aside.json`: which episodes
were left out, and why.

The work is done in blocks of episodes, made ready by any number of processes, and written in order: the bytes
do not depend on how many there are. Blocks are gathered in parts, one file of `data` each. A part counts when
its index is complete, in the folder `.OUT.part`; a run that was killed, by whatever, continues behind the
last one, and what was begun is written again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from spear.data.actions import RATE_HZ
from spear.data.aside import SetAside
from spear.data.episode import EpisodeStore
from spear.data.images import FitImage
from spear.data.readers.formats import need_format, open_split
from spear.data.readers.spec import SPEC_FILE, Layout
from spear.data.store.index import INDEX, read_batches
from spear.data.store.lerobot_write import check_free
from spear.data.store.parts import SET_ASIDE, Parts, working
from spear.data.store.ready import Wanted, blocks, length, ready_blocks
from spear.errors import SpearError
from spear.util.progress import ProgressBar

QUALITY = 95
"""Of the JPEGs that are written; colour is kept at full resolution (our choice)."""
PART_MB = 100
"""Images in a part: the size that LeRobot gives its files."""
MARK = "request"
"""The note in the index that tells for which request a dataset was prepared."""


def prepare(
    path: str | Path,
    out_dir: str | Path,
    split: str = "train",
    dataset: Layout = None,
    most_bad: float = 0.5,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    fit_image: FitImage | None = None,
    rate_hz: float = RATE_HZ,
    quality: int = QUALITY,
    workers: int = 0,
    part_mb: float = PART_MB,
    quiet: bool = False,
) -> tuple[int, list[str]]:
    """Make a dataset ready for training (see above); returns how many episodes it has, and why not the rest.

    path       in any format that `spear.data.readers.formats` knows; split says which of its episodes.
    most_bad   the share of bad episodes at which it is given up.
    sizes      camera -> (width, height) of its images, "" for all others; `fit_image` brings them there. None
               keeps them as they are.
    quality    JPEG quality of images that are changed.
    workers    processes that read and resize (0: this one). The result is the same, byte for byte.
    part_mb    images, in MB, after which a part ends.
    quiet      show no progress.

    A broken record, an episode that `check_episode` refuses (much of BridgeData has no instruction), and one
    that differs from the first in its cameras or image sizes is set aside. Raises SpearError when more than
    the share `most_bad` is bad, or nothing good is left; when `out_dir` holds something else (also other
    episodes); and when it cannot be written (a full disk): then, as after any interruption, the same call
    continues. `out_dir` appears when everything is in it; the same call then finds it there, and does
    nothing.
    """
    out = Path(out_dir)
    if sizes and fit_image is None:
        raise SpearError("image sizes without a way to get there: give fit_image as well")
    wanted = Wanted(Path(path), dataset, rate_hz, dict(sizes or {}), fit_image, quality)
    todo = blocks(wanted.path, split)
    aside = SetAside(most_bad)
    request = {
        "path": str(wanted.path.resolve()),
        "episodes": hashlib.sha256("\n".join(todo).encode()).hexdigest(),
        "layout": _layout_text(wanted),
        "sizes": {name: list(size) for name, size in sorted(wanted.sizes.items())},
        "rate_hz": rate_hz,
        "quality": quality,
        "part_mb": part_mb,
    }
    mark = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    done = (out / INDEX).is_file() and (out / SET_ASIDE).is_file()
    if done and read_batches(out / INDEX)[1].get(MARK) == mark:
        return len(EpisodeStore(out)), json.loads((out / SET_ASIDE).read_text())
    if done:
        raise SpearError(
            f"{out} was prepared from other episodes, or in another way: {path} or its layout may have changed since: "
            "remove that folder, or choose another --out"
        )
    check_free(out)
    try:
        with working(out.with_name(f".{out.name}.part"), request) as work:
            parts = Parts(work, rate_hz, part_mb, aside)
            try:
                parts.resume()
                before, total = (sum(map(length, some)) for some in (todo[: parts.blocks], todo))
                bar = ProgressBar(f"preparing {wanted.path.name}", total, "episodes", before, quiet)
                left = todo[parts.blocks :]
                with bar, contextlib.closing(ready_blocks(wanted, left, workers)) as results:
                    for block, (ready, reasons) in zip(left, results, strict=True):
                        parts.add(ready, reasons)
                        bar.update(bar.done + length(block), f"{len(aside.reasons)} set aside")
                aside.check_all(parts.episodes, path, split)
                parts.finish({MARK: mark})
            except BaseException:
                parts.abandon()
                raise
            (work / "dataset").replace(out)
            shutil.rmtree(work, ignore_errors=True)
            return parts.episodes, aside.reasons
    except OSError as error:
        raise SpearError(
            f"cannot write: {out}: {error}; free some space and give the same command again (it continues), or "
            "choose another folder"
        ) from error


def _layout_text(wanted: Wanted) -> str:
    """What the columns are said to mean, to notice when that has changed."""
    given = wanted.dataset
    file = given if isinstance(given, Path) else wanted.path / SPEC_FILE
    return repr(given) + (file.read_text() if file.is_file() else "")


def open_store(
    path: str | Path, work_dir: str | Path, split: str = "train", wait: bool = False
) -> tuple[EpisodeStore, list[str]]:
    """The episodes of a split of a folder in any format, as training reads them, and why some were set aside.

    A store (recorded or prepared) is opened as it is. Anything else is prepared first, once, into a folder of
    `work_dir` whose name depends on path and split. With `wait`, another process does that, and this one
    waits until it has.
    """
    if need_format(path) == "store":
        return open_split(path, split), []
    whole = Path(path).resolve()
    key = hashlib.sha256(f"{whole} {split}".encode()).hexdigest()[:8]
    target = Path(work_dir) / f"{whole.name}-{key}"
    while wait and not target.is_dir():
        time.sleep(0.5)
    reasons: list[str] = []
    if not wait:
        target.parent.mkdir(parents=True, exist_ok=True)
        _, reasons = prepare(path, target, split)
    return EpisodeStore(target), reasons
