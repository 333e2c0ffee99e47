"""Hashes of files, by which runs recognize data and checkpoints that have changed."""

import fnmatch
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

HASHED_TAIL_BYTES = 65536
"""Bytes at the end of a file that are hashed. Parquet, Arrow and growing files change there."""
MAX_LARGE_FILES_READ = 1000
"""About how many files of a folder are read, among those that are larger than the hashed end."""


def list_files_recursively(folder: Path, pattern: str) -> list[Path]:
    """Return all files below a folder whose names match a pattern ("*.parquet"), sorted.

    Symbolic links to folders are followed, but no folder is entered twice.
    """
    files: list[Path] = []
    entered_folders: set[str] = set()
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        subfolders.sort()  # `os.walk` enters what this list contains, in its order
        real_parent = os.path.realpath(parent)
        if real_parent in entered_folders:
            subfolders.clear()  # so nothing below is entered
            continue
        entered_folders.add(real_parent)
        files += [Path(parent, name) for name in fnmatch.filter(names, pattern)]
    return sorted(files)


def hash_names_sizes_and_tails(
    folders: Iterable[Path], patterns: Sequence[str], prefix: bytes = b""
) -> str:
    """Hash `prefix` and the names, sizes and ends of all matching files in the folders.

    A large file is read only at its end. If a folder has more than `MAX_LARGE_FILES_READ` matching
    files, only some of its large files are read; the name and size of every file are hashed.

    Args:
        folders: the folders, which are searched together with the folders in them.
        patterns: patterns of file names, such as "*.parquet".
        prefix: bytes that are hashed before the files.
    """
    digest = hashlib.sha256(prefix)
    for folder in folders:
        paths: list[Path] = []
        for pattern in patterns:
            paths += list_files_recursively(folder, pattern)
        paths.sort()
        # Every small file is read, and a large file if its number is a multiple of this.
        stride = 1 + len(paths) // MAX_LARGE_FILES_READ
        for number, path in enumerate(paths):
            num_bytes = path.stat().st_size
            digest.update(f"{path.relative_to(folder)} {num_bytes}".encode())
            is_small = num_bytes <= HASHED_TAIL_BYTES
            if is_small or number % stride == 0:
                with path.open("rb") as file:
                    file.seek(max(0, num_bytes - HASHED_TAIL_BYTES))
                    digest.update(file.read())
    return digest.hexdigest()


def hash_files(files: Iterable[tuple[str, Path]]) -> str:
    """Hash the names and the complete contents of files, to 16 hexadecimal digits.

    Args:
        files: pairs of a name, which is hashed, and the path of the file.
    """
    digest = hashlib.sha256()
    for name, path in files:
        with path.open("rb") as file:
            content_digest = hashlib.file_digest(file, "sha256").digest()
        digest.update(name.encode() + content_digest)
    return digest.hexdigest()[:16]


def fingerprint_checkpoint(folder: Path) -> str:
    """Hash the configuration and the weights of a checkpoint, which determine its actions."""
    files = {*folder.glob("*.json"), *folder.glob("*.safetensors")}
    files.discard(folder / "calibration.json")  # does not change the actions
    return hash_files((path.name, path) for path in sorted(files))
