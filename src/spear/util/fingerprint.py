"""Whether large files are still the same, without reading them whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

END = 65536
"""Bytes that are read of each file: its end, where Parquet, Arrow and growing files change."""


class Digest(Protocol):
    """A hash of `hashlib`."""

    def update(self, data: bytes, /) -> None: ...


def add_files(digest: Digest, folder: Path, kinds: Sequence[str]) -> None:
    """Names, sizes and ends of all files of these kinds ("*.parquet") in a folder and below."""
    for path in sorted(p for kind in kinds for p in folder.rglob(kind)):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - END))
            digest.update(file.read())
