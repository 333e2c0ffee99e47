"""Frames written as RGB-D folders: plain ones and ScanNet's."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from spear.types import Array, Frame


def to_millimeter_image(depth: Array | None) -> Image.Image:
    return Image.fromarray(np.rint(depth * 1000).astype(np.uint16))


def write_plain(folder: Path, frames: list[Frame]) -> Path:
    for name in ("color", "depth", "pose"):
        (folder / name).mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame.image).save(folder / "color" / f"{i}.png")
        to_millimeter_image(frame.depth).save(folder / "depth" / f"{i}.png")
        np.savetxt(folder / "pose" / f"{i}.txt", frame.extrinsics)
    np.savetxt(folder / "intrinsics.txt", shift_to_first_pixel(frames[0].intrinsics))
    return folder


def write_scannet(folder: Path, frames: list[Frame]) -> Path:
    write_plain(folder, frames)
    (folder / "intrinsics.txt").unlink()
    (folder / "intrinsic").mkdir()
    (folder / "instance-filt").mkdir()
    for name in ("color", "depth"):
        k = np.eye(4)
        k[:3, :3] = shift_to_first_pixel(frames[0].intrinsics)
        np.savetxt(folder / "intrinsic" / f"intrinsic_{name}.txt", k, fmt="%f")
        np.savetxt(folder / "intrinsic" / f"extrinsic_{name}.txt", np.eye(4), fmt="%f")
    for i, frame in enumerate(frames):
        Image.fromarray(frame.instances.astype(np.uint8)).save(
            folder / "instance-filt" / f"{i}.png"
        )
    names = {number: name for frame in frames for number, name in frame.names.items()}
    groups = [{"objectId": n - 1, "label": name} for n, name in names.items()]
    groups.append({"objectId": 20, "label": "wall"})
    (folder / "scene0000_00.aggregation.json").write_text(json.dumps({"segGroups": groups}))
    return folder


def shift_to_first_pixel(k: Array | None) -> Array:
    """Intrinsics with the first pixel's centre at 0, as most files have them."""
    return k - np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
