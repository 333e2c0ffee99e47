"""The labels that all tests of questions ask about."""

import numpy as np
import pytest

from labels_scenes import TRUTH, make_random_frame
from spear.labels.pipeline import label_images
from spear.types import LabeledImage

NAMES = ("carrot", "green cube", "bowl", "plate", "eggplant", "spoon")


@pytest.fixture(scope="package")
def labels() -> list[LabeledImage]:
    """18 labels of ray-cast scenes.

    The first twelve have one to six objects with different names. The last six have six objects
    with four names, so some names are ambiguous.
    """
    rng = np.random.default_rng(1)
    frames = [
        make_random_frame(rng, objects=int(rng.integers(1, 7)), names=NAMES) for _ in range(12)
    ]
    frames += [make_random_frame(rng, objects=6, names=NAMES[:4]) for _ in range(6)]
    return list(label_images(frames, *TRUTH))
