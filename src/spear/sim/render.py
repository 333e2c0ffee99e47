"""Renders images of worlds, and their ground truth (depth, instances, boxes).

One rendering context serves all worlds of a thread. All cameras are drawn side by side into one
buffer, which is read back at once. Shadows, reflections and multisampling are off, because on a
software renderer they take up to 90 times as long as everything else.

An *instance* is an object in an image, with a number: the objects of a world from 1 on, then the
robot's gripper. 0 is the background.
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
from spear.sim.scene import sample_clutter_scene
from spear.sim.world import (
    GRIPPER_NAME,
    World,
    compute_half_extent,
    get_shared_base_spec,
    list_cameras,
)
from spear.types import Frame, WidthAndHeight

MIN_PIXELS = 8
"""An object with fewer visible pixels is not among a frame's instances."""
INITIAL_BUFFER_PX = (560, 420)  # (width, height); the buffer grows if larger images are requested
MAX_GEOMS = 600  # the largest number of MuJoCo geoms in a scene

_UNIT_CORNERS = np.array(list(itertools.product((0, 1), repeat=3)))  # [8, 3], of the unit cube

_ALL_RENDERERS: list["Renderer"] = []
"""Keeps all renderers alive. When a renderer is deleted, MuJoCo deletes its buffers by their
numbers in the OpenGL context that is current, which may be another renderer's. That one has buffers
of the same numbers, so it would lose them and draw nothing but its background."""
_THREAD = threading.local()  # its attribute `renderer` is each thread's own renderer


class Renderer:
    """A rendering context for any number of worlds. It lives until the process ends.

    A renderer may be used only in the thread that made it; see `get_thread_renderer`.
    """

    def __init__(self) -> None:
        width, height = INITIAL_BUFFER_PX
        self._buffer_size = INITIAL_BUFFER_PX
        try:
            self._gl_context = _make_gl_context(width, height)
            self._gl_context.make_current()
        except Exception as error:  # which exception depends on what is missing in the driver
            raise SpearError(
                f"no OpenGL through EGL ({error}), so nothing can be rendered. Install the "
                "Debian packages libegl1 libgl1 libgl1-mesa-dri."
            ) from error

        spec = get_shared_base_spec().copy()
        spec.visual.global_.offwidth = width
        spec.visual.global_.offheight = height
        model = spec.compile()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        _ALL_RENDERERS.append(self)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._context.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR

        self._scene = mujoco.MjvScene(model, maxgeom=MAX_GEOMS)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._options = mujoco.MjvOption()
        self._options.geomgroup[:] = 1
        self._options.geomgroup[HIDDEN_GROUP] = 0
        self._options.sitegroup[:] = 0
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._perturbation = mujoco.MjvPerturb()  # MuJoCo requires one; this one moves nothing

    def render_images(
        self, world: World, views: Sequence[tuple[str, WidthAndHeight]]
    ) -> list[NDArray[np.uint8]]:
        """Render one image [h, w, 3] uint8 per (camera name, size), in the order of the views."""
        # Draw all views side by side.
        rectangles = self._lay_out([size for _, size in views])
        first_camera, _ = views[0]
        self._update_scene(world, first_camera)
        for (camera, _), rectangle in zip(views, rectangles, strict=True):
            self._camera.fixedcamid = world.model.camera(camera).id
            mujoco.mjv_updateCamera(world.model, world.data, self._camera, self._scene)
            mujoco.mjr_render(rectangle, self._scene, self._context)

        # Read all views back at once, and cut them apart.
        width = max(rectangle.left + rectangle.width for rectangle in rectangles)
        height = max(rectangle.height for rectangle in rectangles)
        pixels = np.empty((height, width, 3), np.uint8)
        mujoco.mjr_readPixels(pixels, None, mujoco.MjrRect(0, 0, width, height), self._context)
        images = []
        for rectangle in rectangles:
            columns = slice(rectangle.left, rectangle.left + rectangle.width)
            view = pixels[: rectangle.height, columns]
            images.append(np.ascontiguousarray(view[::-1]))  # OpenGL's rows go from the bottom up
        return images

    def render_image_depth_and_geom_ids(
        self, world: World, camera: str, size: WidthAndHeight
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int32]]:
        """Render what one camera sees.

        Returns:
            The image [h, w, 3], the depth [h, w] along the camera's z axis in meters, and the id of
            the geom that each pixel shows, [h, w], -1 for the background.
        """
        (rectangle,) = self._lay_out([size])
        width, height = size
        self._update_scene(world, camera)
        mujoco.mjr_render(rectangle, self._scene, self._context)
        image = np.empty((height, width, 3), np.uint8)
        depth_buffer = np.empty((height, width), np.float32)
        mujoco.mjr_readPixels(image, depth_buffer, rectangle, self._context)

        # Draw again, now with every geom in a color that encodes the geom's number in the scene.
        self._set_segmentation(is_on=True)
        mujoco.mjr_render(rectangle, self._scene, self._context)
        self._set_segmentation(is_on=False)
        codes = np.empty((height, width, 3), np.uint8)
        mujoco.mjr_readPixels(codes, None, rectangle, self._context)

        depth_m = _to_meters(depth_buffer[::-1], world)
        return np.ascontiguousarray(image[::-1]), depth_m, self._decode_geom_ids(codes[::-1])

    def _lay_out(self, sizes: Sequence[WidthAndHeight]) -> list[mujoco.MjrRect]:
        """Return rectangles of these sizes, side by side in the buffer.

        The buffer is enlarged if the rectangles do not fit.
        """
        total_width = sum(width for width, _ in sizes)
        max_height = max(height for _, height in sizes)
        self._gl_context.make_current()
        buffer_width, buffer_height = self._buffer_size
        if total_width > buffer_width or max_height > buffer_height:
            self._buffer_size = (max(total_width, buffer_width), max(max_height, buffer_height))
            mujoco.mjr_resizeOffscreen(*self._buffer_size, self._context)
        rectangles = []
        left_px = 0
        for width, height in sizes:
            rectangles.append(mujoco.MjrRect(left_px, 0, width, height))
            left_px += width
        return rectangles

    def _update_scene(self, world: World, camera: str) -> None:
        """Copy the world's present state into MuJoCo's scene, as seen by a camera."""
        self._camera.fixedcamid = world.model.camera(camera).id
        mujoco.mjv_updateScene(
            world.model,
            world.data,
            self._options,
            self._perturbation,
            self._camera,
            mujoco.mjtCatBit.mjCAT_ALL,
            self._scene,
        )

    def _set_segmentation(self, is_on: bool) -> None:
        """Switch between colors that encode numbers of geoms (on) and natural colors (off)."""
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = int(is_on)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = int(is_on)

    def _decode_geom_ids(self, codes: NDArray[np.uint8]) -> NDArray[np.int32]:
        """Return the geom id of each pixel, -1 for the background.

        Args:
            codes: [h, w, 3], colors drawn with segmentation on. Red and green are the low and the
                high byte of a number: a scene geom's `segid` plus 1, or 0 for the background.
        """
        numbers = codes[..., 0].astype(np.int32) + (codes[..., 1].astype(np.int32) << 8)
        geom_type = int(mujoco.mjtObj.mjOBJ_GEOM)
        # The geom id of each number. The scene also has decoration that is no geom of the model; it
        # keeps -1, and so does the last entry, which stands for any larger number.
        geom_of_number = np.full(self._scene.ngeom + 2, -1, np.int32)
        for item in self._scene.geoms[: self._scene.ngeom]:
            if item.objtype == geom_type and item.segid >= 0:
                geom_of_number[item.segid + 1] = item.objid
        return geom_of_number[np.minimum(numbers, len(geom_of_number) - 1)]


def _make_gl_context(width: int, height: int) -> Any:
    """Make an off-screen OpenGL context.

    On Linux it is an EGL context, which needs no display, unless the environment variable
    MUJOCO_GL names another kind.
    """
    if sys.platform == "linux" and "MUJOCO_GL" not in os.environ:
        os.environ.setdefault("PYOPENGL_PLATFORM", "egl")
        from mujoco import egl

        return egl.GLContext(width, height)
    return mujoco.GLContext(width, height)


def _to_meters(depth_buffer: NDArray[np.float32], world: World) -> NDArray[np.float32]:
    """Convert a depth buffer, which is 1 at the near and 0 at the far plane, to meters."""
    extent = world.model.stat.extent
    near_m = world.model.vis.map.znear * extent
    far_m = world.model.vis.map.zfar * extent
    # The buffer is linear in 1 / depth.
    depth_m = near_m * far_m / (near_m + depth_buffer * (far_m - near_m))
    return depth_m.astype(np.float32)


def get_thread_renderer() -> Renderer:
    """Return this thread's renderer. Raises `SpearError` if rendering does not work here."""
    if not hasattr(_THREAD, "renderer"):
        _THREAD.renderer = Renderer()
    return _THREAD.renderer


# --- Ground truth ---


def render_frame(world: World, camera: str, size: WidthAndHeight) -> Frame:
    """Render what a camera of the world sees, with its ground truth.

    Args:
        world: the world in its present state.
        camera: one of `list_cameras()`.
        size: (width, height), pixels.
    """
    check_known("camera", list_cameras(), camera)
    image, depth_m, geom_ids = get_thread_renderer().render_image_depth_and_geom_ids(
        world, camera, size
    )
    instances = world.instance_of_geom[geom_ids]  # [h, w]; geom id -1 is the last entry, 0
    ids, num_pixels = np.unique(instances, return_counts=True)
    visible = []
    for instance, count in zip(ids, num_pixels, strict=True):
        if instance > 0 and count >= MIN_PIXELS:
            visible.append(int(instance))
    instances = np.where(np.isin(instances, visible), instances, 0).astype(np.int32)

    # Boxes in the camera frame. Multiplying row vectors by the rotation from camera to base turns
    # them from base to camera, because the inverse of a rotation is its transpose.
    pose = compute_camera_pose(world, camera)
    camera_position = pose[:3, 3]
    camera_to_base = pose[:3, :3]
    base_boxes = compute_instance_box_corners(world)
    boxes = {}
    for instance in visible:
        boxes[instance] = (base_boxes[instance] - camera_position) @ camera_to_base  # [8, 3]
    return Frame(
        image=image,
        depth=depth_m,
        instances=instances,
        names={instance: _get_instance_name(world, instance) for instance in visible},
        intrinsics=compute_intrinsics(world, camera, size),
        extrinsics=pose,
        boxes=boxes,
        source=f"sim/{world.spec.family}/{world.spec.seed}/{camera}",
    )


def render_clutter_frame(seed: int, camera: str, size: WidthAndHeight) -> Frame:
    """Render the cluttered scene, without a task, that `seed` stands for, with its ground truth."""
    return render_frame(World(sample_clutter_scene(seed)), camera, size)


def _get_instance_name(world: World, instance: int) -> str:
    """Return the name of an instance, numbered from 1: an object's kind, or the gripper."""
    if instance <= len(world.bodies):
        return world.bodies[instance - 1].kind.name
    return GRIPPER_NAME


def compute_intrinsics(world: World, camera: str, size: WidthAndHeight) -> NDArray[np.float64]:
    """The camera's pinhole matrix [3, 3], in pixels; pixel centers are at integer + 0.5.

    Pixels are square, and the principal point is in the middle of the image.
    """
    width, height = size
    fovy_deg = float(world.model.cam_fovy[world.model.camera(camera).id])
    focal_px = height / 2 / math.tan(math.radians(fovy_deg) / 2)
    return np.array([[focal_px, 0, width / 2], [0, focal_px, height / 2], [0, 0, 1.0]])


def compute_camera_pose(world: World, camera: str) -> NDArray[np.float64]:
    """The camera's pose [4, 4] in the base frame; its axes are x right, y down, z forward."""
    index = world.model.camera(camera).id
    pose = np.eye(4)
    # MuJoCo's cameras have y up and look along -z.
    pose[:3, :3] = world.data.cam_xmat[index].reshape(3, 3) @ np.diag([1.0, -1.0, -1.0])
    pose[:3, 3] = world.data.cam_xpos[index]
    return pose


def compute_instance_box_corners(world: World) -> dict[int, NDArray[np.float64]]:
    """The oriented boxes of all instances: instance id -> corners [8, 3], base frame, m."""
    boxes = {}
    for index, body in enumerate(world.bodies):
        corners = body.low + _UNIT_CORNERS * (body.high - body.low)  # in the object's frame
        rotation = world.get_object_rotation_matrix(index)
        boxes[index + 1] = corners @ rotation.T + world.get_object_position(index)
    boxes[len(world.bodies) + 1] = _compute_gripper_box_corners(world)
    return boxes


def _compute_gripper_box_corners(world: World) -> NDArray[np.float64]:
    """The corners [8, 3] of the box around hand and fingers, base frame.

    The sides of the box are along the hand's axes.
    """
    model = world.model
    data = world.data
    hand = model.body("hand").id
    axes = data.xmat[hand].reshape(3, 3)  # the hand's axes are the columns
    origin = data.xpos[hand]
    # The extent, in the hand's frame, of all geoms of the gripper.
    gripper_instance = len(world.bodies) + 1
    low = np.full(3, np.inf)
    high = np.full(3, -np.inf)
    for geom in np.flatnonzero(world.instance_of_geom == gripper_instance):
        rotation = axes.T @ data.geom_xmat[geom].reshape(3, 3)
        half_size = compute_half_extent(model.geom_type[geom], model.geom_size[geom], rotation)
        center = axes.T @ (data.geom_xpos[geom] - origin)
        low = np.minimum(low, center - half_size)
        high = np.maximum(high, center + half_size)
    return (low + _UNIT_CORNERS * (high - low)) @ axes.T + origin
