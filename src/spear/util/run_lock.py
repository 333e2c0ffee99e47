"""Locks that let one process at a time write to a folder.

The `filelock` library locks a file. The lock ends with its process, also if that process is killed,
and processes that it forked do not keep the lock. The lock file itself stays.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from spear.errors import SpearError
from spear.util.files import convert_write_errors


@contextlib.contextmanager
def try_to_hold_lock(path: Path, wait: bool = False) -> Iterator[bool]:
    """Try to hold a lock in the `with` block, and yield whether this process holds it.

    With `wait`, the call blocks until no other process holds the lock, and then always yields True.

    Raises:
        SpearError: the lock file cannot be written, or its file system has no locks.
    """
    import filelock  # takes longer to import than most commands take to parse their options

    with convert_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a", encoding="utf-8").close()  # so that an error of writing is reported here

    # A "soft" lock, which is a file that exists, would outlive a process that is killed.
    file_lock = filelock.FileLock(path, thread_local=False, fallback_to_soft=False)
    timeout_s = -1 if wait else 0  # -1 waits without limit
    try:
        file_lock.acquire(timeout=timeout_s)
    except filelock.Timeout:
        yield False
        return
    except OSError as error:
        raise SpearError(
            f"{path} cannot be locked ({error.strerror}). Use another disk."
        ) from error

    try:
        yield True
    finally:
        file_lock.release()


@contextlib.contextmanager
def acquire_run_lock(
    folder: Path, doing: str, *files_without_results: str, name: str = ".lock"
) -> Iterator[None]:
    """Create `folder` and let one process at a time work in it.

    Args:
        folder: the folder to lock.
        doing: what another process in the folder does, for the message: "labeling into".
        files_without_results: names of files that are written before any result. If the work fails
            and the folder is new and contains only these files, the folder is removed again.
        name: name of the lock file. Locks of different names let several processes work in
            different parts of one folder.

    Raises:
        SpearError: another process works in the folder.
    """
    # The folder and those of its parents that are missing, from the innermost outward.
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    with try_to_hold_lock(folder / name) as is_acquired:
        if not is_acquired:
            raise SpearError(f"another process is {doing} the folder {folder}. Wait until it ends.")
        try:
            yield
        except BaseException:
            is_new = len(new_folders) > 0
            if is_new and not _has_results(folder, {name, *files_without_results}):
                _remove_new_folders(folder, new_parents=new_folders[1:])
            raise


def _has_results(folder: Path, ignored_names: set[str]) -> bool:
    """Return whether there is a file below `folder` whose name is not in `ignored_names`."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return any(path.name not in ignored_names for path in files)


def _remove_new_folders(folder: Path, new_parents: list[Path]) -> None:
    """Remove a folder with its content, and the parents that were created for it, if empty."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # another process has written to a parent meanwhile
        for parent in new_parents:
            parent.rmdir()
