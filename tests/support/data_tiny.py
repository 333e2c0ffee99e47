"""Makes small robot episodes, datasets and pictures."""

import json
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c

from spear.data.store.episode_store import EpisodeStore, append_episodes
from spear.types import Episode
from spear.util.images import encode_image_file, encode_jpeg

LAYOUT = {
    "like": "bridge_dataset",
    "images": {"external": "observation/images/image_0"},
    "image_aspect": {},  # as without this key, but without a notice
}
"""The layout of the BridgeData V2 dataset, with the first of its cameras as external one."""


def copy_dataset(folder: Path, target: Path, layout: dict[str, Any] | None = LAYOUT) -> Path:
    """Copy a dataset so that tests may change it, and write the layout as its spear.json."""
    shutil.copytree(folder, target)
    for path in [target, *target.rglob("*")]:  # the original may be read-only
        path.chmod(0o755 if path.is_dir() else 0o644)
    if layout is not None:
        (target / "spear.json").write_text(json.dumps(layout))
    return target


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the content of a JSON file by a function that changes the parsed object."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def make_png(level: int, width: int = 48, height: int = 32) -> bytes:
    """Make a PNG whose pixels all have one gray level (0 to 255)."""
    return encode_image_file(np.full((height, width, 3), level, np.uint8), "gray.png")


def assemble_png(head: tuple[int, int, int, int], data: bytes) -> bytes:
    """Assemble a PNG, which need not be valid.

    Args:
        head: width, height, bits per channel and color type (0 gray, 2 RGB).
        data: the compressed pixels.
    """
    return (
        b"\x89PNG\r\n\x1a\n"
        # The zeros are the methods of compression and filtering, and no interlacing.
        + _png_chunk(b"IHDR", struct.pack(">IIBBBBB", *head, 0, 0, 0))
        + _png_chunk(b"IDAT", data)
        + _png_chunk(b"IEND", b"")
    )


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    """Return a part of a PNG: length, kind, body and checksum."""
    checksum = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + checksum


def write_records(path: Path, records: list[bytes]) -> Path:
    """Write a TFRecord file."""
    with open(path, "wb") as file:
        for record in records:
            length = struct.pack("<Q", len(record))
            file.write(length + _compute_masked_crc(length) + record + _compute_masked_crc(record))
    return path


def _compute_masked_crc(data: bytes) -> bytes:
    """Return the checksum of data as TFRecord files have it."""
    # The format rotates the checksum by 15 bits and adds a constant, because checksums of data that
    # contain checksums are weak.
    crc = crc32c(data)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return struct.pack("<I", masked)


def make_episode(
    index: int, num_steps: int = 6, size: tuple[int, int] = (64, 80), **fields: Any
) -> Episode:
    """Make a smooth episode, whose images differ in color from step to step.

    Args:
        index: number of the episode, which changes its motion, colors and source.
        num_steps: number of steps.
        size: height and width of the images.
        fields: fields of `Episode`, which replace those of this episode.
    """
    steps = np.arange(num_steps, dtype=np.float32)
    zeros = 0 * steps
    angle = 0.1 * steps + index  # radians
    if "images" not in fields:
        images = [
            np.full((*size, 3), (30 * step + 20, 40 * index, 90), np.uint8)
            for step in range(num_steps)
        ]
        fields["images"] = {"external": [encode_jpeg(image) for image in images]}
    position = np.stack([0.3 + 0.01 * steps, 0.02 * np.sin(angle), 0.2 + zeros], axis=1)
    rotation = np.stack([np.cos(angle / 9), zeros, zeros, np.sin(angle / 9)], axis=1)
    defaults: dict[str, Any] = {
        "position": position,
        "rotation": rotation,
        "gripper": (steps % 2).astype(np.float32),
        "instruction": f"push the block {index % 2}",
        "rate_hz": 5.0,
        "source": f"made#{index}",
    }
    return Episode(**{**defaults, **fields})


def write_store(episodes: Iterable[Episode], folder: Path, **options: int) -> EpisodeStore:
    """Write a store of these episodes, and open it.

    options: arguments of `append_episodes`.
    """
    append_episodes(episodes, folder, **options)
    return EpisodeStore(folder)


def assert_same(episode: Episode, expected: Episode, atol: float = 0.0) -> None:
    """Assert that two episodes are equal, with a tolerance `atol` for their numbers."""
    images = {camera: list(encoded) for camera, encoded in episode.images.items()}
    expected_images = {camera: list(encoded) for camera, encoded in expected.images.items()}
    assert images == expected_images
    for name in ("position", "rotation", "gripper", "action", "action_mask"):
        values = getattr(episode, name)
        expected_values = getattr(expected, name)
        assert (values is None) == (expected_values is None)
        if values is not None:
            np.testing.assert_allclose(values, expected_values, rtol=0, atol=atol)
    for name in ("instruction", "rate_hz", "source", "success"):
        assert getattr(episode, name) == getattr(expected, name)
