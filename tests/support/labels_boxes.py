"""Makes labeled images of three cubes in a row, without the simulator. The pixels are all gray."""

import numpy as np

from spear.labels.fit.box3d import make_box
from spear.labels.fit.image import project
from spear.types import LabeledImage, LabeledObject, Unit
from spear.util.images import encode_jpeg

WIDTH_PX = 140
HEIGHT_PX = 105
INTRINSICS = np.array([[140.0, 0, 70], [0, 140, 52.5], [0, 0, 1]])


def make_labeled_image(seed: int, scale: float = 1.0, unit: Unit = "metre") -> LabeledImage:
    """Make a labeled image of a mug, a spoon and a bowl, which are cubes of 6 cm.

    Args:
        seed: decides the distances, which are between 0.8 and 0.9 m.
        scale: factor on all lengths.
        unit: the unit of the label.
    """
    empty_mask = [WIDTH_PX * HEIGHT_PX]  # run lengths, of which the first counts zeros
    rng = np.random.default_rng(seed)
    objects = []
    for index, name in enumerate(("mug", "spoon", "bowl")):
        x = -0.2 + 0.2 * index  # from left to right, in meters
        z = 0.8 + 0.1 * rng.random()
        center = np.array([x, 0.02, z])
        box = make_box(scale * center, np.full(3, scale * 0.06), np.eye(3))
        corners = project(box.vertices, INTRINSICS)
        box2d = np.concatenate([corners.min(0), corners.max(0)])
        keypoints = dict.fromkeys(("closest", "furthest", "centre"), box.center)
        objects.append(LabeledObject(name, box2d, empty_mask, box, keypoints, {"visible": 1.0}))
    image = encode_jpeg(np.full((HEIGHT_PX, WIDTH_PX, 3), 90, np.uint8))
    return LabeledImage(image, WIDTH_PX, HEIGHT_PX, INTRINSICS, objects, unit, f"test/{seed}")
