"""Labeled images of three cubes in a row before a gray wall, for tests that need labels and no
simulator."""

import numpy as np

from spear.labels.fit.box3d import make_box
from spear.labels.fit.image import project
from spear.types import LabeledImage, LabeledObject, Unit
from spear.util.images import encode_jpeg

INTRINSICS = np.array([[140.0, 0, 70], [0, 140, 52.5], [0, 0, 1]])


def make_labeled_image(seed: int, scale: float = 1.0, unit: Unit = "metre") -> LabeledImage:
    """A mug, a spoon and a bowl, 0.8 to 0.9 m away (times `scale`), boxes of 6 cm."""
    rng = np.random.default_rng(seed)
    objects = []
    for index, name in enumerate(("mug", "spoon", "bowl")):
        center = np.array([0.2 * index - 0.2, 0.02, 0.8 + 0.1 * rng.random()])
        box = make_box(scale * center, np.full(3, scale * 0.06), np.eye(3))
        corners = project(box.vertices, INTRINSICS)
        box2d = np.concatenate([corners.min(0), corners.max(0)])
        keypoints = dict.fromkeys(("closest", "furthest", "centre"), box.center)
        objects.append(LabeledObject(name, box2d, [140 * 105], box, keypoints, {"visible": 1.0}))
    image = encode_jpeg(np.full((105, 140, 3), 90, np.uint8))
    return LabeledImage(image, 140, 105, INTRINSICS, objects, unit, f"test/{seed}")
