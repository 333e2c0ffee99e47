"""Ground truth: what a camera of a world sees, where everything in it is, as a `Frame`."""

from __future__ import annotations

import itertools
import math

import mujoco
import numpy as np
from numpy.typing import NDArray

from spear.errors import unknown_name
from spear.sim.render import Renderer, Size
from spear.sim.scene import clutter_scene
from spear.sim.world import GRIPPER, World
from spear.types import Frame

CAMERAS = ("external", "wrist")
MIN_PIXELS = 8
"""An object of which fewer pixels are seen is not among a frame's instances."""
_CORNERS = np.array(list(itertools.product((0, 1), repeat=3)))


def frame_of(world: World, camera: str, size: Size, renderer: Renderer) -> Frame:
    """What `camera` ("external" or "wrist") of `world` sees at `size` (width, height)."""
    if camera not in CAMERAS:
        raise unknown_name("camera", camera, CAMERAS)
    layers = renderer.layers(world, camera, size)
    instances = world.instance_of_geom[layers.geoms]
    ids, counts = np.unique(instances, return_counts=True)
    seen = [int(i) for i, n in zip(ids, counts, strict=True) if i > 0 and n >= MIN_PIXELS]
    instances = np.where(np.isin(instances, seen), instances, 0).astype(np.int32)
    pose = camera_pose(world, camera)
    boxes = object_boxes(world)
    return Frame(
        image=layers.image,
        depth=layers.depth,
        instances=instances,
        names={i: world.bodies[i - 1].name if i <= len(world.bodies) else GRIPPER for i in seen},
        intrinsics=intrinsics(world, camera, size),
        extrinsics=pose,
        boxes={i: (boxes[i] - pose[:3, 3]) @ pose[:3, :3] for i in seen},
        source=f"sim/{world.spec.family}/{world.spec.seed}/{camera}",
    )


def clutter_frame(seed: int, camera: str, size: Size, renderer: Renderer) -> Frame:
    """A labelled picture of the scene without a task that `seed` stands for."""
    return frame_of(World(clutter_scene(seed)), camera, size, renderer)


def intrinsics(world: World, camera: str, size: Size) -> NDArray[np.float64]:
    """[3, 3] pinhole matrix, pixels; square pixels, centred, pixel centres at integer + 0.5."""
    width, height = size
    fovy = math.radians(float(world.model.cam_fovy[world.model.camera(camera).id]))
    focal = height / 2 / math.tan(fovy / 2)
    return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])


def camera_pose(world: World, camera: str) -> NDArray[np.float64]:
    """[4, 4] camera -> base; camera axes x right, y down, z forward."""
    index = world.model.camera(camera).id
    pose = np.eye(4)
    pose[:3, :3] = world.data.cam_xmat[index].reshape(3, 3) @ np.diag([1.0, -1.0, -1.0])
    pose[:3, 3] = world.data.cam_xpos[index]
    return pose


def object_boxes(world: World) -> dict[int, NDArray[np.float64]]:
    """Instance id -> [8, 3] corners of its oriented box, base frame: objects from 1, then the gripper."""
    boxes = {}
    for i, body in enumerate(world.bodies):
        corners = body.low + _CORNERS * (body.high - body.low)
        boxes[i + 1] = corners @ world.matrix(i).T + world.position(i)
    boxes[len(world.bodies) + 1] = _gripper_box(world)
    return boxes


def _gripper_box(world: World) -> NDArray[np.float64]:
    """[8, 3] the box around hand and fingers, along the hand's axes, base frame."""
    model, data = world.model, world.data
    hand = model.body("hand").id
    axes, origin = data.xmat[hand].reshape(3, 3), data.xpos[hand]
    low, high = np.full(3, np.inf), np.full(3, -np.inf)
    for name in ("hand", "finger1", "finger2"):
        start = int(model.body(name).geomadr[0])
        for geom in range(start, start + int(model.body(name).geomnum[0])):
            turn = axes.T @ data.geom_xmat[geom].reshape(3, 3)
            size = model.geom_size[geom]
            if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_BOX:
                half = np.abs(turn) @ size
            else:  # a capsule
                half = size[0] + size[1] * np.abs(turn[:, 2])
            center = axes.T @ (data.geom_xpos[geom] - origin)
            low, high = np.minimum(low, center - half), np.maximum(high, center + half)
    return (low + _CORNERS * (high - low)) @ axes.T + origin
