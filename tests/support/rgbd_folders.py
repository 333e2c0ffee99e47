"""Writes frames as RGB-D folders, in a plain layout and in ScanNet's."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from spear.types import Array, Frame


def to_millimeter_image(depth: Array | None) -> Image.Image:
    """Return a depth image of whole millimeters from depths in meters [h, w]."""
    return Image.fromarray(np.rint(depth * 1000).astype(np.uint16))


def write_plain(folder: Path, frames: list[Frame]) -> Path:
    """Write frames of one camera with their poses, and the camera's intrinsics."""
    for name in ("color", "depth", "pose"):
        (folder / name).mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame.image).save(folder / "color" / f"{i}.png")
        to_millimeter_image(frame.depth).save(folder / "depth" / f"{i}.png")
        np.savetxt(folder / "pose" / f"{i}.txt", frame.extrinsics)
    np.savetxt(folder / "intrinsics.txt", shift_to_first_pixel(frames[0].intrinsics))
    return folder


def write_scannet(folder: Path, frames: list[Frame]) -> Path:
    """Write frames as a scene of ScanNet, with masks and names of the objects."""
    write_plain(folder, frames)
    (folder / "intrinsics.txt").unlink()
    (folder / "intrinsic").mkdir()
    (folder / "instance-filt").mkdir()
    for name in ("color", "depth"):
        intrinsics = np.eye(4)
        intrinsics[:3, :3] = shift_to_first_pixel(frames[0].intrinsics)
        np.savetxt(folder / "intrinsic" / f"intrinsic_{name}.txt", intrinsics, fmt="%f")
        np.savetxt(folder / "intrinsic" / f"extrinsic_{name}.txt", np.eye(4), fmt="%f")
    for i, frame in enumerate(frames):
        Image.fromarray(frame.instances.astype(np.uint8)).save(
            folder / "instance-filt" / f"{i}.png"
        )
    name_of_instance: dict[int, str] = {}
    for frame in frames:
        name_of_instance.update(frame.names)
    # In ScanNet the pixels of an object have the value of its id plus 1.
    groups = [{"objectId": n - 1, "label": name} for n, name in name_of_instance.items()]
    unseen_id = 20  # of an object that no image shows
    groups.append({"objectId": unseen_id, "label": "wall"})
    (folder / "scene0000_00.aggregation.json").write_text(json.dumps({"segGroups": groups}))
    return folder


def shift_to_first_pixel(intrinsics: Array | None) -> Array:
    """Return intrinsics for pixel coordinates that are 0 in the center of the first pixel.

    Most files have such intrinsics; ours are 0 at the corner of the image.
    """
    return intrinsics - np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
