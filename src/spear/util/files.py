"""Files that appear whole or not at all; folders that hold one thing, all of it."""

import errno
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from spear.errors import SpearError, notice, summarize_error

T = TypeVar("T")

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
"""The numbers of the errors that mean a full disk."""
DISK_FULL_MESSAGE = "the disk is full: free some space and run the same command again"


@contextmanager
def report_write_errors(path: Path) -> Iterator[None]:
    """Turns the errors of writing `path` into one line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL_ERRNOS:
            raise SpearError(f"{path}: {DISK_FULL_MESSAGE}") from error
        if file := next((parent for parent in path.parents if parent.is_file()), None):
            raise SpearError(f"{file}: is a file, not a folder: give another name") from error
        raise SpearError(
            f"{path}: cannot be written, {error.strerror or error}: check the folder"
        ) from error


def check_writable(path: Path) -> None:
    """Raises `SpearError`, before there is work, where `write_bytes` could not write; makes nothing."""
    with report_write_errors(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if path.is_file() or not path.exists():
            tempfile.TemporaryFile(
                dir=next(one for one in path.resolve().parents if one.exists())
            ).close()


def write_bytes(path: Path, data: bytes) -> None:
    """A file, whole or not at all; its folder is made. Raises `SpearError` when it cannot be written."""
    with report_write_errors(path):
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(data)  # a device or a pipe, whose place nothing takes
            return
        path = path.resolve()  # a link stays one
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp"
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode())


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """The JSON object in a file; `SpearError`, as of `read_json_as`, where there is none."""
    return read_json_as(dict[str, Any], path, advice, "no JSON object can be read")


def read_json_as(kind: type[T], path: Path, advice: str, what: str = "cannot be read") -> T:
    """What the JSON in a file says, as a pydantic type. Raises `SpearError`, which names the file, says what
    is wrong and of which key, and ends in the advice."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = getattr(error, "strerror", None) or summarize_error(error)
        raise SpearError(f"{path}: {what} ({reason}): {advice}") from error


def check_new_folder(folder: Path) -> None:
    """Raises `SpearError` for a folder that holds something, the one that one is in, and a file."""
    if folder.exists() and folder.samefile("."):
        raise SpearError(f"{folder}: is the folder that you are in: give a new one in it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SpearError(
            f"{folder} is there already, and not empty: give a new folder, or remove it"
        )


def check_no_foreign_files(folder: Path, mark: str, action: str) -> None:
    """Raises `SpearError` for a folder that holds something, but nothing whose name fits the pattern `mark`.

    action  what is about to be done, for the message: "label". Hidden files do not count.
    """
    if not folder.is_dir() or any(folder.glob(mark)):
        return
    if any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise SpearError(f"{folder}: holds other files: {action} into a folder of its own")


def notice_missing_shards(path: Path, shards: Sequence[Path], cure: str, made: int = 0) -> None:
    """Notice where a folder's `shards`, in order, are not all from number 0 to the last, or of those made."""
    last = shards[-1].stem.rpartition("-")[2]
    whole = max(made, int(last) + 1 if last.isdecimal() else 0)
    if path.is_dir() and whole > len(shards):
        notice(f"{path}: lacks {whole - len(shards)} of its shards: {cure}")
