"""Draw labels on their image: masks, projected 3D boxes and names, in distinct colours."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from spear.labels.fit import rle
from spear.labels.fit.box3d import EDGES
from spear.labels.fit.camera import project
from spear.labels.fit.masks import erode
from spear.types import Array, LabeledImage
from spear.util.images import decode_image


def colors(n: int) -> list[tuple[int, int, int]]:
    """n bright colours that differ in hue as much as they can."""
    return [
        tuple(round(255 * c) for c in colorsys.hsv_to_rgb((0.02 + i * 0.618034) % 1.0, 0.85, 1.0))  # type: ignore[misc]
        for i in range(n)
    ]


def draw_boxes(
    image: Array,
    vertices: Sequence[Array],
    names: Sequence[str],
    intrinsics: Array,
    palette: Sequence[tuple[int, int, int]] | None = None,
    scale: int = 3,
) -> Array:
    """The image [h, w, 3], `scale` times as large, with 3D boxes on it.

    Args:
        image: [h, w, 3] uint8 RGB.
        vertices: per box [8, 3], camera frame, in `box3d.order_vertices` order; boxes that reach behind the
            camera are left out.
        names: per box.
        intrinsics: [3, 3] pixels of the unscaled image.
        palette: RGB per box; `colors` by default.

    Returns:
        [scale·h, scale·w, 3] uint8. The near face is drawn thicker.
    """
    height, width = image.shape[:2]
    canvas = Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=max(10, 5 * scale, width * scale // 36))
    thick = max(1, scale, width * scale // 280)
    for box, name, color in zip(
        vertices, names, palette if palette is not None else colors(len(names)), strict=True
    ):
        if (np.asarray(box)[:, 2] <= 1e-3).any():
            continue
        corners = project(np.asarray(box), intrinsics) * scale
        for i, j in EDGES:
            front = {i, j} <= {0, 1, 4, 5}
            line = [tuple(corners[i].tolist()), tuple(corners[j].tolist())]
            pen.line(line, fill=color, width=thick if front else max(1, thick // 2))
        x, y = corners[:, 0].mean(), corners[:, 1].min()
        place = (float(np.clip(x, 0, width * scale)), float(np.clip(y, 6 * scale, height * scale)))
        pen.text(place, name, fill=color, font=font, anchor="mb", stroke_width=2, stroke_fill=(0, 0, 0))
    return np.asarray(canvas)


def draw_masks(image: Array, masks: Sequence[Array], palette: Sequence[tuple[int, int, int]]) -> Array:
    """The image [h, w, 3] uint8, tinted where the masks [h, w] bool are: each with a colour and an
    outline."""
    tinted = image.copy()
    for mask, color in zip(masks, palette, strict=True):
        tinted[mask] = (0.65 * tinted[mask] + 0.35 * np.array(color)).astype(np.uint8)
        tinted[mask & ~erode(mask, 1)] = color
    return tinted


def draw_label(label: LabeledImage, scale: int = 3, masks: bool = False) -> Array:
    """A labelled image with all its 3D boxes and names, and its masks if wanted: [scale·h, scale·w, 3]
    uint8."""
    image, palette = decode_image(label.image), colors(len(label.objects))
    if masks:
        outlines = [rle.decode(o.mask, label.height, label.width) for o in label.objects]
        image = draw_masks(image, outlines, palette)
    boxed = [(o.box3d.vertices, o.name, c) for o, c in zip(label.objects, palette, strict=True) if o.box3d]
    vertices, names, chosen = zip(*boxed, strict=True) if boxed else ((), (), ())
    return draw_boxes(image, vertices, names, label.intrinsics, chosen, scale)
