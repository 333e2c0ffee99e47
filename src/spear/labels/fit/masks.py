"""Masks of objects: encoding them as run lengths, and correcting estimated ones by their 3D points.

The outline of an estimated mask is off by a pixel or two. Estimated depth does not jump at the
outline, but changes gradually from the object to what is behind it. The 3D points in between belong
to neither surface; they are called "flying pixels". `snap_outline` decides by the 3D points which
pixels near the outline belong to the object. `denoise_points_at_pixels` gives flying pixels on the
outline the depth to which pixels further inside the object lead. All of this is our choice.

The functions compute with inverse depth, because inverse depth on a plane is a linear function of
the pixel's row and column. Continuing it from some pixels to others is therefore exact on a plane.

Three terms describe surfaces here. The *support* is the plane on which the objects stand. The
*height* of a point is its component along the support's normal `Plane.up`; `Plane.height` is the
support's own height. A *part* of a mask is a connected set of its pixels without jumps in depth.
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
"""Depth tells object and background apart when their inverse depths differ by more than this
fraction."""
FLYING_FRACTION = 0.005
"""A pixel of the outline counts as flying when its inverse depth differs by more than this fraction
from the value to which the pixels inside the object lead."""
ON_SUPPORT_FRACTION = 0.0025
"""A point may lie on the support when its height above the support is less than this fraction of
its distance from the camera. The fraction is for exact points; noise widens it."""
MIN_SMOOTHED_NOISE = 5e-4
"""Depth is smoothed when its noise, as a fraction of the depth (`points.estimate_relative_noise`),
is at least this."""
MIN_PART_FRACTION = 0.2
"""`drop_small_and_distant_parts` drops parts with a smaller fraction of the largest part's pixels.
"""
MIN_OFF_SUPPORT_FRACTION = 0.3
"""`drop_support_pixels` leaves a mask as it is if less than this fraction of it would remain."""
MIN_LEVEL_POINTS = 8  # with fewer points beside an object, their height says nothing


def encode_mask(mask: Array) -> list[int]:
    """Encode a mask [h, w] bool as run lengths, by COCO's convention.

    Returns:
        Alternating counts of zeros and ones, column by column, zeros first (0 when the first pixel
        is set). They add up to h·w.

    Example:
        >>> encode_mask(np.array([[True, False], [True, False]]))
        [0, 2, 2]
    """
    flat = np.asarray(mask, dtype=bool).ravel(order="F")  # column by column
    run_starts = np.flatnonzero(np.diff(flat, prepend=False))  # indices where the value changes
    return np.diff(run_starts, prepend=0, append=flat.size).tolist()


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
    is_one = np.arange(len(counts)) % 2 == 1  # the first run is of zeros
    return np.repeat(is_one, counts).reshape((height, width), order="F")


def rasterize_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> Array:
    """Make a mask from polygons, with pycocotools' rule for pixels on their borders.

    Args:
        polygons: The corners of each polygon as x0, y0, x1, y1, … in pixels.
        height: Height of the mask in pixels.
        width: Width of the mask in pixels.

    Returns:
        The union [height, width] bool of the polygons.

    Raises:
        SpearError: A polygon has an odd number of coordinates, fewer than three points, or a
            coordinate that is not finite.
    """
    for polygon in polygons:
        if not _is_polygon(np.asarray(polygon, np.float64)):
            size = np.asarray(polygon, np.float64).size
            raise SpearError(
                f"a polygon has {size} coordinates, or one that is not finite. Give x, y of three "
                "points or more."
            )
    coco = import_optional("pycocotools.mask", "label", "a COCO polygon")
    encoded_polygons = coco.frPyObjects(polygons, height, width)
    encoded_union = coco.merge(encoded_polygons)
    return np.asarray(coco.decode(encoded_union), bool)


def _is_polygon(corners: Array) -> bool:
    """Whether `corners` are x0, y0, x1, y1, … of at least three finite points."""
    has_pairs = corners.ndim == 1 and len(corners) % 2 == 0
    return has_pairs and len(corners) >= 6 and bool(np.isfinite(corners).all())


def decode_coco_run_length_string(text: str) -> list[int]:
    """Decode run lengths from COCO's compressed string.

    A letter of the string is a group of six bits, plus 48 to make it printable. The lower five bits
    belong to a number, whose lowest five bits come first. The sixth bit is set in all letters of a
    number but the last; letters from "P" on have it. The fifth bit of a number's last letter is the
    number's sign. The first three numbers are run lengths. Each later number is the difference of a
    run length from the one two runs before.

    pycocotools is not used, because it accepts a truncated string and fills the rest of the mask
    with whatever is in memory.

    Raises:
        SpearError: The text is no such string, or a truncated one.
    """
    # A number is any number of letters with the sixth bit (P to o), and one without it (0 to O).
    remainder = re.sub(r"^([P-o]*[0-O])*", "", text)  # what follows the last whole number
    if remainder:
        raise SpearError(
            f"a compressed mask is cut off, or is none ({remainder[:20]!r}). Give the whole string."
        )
    runs: list[int] = []
    for number_letters in re.findall(r"[P-o]*[0-O]", text):
        value = 0
        for group, letter in enumerate(number_letters):
            five_bits = (ord(letter) - 48) & 31
            value += five_bits << (5 * group)
        # A set sign bit makes the number negative: two's complement, with 5 bits per letter.
        sign_bit = ((ord(number_letters[-1]) - 48) >> 4) & 1
        value -= sign_bit << (5 * len(number_letters))
        if len(runs) > 2:
            value += runs[-2]
        runs.append(value)
    return runs


def erode_keeping_image_edge(mask: Array, num_pixels: int) -> Array:
    """Remove `num_pixels` layers of outermost pixels from a mask [h, w].

    A pixel is outermost when one of its four neighbors is not in the mask. The image's edge counts
    as mask, so pixels at the edge are removed only because of neighbors inside the image.
    """
    for _ in range(num_pixels):
        padded = np.pad(mask, 1, mode="edge")
        above = padded[:-2, 1:-1]
        below = padded[2:, 1:-1]
        left = padded[1:-1, :-2]
        right = padded[1:-1, 2:]
        mask = mask & above & below & left & right
    return mask


def drop_small_and_distant_parts(
    mask: Array, points: Array, is_known: Array, max_depth_step: float
) -> Array:
    """Remove the parts of a mask apart from its main part, where the mask leaks over an edge.

    Neighboring pixels belong to one part when their depths differ by less than the fraction
    `max_depth_step`. The largest part stays. A smaller part stays if it has at least
    `MIN_PART_FRACTION` of the largest part's pixels and the same distance from the camera, since
    then something in front of the object probably divides it.

    Args:
        mask: [h, w] bool.
        points: [h, w, 3] camera frame.
        is_known: [h, w] bool, where the points are known.
        max_depth_step: Largest difference in depth between neighboring pixels of one part, as a
            fraction of the depth.

    Returns:
        The remaining mask [h, w]. Pixels without a known point are removed, unless the mask has no
        other pixels.
    """
    is_usable = mask & is_known
    if not is_usable.any():
        return mask

    # Parts are the connected components of a graph. Its nodes are the n usable pixels, numbered in
    # reading order. Its edges link neighboring pixels with similar depth.
    num_pixels = int(is_usable.sum())
    node = np.cumsum(is_usable).reshape(is_usable.shape) - 1  # [h, w], meaningful where usable
    depth = np.where(is_usable, points[..., 2], 1.0)
    right = np.s_[:, 1:]
    left = np.s_[:, :-1]
    lower = np.s_[1:]
    upper = np.s_[:-1]
    links = []
    for a, b in ((right, left), (lower, upper)):
        is_linked = is_usable[a] & is_usable[b]
        is_linked &= np.abs(depth[a] - depth[b]) < max_depth_step * np.minimum(depth[a], depth[b])
        links.append(np.stack([node[a][is_linked], node[b][is_linked]]))
    starts, ends = np.concatenate(links, axis=1)
    graph = coo_array((np.ones(len(starts), bool), (starts, ends)), shape=(num_pixels, num_pixels))
    _, part_of_node = connected_components(graph, directed=False)  # [n]

    # A part stays if it is large enough and at the depth of the largest part, the main part.
    sizes = np.bincount(part_of_node)  # [parts]
    main_part = int(sizes.argmax())
    node_depth = depth[is_usable]  # [n]
    main_depth = node_depth[part_of_node == main_part]
    nearest_depth = main_depth.min() * (1 - max_depth_step)
    furthest_depth = main_depth.max() * (1 + max_depth_step)
    median_depth = ndimage.median(node_depth, part_of_node, np.arange(len(sizes)))  # [parts]
    is_large = sizes >= MIN_PART_FRACTION * sizes[main_part]
    is_at_main_depth = (median_depth > nearest_depth) & (median_depth < furthest_depth)
    is_retained = is_large & is_at_main_depth  # [parts]
    result = np.zeros_like(mask)
    result[is_usable] = is_retained[part_of_node]
    return result


def drop_support_pixels(
    mask: Array, points: Array, is_known: Array, occupied: Array, plane: Plane, noise: float
) -> Array:
    """Remove the pixels of a mask that lie on the support, where the mask leaks on to the support.

    The mask stays in either of two cases: the object rises so little above the support that it
    could be an error of the depth, or too little of the mask would remain.

    Args:
        mask: [h, w] bool.
        points: [h, w, 3] camera frame.
        is_known: [h, w] bool, where the points are known.
        occupied: [h, w] bool, the pixels of other objects.
        plane: The support.
        noise: Standard deviation of the depth, as a fraction of the depth.

    Returns:
        The new mask [h, w].
    """
    is_on_object = mask & is_known
    if not is_on_object.any():
        return mask
    # The pixels beside the object, at most 4 pixels away, show the support near the object.
    is_near_mask = ndimage.binary_dilation(mask, iterations=4)
    is_beside = is_known & ~mask & ~occupied & is_near_mask
    level = _estimate_support_height_near_object(points[is_beside], plane)
    height = points @ plane.up - level  # [h, w] above the support

    # Average the heights over 3 × 3 pixels, of which only the object's pixels count. The filter
    # divides both sums by 9, so their quotient is the mean over the object's pixels.
    object_fraction = ndimage.uniform_filter(is_on_object.astype(np.float64), 3)
    height_sum = ndimage.uniform_filter(np.where(is_on_object, height, 0.0), 3)
    mean_height = height_sum / np.maximum(object_fraction, 1e-9)
    limit = max(ON_SUPPORT_FRACTION, noise) * float(np.median(points[is_on_object][:, 2]))
    is_on_support = is_on_object & (mean_height < limit)
    trimmed: Array = mask & ~is_on_support

    # If the median height is NaN, the mask stays. Comparisons with NaN are False, so `is_flat` is
    # written as `not … > …`, which is then True. With `<=` it would be False.
    is_flat = not np.median(height[is_on_object]) > 2 * limit
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
    """Decide by the 3D points which pixels within `band_px` of a mask's outline are the object's.

    These pixels are the band. The pixels that the band encloses, the core, certainly belong to the
    object, and the pixels beyond the band certainly do not. The inverse depth of the core and that
    of the pixels beyond are both continued into the band. A pixel of the band is decided by the
    first rule that applies:

    1. Object and background differ in depth there: the pixel belongs to the one whose continued
       inverse depth is nearer to the pixel's own.
    2. Object and background meet there, and the support is known: the pixel belongs to the object
       if it is higher than the support.
    3. Otherwise the pixel stays as the mask has it.

    A mask that is too thin to have a core is returned unchanged.

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
    core = erode_keeping_image_edge(mask, band_px) & is_known
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
    object_inverse[band] = _extrapolate_values(inverse, core, band_pixels, reach_px, noise)
    background_inverse = np.full(band.shape, np.nan)
    background_inverse[band] = _extrapolate_values(inverse, outside, band_pixels, reach_px, noise)
    with np.errstate(invalid="ignore"):  # NaN, where a value is unknown, fails each comparison
        gap = np.abs(object_inverse - background_inverse)
        is_separate = band & (gap > SEPARATION_FRACTION * inverse)
        distance_to_object = np.abs(inverse - object_inverse)
        distance_to_background = np.abs(inverse - background_inverse)
        is_object = distance_to_object < distance_to_background

    # Rule 2, where object and support meet
    result = mask.copy()
    if plane is not None:
        # The pixels at most 3 pixels outside the band show the support near the object.
        is_beside = outside & ~occupied & ndimage.binary_dilation(surroundings, iterations=3)
        level = _estimate_support_height_near_object(points[is_beside], plane)
        height = points @ plane.up - level  # [h, w] above the support
        # 2.5 standard deviations of noise (our choice), as a length at the object's distance
        limit = max(ON_SUPPORT_FRACTION, 2.5 * noise) * float(np.median(points[core][:, 2]))
        # If the object is as flat as the error of its height, heights decide nothing.
        if np.median(height[core]) > 2 * limit:
            is_candidate = mask | ~occupied  # pixels of other objects stay theirs
            is_contact = band & ~is_separate & np.isfinite(object_inverse) & is_candidate
            result[is_contact] = height[is_contact] > limit

    # Rule 1, where depth tells object and background apart. It is applied last because it has
    # precedence over rule 2.
    result[is_separate] = is_object[is_separate]
    return result


def denoise_points_at_pixels(
    mask: Array, points: Array, pixels: Array, erosion_px: int, noise: float
) -> Array:
    """Denoise the points of some pixels of a mask.

    Noisy depth is smoothed. The outermost pixels that fly (see the module's docstring) get the
    depth to which the pixels further inside lead. Removing these pixels instead would make the
    object smaller than it is.

    Args:
        mask: [h, w] bool.
        points: [h, w, 3] of the image, camera frame.
        pixels: [n, 2] row and column of these pixels, all in the mask.
        erosion_px: How many layers of outermost pixels may fly; 0 if none does.
        noise: Standard deviation of the depth, as a fraction of the depth.

    Returns:
        The points [n, 3].
    """
    at_pixels = (pixels[:, 0], pixels[:, 1])
    raw_points = points[at_pixels]  # [n, 3]
    if erosion_px == 0 and noise < MIN_SMOOTHED_NOISE:
        return raw_points
    inner = erode_keeping_image_edge(mask, erosion_px)
    if not inner.any():
        inner = mask
    is_inner = inner[at_pixels]
    inverse = _invert_depth(points, mask)  # [h, w]

    # Inner pixels are smoothed without the outline, whose flying pixels would distort them.
    smooth_inner = _smooth_values_at(inverse, inner, pixels, noise)
    smooth_all = _smooth_values_at(inverse, mask, pixels, noise)
    values = np.where(is_inner, smooth_inner, smooth_all)  # [n] inverse depths

    # Pixels of the outline that differ from the value to which the inside leads take that value.
    expected = np.full(len(pixels), np.nan)
    reach_px = 1.5 * erosion_px  # the layers are √2 · erosion_px wide along a diagonal
    expected[~is_inner] = _extrapolate_values(inverse, inner, pixels[~is_inner], reach_px, noise)
    with np.errstate(invalid="ignore"):
        is_flying = np.abs(values - expected) > FLYING_FRACTION * expected
    values = np.where(is_flying, expected, values)

    # Move each point along its ray, so that its depth z becomes 1 / value.
    scale = raw_points[:, 2] * values
    return raw_points / scale[:, None]


def _invert_depth(points: Array, is_known: Array) -> Array:
    """The inverse depth [h, w] of points [h, w, 3]; NaN where `is_known` [h, w] is False."""
    depth = np.where(is_known, points[..., 2], 1.0).astype(np.float64)
    return np.where(is_known, 1 / depth, np.nan)


def _estimate_support_height_near_object(points_beside: Array, plane: Plane) -> float:
    """The height of the support near an object.

    It is the median height of the points beside the object that are near the support plane, or the
    plane's height if they are too few.

    Args:
        points_beside: [n, 3] points beside the object, camera frame.
        plane: The support.
    """
    heights = points_beside @ plane.up
    is_near = np.abs(heights - plane.height) < 2 * TOUCHING_FRACTION * points_beside[:, 2]
    heights = heights[is_near]
    return float(np.median(heights)) if len(heights) >= MIN_LEVEL_POINTS else plane.height


def _smooth_values_at(values: Array, valid: Array, pixels: Array, noise: float) -> Array:
    """The `values` of some pixels, smoothed if they are noisy.

    The eight neighbors of a pixel are four pairs of pixels opposite each other. The smoothed value
    is the median of the pixel's own value and of the means of these pairs. A pair with an invalid
    pixel does not count. On a slope the mean of a pair is the value at its center, so smoothing
    shifts neither slopes nor borders.

    Args:
        values: [h, w].
        valid: [h, w] bool, the pixels that may take part in smoothing.
        pixels: [n, 2] row and column of the pixels to smooth.
        noise: Standard deviation of the depth, as a fraction of the depth.

    Returns:
        The smoothed values [n].
    """
    if noise < MIN_SMOOTHED_NOISE:
        return np.asarray(values[pixels[:, 0], pixels[:, 1]])
    padded = np.pad(np.where(valid, values, np.nan), 1, constant_values=np.nan)
    width = padded.shape[1]
    flat = padded.ravel()
    center = (pixels[:, 0] + 1) * width + pixels[:, 1] + 1  # [n] indices into `flat`
    # Offsets in `flat` from a pixel to one neighbor of each pair: 1 is the next column, `width` the
    # next row, `width` - 1 and `width` + 1 the pixels to the left and right in the next row. The
    # opposite neighbor is at minus the offset. Offset 0 pairs the pixel with itself, so that its
    # own value is among the five of which the median is taken.
    offsets = (0, 1, width - 1, width, width + 1)
    pair_means = np.stack([(flat[center + k] + flat[center - k]) / 2 for k in offsets])  # [5, n]

    # The mean of a pair with an invalid pixel is NaN. Sorting puts NaN last, so the finite means of
    # a pixel have the indices 0 to `last_index`. Their median is the mean of the elements with
    # indices `low_middle` and `high_middle`, which are equal if the number of means is odd.
    pair_means.sort(axis=0)
    num_finite = np.isfinite(pair_means).sum(axis=0)  # [n]
    last_index = np.maximum(num_finite - 1, 0)
    low_middle = last_index // 2
    high_middle = (last_index + 1) // 2
    low = np.take_along_axis(pair_means, low_middle[None], axis=0)[0]
    high = np.take_along_axis(pair_means, high_middle[None], axis=0)[0]
    return np.asarray((low + high) / 2)


def _extrapolate_values(
    values: Array, source: Array, targets: Array, reach_px: float, noise: float
) -> Array:
    """Extrapolate `values` linearly from the pixels `source` to the pixels `targets`.

    A target's value is extrapolated from two pixels: the source pixel that is nearest to the
    target, and the target's mirror image about that pixel. If the mirror image is not in the
    source, the target gets the value of the nearest pixel.

    Args:
        values: [h, w].
        source: [h, w] bool, the pixels whose values are continued.
        targets: [n, 2] row and column of the pixels that get values.
        reach_px: How far from the source a target may be.
        noise: Standard deviation of the depth, as a fraction of the depth. It decides whether the
            values of the two pixels are smoothed (`_smooth_values_at`).

    Returns:
        The values [n] of the targets; NaN out of reach.
    """
    target_values = np.full(len(targets), np.nan)
    if not source.any():
        return target_values
    # Distance [h, w] to the nearest source pixel, and that pixel's row and column [2, h, w]
    distance, nearest = ndimage.distance_transform_edt(~source, return_indices=True)
    is_in_reach = distance[targets[:, 0], targets[:, 1]] <= reach_px
    target = targets[is_in_reach]  # [k, 2]
    nearest_source = nearest[:, target[:, 0], target[:, 1]].T  # [k, 2] nearest source pixels
    mirror_image = 2 * nearest_source - target
    mirror_pixel = np.clip(mirror_image, 0, np.array(values.shape) - 1)  # [k, 2] inside the image

    # The nearest source pixel is halfway between the mirror pixel and the target. So the value is
    # taken to change by the same amount in both halves.
    base = _smooth_values_at(values, source, nearest_source, noise)
    change = base - _smooth_values_at(values, source, mirror_pixel, noise)
    is_mirror_in_source = source[mirror_pixel[:, 0], mirror_pixel[:, 1]]
    step = np.where(is_mirror_in_source, change, 0.0)
    max_step = TOUCHING_FRACTION * base
    target_values[is_in_reach] = base + np.clip(step, -max_step, max_step)
    return target_values
