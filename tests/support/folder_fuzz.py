"""Hostile folders: changes of single files of good folders, and what reading them must not do.

A change is drawn from a seed. Reading the changed folder must succeed or raise `SpearError`. It
must not raise anything else, ask a question, need more than 1 GiB of memory, or open a file outside
of the folder.

The probabilities of the kinds of changes let each kind occur often. Their exact values do not
matter.
"""

import builtins
import json
import os
import resource
import shutil
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spear.errors import SpearError, suppress_notices

MAX_MEMORY_BYTES = 2**30
MAX_HEADER_BYTES = 2**20
OUTSIDE_NAME = "outside"
MISSING_PROBABILITY = 0.04  # that a change removes the file
FOLDER_PROBABILITY = 0.02  # that a change puts a folder in place of the file
SAFETENSORS_SUFFIX = ".safetensors"
TEXT_SUFFIXES = (".json", ".jsonl")
NASTY_TEXTS = (
    "",
    "../outside/secret.json",
    "/etc/passwd",
    "{episode_index:>9999999999}",
    "{episode_index.__class__}",
    "%s%s%n",
    "\x1b[31m\x00\n",
    "x" * 100_000,
    "ü" * 300,
    "__import__('os')",
)
NASTY_VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    2**31,
    2**63,
    10**400,
    -(10**15),
    1e308,
    float("nan"),
    float("inf"),
    [],
    {},
    [[]],
    {"": {}},
    [0] * 1000,
)
NASTY_BYTES = (
    b"",
    b"\0",
    b"null",
    b"[]",
    b"{}",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"9" * 5000,
    b"\xff\xfe\xff",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
)
BYTE_CHANGES = ("cut off", "insert", "replace all", "remove", "overwrite")
"""What a change of bytes does to a file's content."""


@dataclass
class Finding:
    """What reading a changed folder did that it must not do.

    Attributes:
        kind: what the folder is.
        change: the seed and the file of the change.
        problem: the error that is no `SpearError`.
    """

    kind: str
    change: str
    problem: str


@dataclass
class FuzzReport:
    """The outcomes of many changes."""

    num_accepted: int = 0
    num_refused: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def num_changes(self) -> int:
        """How many changed folders were read."""
        return self.num_accepted + self.num_refused + len(self.findings)


class FolderFuzz:
    """Changes copies of a good folder and reads them.

    Args:
        kind: what the folder is, for findings.
        folder: the good folder.
        read: reads a folder completely.
        workspace: where the copies are made.
    """

    def __init__(
        self, kind: str, folder: Path, read: Callable[[Path], None], workspace: Path
    ) -> None:
        self.kind = kind
        self._folder = folder
        self._read = read
        self._copy = workspace / f"changed-{kind}"
        self._outside = workspace / OUTSIDE_NAME
        self._outside.mkdir(exist_ok=True)
        (self._outside / "secret.json").write_text("{}")
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        self._names = [path.relative_to(folder) for path in paths]
        # The unchanged folder must be readable. Reading it also imports modules that are loaded
        # only when needed. Imported later, their files would count as opened outside.
        read(folder)

    def run(self, num_changes: int, seed: int = 0) -> FuzzReport:
        """Make this many changes, one at a time, and read each changed folder."""
        report = FuzzReport()
        for index in range(num_changes):
            rng = np.random.default_rng([seed, index])
            self._make_copy()
            change = self._change_one_file(rng)
            self._read_copy(f"seed {seed}, {index}: {change}", report)
        return report

    def _make_copy(self) -> None:
        """Copy the folder with hard links: only the file that is changed is written anew."""
        shutil.rmtree(self._copy, ignore_errors=True)
        for name in self._names:
            target = self._copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(self._folder / name, target)

    def _change_one_file(self, rng: np.random.Generator) -> str:
        """Change a file of the copy; return its name, and what became of it if it is no file."""
        name = self._names[rng.integers(len(self._names))]
        path = self._copy / name
        data = path.read_bytes()
        path.unlink()  # the link; the original stays
        if rng.random() < MISSING_PROBABILITY:
            return f"{name} is missing"
        if rng.random() < FOLDER_PROBABILITY:
            path.mkdir()
            return f"{name} is a folder"
        path.write_bytes(change_bytes(rng, data, path.suffix))
        return str(name)

    def _read_copy(self, change: str, report: FuzzReport) -> None:
        """Read the copy, and add the outcome to the report."""
        try:
            with forbid_deeds(self._outside), suppress_notices(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._read(self._copy)
            report.num_accepted += 1
        except SpearError:
            report.num_refused += 1
        except (Exception, SystemExit) as error:
            problem = f"{type(error).__name__}: {str(error)[:300]}"
            report.findings.append(Finding(self.kind, change, problem))


def change_bytes(rng: np.random.Generator, data: bytes, suffix: str) -> bytes:
    """Change the content of a file: its values if they are known, or else its bytes."""
    is_structural = rng.random() < 0.7  # a change of values, not of bytes
    if is_structural and suffix in TEXT_SUFFIXES:
        return change_json_text(rng, data)
    if is_structural and suffix == SAFETENSORS_SUFFIX:
        return change_safetensors(rng, data)
    kind = BYTE_CHANGES[rng.integers(len(BYTE_CHANGES))]
    position = int(rng.integers(len(data) + 1))
    if kind == "cut off":
        return data[:position]
    if kind == "insert":
        num_inserted = int(rng.integers(1, 9))
        return data[:position] + rng.bytes(num_inserted) + data[position:]
    if kind == "replace all":
        return NASTY_BYTES[rng.integers(len(NASTY_BYTES))]
    if kind == "remove":
        num_removed = int(rng.integers(1, 200))
        return data[:position] + data[position + num_removed :]
    changed = bytearray(data)
    num_overwritten = int(rng.integers(1, 5))
    for _ in range(num_overwritten):
        if changed:
            changed[rng.integers(len(changed))] = rng.integers(256)
    return bytes(changed)


def change_json_text(rng: np.random.Generator, data: bytes) -> bytes:
    """Replace, remove or nest one value of a JSON file, or of one line of a JSON-lines file."""
    lines = data.splitlines()
    # A JSON file is one document, even if it has several lines. A JSON-lines file has one per line.
    is_document = len(lines) < 2 or data.lstrip().startswith((b"{\n", b"[\n"))
    index = 0 if is_document else int(rng.integers(len(lines)))
    try:
        content = json.loads(data if is_document else lines[index])
    except ValueError:
        return NASTY_BYTES[rng.integers(len(NASTY_BYTES))]
    changed = json.dumps(change_value(rng, content)).encode()
    if is_document:
        return changed
    return b"\n".join([*lines[:index], changed, *lines[index + 1 :]])


def change_safetensors(rng: np.random.Generator, data: bytes) -> bytes:
    """Change one value of the header, or the length of the header."""
    # The file begins with the length of the header, as an integer of 8 bytes.
    [header_bytes] = struct.unpack("<Q", data[:8])
    if rng.random() < 0.1:
        return struct.pack("<Q", int(rng.integers(2**62))) + data[8:]
    header = json.loads(data[8 : 8 + header_bytes])
    changed = json.dumps(change_value(rng, header)).encode()[:MAX_HEADER_BYTES]
    return struct.pack("<Q", len(changed)) + changed + data[8 + header_bytes :]


def change_value(rng: np.random.Generator, content: Any) -> Any:
    """Return JSON content with one change, somewhere in it."""
    can_descend = isinstance(content, dict | list) and len(content) > 0
    if not can_descend or rng.random() < 0.15:
        return draw_nasty_value(rng)
    if isinstance(content, list):
        index = int(rng.integers(len(content)))
        changed_entry = change_value(rng, content[index])
        return [*content[:index], changed_entry, *content[index + 1 :]]
    key = list(content)[rng.integers(len(content))]
    if rng.random() < 0.15:
        return {name: value for name, value in content.items() if name != key}
    return {**content, key: change_value(rng, content[key])}


def draw_nasty_value(rng: np.random.Generator) -> Any:
    """Draw a value that no good file has."""
    if rng.random() < 0.4:
        return NASTY_TEXTS[rng.integers(len(NASTY_TEXTS))]
    if rng.random() < 0.05:
        nested: Any = 0
        for _ in range(500):
            nested = [nested]
        return nested
    return NASTY_VALUES[rng.integers(len(NASTY_VALUES))]


class ForbiddenDeedError(Exception):
    """Raised where a reader asks a question or opens a file outside of its folder."""


_forbidden_folder: Path | None = None


def _refuse_open(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook of Python; it stays for the whole process and acts while a folder is set."""
    if _forbidden_folder is None or event not in ("open", "os.listdir", "os.scandir"):
        return
    path = arguments[0]
    if isinstance(path, str | bytes | os.PathLike):
        resolved = os.path.realpath(os.fsdecode(path))
        is_secret = resolved == "/etc/passwd" or resolved.startswith(str(_forbidden_folder))
        if is_secret:
            raise ForbiddenDeedError(f"opens {resolved}")


sys.addaudithook(_refuse_open)


@contextmanager
def forbid_deeds(outside: Path) -> Iterator[None]:
    """Raise an error in whoever asks a question, opens a file outside or takes too much memory."""
    global _forbidden_folder

    def refuse_question(*_: object) -> str:
        raise ForbiddenDeedError("asks a question")

    old_input = builtins.input
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_DATA)
    builtins.input = refuse_question
    _forbidden_folder = outside.resolve()
    resource.setrlimit(resource.RLIMIT_DATA, (measure_data_bytes() + MAX_MEMORY_BYTES, hard_limit))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft_limit, hard_limit))
        _forbidden_folder = None
        builtins.input = old_input


def measure_data_bytes() -> int:
    """Measure what `RLIMIT_DATA` limits: the memory that this process has asked for."""
    [line] = [
        line for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line
    ]
    _, kib, _ = line.split()  # "VmData:   123456 kB"
    return int(kib) * 1024
