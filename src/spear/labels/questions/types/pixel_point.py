"""Questions for the 3D point that a pixel shows, whatever object it belongs to.

The answer has 3 numbers, the point. Such questions need the depth of the image, and are not scored
(the paper has them in an ablation).
"""

import numpy as np

from spear.labels.questions.interface import Draft, QuestionScene, QuestionType, Random
from spear.labels.store import DEPTH_STRIDE_PX
from spear.types import Pixel

PROMPTS = (
    "Provide the 3D coordinates of the pixel {p}",
    "Where is {p} in 3D?",
    "Estimate the 3D position of what is at {p}",
    "Give the x, y, z of {p}",
    "Locate the pixel {p} in 3D",
)


def _draft(scene: QuestionScene, rng: Random) -> Draft | None:
    """Draw a pixel; None if its depth is not known."""
    if scene.depth is None:
        return None
    num_rows, num_columns = scene.depth.shape
    row = int(rng.random() * num_rows)
    column = int(rng.random() * num_columns)
    z = float(scene.depth[row, column])
    if not np.isfinite(z) or z <= 0:
        return None
    label = scene.label
    # The center of the middle pixel of the square for which the depth was stored
    x = column * DEPTH_STRIDE_PX + DEPTH_STRIDE_PX // 2 + 0.5
    y = row * DEPTH_STRIDE_PX + DEPTH_STRIDE_PX // 2 + 0.5
    point = z * np.linalg.solve(label.intrinsics, [x, y, 1.0])
    pixel = Pixel(x / label.width, y / label.height)
    return Draft({"p": str(pixel)}, point.tolist())


QUESTION_TYPE = QuestionType(prompts=PROMPTS, draft=_draft)
