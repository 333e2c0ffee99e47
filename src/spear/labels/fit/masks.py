"""Masks of objects: as run lengths; and which pixels are an object's, where masks and depth are
estimates.

The outline of an estimated mask is off by a pixel or two, and estimated depth slides over it from
the object to what is behind ("flying pixels"). Geometry repairs both. Pixels near the outline are
decided anew by where they are in 3D, and those on it that fly take their depth from the inside. All
our choice.

Depth is handled as its inverse, which is straight along pixels on every plane, so that continuing
it is exact there.
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
"""Object and background that differ in depth by more than this fraction of it are separated by
depth."""
FLYING_FRACTION = 0.005
"""A pixel of the outline flies when the inside leads to a depth that differs by more than this
fraction."""
ON_SUPPORT_FRACTION = 0.0025
"""Exact points nearer to the support than this fraction of their distance may lie on it."""
MIN_SMOOTHED_NOISE = 5e-4
"""Relative depth noise (`points.estimate_noise`) from which on depth is smoothed."""
MIN_PART_FRACTION = 0.2
"""A second part of an object has at least this fraction of the pixels of its largest part."""
MIN_OFF_SUPPORT_FRACTION = 0.3
"""`remove_support` leaves a mask alone if less than this fraction of it would stay."""
MIN_LEVEL_POINTS = 8  # beside an object tell the height of the support there


def encode_mask(mask: Array) -> list[int]:
    """Encode a mask [h, w] bool as run lengths, by COCO's convention.

    Returns:
        Alternating counts of zeros and ones, column by column, zeros first (0 when the first pixel
        is set). They add up to h·w.

    Example:
        >>> encode_mask(np.array([[True, False], [True, False]]))
        [0, 2, 2]
    """
    flat = np.asarray(mask, dtype=bool).ravel(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    return np.diff(changes, prepend=0, append=flat.size).tolist()


def decode_mask(runs: Sequence[int] | Array, height: int, width: int) -> Array:
    """Decode the run lengths of `encode_mask`.

    Returns:
        The mask [height, width] bool.

    Raises:
        SpearError: The runs do not add up to the size of the mask.
    """
    counts = np.asarray(runs, dtype=np.int64)
    if (counts < 0).any() or counts.sum() != height * width:
        raise SpearError(
            f"a mask has {counts.sum()} pixels, not {height}×{width}. Label the image again."
        )
    is_one = np.arange(len(counts)) % 2 == 1
    return np.repeat(is_one, counts).reshape((height, width), order="F")


def rasterize_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> Array:
    """Fill polygons by COCO's rule.

    Args:
        polygons: Each as x0, y0, x1, y1, … in pixels.
        height: Height of the mask in pixels.
        width: Width of the mask in pixels.

    Returns:
        The union [height, width] bool of the polygons.

    Raises:
        SpearError: A polygon has an odd number of coordinates, fewer than three points, or one that
            is not finite.
    """
    for polygon in polygons:
        if not _is_polygon(np.asarray(polygon, np.float64)):
            size = np.asarray(polygon, np.float64).size
            raise SpearError(
                f"a polygon has {size} coordinates, or one that is not finite. Give x, y of three "
                "points or more."
            )
    coco = import_optional("pycocotools.mask", "label", "a COCO polygon")
    return np.asarray(coco.decode(coco.merge(coco.frPyObjects(polygons, height, width))), bool)


def _is_polygon(corners: Array) -> bool:
    has_pairs = corners.ndim == 1 and len(corners) % 2 == 0
    return has_pairs and len(corners) >= 6 and bool(np.isfinite(corners).all())


def decode_run_lengths(text: str) -> list[int]:
    """Decode run lengths from COCO's compressed string.

    Each number is in groups of five bits, lowest first. The sixth bit is set while more groups
    follow, and 48 is added to make the letter printable, so "P" and higher continue a number. The
    last group's fifth bit is the sign. From the third number on, it is the difference from the run
    two before.

    pycocotools is not used: it takes a string that is cut off for a mask and fills it up with what
    was in memory.

    Raises:
        SpearError: The text is no such string, or not all of one.
    """
    remainder = re.sub(r"^([P-o]*[0-O])*", "", text)
    if remainder:
        raise SpearError(
            f"a compressed mask is cut off, or is none ({remainder[:20]!r}). Give the whole string."
        )
    runs: list[int] = []
    for number in re.findall(r"[P-o]*[0-O]", text):
        value = sum((ord(letter) - 48 & 31) << 5 * group for group, letter in enumerate(number))
        value -= (ord(number[-1]) - 48 >> 4 & 1) << 5 * len(number)  # the sign
        if len(runs) > 2:
            value += runs[-2]
        runs.append(value)
    return runs


def erode(mask: Array, num_pixels: int) -> Array:
    """The mask [h, w] without its outermost pixels (4-neighborhood), except those at the image's
    edge."""
    for _ in range(num_pixels):
        padded = np.pad(mask, 1, mode="edge")
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


def keep_main_part(mask: Array, points: Array, is_known: Array, limit: float) -> Array:
    """Remove the parts of a mask that leak over edges, on to what is far behind.

    Neighboring pixels belong to one part when their depths differ by less than `limit`, a fraction
    of them. The largest part stays. So does another one if it has a fifth of the largest one's
    pixels and is as far away, since something stands in front of the object then.

    Args:
        mask: [h, w] bool.
        points: [h, w, 3] camera frame.
        is_known: [h, w] bool, where the points are known.
        limit: Largest relative difference in depth between neighbors.
    """
    usable = mask & is_known
    if not usable.any():
        return mask

    # Parts: connected components of the graph of neighbors with similar depth
    num_pixels = int(usable.sum())
    index = np.cumsum(usable).reshape(usable.shape) - 1
    depth = np.where(usable, points[..., 2], 1.0)
    links = []
    for a, b in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:], np.s_[:-1])):
        is_linked = usable[a] & usable[b]
        is_linked &= np.abs(depth[a] - depth[b]) < limit * np.minimum(depth[a], depth[b])
        links.append(np.stack([index[a][is_linked], index[b][is_linked]]))
    starts, ends = np.concatenate(links, axis=1)
    graph = coo_array((np.ones(len(starts), bool), (starts, ends)), shape=(num_pixels, num_pixels))
    _, component = connected_components(graph, directed=False)

    # Those that stay: large enough, and at the depth of the largest
    sizes = np.bincount(component)
    main = int(sizes.argmax())
    z = depth[usable]
    low = z[component == main].min()
    high = z[component == main].max()
    median_depth = ndimage.median(z, component, np.arange(len(sizes)))
    is_large = sizes >= MIN_PART_FRACTION * sizes[main]
    is_as_far = (median_depth > low * (1 - limit)) & (median_depth < high * (1 + limit))
    result = np.zeros_like(mask)
    result[usable] = (is_large & is_as_far)[component]
    return result


def remove_support(
    mask: Array, points: Array, is_known: Array, occupied: Array, plane: Plane, noise: float
) -> Array:
    """Remove the pixels of a mask [h, w] that lie on the support, on to which the mask leaks.

    The mask of a thing as flat as the error of its depth stays as it is. Arguments as in
    `snap_outline`.
    """
    on_object = mask & is_known
    if not on_object.any():
        return mask
    beside = is_known & ~mask & ~occupied & ndimage.binary_dilation(mask, iterations=4)
    height = points @ plane.up - _estimate_level(points[beside], plane)

    # Heights, averaged over 3 × 3 pixels of the object
    total = ndimage.uniform_filter(on_object.astype(np.float64), 3)
    mean_height = ndimage.uniform_filter(np.where(on_object, height, 0.0), 3) / np.maximum(
        total, 1e-9
    )
    limit = max(ON_SUPPORT_FRACTION, noise) * float(np.median(points[on_object][:, 2]))
    trimmed: Array = mask & ~(on_object & (mean_height < limit))

    is_flat = not np.median(height[on_object]) > 2 * limit
    is_mostly_gone = not trimmed.sum() > MIN_OFF_SUPPORT_FRACTION * mask.sum()
    return mask if is_flat or is_mostly_gone else trimmed


def snap_outline(
    mask: Array,
    points: Array,
    is_known: Array,
    occupied: Array,
    plane: Plane | None,
    band_px: int,
    noise: float,
) -> Array:
    """Decide anew which pixels within `band_px` of a mask's outline are the object's.

    Object and background are each continued to such a pixel from where they are certain. Where they
    differ in depth, the pixel belongs to the one that its own depth is nearer to. Where they meet,
    it belongs to the object when it is higher than the support. The mask decides where neither
    tells, and it stays as it is when it is too thin to have an inside.

    Args:
        mask: [h, w] bool.
        points: [h, w, 3] camera frame.
        is_known: [h, w] bool, where the points are known.
        occupied: [h, w] bool, the pixels of other objects.
        plane: The support, None when unknown.
        band_px: Width of the band on either side of the outline.
        noise: Standard deviation of the depth, as a fraction of the depth.

    Returns:
        The new mask [h, w].
    """
    core = erode(mask, band_px) & is_known
    if not core.any():
        return mask
    surroundings = ndimage.binary_dilation(mask, iterations=band_px)
    outside = is_known & ~surroundings
    band = is_known & surroundings & ~core

    # Continue object and background into the band
    inverse = _invert_depth(points, is_known)
    band_pixels = np.argwhere(band)
    reach_px = 2 * band_px + 1
    object_inverse = np.full(band.shape, np.nan)
    object_inverse[band] = _continue_values(inverse, core, band_pixels, reach_px, noise)
    background_inverse = np.full(band.shape, np.nan)
    background_inverse[band] = _continue_values(inverse, outside, band_pixels, reach_px, noise)
    with np.errstate(invalid="ignore"):
        gap = np.abs(object_inverse - background_inverse)
        is_separate = band & (gap > SEPARATION_FRACTION * inverse)
        is_object = np.abs(inverse - object_inverse) < np.abs(inverse - background_inverse)

    result = mask.copy()
    if plane is not None:
        beside = outside & ~occupied & ndimage.binary_dilation(surroundings, iterations=3)
        height = points @ plane.up - _estimate_level(points[beside], plane)
        limit = max(ON_SUPPORT_FRACTION, 2.5 * noise) * float(np.median(points[core][:, 2]))
        # The height of a thing as flat as the error tells nothing.
        if np.median(height[core]) > 2 * limit:
            meets = band & ~is_separate & np.isfinite(object_inverse) & (mask | ~occupied)
            result[meets] = height[meets] > limit
    result[is_separate] = is_object[is_separate]
    return result


def clean_points(mask: Array, points: Array, pixels: Array, erosion_px: int, noise: float) -> Array:
    """Clean the points of some pixels of a mask.

    Points of the outermost pixels that fly are moved to where the inside leads; eroding them away
    would lose the outline with them. Noisy depth is smoothed.

    Args:
        mask: [h, w] bool.
        points: [h, w, 3] of the image, camera frame.
        pixels: [n, 2] row and column of the pixels, all in the mask.
        erosion_px: How many of the outermost pixels may fly; 0 if none does.
        noise: Standard deviation of the depth, as a fraction of the depth.

    Returns:
        The points [n, 3].
    """
    at_pixels = tuple(pixels.T)
    raw_points = points[at_pixels]
    if erosion_px == 0 and noise < MIN_SMOOTHED_NOISE:
        return raw_points
    inner = erode(mask, erosion_px)
    if not inner.any():
        inner = mask
    is_inner = inner[at_pixels]
    inverse = _invert_depth(points, mask)

    # The inside is smoothed without the outline, which would pull it along.
    smooth_inner = _smooth_values(inverse, inner, pixels, noise)
    smooth_all = _smooth_values(inverse, mask, pixels, noise)
    values = np.where(is_inner, smooth_inner, smooth_all)

    # Pixels of the outline take the value to which the inside leads, if they differ from it.
    expected = np.full(len(pixels), np.nan)
    expected[~is_inner] = _continue_values(
        inverse, inner, pixels[~is_inner], 1.5 * erosion_px, noise
    )
    with np.errstate(invalid="ignore"):
        is_flying = np.abs(values - expected) > FLYING_FRACTION * expected
    values = np.where(is_flying, expected, values)
    return raw_points / (raw_points[:, 2] * values)[:, None]


def _invert_depth(points: Array, is_known: Array) -> Array:
    """Inverse depth [h, w], NaN where it is not known."""
    return np.where(
        is_known, 1 / np.where(is_known, points[..., 2], 1.0).astype(np.float64), np.nan
    )


def _estimate_level(beside: Array, plane: Plane) -> float:
    """The height of the support near an object: of the points [n, 3] beside it that are near the
    plane."""
    heights = beside @ plane.up
    is_near = np.abs(heights - plane.height) < 2 * TOUCHING_FRACTION * beside[:, 2]
    heights = heights[is_near]
    return float(np.median(heights)) if len(heights) >= MIN_LEVEL_POINTS else plane.height


def _smooth_values(values: Array, valid: Array, pixels: Array, noise: float) -> Array:
    """The `values` [h, w] of `pixels` [n, 2], smoothed if they are noisy.

    A smoothed value is the median of the value itself and of the means of the four pairs of pixels
    opposite each other around it, as far as they are `valid` [h, w]. Pairs shift no slopes and no
    borders.
    """
    if noise < MIN_SMOOTHED_NOISE:
        return np.asarray(values[tuple(pixels.T)])
    padded = np.pad(np.where(valid, values, np.nan), 1, constant_values=np.nan)
    width = padded.shape[1]
    flat = padded.ravel()
    # The index of each pixel in the flat, padded image. In it, a pixel's neighbors are at these
    # offsets: 1 is the next column, `width` the next row, `width` ∓ 1 that row's pixels to the
    # left and right. The opposite neighbor is at minus the offset. Offset 0 pairs the pixel with
    # itself, so its own value is among the five whose median is taken.
    center = (pixels[:, 0] + 1) * width + pixels[:, 1] + 1
    offsets = (0, 1, width - 1, width, width + 1)
    pair_means = np.stack([(flat[center + k] + flat[center - k]) / 2 for k in offsets])

    # Means of pairs with a pixel that is not valid are NaN. Sorting puts them last, so the other
    # means have the indices 0 to `last`. Their median is the middle one, or the mean of the two in
    # the middle if their number is even.
    pair_means.sort(axis=0)
    last = np.maximum(np.isfinite(pair_means).sum(axis=0) - 1, 0)
    low = np.take_along_axis(pair_means, (last // 2)[None], axis=0)[0]
    high = np.take_along_axis(pair_means, ((last + 1) // 2)[None], axis=0)[0]
    return np.asarray((low + high) / 2)


def _continue_values(
    values: Array, source: Array, targets: Array, reach_px: float, noise: float
) -> Array:
    """Continue the `values` [h, w] of the pixels `source` [h, w] to other pixels along straight
    lines.

    The line leads through two pixels: the pixel of the source that is nearest to the target, and
    the target's mirror image about that pixel. If the mirror image is not in the source, the value
    of the nearest pixel is continued unchanged.

    Args:
        values: [h, w].
        source: [h, w] bool.
        targets: [n, 2] row and column of the pixels to continue to.
        reach_px: How far from the source a target may be.
        noise: As in `_smooth_values`.

    Returns:
        The values [n] of the targets; NaN out of reach.
    """
    result = np.full(len(targets), np.nan)
    if not source.any():
        return result
    distance, nearest = ndimage.distance_transform_edt(~source, return_indices=True)
    is_in_reach = distance[tuple(targets.T)] <= reach_px
    target = targets[is_in_reach]
    start = nearest[:, target[:, 0], target[:, 1]].T
    behind = np.clip(2 * start - target, 0, np.array(values.shape) - 1)
    base = _smooth_values(values, source, start, noise)
    slope = base - _smooth_values(values, source, behind, noise)
    step = np.where(source[tuple(behind.T)], slope, 0.0)
    max_step = TOUCHING_FRACTION * base
    result[is_in_reach] = base + np.clip(step, -max_step, max_step)
    return result
