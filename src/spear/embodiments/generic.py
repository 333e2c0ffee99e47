"""An embodiment for any robot whose program sends observations with the keys of
`spear.types.Policy` and executes SPEAR-1's actions [5, 8] itself.
"""

import numpy as np

from spear.embodiments import Control, Embodiment
from spear.embodiments.observations import (
    COMMITTED_KEY,
    IMAGE_KEY,
    PROMPT_KEY,
    REQUIRED_KEYS,
    STATE_KEY,
    WRIST_IMAGE_KEY,
    make_example_image,
)

EMBODIMENT = Embodiment(
    required=REQUIRED_KEYS,
    optional={
        WRIST_IMAGE_KEY: "the wrist camera's image, uint8 [height, width, 3]",
        COMMITTED_KEY: "actions [d, 8] that are executed before the answer is there; it begins "
        "with them",
    },
    observe=dict,  # a copy; nothing to convert
    controls={
        "delta_pose": Control(
            "translation 3 (m, base frame), rotation quaternion 4 (w x y z, end-effector frame), "
            "gripper opening (1 open, 0 closed), per step",
            rate_hz=5.0,
        )
    },
    example=lambda: {
        IMAGE_KEY: make_example_image(192, 128),  # the sizes of nano, which this package contains
        WRIST_IMAGE_KEY: make_example_image(96, 96),
        STATE_KEY: np.array([0.45, 0.0, 0.2, 1.0, 0.0, 0.0, 0.0, 1.0], np.float32),
        PROMPT_KEY: "put the carrot on the plate",
    },
)
