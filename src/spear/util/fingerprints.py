"""Hashes of files, to recognize data and checkpoints."""

import fnmatch
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

HASHED_TAIL_BYTES = 65536  # Parquet, Arrow and growing files change at their end
MAX_LARGE_FILES_READ = 1000  # about so many files per folder, if they are larger than the tail


def list_files_recursively(folder: Path, pattern: str) -> list[Path]:
    """All files whose name matches a pattern ("*.parquet") in a folder and the folders in it,
    sorted.

    Symbolic links to folders are followed, but no folder is entered twice.
    """
    files: list[Path] = []
    entered_folders: set[str] = set()
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        subfolders.sort()
        real_parent = os.path.realpath(parent)
        if real_parent in entered_folders:
            subfolders.clear()
            continue
        entered_folders.add(real_parent)
        files += [Path(parent, name) for name in fnmatch.filter(names, pattern)]
    return sorted(files)


def hash_file_ends(folders: Iterable[Path], patterns: Sequence[str], prefix: bytes = b"") -> str:
    """Hash `prefix` and the names, sizes and ends of all files in these folders that match the
    patterns.

    Large files are not read completely, and of more than `MAX_LARGE_FILES_READ` files in a folder
    only some of the large ones are read at all.
    """
    digest = hashlib.sha256(prefix)
    for folder in folders:
        paths: list[Path] = []
        for pattern in patterns:
            paths += list_files_recursively(folder, pattern)
        paths.sort()
        stride = 1 + len(paths) // MAX_LARGE_FILES_READ
        for number, path in enumerate(paths):
            num_bytes = path.stat().st_size
            digest.update(f"{path.relative_to(folder)} {num_bytes}".encode())
            if num_bytes <= HASHED_TAIL_BYTES or number % stride == 0:
                with path.open("rb") as file:
                    file.seek(max(0, num_bytes - HASHED_TAIL_BYTES))
                    digest.update(file.read())
    return digest.hexdigest()


def hash_files(files: Iterable[tuple[str, Path]]) -> str:
    """Hash files, each with the name that it is known by, completely; 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, path in files:
        with path.open("rb") as file:
            content_digest = hashlib.file_digest(file, "sha256").digest()
        digest.update(name.encode() + content_digest)
    return digest.hexdigest()[:16]


def fingerprint_checkpoint(folder: Path) -> str:
    """Hash the configuration and the weights of a checkpoint: what determines its actions."""
    files = {*folder.glob("*.json"), *folder.glob("*.safetensors")}
    files.discard(folder / "calibration.json")  # it changes no action
    return hash_files((path.name, path) for path in sorted(files))
