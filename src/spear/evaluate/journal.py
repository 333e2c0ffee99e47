"""Outcomes on disk as they come: an interrupted evaluation goes on where it was, shards come together.

A folder of results holds one journal per shard, `episodes-2-of-5.jsonl` (`episodes-1-of-1.jsonl` without
sharding). Its first line says who acted and how, each further line is one episode. Only whole lines count.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spear.errors import SpearError
from spear.evaluate.results import Outcome, Results, merge
from spear.util.files import writing
from spear.util.ledger import difference, plain


def parse_shard(text: str) -> tuple[int, int]:
    """ "2/5", the second of five parts of an evaluation, as (2, 5): every fifth scene from the second on.

    Raises `SpearError` for anything else than k/n with 1 <= k <= n.
    """
    index, _, of = text.partition("/")
    if not (index.isdecimal() and of.isdecimal() and 1 <= int(index) <= int(of)):
        raise SpearError(f"--shard {text}: write it as 2/5 for the second of five parts")
    return int(index), int(of)


class Journal:
    """The journal that this process writes. done: the outcomes that any journal of the folder holds."""

    def __init__(
        self, folder: Path, policy: str, settings: Mapping[str, Any], shard: tuple[int, int] = (1, 1)
    ) -> None:
        """Opens a journal, or goes on with it.

        Raises `SpearError` when the folder has results of another policy or of other settings.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.done: dict[tuple[str, int], Outcome] = {}
        for path in journals(folder):
            earlier = read_journal(path)
            heads = ({"policy": earlier.policy, **earlier.settings}, {"policy": policy, **settings})
            if other := difference(*heads):
                raise SpearError(
                    f"{folder}: holds other results: {other}: give another --out, or remove that folder to "
                    "start anew"
                )
            self.done |= {(o.family, o.seed): o for o in earlier.outcomes}
        self._path = folder / f"episodes-{shard[0]}-of-{shard[1]}.jsonl"
        if self._path.is_file():
            whole = self._path.read_bytes().rpartition(b"\n")[0]
            os.truncate(self._path, len(whole) + 1 if whole else 0)
        if not self._path.is_file() or not self._path.stat().st_size:
            self._write({"policy": policy, "settings": plain(settings)})

    def add(self, outcome: Outcome, seconds: float) -> None:
        """One more episode, on disk when this returns. seconds: wall time since the one before."""
        self._write({**asdict(outcome), "seconds": seconds})
        self.done[outcome.family, outcome.seed] = outcome

    def _write(self, line: Mapping[str, Any]) -> None:
        with writing(self._path), self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def journals(folder: Path) -> list[Path]:
    """The journals of a folder that say at least who acted."""
    return sorted(p for p in folder.glob("episodes-*-of-*.jsonl") if b"\n" in p.read_bytes())


def missing_parts(folders: Sequence[Path]) -> list[str]:
    """The parts, like "2/5", of an evaluation in shards of which none of these folders holds a journal.

    None where the parts of some number of shards are all there, or where there is no journal.
    """
    found: dict[int, set[int]] = {}
    for path in (path for folder in folders if folder.is_dir() for path in journals(folder)):
        index, _, of = path.stem.removeprefix("episodes-").partition("-of-")
        found.setdefault(int(of), set()).add(int(index))
    missing = [[f"{i}/{of}" for i in range(1, of + 1) if i not in found[of]] for of in sorted(found)]
    return min(missing, key=len, default=[])


def read_journal(path: Path) -> Results:
    """The episodes of one journal so far. Raises `SpearError` for a file that is not one."""
    lines = path.read_text().rpartition("\n")[0].split("\n")
    try:
        head, *episodes = [json.loads(line) for line in lines]
        seconds = sum(e.pop("seconds") for e in episodes)
        return Results(head["policy"], head["settings"], [Outcome(**e) for e in episodes], seconds)
    except (ValueError, KeyError, TypeError):
        raise SpearError(f"results: {path}: not a journal of `spear evaluate`: remove it") from None


def load(path: Path) -> Results:
    """The results in a folder (its journals together, or else its results.json), or in a results file.

    Raises `SpearError` when there are none, or when they do not belong together.
    """
    if not path.is_dir():
        return Results.load(path)
    found = journals(path)
    if not found:
        return Results.load(path / "results.json")
    results = merge([read_journal(p) for p in found])
    if not results.outcomes:
        raise SpearError(
            f"results: {path}: no episode has ended there yet: wait, or run `spear evaluate` again"
        )
    return results
