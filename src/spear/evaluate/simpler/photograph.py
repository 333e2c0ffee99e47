"""The photograph behind SIMPLER's scenes, as it looks in other light, in other colors, or from
another camera pose.

The photograph shows a real table, and its camera's pose is that of the simulated camera. To show it
from elsewhere, it is painted onto a *stage*: the plane of the table, and a dome around it that
stands for the wall. What was not photographed is mirrored from what was. So the table looks right
from everywhere, and everything on it or behind it looks flat.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from spear.sim.textures import TEXTURE_SIZE_PX, draw_texture
from spear.types import Array, WidthAndHeight

DOME_RADIUS_M = 0.7  # of the dome around the point that the camera looks at; the wall is as far
MIN_DEPTH_M = 0.01  # smaller depths in the photographing camera count as this
TEXTURE_PERIOD_M = 0.3  # side of a tile of a texture on the table
GAMMA = 2.2  # of ManiSkill's images: a pixel's value is (brightness) ** (1 / GAMMA)


@dataclass(frozen=True)
class CameraView:
    """A camera without distortion.

    position     [3] m, base frame.
    rotation     [3, 3] from the camera frame (x right, y down, z forward) to the base frame.
    focal_px     focal length, px.
    center_px    (x, y) of the optical axis in the image, px.
    size_px      (width, height) of the image, px.
    """

    position: Array
    rotation: Array
    focal_px: float
    center_px: tuple[float, float]
    size_px: WidthAndHeight

    @property
    def fovy_deg(self) -> float:
        """Vertical view angle, degrees."""
        return math.degrees(2 * math.atan(self.size_px[1] / 2 / self.focal_px))

    def compute_target(self, table_z_m: float) -> Array:
        """Return the point [3] where the optical axis meets the table, m, base frame."""
        forward = self.rotation[:, 2]
        depth_m = (table_z_m - self.position[2]) / forward[2]
        return np.asarray(self.position + depth_m * forward)

    def compute_rays(self) -> Array:
        """Return the direction [h, w, 3] of the ray of each pixel, unit vectors, base frame."""
        width, height = self.size_px
        columns, rows = np.meshgrid(np.arange(width), np.arange(height))
        rays = np.stack(
            [
                (columns - self.center_px[0]) / self.focal_px,
                (rows - self.center_px[1]) / self.focal_px,
                np.ones((height, width)),
            ],
            axis=-1,
        )
        rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
        return np.asarray(rays @ self.rotation.T)

    def project(self, points: Array) -> Array:
        """Return where points [..., 3] (m, base frame) appear: (x, y) [..., 2], px."""
        in_camera = (points - self.position) @ self.rotation
        depth_m = np.maximum(in_camera[..., 2:], MIN_DEPTH_M)
        return np.asarray(in_camera[..., :2] / depth_m * self.focal_px + self.center_px)


def compute_stage_points_of_pixels(camera: CameraView, dome_center: Array) -> Array:
    """Return the point [h, w, 3] of the stage that each pixel of a camera shows, m, base frame.

    Args:
        camera: A camera inside the dome, above the table.
        dome_center: [3] a point on the table.
    """
    rays = camera.compute_rays()
    offset = camera.position - dome_center
    # The ray meets the dome where |offset + distance · ray| is its radius. A camera outside of the
    # dome widens it.
    radius_m = max(DOME_RADIUS_M, 1.05 * float(np.linalg.norm(offset)))
    along_ray = rays @ offset  # [h, w]
    to_dome_m = -along_ray + np.sqrt(along_ray**2 + radius_m**2 - offset @ offset)
    with np.errstate(divide="ignore"):
        to_table_m = -offset[2] / rays[..., 2]
    to_table_m = np.where(rays[..., 2] < 0, to_table_m, np.inf)
    distance_m = np.minimum(to_dome_m, to_table_m)
    return np.asarray(camera.position + distance_m[..., None] * rays)


def reproject_table_and_dome_with_mirrored_margins(
    photograph: Array, photographed_by: CameraView, camera: CameraView, table_z_m: float
) -> NDArray[np.uint8]:
    """Return what another camera would see of the photographed table.

    Args:
        photograph: [h, w, 3] uint8.
        photographed_by: The camera of the photograph.
        camera: The other camera.
        table_z_m: The table's height, m, base frame.

    Returns:
        [h, w, 3] uint8. Parts that were not photographed are mirrored at the photograph's edges.
    """
    points = compute_stage_points_of_pixels(camera, photographed_by.compute_target(table_z_m))
    pixels = photographed_by.project(points)  # [h, w, 2]
    # A single reflection is enough; farther away, the mirrored image's edge is repeated.
    width, height = photographed_by.size_px
    columns = np.clip(pixels[..., 0], -width + 1, 2 * width - 2)
    rows = np.clip(pixels[..., 1], -height + 1, 2 * height - 2)
    channels = []
    for channel in range(3):
        plane = photograph[..., channel].astype(np.float64)
        channels.append(map_coordinates(plane, [rows, columns], order=1, mode="mirror"))
    return np.clip(np.rint(np.stack(channels, axis=-1)), 0, 255).astype(np.uint8)


def measure_photographed_fraction(
    photographed_by: CameraView, camera: CameraView, table_z_m: float
) -> float:
    """Return which fraction of another camera's image the photograph shows, not a mirror of it."""
    points = compute_stage_points_of_pixels(camera, photographed_by.compute_target(table_z_m))
    x, y = np.moveaxis(photographed_by.project(points), -1, 0)
    width, height = photographed_by.size_px
    is_photographed = (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)
    return float(is_photographed.mean())


def relight(photograph: Array, factors: Array) -> NDArray[np.uint8]:
    """Return a photograph as if its light's red, green and blue had changed by factors [3]."""
    return _round_to_uint8(photograph * np.asarray(factors) ** (1 / GAMMA))


def shift_to_mean_color(
    photograph: Array, mean_color: tuple[float, float, float]
) -> NDArray[np.uint8]:
    """Return a photograph whose colors are all moved until their mean is `mean_color`.

    Args:
        photograph: [h, w, 3] uint8.
        mean_color: Red, green and blue, 0 to 1.
    """
    mean = photograph.reshape(-1, 3).mean(axis=0)
    return _round_to_uint8(photograph + (255 * np.asarray(mean_color) - mean))


def colorize(photograph: Array, color: tuple[float, float, float]) -> NDArray[np.uint8]:
    """Return a photograph in which everything has the same color, with the same light and shade.

    Args:
        photograph: [h, w, 3] uint8.
        color: Red, green and blue, 0 to 1.
    """
    gray = photograph.mean(axis=-1, keepdims=True)
    return _round_to_uint8(gray / gray.mean() * 255 * np.asarray(color))


def render_textured_stage(
    texture: str, color: tuple[float, float, float], camera: CameraView, table_z_m: float
) -> NDArray[np.uint8]:
    """Return what a camera sees of a stage that has a texture (`draw_texture`) in a color.

    Args:
        texture: Name of the texture.
        color: Red, green and blue, 0 to 1.
        camera: The camera.
        table_z_m: The table's height, m, base frame.
    """
    points = compute_stage_points_of_pixels(camera, camera.compute_target(table_z_m))
    tile_pixels = np.floor(points[..., :2] / TEXTURE_PERIOD_M * TEXTURE_SIZE_PX).astype(int)
    columns, rows = np.moveaxis(tile_pixels % TEXTURE_SIZE_PX, -1, 0)
    gray = draw_texture(texture)[rows, columns]  # [h, w]
    return _round_to_uint8(gray[..., None] * np.asarray(color))


def _round_to_uint8(values: Array) -> NDArray[np.uint8]:
    """Round values to uint8."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
