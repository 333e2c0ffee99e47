"""Kinds of arguments that several commands take, and what they stand for."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from spear.errors import SpearError

if TYPE_CHECKING:
    from spear.data.store.episode_store import EpisodeStore

Folder = Annotated[Path | None, arg(metavar="FOLDER")]
File = Annotated[Path | None, arg(metavar="FILE")]
Name = Annotated[str | None, arg(metavar="NAME")]
Number = Annotated[int | None, arg(metavar="INT")]


def open_episodes(path: Path, out: Path, split: str = "train") -> EpisodeStore:
    """The episodes of a folder; what is not our own store is prepared first, into OUT, by the first
    process."""
    from spear.data.store.prepare import open_store

    store, reasons = open_store(path, out, split, wait=int(os.environ.get("RANK", "0")) > 0)
    for reason in reasons[:5]:
        print(f"skipped: {reason}", file=sys.stderr)
    if reasons:
        print(f"{path}: {len(store)} episodes, {len(reasons)} skipped", file=sys.stderr)
    return store


def at_least(least: int, **given: float) -> None:
    """Raises `SpearError` for an option, named as its parameter is, of less than `least`."""
    for name, value in given.items():
        if not value >= least:
            raise SpearError(f"--{name.replace('_', '-')} {value:g}: give at least {least}")
