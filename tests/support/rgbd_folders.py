"""Frames written as RGB-D folders: plain ones, ScanNet's and Hypersim's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spear.labels.fit import rle
from spear.labels.fit.box3d import box_from_vertices
from spear.labels.fit.boxes2d import tight_box
from spear.labels.fit.camera import unproject
from spear.labels.hypersim import NYU40
from spear.types import Array, Frame

UNIT = 0.0254
"""Metres per unit of the Hypersim scene."""
GL = np.diag([1.0, -1, -1])
"""Between cameras with y up and ours."""


def millimetres(depth: Array | None) -> Image.Image:
    assert depth is not None
    return Image.fromarray(np.rint(depth * 1000).astype(np.uint16))


def write_plain(folder: Path, frames: list[Frame]) -> Path:
    for name in ("color", "depth", "pose"):
        (folder / name).mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame.image).save(folder / "color" / f"{i}.png")
        millimetres(frame.depth).save(folder / "depth" / f"{i}.png")
        assert frame.extrinsics is not None
        np.savetxt(folder / "pose" / f"{i}.txt", frame.extrinsics)
    np.savetxt(folder / "intrinsics.txt", from_zero(frames[0].intrinsics))
    return folder


def write_scannet(folder: Path, frames: list[Frame]) -> Path:
    write_plain(folder, frames)
    (folder / "intrinsics.txt").unlink()
    (folder / "intrinsic").mkdir()
    (folder / "instance-filt").mkdir()
    for name in ("color", "depth"):
        k = np.eye(4)
        k[:3, :3] = from_zero(frames[0].intrinsics)
        np.savetxt(folder / "intrinsic" / f"intrinsic_{name}.txt", k, fmt="%f")
        np.savetxt(folder / "intrinsic" / f"extrinsic_{name}.txt", np.eye(4), fmt="%f")
    for i, frame in enumerate(frames):
        assert frame.instances is not None
        Image.fromarray(frame.instances.astype(np.uint8)).save(folder / "instance-filt" / f"{i}.png")
    names = {number: name for frame in frames for number, name in frame.names.items()}
    groups = [{"objectId": n - 1, "label": name} for n, name in names.items()]
    groups.append({"objectId": 20, "label": "wall"})
    (folder / "scene0000_00.aggregation.json").write_text(json.dumps({"segGroups": groups}))
    return folder


def from_zero(k: Array | None) -> Array:
    """Intrinsics with the first pixel's centre at 0, as most files have them."""
    assert k is not None
    return k - np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])


def write_hypersim(folder: Path, frame: Frame, unit: float = UNIT) -> Path:
    """One frame as the dataset stores it; the world is the frame's base. Returns the scene, in `folder`."""
    h5py = pytest.importorskip("h5py")
    assert frame.depth is not None and frame.instances is not None and frame.intrinsics is not None
    assert frame.extrinsics is not None and frame.boxes is not None
    scene = folder / "ai_001_001"
    detail, images = scene / "_detail", scene / "images"

    def store(path: Path, values: Array) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            file["dataset"] = values

    distance = np.linalg.norm(unproject(frame.depth, frame.intrinsics), axis=-1)
    distance[frame.depth == 0] = np.nan
    geometry = images / "scene_cam_00_geometry_hdf5"
    store(geometry / "frame.0007.depth_meters.hdf5", distance.astype(np.float32))
    store(
        geometry / "frame.0007.semantic_instance.hdf5",
        np.where(frame.instances, frame.instances, -1).astype(np.int16),
    )
    labels = np.full(frame.instances.shape, -1, np.int16)
    labels[frame.instances == 0] = NYU40.index("floor") + 1
    for number, name in frame.names.items():
        labels[frame.instances == number] = NYU40.index(name) + 1
    store(geometry / "frame.0007.semantic.hdf5", labels)
    preview = images / "scene_cam_00_final_preview"
    preview.mkdir(parents=True, exist_ok=True)
    Image.fromarray(frame.image).save(preview / "frame.0007.tonemap.jpg")
    camera = detail / "cam_00"
    store(camera / "camera_keyframe_frame_indices.hdf5", np.array([3, 7]))
    turn, place = frame.extrinsics[:3, :3] @ GL, frame.extrinsics[:3, 3] / unit
    store(camera / "camera_keyframe_orientations.hdf5", np.stack([np.eye(3), turn]))
    store(camera / "camera_keyframe_positions.hdf5", np.stack([np.zeros(3), place]))
    boxes = [
        box_from_vertices(v @ frame.extrinsics[:3, :3].T + frame.extrinsics[:3, 3])
        for v in frame.boxes.values()
    ]
    values = {
        "positions": [b.center / unit for b in boxes],
        "extents": [b.size / unit for b in boxes],
        "orientations": [b.rotation for b in boxes],
    }
    for kind, rows in values.items():
        name = f"metadata_semantic_instance_bounding_box_object_aligned_2d_{kind}.hdf5"
        store(detail / "mesh" / name, np.array([np.full_like(rows[0], np.nan), *rows]))
    (detail / "metadata_scene.csv").write_text(
        f"parameter_name,parameter_value\nmeters_per_asset_unit,{unit}\n"
    )
    return scene


def camera_table(folder: Path, rays: Array) -> None:
    """Hypersim's table of cameras, beside the scene."""
    names = [f"M_cam_from_uv_{i}{j}" for i in range(3) for j in range(3)]
    lines = [",".join(["scene_name", *names]), ",".join(["ai_001_001", *map(str, rays.ravel())])]
    (folder / "metadata_camera_parameters.csv").write_text("\n".join(lines))


def rays_of(k: Array, height: int, width: int) -> Array:
    """Hypersim's matrix from image coordinates to rays, of a pinhole camera."""
    pixel_from_uv = np.array([[width / 2, 0, width / 2], [0, -height / 2, height / 2], [0, 0, 1]])
    matrix: Array = GL @ np.linalg.inv(k) @ pixel_from_uv
    return matrix


def write_coco(path: Path, frames: dict[str, Frame]) -> Path:
    """The instances of frames, by file name, as COCO annotations with masks."""
    names = sorted({name for frame in frames.values() for name in frame.names.values()})
    images, annotations = [], []
    for number, (file, frame) in enumerate(frames.items()):
        assert frame.instances is not None
        height, width = frame.instances.shape
        images.append({"id": number, "file_name": file, "height": height, "width": width})
        for instance, name in frame.names.items():
            mask = frame.instances == instance
            x0, y0, x1, y1 = tight_box(mask).tolist()
            annotations.append(
                {
                    "image_id": number,
                    "category_id": names.index(name),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "segmentation": {"counts": rle.encode(mask), "size": [height, width]},
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path
