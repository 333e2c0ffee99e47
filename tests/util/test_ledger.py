"""Locks, settings and shares of bad items."""

import multiprocessing
from pathlib import Path

import pytest

from refusals import refuses
from spear.errors import SpearError
from spear.util.ledger import Skipped, alone, lock


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
    with pytest.raises(SpearError, match=tmp_path.name), alone(tmp_path, "labelling into"):
        pass
    other.kill()
    with lock(tmp_path / ".lock", wait=True) as ours:
        assert ours
    other.join()


def test_a_new_folder_in_which_nothing_was_done_is_removed(tmp_path: Path) -> None:
    cases = (("new/one", (), ()), ("old", ("x",), ("x", "run.json")), ("done", (), ("run.json", "y")))
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


def test_too_many_bad_items_end_the_work_once_enough_are_seen() -> None:
    skipped = Skipped(limit=0.5, patience=4)
    skipped("broken: 1")
    skipped.check(good=0)
    refuses("1 of 1", skipped.check, good=0, finished=True)
    skipped("broken: 2")
    skipped.check(good=2)
    skipped("broken: 3")
    refuses("3 of 5", skipped.check, good=2)
