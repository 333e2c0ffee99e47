"""A folder of labels: begun, continued after any interruption, finished.

    LABELS/labels-00000.parquet, …   labelled images (see `spear.labels.store`)
    LABELS/rejected.parquet          what was set aside: source, reason, and whether the reason may pass
    LABELS/run.json                  the settings, which every continuation must share
    LABELS/README.md                 dataset card with statistics

Shard n is made from items n · shard_size … of the input, no matter how often the run was stopped, so a shard
that is there is finished and one that is not is made again. Its footer names what was set aside from it, and
a hash of the keys of its items, by which an input that has changed meanwhile is found out. Images that were
set aside for a reason that may pass can be tried again; the shard is then what it would have been had they
gone well at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

import spear
from spear.errors import SpearError
from spear.labels.card import write_card
from spear.labels.engine import Done, Engine, Rejected
from spear.labels.inputs import Item
from spear.labels.parquet import ParquetWriter, sweep
from spear.labels.pipeline import Failures
from spear.labels.retry import merged, set_aside, to_retry
from spear.labels.store import REJECTED, SCHEMA, footer
from spear.util.files import check_own, write_text, writing

FOOTER = "spear.labels"
"""Key in a shard's footer of a JSON object with "items", "keys", "rejected" ([source, reason] each) and
"temporary" (which of those, by number, were set aside for a reason that may pass)."""
SETTINGS = "run.json"
_REJECTED = pa.schema({"source": pa.string(), "reason": pa.string(), "temporary": pa.bool_()})
T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """How far a run is, in images: `done` of `total`, of which `rejected` were set aside, `temporary` of
    these for a reason that may pass; `before` were done when this command began."""

    total: int
    before: int
    done: int
    rejected: int
    temporary: int = 0


class _Shard(NamedTuple):
    """A shard that is to be made: its number, how many items it stands for and a hash of their keys; the keys
    themselves when it is there and some of its items are tried again, else none."""

    number: int
    items: int
    keys: str
    again: tuple[str, ...] = ()

    def path(self, folder: Path) -> Path:
        return folder / f"labels-{self.number:05d}.parquet"


def label_folder(
    items: Callable[[], Iterable[Item]],
    out: Path,
    engine: Engine,
    settings: Mapping[str, Any],
    shard_size: int = 1024,
    batch_size: int = 8,
    most_bad: float = 0.5,
    retry_rejected: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Label items into a folder, or finish what was begun there.

    Args:
        items: lists the input; called twice, and must list the same both times.
        out: folder, new or of a run with the same settings.
        engine: labels batches.
        settings: all that decides what the labels are, JSON-able; kept in run.json.
        shard_size: items per shard. Memory does not depend on it.
        batch_size: items that go through the networks together.
        most_bad: the run stops when a larger fraction of the images fail (images without objects do not
            count).
        retry_rejected: try again the images that were set aside for a reason that may pass; `most_bad` is
            then of all images of the folder.
        on_progress: called at the start and after each batch.

    Raises:
        SpearError: the folder is of another run, is being written to, or its input has changed; no input; too
            many failures; the disk is full. What is finished stays, and the same call finishes the rest.
    """
    total = sum(1 for _ in items())
    if not total:
        raise SpearError("no image to label: give photos, folders, videos or episodes")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        _same_run(out, {"spear": spear.__version__, **settings, "shard_size": shard_size})
        sweep(out)
        finished = _finished(out)
        for number, known in finished.items():
            if number * shard_size >= total:
                raise _changed(out, number, known)
        aside = {number: set_aside(known) for number, known in finished.items()}
        temporary = sum(r.temporary for some in aside.values() for r in some)
        again = temporary if retry_rejected else 0
        before = sum(known["items"] for known in finished.values()) - again
        rejected = sum(map(len, aside.values())) - again
        progress = Progress(total, before, before, rejected, temporary - again)
        on_progress(progress)
        failures = Failures(limit=most_bad, seen=before if retry_rejected else 0)

        def counted(results: Iterable[tuple[_Shard, Done]]) -> Iterator[Done]:
            nonlocal progress
            for _, done in results:
                progress = _count(progress, done, failures)
                on_progress(progress)
                yield done

        labelled = _labelled(out, items(), engine, finished, shard_size, batch_size, retry_rejected)
        with closing(labelled) as results:
            for shard, group in groupby(results, key=lambda result: result[0]):
                path = shard.path(out)
                with ParquetWriter(path, SCHEMA) as writer:
                    batches = counted(group)
                    if shard.again:
                        batches = merged(path, shard.again, aside[shard.number], batches)
                    refused: list[Rejected] = []
                    for done in batches:
                        writer.write(done.labels)
                        refused += done.rejected
                    writer.commit({FOOTER: json.dumps(_footer(shard, refused))})
        _write_rejected(out)
        write_card(out)
    return progress


def _labelled(
    out: Path,
    items: Iterable[Item],
    engine: Engine,
    finished: Mapping[int, Mapping[str, Any]],
    shard_size: int,
    batch_size: int,
    retry_rejected: bool,
) -> Generator[tuple[_Shard, Done], None, None]:
    """The batches of the shards that are not finished, and of what is tried again, in order, each with its
    shard."""
    handed: deque[_Shard] = deque()

    def batches() -> Iterator[Sequence[Item]]:
        for number, members in enumerate(chunks(items, shard_size)):
            keys = tuple(item.key for item in members)
            shard = _Shard(number, len(members), hashlib.sha256("\0".join(keys).encode()).hexdigest())
            if (known := finished.get(number)) is not None:
                if known["keys"] != shard.keys:
                    raise _changed(out, number, known)
                members = [members[i] for i in to_retry(keys, set_aside(known))] if retry_rejected else []
                shard = shard._replace(again=keys)
            for batch in chunks(members, batch_size):
                handed.append(shard)
                yield batch

    for done in engine(batches()):
        yield handed.popleft(), done


def _count(progress: Progress, done: Done, failures: Failures) -> Progress:
    """The progress with one more batch; raises when too much has failed."""
    images, rejected = len(done.labels) + len(done.rejected), len(done.rejected)
    failures.seen += images
    for r in done.rejected:
        if not r.empty:
            failures.add(r.source, r.reason)
    progress = replace(
        progress,
        done=progress.done + images,
        rejected=progress.rejected + rejected,
        temporary=progress.temporary + sum(r.temporary for r in done.rejected),
    )
    failures.check(finished=progress.done == progress.total)
    return progress


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items; the last may be shorter."""
    source = iter(items)
    while chunk := list(islice(source, size)):
        yield chunk


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Only one process writes to a folder at a time; the lock ends with the process, however it ends."""
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SpearError(f"{out}: another process is labelling into this folder: wait for it") from error
        yield
    finally:
        os.close(handle)


def _same_run(out: Path, settings: dict[str, Any]) -> None:
    """Keep the settings of a new run; refuse the folder of one with other settings, naming what differs.

    A run that has labelled nothing yet, because it was refused, is none.
    """
    path = out / SETTINGS
    settings = json.loads(json.dumps(settings))
    if not path.is_file() or not any(out.glob("labels-*.parquet")):
        check_own(out, SETTINGS, "label")
        write_text(path, json.dumps(settings, indent=2) + "\n")
        return
    try:
        there = json.loads(path.read_text())
        keys = sorted({*there, *settings})
    except (OSError, ValueError, TypeError) as error:
        raise SpearError(f"{path}: cannot be read ({error}): label into another folder") from error
    for key in keys:
        if there.get(key) != settings.get(key):
            raise SpearError(
                f"{out}: holds a run with other settings: {key} is {json.dumps(there.get(key))} there, "
                f"{json.dumps(settings.get(key))} here: label into another folder, or use its settings"
            )


def _finished(out: Path) -> dict[int, dict[str, Any]]:
    """Number → footer of the shards that are there."""
    found = {}
    for path in sorted(out.glob("labels-*.parquet")):
        text = footer(path, FOOTER)
        if text is None:
            raise SpearError(f"{path}: not of this run: move it elsewhere")
        found[int(path.stem.removeprefix("labels-"))] = json.loads(text)
    return found


def _footer(shard: _Shard, refused: Sequence[Rejected]) -> dict[str, Any]:
    return {
        "items": shard.items,
        "keys": shard.keys,
        "rejected": [(r.source, r.reason) for r in refused],
        "temporary": [number for number, r in enumerate(refused) if r.temporary],
    }


def _changed(out: Path, number: int, known: Mapping[str, Any]) -> SpearError:
    return SpearError(
        f"{out}: the input has changed since labels-{number:05d}.parquet was made from {known['items']} of its "
        "images: label the present input into another folder"
    )


def _write_rejected(out: Path) -> None:
    with ParquetWriter(out / REJECTED, _REJECTED, rows_per_group=4096) as writer:
        for known in _finished(out).values():
            rows = [
                {"source": r.source, "reason": r.reason, "temporary": r.temporary} for r in set_aside(known)
            ]
            writer.write(pa.Table.from_pylist(rows, _REJECTED))
        writer.commit()
