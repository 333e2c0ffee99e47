"""Small robot episodes and pictures for tests."""

import json
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c

from spear.data.store.episode_store import EpisodeStore, write_episodes
from spear.types import Episode
from spear.util.images import encode_image_file, encode_jpeg

LAYOUT = {"like": "bridge_dataset", "images": {"external": "observation/images/image_0"}}


def copied(folder: Path, target: Path, layout: dict[str, Any] | None = LAYOUT) -> Path:
    shutil.copytree(folder, target)
    for path in [target, *target.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    if layout is not None:
        (target / "spear.json").write_text(json.dumps(layout))
    return target


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a JSON file holds."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def png(grey: int, width: int = 48, height: int = 32) -> bytes:
    return encode_image_file(np.full((height, width, 3), grey, np.uint8), "grey.png")


def bare_png(head: tuple[int, int, int, int], data: bytes) -> bytes:
    """A PNG of this width, height, bits per channel and kind of colour."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    parts = (
        chunk(b"IHDR", struct.pack(">IIBBBBB", *head, 0, 0, 0)),
        chunk(b"IDAT", data),
        chunk(b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def write_records(path: Path, records: list[bytes]) -> Path:
    """A TFRecord file."""

    def masked(data: bytes) -> bytes:
        crc = crc32c(data)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    with open(path, "wb") as file:
        for record in records:
            length = struct.pack("<Q", len(record))
            file.write(length + masked(length) + record + masked(record))
    return path


def make(index: int, steps: int = 6, size: tuple[int, int] = (64, 80), **parts: Any) -> Episode:
    """A smooth episode whose images can be told apart."""
    t = np.arange(steps, dtype=np.float32)
    angle = 0.1 * t + index
    shown = 0 if "images" in parts else steps
    images = [np.full((*size, 3), (30 * k + 20, 40 * index, 90), np.uint8) for k in range(shown)]
    fields: dict[str, Any] = {
        "images": {"external": [encode_jpeg(image) for image in images]},
        "position": np.stack([0.3 + 0.01 * t, 0.02 * np.sin(angle), 0.2 + 0 * t], axis=1),
        "rotation": np.stack([np.cos(angle / 9), 0 * t, 0 * t, np.sin(angle / 9)], axis=1),
        "gripper": (t % 2).astype(np.float32),
        "instruction": f"push the block {index % 2}",
        "rate_hz": 5.0,
        "source": f"made#{index}",
    }
    return Episode(**{**fields, **parts})


def stored(episodes: Iterable[Episode], folder: Path, **how: int) -> EpisodeStore:
    write_episodes(episodes, folder, **how)
    return EpisodeStore(folder)


def assert_same(a: Episode, b: Episode, atol: float = 0.0) -> None:
    """Two episodes are one; `atol`: of their numbers."""
    assert {k: list(v) for k, v in a.images.items()} == {k: list(v) for k, v in b.images.items()}
    for name in ("position", "rotation", "gripper", "action", "action_mask"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None)
        if x is not None:
            np.testing.assert_allclose(x, y, rtol=0, atol=atol)
    for name in ("instruction", "rate_hz", "source", "success"):
        assert getattr(a, name) == getattr(b, name)
