"""Pictures of worlds and their ground truth: one rendering context for all, all cameras in one read-back.

Shadows, reflections and multisampling are off: they cost up to 90 times the rest on a software renderer.
"""

import itertools
import math
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from spear.errors import SpearError, check_known
from spear.sim.control import HIDDEN_GROUP
from spear.sim.scene import clutter_scene
from spear.sim.world import GRIPPER_NAME, World, base_spec, half_extent
from spear.types import Frame

ImageSize = tuple[int, int]
"""Width and height, pixels."""
CAMERAS = ("external", "wrist")
MIN_PIXELS = 8
"""An object of which fewer pixels are seen is not among a frame's instances."""
_CORNERS = np.array(list(itertools.product((0, 1), repeat=3)))


def _gl_context(width: int, height: int) -> Any:
    """An off-screen OpenGL context: EGL on Linux, which needs no display, unless MUJOCO_GL names another."""
    if sys.platform == "linux" and "MUJOCO_GL" not in os.environ:
        os.environ.setdefault("PYOPENGL_PLATFORM", "egl")
        from mujoco import egl

        return egl.GLContext(width, height)
    return mujoco.GLContext(width, height)


_KEPT: list["Renderer"] = []
"""All of them: MuJoCo deletes a context's buffers, by numbers that all contexts share, in whichever is
current, and another renderer would then draw nothing but its background."""
_OWN = threading.local()


class Renderer:
    """A rendering context that any number of worlds share, until the process ends. It belongs to the thread
    that made it; see `get_thread_renderer`."""

    def __init__(self) -> None:
        self._size = width, height = (
            560,
            420,
        )  # of the buffers, which grow with the pictures asked for
        try:
            self._gl = _gl_context(width, height)
            self._gl.make_current()
        except Exception as error:  # the library raises whatever the missing driver made it raise
            cure = "install the Debian packages libegl1 libgl1 libgl1-mesa-dri"
            raise SpearError(f"rendering: no OpenGL through EGL ({error}): {cure}") from error
        spec = base_spec().copy()
        spec.visual.global_.offwidth, spec.visual.global_.offheight = width, height
        model = spec.compile()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        _KEPT.append(self)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._context.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR
        self._scene = mujoco.MjvScene(model, maxgeom=600)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._scene.flags[flag] = 0
        self._option = mujoco.MjvOption()
        self._option.geomgroup[:] = 1
        self._option.geomgroup[HIDDEN_GROUP] = 0
        self._option.sitegroup[:] = 0
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._nothing = mujoco.MjvPerturb()

    def images(
        self, world: World, views: Sequence[tuple[str, ImageSize]]
    ) -> list[NDArray[np.uint8]]:
        """One [h, w, 3] uint8 image per (camera name, size), in the order asked for."""
        rectangles = self._layout([size for _, size in views])
        self._update(world, views[0][0])
        for (name, _), rectangle in zip(views, rectangles, strict=True):
            self._camera.fixedcamid = world.model.camera(name).id
            mujoco.mjv_updateCamera(world.model, world.data, self._camera, self._scene)
            mujoco.mjr_render(rectangle, self._scene, self._context)
        width, height = max(r.left + r.width for r in rectangles), max(r.height for r in rectangles)
        pixels = np.empty((height, width, 3), np.uint8)
        mujoco.mjr_readPixels(pixels, None, mujoco.MjrRect(0, 0, width, height), self._context)
        return [  # OpenGL's rows go from the bottom up
            np.ascontiguousarray(pixels[: r.height][::-1, r.left : r.left + r.width])
            for r in rectangles
        ]

    def layers(
        self, world: World, camera: str, size: ImageSize
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int32]]:
        """What one camera sees: image [h, w, 3], depth [h, w] along its z (m), geom ids [h, w] or -1."""
        (rectangle,) = self._layout([size])
        width, height = size
        self._update(world, camera)
        mujoco.mjr_render(rectangle, self._scene, self._context)
        image = np.empty((height, width, 3), np.uint8)
        depth = np.empty((height, width), np.float32)
        mujoco.mjr_readPixels(image, depth, rectangle, self._context)
        flags = self._scene.flags
        flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = 1
        mujoco.mjr_render(rectangle, self._scene, self._context)
        flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = 0
        codes = np.empty((height, width, 3), np.uint8)
        mujoco.mjr_readPixels(codes, None, rectangle, self._context)
        # the buffer is 1 at the near and 0 at the far plane
        extent = world.model.stat.extent
        near, far = world.model.vis.map.znear * extent, world.model.vis.map.zfar * extent
        metres = (near * far / (near + depth[::-1] * (far - near))).astype(np.float32)
        return np.ascontiguousarray(image[::-1]), metres, self._geom_ids(codes[::-1])

    def _layout(self, sizes: Sequence[ImageSize]) -> list[mujoco.MjrRect]:
        width, height = sum(w for w, _ in sizes), max(h for _, h in sizes)
        self._gl.make_current()
        if width > self._size[0] or height > self._size[1]:
            self._size = (max(width, self._size[0]), max(height, self._size[1]))
            mujoco.mjr_resizeOffscreen(*self._size, self._context)
        lefts = itertools.accumulate((w for w, _ in sizes), initial=0)
        return [mujoco.MjrRect(left, 0, w, h) for left, (w, h) in zip(lefts, sizes, strict=False)]

    def _update(self, world: World, camera: str) -> None:
        self._camera.fixedcamid = world.model.camera(camera).id
        everything = mujoco.mjtCatBit.mjCAT_ALL
        given = self._option, self._nothing, self._camera, everything, self._scene
        mujoco.mjv_updateScene(world.model, world.data, *given)

    def _geom_ids(self, codes: NDArray[np.uint8]) -> NDArray[np.int32]:
        numbers = codes[..., 0].astype(np.int32) + (codes[..., 1].astype(np.int32) << 8)
        geom = int(mujoco.mjtObj.mjOBJ_GEOM)
        lookup = np.full(self._scene.ngeom + 2, -1, np.int32)
        for item in self._scene.geoms[: self._scene.ngeom]:
            if item.objtype == geom and item.segid >= 0:
                lookup[item.segid + 1] = item.objid
        return lookup[np.minimum(numbers, len(lookup) - 1)]


def get_thread_renderer() -> Renderer:
    """This thread's. Raises `SpearError` where nothing can be rendered."""
    if not hasattr(_OWN, "renderer"):
        _OWN.renderer = Renderer()
    return _OWN.renderer


def render_frame(world: World, camera: str, size: ImageSize) -> Frame:
    """What `camera` ("external" or "wrist") of `world` sees at `size` (width, height)."""
    check_known("camera", CAMERAS, camera)
    image, depth, geoms = get_thread_renderer().layers(world, camera, size)
    instances = world.instance_of_geom[geoms]
    ids, counts = np.unique(instances, return_counts=True)
    seen = [int(i) for i, n in zip(ids, counts, strict=True) if i > 0 and n >= MIN_PIXELS]
    instances = np.where(np.isin(instances, seen), instances, 0).astype(np.int32)
    pose = camera_pose(world, camera)
    boxes = object_boxes(world)
    return Frame(
        image=image,
        depth=depth,
        instances=instances,
        names={
            i: world.bodies[i - 1].kind.name if i <= len(world.bodies) else GRIPPER_NAME
            for i in seen
        },
        intrinsics=intrinsics(world, camera, size),
        extrinsics=pose,
        boxes={i: (boxes[i] - pose[:3, 3]) @ pose[:3, :3] for i in seen},
        source=f"sim/{world.spec.family}/{world.spec.seed}/{camera}",
    )


def render_clutter_frame(seed: int, camera: str, size: ImageSize) -> Frame:
    """A labelled picture of the scene without a task that `seed` stands for."""
    return render_frame(World(clutter_scene(seed)), camera, size)


def intrinsics(world: World, camera: str, size: ImageSize) -> NDArray[np.float64]:
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
        boxes[i + 1] = (body.low + _CORNERS * (body.high - body.low)) @ world.matrix(
            i
        ).T + world.position(i)
    boxes[len(world.bodies) + 1] = _gripper_box(world)
    return boxes


def _gripper_box(world: World) -> NDArray[np.float64]:
    """[8, 3] the box around hand and fingers, along the hand's axes, base frame."""
    model, data = world.model, world.data
    hand = model.body("hand").id
    axes, origin = data.xmat[hand].reshape(3, 3), data.xpos[hand]
    low, high = np.full(3, np.inf), np.full(3, -np.inf)
    for geom in np.flatnonzero(world.instance_of_geom == len(world.bodies) + 1):
        turn = axes.T @ data.geom_xmat[geom].reshape(3, 3)
        half = half_extent(model.geom_type[geom], model.geom_size[geom], turn)
        center = axes.T @ (data.geom_xpos[geom] - origin)
        low, high = np.minimum(low, center - half), np.maximum(high, center + half)
    return (low + _CORNERS * (high - low)) @ axes.T + origin
