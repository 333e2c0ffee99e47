"""Whether a kind of file is somewhere below a folder, without walking all of a large one."""

from __future__ import annotations

import os
from pathlib import Path

MOST_FOLDERS = 300
"""Folders that are looked into before giving up (our choice)."""


def has_below(path: str | Path, name: str) -> bool:
    """Whether a file of this name is in a folder or below it, among the first folders, depth first."""
    waiting, seen = [str(path)], 0
    while waiting and seen < MOST_FOLDERS:
        seen += 1
        try:
            with os.scandir(waiting.pop()) as entries:
                below = []
                for entry in entries:
                    if entry.name == name:
                        return True
                    if not entry.name.startswith(".") and entry.is_dir():
                        below.append(entry.path)
        except OSError:
            continue
        waiting += sorted(below, reverse=True)
    return False
