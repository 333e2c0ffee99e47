"""Writing files completely or not at all, reading JSON, and checking output folders."""

import errno
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from spear.errors import SpearError, notice, summarize_error, to_sentence
from spear.util.json_text import MAX_JSON_BYTES, parse_json_as, read_utf8_bytes

T = TypeVar("T")

# How a Git LFS pointer begins, today and when Git LFS was called Hawser.
LFS_POINTER_STARTS = (b"version https://git-lfs", b"version https://hawser")
MAX_LFS_START_BYTES = max(len(start) for start in LFS_POINTER_STARTS)
LFS_POINTER_PROBLEM = "the file is a Git LFS pointer, which names the content but lacks it"
LFS_POINTER_ADVICE = "Run `git lfs pull` in its folder, or download it with `hf download`."
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
DISK_FULL_MESSAGE = "the disk is full. Free some space and run the same command again."


@contextmanager
def convert_write_errors(path: Path) -> Iterator[None]:
    """Convert errors of writing `path` in the `with` block into `SpearError`s with advice."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL_ERRNOS:
            raise SpearError(f"{path} cannot be written, because {DISK_FULL_MESSAGE}") from error
        for parent in path.parents:
            if parent.is_file():
                raise SpearError(f"{parent} is a file, not a folder. Give another name.") from error
        raise SpearError(
            f"{path} cannot be written ({error.strerror or error}). Check the folder."
        ) from error


def check_writable(path: Path) -> None:
    """Raise `SpearError` if `write_bytes` could not write `path`. No file remains."""
    with convert_write_errors(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if path.is_file() or not path.exists():  # otherwise it is a device or a pipe
            existing_parent = next(parent for parent in path.resolve().parents if parent.exists())
            tempfile.TemporaryFile(dir=existing_parent).close()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that it appears completely or not at all, and create its folder.

    Raises:
        SpearError: the file cannot be written.
    """
    with convert_write_errors(path):
        is_device_or_pipe = path.exists() and not path.is_file() and not path.is_dir()
        if is_device_or_pipe:
            path.write_bytes(data)  # a new file must not take the place of /dev/stdout
            return
        path = path.resolve()  # write the target of a symbolic link, so that the link stays
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp"
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8 so that its file appears completely or not at all (`write_bytes`)."""
    write_bytes(path, text.encode())


def is_lfs_pointer(source: Path | bytes) -> bool:
    """Return whether a file, given by its path or its content, is a Git LFS pointer.

    A repository that was cloned without Git LFS has a pointer, a text of some 130 bytes, in place
    of every large file. The result is False for a path that cannot be read.

    Example:
        >>> is_lfs_pointer(b"version https://git-lfs.github.com/spec/v1\\noid sha256:4d7a")
        True
    """
    if isinstance(source, bytes):
        return source.startswith(LFS_POINTER_STARTS)
    try:
        with source.open("rb") as file:
            return file.read(MAX_LFS_START_BYTES).startswith(LFS_POINTER_STARTS)
    except OSError:
        return False


def refuse_lfs_pointer(source: Path | bytes, name: str | Path) -> None:
    """Raise `SpearError` for a Git LFS pointer.

    Args:
        source: the path or the content of a file that could not be read.
        name: the file's name in the message.
    """
    if is_lfs_pointer(source):
        raise SpearError(
            f"{name} cannot be read, because {LFS_POINTER_PROBLEM}. {LFS_POINTER_ADVICE}"
        )


def advise_on_downloaded_file_error(error: BaseException) -> str:
    """Say what to do about an error of opening or reading a data file.

    Example:
        >>> advise_on_downloaded_file_error(FileNotFoundError())
        'Download the missing file, for example with `hf download`.'
    """
    if isinstance(error, FileNotFoundError):
        return "Download the missing file, for example with `hf download`."
    if isinstance(error, PermissionError):
        return "Allow yourself to read it: `chmod u+r FILE`."
    return "The file is cut off or damaged. Delete it, and download this file again."


def read_json(path: Path, advice: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read the JSON object in a file; arguments and errors are those of `read_json_as`."""
    problem = "contains no JSON object"
    return read_json_as(dict[str, Any], path, advice, problem, max_bytes)


def read_json_as(
    json_type: type[T],
    path: Path,
    advice: str,
    problem: str = "cannot be read",
    max_bytes: int = MAX_JSON_BYTES,
) -> T:
    """Read a JSON file and validate its content.

    Args:
        json_type: a type that pydantic can validate.
        path: the file.
        advice: what to do if the content is wrong, for the message.
        problem: what is wrong, for the message.
        max_bytes: size of the largest file that is read.

    Raises:
        SpearError: the file is missing or too large, or its content is not of the type. The message
            names the file, and the line and column or the key that is wrong.
    """
    try:
        return parse_json_as(json_type, read_utf8_bytes(path, max_bytes))
    except (OSError, ValueError) as error:
        refuse_lfs_pointer(path, path)
        reason = getattr(error, "strerror", None) or summarize_error(error)
        if isinstance(error, OSError):
            problem = "cannot be read"
        raise SpearError(f"{path} {problem} ({reason}). {to_sentence(advice)}") from error


def check_new_or_empty_folder(folder: Path) -> None:
    """Raise `SpearError` unless a folder is new or empty, and not the current folder."""
    if folder.exists() and folder.samefile("."):
        raise SpearError(f"{folder} is the folder that you are in. Give a new one in it.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SpearError(
            f"{folder} is there already, and not empty. Give a new folder, or remove it."
        )


def check_empty_or_own_folder(folder: Path, own_pattern: str, action: str) -> None:
    """Raise `SpearError` if a folder has files, but none with a name that this work writes.

    Hidden files do not count.

    Args:
        folder: the output folder, which may not exist yet.
        own_pattern: pattern of the names of the files that this work writes.
        action: what is about to be done, for the message: "label".
    """
    if not folder.is_dir() or any(folder.glob(own_pattern)):
        return
    if any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise SpearError(f"{folder} contains other files. Choose an empty folder to {action} into.")


def notice_missing_shards(
    folder: Path, shards: Sequence[Path], advice: str, num_written: int = 0
) -> None:
    """Print a notice if a folder lacks shards.

    Args:
        folder: the folder.
        shards: its shards in order, whose names end in their number: "episodes-00003.parquet".
        advice: what to do, for the message.
        num_written: how many shards are known to have been written.
    """
    last_number = shards[-1].stem.rpartition("-")[2]
    num_by_name = int(last_number) + 1 if last_number.isdecimal() else 0  # numbers begin at 0
    num_expected = max(num_written, num_by_name)
    if folder.is_dir() and num_expected > len(shards):
        first_missing = _name_first_missing(shards, num_expected)
        notice(
            f"{folder} lacks {num_expected - len(shards)} of its shards, the first of them "
            f"{first_missing}. {to_sentence(advice)}"
        )


def _name_first_missing(shards: Sequence[Path], num_expected: int) -> str:
    """Find the name of the first shard that is missing; the names end in their numbers."""
    names = {shard.name for shard in shards}
    prefix, _, digits = shards[-1].stem.rpartition("-")
    for number in range(num_expected):
        name = f"{prefix}-{number:0{len(digits)}}{shards[-1].suffix}"
        if name not in names:
            return name
    return "unknown"
