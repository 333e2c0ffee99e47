"""Makes docs/figures/labeling.jpg: the four steps from a picture to 3D boxes, in one scene.

python scripts/label_figure.py [SEED]
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from spear.labels.fit.masks import decode_mask
from spear.labels.pipeline import label_with_ground_truth
from spear.report.draw import draw_label, make_palette
from spear.sim.render import render_clutter_frame
from spear.types import Array, LabeledImage

DEFAULT_SEED = 10_003
SIZE_PX = (640, 426)
FONT = ImageFont.load_default(size=17)
CAPTION_FONT = ImageFont.load_default(size=19)
TAG_COLOR = (16, 18, 22)
TEXT_COLOR = (255, 255, 255)
MASK_OPACITY = 0.6
NEAR_COLOR = np.array([253, 231, 37])  # yellow
MIDDLE_COLOR = np.array([33, 145, 140])  # green
FAR_COLOR = np.array([68, 1, 84])  # violet
GAP_PX = 6
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "labeling.jpg"


def write_tag(canvas: Image.Image, corner: tuple[float, float], text: str, font: Any) -> None:
    """Write a text on a dark field, whose lower left corner is given."""
    draw = ImageDraw.Draw(canvas)
    x, y = corner
    x0, y0, x1, y1 = draw.textbbox((x + 5, y - 5), text, font=font, anchor="ls")
    draw.rectangle((x0 - 5, y0 - 4, x1 + 5, y1 + 4), fill=TAG_COLOR)
    draw.text((x + 5, y - 5), text, fill=TEXT_COLOR, font=font, anchor="ls")


def draw_detections(image: Array, label: LabeledImage) -> Image.Image:
    """Draw the 2D box and the name of each object."""
    canvas = Image.fromarray(image)
    draw = ImageDraw.Draw(canvas)
    for labeled_object, color in zip(label.objects, make_palette(len(label.objects)), strict=True):
        x0, y0, x1, y1 = labeled_object.box2d.tolist()
        draw.rectangle((x0, y0, x1, y1), outline=color, width=3)
    for labeled_object in label.objects:
        x0, y0, *_ = labeled_object.box2d.tolist()
        write_tag(canvas, (x0, max(y0, 30.0)), labeled_object.name, FONT)
    return canvas


def draw_masks(image: Array, label: LabeledImage) -> Image.Image:
    """Draw the mask of each object in a color on a faded picture."""
    gray = image.mean(axis=2, keepdims=True)  # [h, w, 1]
    picture = np.repeat(0.8 * gray, 3, axis=2)  # [h, w, 3]
    for labeled_object, color in zip(label.objects, make_palette(len(label.objects)), strict=True):
        mask = decode_mask(labeled_object.mask_runs, label.height, label.width)
        picture[mask] = (1 - MASK_OPACITY) * picture[mask] + MASK_OPACITY * np.array(color)
    return Image.fromarray(picture.astype(np.uint8))


def draw_depth(depth_m: Array) -> Image.Image:
    """Draw the distance of every pixel: near pixels are yellow, far ones violet."""
    near_m, far_m = np.quantile(depth_m, (0.01, 0.97))
    fraction = np.clip((depth_m - near_m) / (far_m - near_m), 0, 1)[..., None]  # [h, w, 1]
    to_middle = NEAR_COLOR + 2 * fraction * (MIDDLE_COLOR - NEAR_COLOR)
    to_far = MIDDLE_COLOR + (2 * fraction - 1) * (FAR_COLOR - MIDDLE_COLOR)
    return Image.fromarray(np.where(fraction < 0.5, to_middle, to_far).astype(np.uint8))


def join_panels(panels: list[Image.Image], captions: list[str]) -> Image.Image:
    """Put four panels with their captions into two rows."""
    width, height = SIZE_PX
    canvas = Image.new("RGB", (2 * width + GAP_PX, 2 * height + GAP_PX), (255, 255, 255))
    for index, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        write_tag(panel, (0, 28), caption, CAPTION_FONT)
        row, column = divmod(index, 2)
        canvas.paste(panel, (column * (width + GAP_PX), row * (height + GAP_PX)))
    return canvas


def main(seed: int) -> None:
    """Draw the figure."""
    frame = render_clutter_frame(seed, "external", SIZE_PX)
    assert frame.depth is not None  # the renderer knows it
    (label,) = label_with_ground_truth([frame])
    objects = [item for item in label.objects if item.box3d and "robot" not in item.name]
    label = dataclasses.replace(label, objects=objects)
    panels = [
        draw_detections(frame.image, label),
        draw_masks(frame.image, label),
        draw_depth(frame.depth),
        Image.fromarray(draw_label(label, scale=1)),
    ]
    captions = ["1  names and 2D boxes", "2  masks", "3  a 3D point for every pixel", "4  3D boxes"]
    join_panels(panels, captions).save(FIGURE, quality=88, optimize=True)
    print(f"{FIGURE.name}: {FIGURE.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_SEED)
