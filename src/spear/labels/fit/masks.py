"""Masks of objects: as run lengths; and which pixels are an object's, where masks and depth are estimates.

The outline of an estimated mask is off by a pixel or two, and estimated depth slides over it from the object
to what is behind ("flying pixels"). Geometry mends both: pixels near the outline are decided anew by where
they are in 3D, and those on it that fly take their depth from the inside. All our choice.

Depth is handled as its inverse, which is straight along pixels on every plane: there, continuing it is exact.
"""

import re
from collections.abc import Sequence

import numpy as np
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from spear.errors import SpearError, import_optional
from spear.labels.fit.points import TOUCHING_FRACTION, Plane
from spear.types import Array

SEPARATION_FRACTION = 0.01
"""Object and background that differ in depth by more than this fraction of it are told apart by it."""
FLYING_FRACTION = 0.005
"""A pixel of the outline flies when the inside leads to another depth by more than this fraction of it."""
ON_SUPPORT_FRACTION = 0.0025
"""Exact points nearer to the support than this fraction of their distance may lie on it."""
MIN_SMOOTHED_NOISE = 5e-4
"""Relative depth noise (`points.noise_level`) from which on depth is smoothed."""


def encode_mask(mask: Array) -> list[int]:
    """A mask [h, w] bool as run lengths, COCO's convention: alternating counts of zeros and ones, column by
    column, zeros first (0 when the first pixel is set); they sum to h·w."""
    flat = np.asarray(mask, dtype=bool).ravel(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    return np.diff(changes, prepend=0, append=flat.size).tolist()


def decode_mask(runs: Sequence[int] | Array, height: int, width: int) -> Array:
    """The mask [height, width] bool of run lengths; `SpearError` when they do not add up to its size."""
    counts = np.asarray(runs, dtype=np.int64)
    if (counts < 0).any() or counts.sum() != height * width:
        raise SpearError(
            f"mask of {counts.sum()} pixels, not {height}×{width}: label the image again"
        )
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape((height, width), order="F")


def rasterize_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> Array:
    """The union [height, width] bool of polygons, each x0, y0, x1, y1, … in pixels, filled by COCO's rule.
    `SpearError` for a polygon of an odd number of coordinates, fewer than three points, or not finite."""
    for polygon in polygons:
        corners = np.asarray(polygon, np.float64)
        if (
            corners.ndim != 1
            or len(corners) % 2
            or len(corners) < 6
            or not np.isfinite(corners).all()
        ):
            raise SpearError(
                f"polygon of size {corners.size}: give x, y of three points or more, finite"
            )
    coco = import_optional("pycocotools.mask", "label", "a COCO polygon")
    return np.asarray(coco.decode(coco.merge(coco.frPyObjects(polygons, height, width))), bool)


def decode_run_lengths(text: str) -> list[int]:
    """Run lengths from COCO's compressed string; `SpearError` for a string that is none, or not all of one.

    Each number is in groups of five bits, lowest first; the sixth bit is set while more groups follow, and 48
    makes it printable: from "P" on. The last group's fifth bit is the sign. From the third on, it is the
    difference from the run two before. Not by pycocotools, which takes a string that is cut off for a mask,
    filled up with what was in memory.
    """
    if rest := re.sub(r"^([P-o]*[0-O])*", "", text):
        raise SpearError(
            f"compressed mask: {rest[:20]!r} is none, or cut off: give the whole string"
        )
    runs: list[int] = []
    for number in re.findall(r"[P-o]*[0-O]", text):
        value = sum((ord(letter) - 48 & 31) << 5 * place for place, letter in enumerate(number))
        value -= (ord(number[-1]) - 48 >> 4 & 1) << 5 * len(number)
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs


def erode(mask: Array, pixels: int) -> Array:
    """The mask [h, w] without its outermost `pixels` (4-neighbourhood), but for those at the image's edge."""
    for _ in range(pixels):
        padded = np.pad(mask, 1, mode="edge")
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


def keep_main_part(mask: Array, points: Array, known: Array, limit: float) -> Array:
    """The pixels of a mask [h, w] that are connected in depth to most of it: neighbours belong to one part
    when their depths differ by less than `limit`, a fraction of them. Masks leak over edges, on to what is
    far behind. Another part stays if it has a fifth of the pixels of the largest and is as far away:
    something stands in front of the object."""
    where = mask & known
    if not where.any():
        return mask
    number = np.cumsum(where).reshape(where.shape) - 1
    depth = np.where(where, points[..., 2], 1.0)
    pairs = []
    for a, b in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:], np.s_[:-1])):
        near = where[a] & where[b]
        near &= np.abs(depth[a] - depth[b]) < limit * np.minimum(depth[a], depth[b])
        pairs.append(np.stack([number[a][near], number[b][near]]))
    one, other = np.concatenate(pairs, axis=1)
    count = int(where.sum())
    links = coo_array((np.ones(len(one), bool), (one, other)), shape=(count, count))
    part = connected_components(links, directed=False)[1]
    sizes = np.bincount(part)
    main = int(sizes.argmax())
    z = depth[where]
    low, high = z[part == main].min(), z[part == main].max()
    middle = ndimage.median(z, part, np.arange(len(sizes)))
    stays = (
        (sizes >= 0.2 * sizes[main]) & (middle > low * (1 - limit)) & (middle < high * (1 + limit))
    )
    result = np.zeros_like(mask)
    result[where] = stays[part]
    return result


def remove_support(
    mask: Array, points: Array, known: Array, taken: Array, plane: Plane, noise: float
) -> Array:
    """The mask [h, w] without the pixels that lie on the support, on to which it leaks, but for that of a
    thing as flat as the error; arguments as in `snap`."""
    beside = known & ~mask & ~taken & ndimage.binary_dilation(mask, iterations=4)
    above = points @ plane.up - _level(points[beside], plane)
    own = mask & known
    total = ndimage.uniform_filter(own.astype(np.float64), 3)
    smooth = ndimage.uniform_filter(np.where(own, above, 0.0), 3) / np.maximum(total, 1e-9)
    limit = (
        max(ON_SUPPORT_FRACTION, noise) * float(np.median(points[own][:, 2])) if own.any() else 0.0
    )
    kept: Array = mask & ~(own & (smooth < limit))
    return (
        kept
        if own.any() and np.median(above[own]) > 2 * limit and kept.sum() > 0.3 * mask.sum()
        else mask
    )


def snap_outline(
    mask: Array,
    points: Array,
    known: Array,
    taken: Array,
    plane: Plane | None,
    pixels: int,
    noise: float,
) -> Array:
    """The mask [h, w] with the pixels within `pixels` of its outline decided anew.

    Where object and background, each continued to such a pixel from where they are certain, differ in depth,
    it belongs to the one that its own depth is nearer to. Where they meet, it belongs to the object when it
    is higher than the support. What neither tells, the mask does; one too thin to have an inside stays.

    points  [h, w, 3] camera frame; known: [h, w] where they are; taken: [h, w] the pixels of other objects.
    plane   the support, None when unknown; noise: of the depth, as a fraction of it.
    """
    core = erode(mask, pixels) & known
    if not core.any():
        return mask
    reach = ndimage.binary_dilation(mask, iterations=pixels)
    outside, band = known & ~reach, known & reach & ~core
    inverse, wanted = _inverse(points, known), np.argwhere(band)
    front, back = np.full(band.shape, np.nan), np.full(band.shape, np.nan)
    front[band] = _continued(inverse, core, wanted, 2 * pixels + 1, noise)
    back[band] = _continued(inverse, outside, wanted, 2 * pixels + 1, noise)
    with np.errstate(invalid="ignore"):
        apart = band & (np.abs(front - back) > SEPARATION_FRACTION * inverse)
        nearer = np.abs(inverse - front) < np.abs(inverse - back)
    result = mask.copy()
    if plane is not None:
        beside = outside & ~taken & ndimage.binary_dilation(reach, iterations=3)
        above = points @ plane.up - _level(points[beside], plane)
        limit = max(ON_SUPPORT_FRACTION, 2.5 * noise) * float(np.median(points[core][:, 2]))
        if (
            np.median(above[core]) > 2 * limit
        ):  # a thing as flat as the error cannot be told by its height
            meet = band & ~apart & np.isfinite(front) & (mask | ~taken)
            result[meet] = above[meet] > limit
    result[apart] = nearer[apart]
    return result


def clean_points(mask: Array, points: Array, pixels: Array, erosion: int, noise: float) -> Array:
    """The points [n, 3] of a mask's `pixels` [n, 2], cleaned, out of the image's [h, w, 3].

    Those of the outermost `erosion` pixels that fly are put where the inside leads to: eroding them away
    would lose the outline with them. Noisy depth is smoothed.
    """
    found = points[tuple(pixels.T)]
    if erosion == 0 and noise < MIN_SMOOTHED_NOISE:
        return found
    inner = erode(mask, erosion)
    inner = inner if inner.any() else mask
    inverse, own = _inverse(points, mask), inner[tuple(pixels.T)]
    # The inside is smoothed without the outline, which would pull it along.
    values = np.where(
        own, _value(inverse, inner, pixels, noise), _value(inverse, mask, pixels, noise)
    )
    expected = np.full(len(pixels), np.nan)
    expected[~own] = _continued(inverse, inner, pixels[~own], 1.5 * erosion, noise)
    with np.errstate(invalid="ignore"):
        values = np.where(np.abs(values - expected) > FLYING_FRACTION * expected, expected, values)
    return found / (found[:, 2] * values)[:, None]


def _inverse(points: Array, where: Array) -> Array:
    """Inverse depth [h, w], NaN elsewhere."""
    return np.where(where, 1 / np.where(where, points[..., 2], 1.0).astype(np.float64), np.nan)


def _level(beside: Array, plane: Plane) -> float:
    """The height of the support near an object: of the points [n, 3] beside it that are near the plane."""
    heights = beside @ plane.up
    heights = heights[np.abs(heights - plane.height) < 2 * TOUCHING_FRACTION * beside[:, 2]]
    return float(np.median(heights)) if len(heights) >= 8 else plane.height


def _value(values: Array, where: Array, pixels: Array, noise: float) -> Array:
    """The `values` [h, w] of `pixels` [n, 2]; if they are noisy the median of each and of the means of the
    pairs opposite each other around it, as far as they are `where`. Pairs shift no slopes and no borders."""
    if noise < MIN_SMOOTHED_NOISE:
        return np.asarray(values[tuple(pixels.T)])
    padded = np.pad(np.where(where, values, np.nan), 1, constant_values=np.nan)
    width, flat = padded.shape[1], padded.ravel()
    at = (pixels[:, 0] + 1) * width + pixels[:, 1] + 1
    five = np.stack(
        [(flat[at + k] + flat[at - k]) / 2 for k in (0, 1, width - 1, width, width + 1)]
    )
    five.sort(axis=0)
    last = np.maximum(np.isfinite(five).sum(axis=0) - 1, 0)
    low, high = (np.take_along_axis(five, n[None], axis=0)[0] for n in (last // 2, (last + 1) // 2))
    return np.asarray((low + high) / 2)


def _continued(values: Array, source: Array, wanted: Array, reach: float, noise: float) -> Array:
    """`values` [h, w] of the pixels `source` continued to the `wanted` ones [n, 2] no further than `reach`
    pixels from one: along the straight line from the nearest and the one as far behind it. NaN elsewhere."""
    result = np.full(len(wanted), np.nan)
    if not source.any():
        return result
    distance, nearest = ndimage.distance_transform_edt(~source, return_indices=True)
    near = distance[tuple(wanted.T)] <= reach
    here = wanted[near]
    there = nearest[:, here[:, 0], here[:, 1]].T
    behind = np.clip(2 * there - here, 0, np.array(values.shape) - 1)
    base = _value(values, source, there, noise)
    step = np.where(source[tuple(behind.T)], base - _value(values, source, behind, noise), 0.0)
    result[near] = base + np.clip(step, -TOUCHING_FRACTION * base, TOUCHING_FRACTION * base)
    return result
