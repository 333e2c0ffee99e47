"""Locks, settings and shares of bad items."""

import errno
import multiprocessing
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import Mock

import pytest

from refusals import refuses
from spear.util import ledger
from spear.util.ledger import Skipped, alone, hash_ends, lock, same_settings


def _hold(path: Path, ready: object, end: object) -> None:
    with lock(path):
        ready.set()  # type: ignore[attr-defined]
        end.wait()  # type: ignore[attr-defined]


def test_a_lock_is_one_process_s_and_ends_with_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, end = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / ".lock", ready, end))
    other.start()
    assert ready.wait(60)
    with lock(tmp_path / ".lock") as ours:
        assert not ours
    refuses(tmp_path.name, alone(tmp_path, "labelling into").__enter__)
    other.kill()
    with lock(tmp_path / ".lock", wait=True) as ours:
        assert ours
    other.join()


def test_a_folder_that_another_process_made_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as other:

        def later(path: Path) -> object:
            other.enter_context(lock(path))
            return lock(path)

        monkeypatch.setattr(ledger, "lock", later)
        refuses("another process", alone(tmp_path / "new", "labelling into").__enter__)
        assert (tmp_path / "new" / ".lock").is_file()
    monkeypatch.setattr(
        ledger.fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))
    )
    refuses("No locks", lock(tmp_path / ".lock", wait=True).__enter__)


def test_a_new_folder_in_which_nothing_was_done_is_removed(tmp_path: Path) -> None:
    cases = (
        ("new/one", (), ()),
        ("old", ("x",), ("x", "run.json")),
        ("done", (), ("run.json", "y")),
    )
    for name, old, left in cases:
        folder = tmp_path / name
        for file in old:
            folder.mkdir()
            (folder / file).touch()
        with pytest.raises(KeyError), alone(folder, "labelling into", "run.json"):
            for file in ("run.json", *left):
                (folder / file).touch()
            raise KeyError
        assert {path.name for path in folder.glob("[!.]*")} == set(left)
    assert {path.name for path in tmp_path.iterdir()} == {"old", "done"}


def test_settings_differ_in_words_and_are_not_made_up(tmp_path: Path) -> None:
    path, settings = tmp_path / "run.json", {"size": [4, 3], "data": 32 * "0", "layout": "{\n}"}
    refuses(r"run\.json", same_settings, path, settings, begun=True)  # it is lost: nobody knows
    same_settings(path, settings, begun=False)
    same_settings(path, {**settings, "size": (4, 3)}, begun=True)
    what = r"data is not what it was; layout is not what it was; size is \[4, 3\] there, \[4\] here"
    refuses(
        what, same_settings, path, {"size": [4], "data": 32 * "1", "layout": "None"}, begun=True
    )


def test_files_where_a_link_leads_are_hashed(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "here/external").symlink_to(tmp_path / "far")
    (tmp_path / "far/back").symlink_to(tmp_path / "here")
    found = set()
    for text in ("one", "two"):
        (tmp_path / "far/labels-0.parquet").write_text(text)
        found.add(hash_ends([tmp_path / "here"], ["*.parquet"]))
    assert len(found) == 2


def test_too_many_bad_items_end_the_work_once_enough_are_seen() -> None:
    skipped = Skipped(limit=0.5, patience=4)
    skipped("broken: 1")
    skipped.check(good=0)
    refuses("1 of 1", skipped.check, good=0, finished=True)
    skipped("broken: 2")
    skipped.check(good=2)
    skipped("broken: 3")
    refuses("3 of 5", skipped.check, good=2)
