"""Any robot that speaks SPEAR-1's own language: `spear.types.Policy` observations in, actions [5, 8] out."""

import numpy as np

from spear.embodiments import Control, Embodiment
from spear.embodiments import tools as read

EMBODIMENT = Embodiment(
    required=read.REQUIRED,
    optional={
        read.WRIST: "the wrist camera's image, uint8 [height, width, 3]",
        read.COMMITTED: "actions [d, 8] that are executed before the answer is there; it begins with them",
    },
    observe=dict,
    controls={
        "delta_pose": Control(
            "translation 3 (m, base frame), rotation quaternion 4 (w x y z, end-effector frame), gripper "
            "opening (1 open, 0 closed), per step",
            5.0,
        )
    },
    example=lambda: {
        read.IMAGE: read.example_image(
            192, 128
        ),  # as nano takes them, which comes with this package
        read.WRIST: read.example_image(96, 96),
        read.STATE: np.array([0.45, 0.0, 0.2, 1.0, 0.0, 0.0, 0.0, 1.0], np.float32),
        read.PROMPT: "put the carrot on the plate",
    },
)
