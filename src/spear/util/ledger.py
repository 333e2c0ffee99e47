"""Resumable work: who may write to a folder, with which settings, and how much of it may go wrong.

What is finished is a matter of the work itself: a file counts from the moment when it has its name (`files`).
"""

import contextlib
import fcntl
import fnmatch
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from spear.errors import SpearError
from spear.util.files import read_json, write_text, writing

_UNREADABLE = re.compile(r"[0-9a-f]{32}|\\n")
"""What hashes and texts of several lines have in them as JSON: to be shown both tells nobody anything."""
END, MOST_READ = 65536, 1000
"""Bytes at the end of a file that `hash_ends` reads, where Parquet, Arrow and growing files change; of about
how many files at most."""

_held: set[IO[str]] = set()
os.register_at_fork(after_in_child=lambda: [file.close() for file in _held])


@contextlib.contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[bool]:
    """Holds the lock file `path`; gives whether this process has it (always, after waiting, with `wait`).

    The lock ends with the process, however that ends: processes that it forks do not keep it.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise SpearError(
                f"{path}: cannot be locked ({error.strerror}): use another disk"
            ) from error
        _held.add(file)
        try:
            yield True
        finally:
            _held.discard(file)


@contextlib.contextmanager
def alone(folder: Path, doing: str, *marks: str, name: str = ".lock") -> Iterator[None]:
    """Makes `folder`, and lets one process at a time work in it, or in its part whose lock has this name.

    Raises `SpearError` when another one does. doing: what, for the message: "labelling into". marks: files
    that are written before there is any work; a new folder that has nothing else when work fails is removed.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    with lock(folder / name) as ours:
        if not ours:
            raise SpearError(f"{folder}: another process is {doing} this folder: wait for it")
        try:
            yield
        except BaseException:
            kept = (
                path
                for path in folder.rglob("*")
                if path.is_file() and path.name not in (name, *marks)
            )
            if new and not any(kept):
                shutil.rmtree(folder, ignore_errors=True)
                with contextlib.suppress(OSError):
                    for parent in new[1:]:
                        parent.rmdir()
            raise


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back: tuples become lists."""
    return json.loads(json.dumps(settings))


def difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """In what two settings differ, in words: "size is 840 there, 560 here"; of hashes and long texts that
    they do: "data is not what it was". Empty when they are the same."""
    theirs, ours = plain(theirs), plain(ours)
    pairs = {key: (theirs.get(key), ours.get(key)) for key in sorted({*theirs, *ours})}
    apart = {
        key: f"{json.dumps(a)} there, {json.dumps(b)} here"
        for key, (a, b) in pairs.items()
        if a != b
    }
    readable = {
        k: "not what it was" if _UNREADABLE.search(words) else words for k, words in apart.items()
    }
    return "; ".join(f"{key} is {words}" for key, words in readable.items())


def same_settings(path: Path, settings: Mapping[str, Any], begun: bool) -> None:
    """Keeps the settings of new work in the file `path`; refuses to continue work of other settings.

    begun: whether there is work to continue; if not, an earlier file of settings is replaced. Raises
    `SpearError`, naming what differs, and where nobody knows, as the file is missing.
    """
    if not begun:
        write_text(path, json.dumps(plain(settings), indent=2) + "\n")
        return
    if words := difference(read_json(path, "choose another folder"), settings):
        begun_with = f"{path.parent}: was begun with other settings: {words}"
        raise SpearError(f"{begun_with}: use the same ones, or another folder")


@dataclass
class Skipped:
    """Items that are left out because they are bad, each with its reason; too many of them end the work.

    limit     the largest share of bad items that is put up with.
    unit      what is counted, as a plural.
    patience  how many items to see before the share means anything; the end of the work is always judged.
    """

    limit: float
    unit: str = "episodes"
    patience: int = 20
    reasons: list[str] = field(default_factory=list)

    def __call__(self, reason: SpearError | str) -> None:
        """Leaves one item out."""
        self.reasons.append(str(reason))

    def check(self, good: int, finished: bool = False) -> None:
        """Raises `SpearError` when, with so many good items beside them, too many were bad."""
        bad, seen = len(self.reasons), good + len(self.reasons)
        if bad > self.limit * seen and (finished or seen >= self.patience):
            what = f"too many bad {self.unit}: {bad} of {seen} (more than {self.limit:.0%})"
            raise SpearError(
                f"{what}; the last one: {self.reasons[-1]}: mend the input, or leave them out"
            )


def below(folder: Path, kind: str) -> list[Path]:
    """All files of a kind ("*.parquet") in a folder and below, and where links lead, but nowhere twice."""
    found, entered = list[Path](), set[str]()
    for here, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        if (real := os.path.realpath(here)) in entered:
            folders.clear()
        else:
            entered.add(real)
            found += (Path(here, name) for name in fnmatch.filter(names, kind))
    return sorted(found)


def hash_ends(folders: Iterable[Path], kinds: Sequence[str], before: bytes = b"") -> str:
    """A hash of `before`, and of names, sizes and ends of all files of these kinds ("*.parquet") in folders
    and below: large files are not read whole, and of very many in a folder only small ones and some more."""
    digest = hashlib.sha256(before)
    for folder in folders:
        paths = sorted(p for kind in kinds for p in below(folder, kind))
        for number, path in enumerate(paths):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder)} {size}".encode())
            if size <= END or number % (1 + len(paths) // MOST_READ) == 0:
                with path.open("rb") as file:
                    file.seek(max(0, size - END))
                    digest.update(file.read())
    return digest.hexdigest()


def hash_files(files: Iterable[tuple[str, Path]]) -> str:
    """A short hash of named files, read whole, by which results of others never mix with theirs."""
    digest = hashlib.sha256()
    for name, path in files:
        with path.open("rb") as file:
            digest.update(name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def fingerprint(folder: Path) -> str:
    """`hash_files` of a checkpoint's configuration and weights."""
    files = {*folder.glob("*.json"), *folder.glob("*.safetensors")} - {folder / "calibration.json"}
    return hash_files((path.name, path) for path in sorted(files))  # without what changes no action
