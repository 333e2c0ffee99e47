"""Pictures of worlds: one rendering context for all of them, all cameras into one buffer, one read-back.

Shadows, reflections and multisampling are off: they cost up to 90 times the rest on a software renderer.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from spear.errors import SpearError
from spear.sim import arm
from spear.sim.world import World, base_spec

Size = tuple[int, int]
"""Width and height, pixels."""
_MAX_GEOMS = 600


@dataclass(frozen=True)
class Layers:
    """What one camera sees.

    image [h, w, 3] uint8; depth [h, w] float32 metres along the camera's z; geoms [h, w] int32 geom ids, -1
    where there is none.
    """

    image: NDArray[np.uint8]
    depth: NDArray[np.float32]
    geoms: NDArray[np.int32]


def _gl_context(width: int, height: int) -> Any:
    """An off-screen OpenGL context: EGL on Linux, which needs no display, unless MUJOCO_GL names another."""
    if sys.platform == "linux" and "MUJOCO_GL" not in os.environ:
        os.environ.setdefault("PYOPENGL_PLATFORM", "egl")
        from mujoco import egl

        return egl.GLContext(width, height)
    return mujoco.GLContext(width, height)


_LOST: list[tuple[Any, mujoco.MjrContext]] = []
"""Contexts whose renderer is gone and that another thread still has current: only that thread could free
them."""


def _free(gl: Any, context: mujoco.MjrContext) -> None:
    """Give a context back. Buffers and textures have the same small numbers in every context, and MuJoCo
    deletes them in whichever is current: were it another renderer's, that one would draw nothing but its
    background from then on."""
    try:
        gl.make_current()
    except Exception:  # each driver has its own: it is current in another thread
        _LOST.append((gl, context))
        return
    context.free()
    gl.free()


class Renderer:
    """A rendering context that any number of worlds share. It belongs to the thread that made it, and is
    given back by `close` or with the last reference."""

    def __init__(self, width: int = 560, height: int = 420) -> None:
        self._size = (width, height)
        try:
            self._gl = _gl_context(width, height)
            self._gl.make_current()
        except Exception as error:  # the library raises whatever the missing driver made it raise
            raise SpearError(
                f"rendering: no OpenGL through EGL ({error}): install the Debian packages "
                "libegl1 libgl1 libgl1-mesa-dri"
            ) from error
        spec = base_spec().copy()
        spec.visual.global_.offwidth, spec.visual.global_.offheight = width, height
        model = spec.compile()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        self._free = weakref.finalize(self, _free, self._gl, self._context)
        self._free.atexit = False  # by then the display is gone, and the process gives everything back
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._context.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR
        self._scene = mujoco.MjvScene(model, maxgeom=_MAX_GEOMS)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._scene.flags[flag] = 0
        self._option = mujoco.MjvOption()
        self._option.geomgroup[:] = 1
        self._option.geomgroup[arm.HIDDEN_GROUP] = 0
        self._option.sitegroup[:] = 0
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._nothing = mujoco.MjvPerturb()

    def images(self, world: World, views: Sequence[tuple[str, Size]]) -> list[NDArray[np.uint8]]:
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
            np.ascontiguousarray(pixels[: r.height][::-1, r.left : r.left + r.width]) for r in rectangles
        ]

    def layers(self, world: World, camera: str, size: Size) -> Layers:
        """Image, metric depth and geom ids of one camera."""
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
        return Layers(
            np.ascontiguousarray(image[::-1]), self._metric(world, depth[::-1]), self._geom_ids(codes[::-1])
        )

    def close(self) -> None:
        """Give the context back; nothing can be rendered after it."""
        self._free()

    def _layout(self, sizes: Sequence[Size]) -> list[mujoco.MjrRect]:
        width, height = sum(w for w, _ in sizes), max(h for _, h in sizes)
        self._gl.make_current()
        if width > self._size[0] or height > self._size[1]:
            self._size = (max(width, self._size[0]), max(height, self._size[1]))
            mujoco.mjr_resizeOffscreen(*self._size, self._context)
        left, rectangles = 0, []
        for w, h in sizes:
            rectangles.append(mujoco.MjrRect(left, 0, w, h))
            left += w
        return rectangles

    def _update(self, world: World, camera: str) -> None:
        self._camera.fixedcamid = world.model.camera(camera).id
        everything = mujoco.mjtCatBit.mjCAT_ALL
        given = self._option, self._nothing, self._camera, everything, self._scene
        mujoco.mjv_updateScene(world.model, world.data, *given)

    def _metric(self, world: World, buffer: NDArray[np.float32]) -> NDArray[np.float32]:
        """Metres from a depth buffer that is 1 at the near and 0 at the far plane."""
        extent = world.model.stat.extent
        near, far = world.model.vis.map.znear * extent, world.model.vis.map.zfar * extent
        return (near * far / (near + buffer * (far - near))).astype(np.float32)

    def _geom_ids(self, codes: NDArray[np.uint8]) -> NDArray[np.int32]:
        numbers = codes[..., 0].astype(np.int32) + (codes[..., 1].astype(np.int32) << 8)
        geom = int(mujoco.mjtObj.mjOBJ_GEOM)
        lookup = np.full(self._scene.ngeom + 2, -1, np.int32)
        for item in self._scene.geoms[: self._scene.ngeom]:
            if item.objtype == geom and item.segid >= 0:
                lookup[item.segid + 1] = item.objid
        return lookup[np.minimum(numbers, len(lookup) - 1)]
