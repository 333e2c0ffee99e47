"""Locks that let one process at a time write to a folder."""

import errno
import multiprocessing
import os
import time
from contextlib import ExitStack
from multiprocessing.synchronize import Event
from pathlib import Path
from unittest.mock import Mock

import filelock
import pytest

from refusals import refuses
from spear.util import run_lock
from spear.util.run_lock import acquire_run_lock, try_to_hold_lock

SPAWN = multiprocessing.get_context("spawn")


def _hold_lock_until(path: Path, is_held: Event, end: Event) -> None:
    """Hold a lock until the event `end` is set."""
    with try_to_hold_lock(path):
        is_held.set()
        end.wait()


def _hold_lock_and_fork(path: Path, is_forked: Event, end_file: Path) -> None:
    """Hold a lock, and fork a process that lives until `end_file` exists."""
    with try_to_hold_lock(path):
        is_child = os.fork() == 0
        if is_child:
            is_forked.set()
        while not end_file.exists():
            time.sleep(0.02)


def _wait_for_lock(path: Path, is_held: Event) -> None:
    """Wait for a lock, and set `is_held` when this process holds it."""
    with try_to_hold_lock(path, wait=True) as is_acquired:
        assert is_acquired
        is_held.set()


def test_only_one_process_holds_a_lock_until_it_is_killed(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    is_held, end = SPAWN.Event(), SPAWN.Event()
    other_process = SPAWN.Process(target=_hold_lock_until, args=(path, is_held, end))
    other_process.start()
    assert is_held.wait(60)

    with try_to_hold_lock(path) as is_acquired:
        assert not is_acquired
    refuses(tmp_path.name, acquire_run_lock(tmp_path, "labeling into").__enter__)

    other_process.kill()
    with try_to_hold_lock(path, wait=True) as is_acquired:
        assert is_acquired
    other_process.join()


def test_a_forked_process_does_not_keep_the_lock_of_its_parent(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    is_forked = SPAWN.Event()
    end_file = tmp_path / "end"
    parent = SPAWN.Process(target=_hold_lock_and_fork, args=(path, is_forked, end_file))
    parent.start()
    assert is_forked.wait(60)

    parent.kill()
    parent.join()

    with try_to_hold_lock(path) as is_acquired:
        assert is_acquired
    end_file.touch()  # ends the forked process


def test_a_waiting_process_gets_the_lock_when_it_is_released(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    is_held = SPAWN.Event()
    with try_to_hold_lock(path):
        waiting_process = SPAWN.Process(target=_wait_for_lock, args=(path, is_held))
        waiting_process.start()
        time.sleep(0.1)
        assert not is_held.is_set()

    assert is_held.wait(60)
    waiting_process.join()


def test_the_lock_file_stays_when_the_lock_is_released(tmp_path: Path) -> None:
    with try_to_hold_lock(tmp_path / ".lock"):
        pass

    assert (tmp_path / ".lock").is_file()


def test_a_folder_that_another_process_created_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes see that the folder is missing; the other one then gets the lock first."""
    with ExitStack() as other_process:

        def hold_lock_too_late(path: Path) -> object:
            other_process.enter_context(try_to_hold_lock(path))
            return try_to_hold_lock(path)

        monkeypatch.setattr(run_lock, "try_to_hold_lock", hold_lock_too_late)

        refuses("another process", acquire_run_lock(tmp_path / "new", "labeling into").__enter__)

        assert (tmp_path / "new" / ".lock").is_file()


def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_locks = OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(filelock.FileLock, "_acquire", Mock(side_effect=no_locks))

    refuses("No locks", try_to_hold_lock(tmp_path / ".lock", wait=True).__enter__)


def test_a_lock_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    refuses("is a file, not a folder", try_to_hold_lock(tmp_path / "file" / ".lock").__enter__)


@pytest.mark.parametrize(
    "folder, existing_files, written_files, files_after_failure",
    [
        ("new/one", [], ["run.json"], []),  # new, and without results: removed
        ("old", ["x"], ["run.json"], ["run.json", "x"]),  # not new
        ("done", [], ["run.json", "y"], ["run.json", "y"]),  # new, with a result
    ],
)
def test_a_new_folder_without_results_is_removed_when_the_work_fails(
    tmp_path: Path,
    folder: str,
    existing_files: list[str],
    written_files: list[str],
    files_after_failure: list[str],
) -> None:
    path = tmp_path / folder
    if existing_files:
        path.mkdir()
    for name in existing_files:
        (path / name).touch()

    with pytest.raises(KeyError), acquire_run_lock(path, "labeling into", "run.json"):
        for name in written_files:
            (path / name).touch()
        raise KeyError

    visible_names = sorted(file.name for file in path.glob("[!.]*"))
    assert visible_names == files_after_failure
    # The parent "new" was created for the folder, so it is removed together with it.
    is_parent_expected = bool(files_after_failure) or path.parent == tmp_path
    assert path.parent.exists() == is_parent_expected
