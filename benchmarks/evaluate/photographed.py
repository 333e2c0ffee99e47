"""How much of a SIMPLER picture shows the photograph when the camera is shifted; the rest is a
mirror image of the photograph.

It needs no ManiSkill, because the photograph's camera is known.

    python benchmarks/evaluate/photographed.py [SEEDS]
"""

import sys

import numpy as np
import torch

from spear.evaluate.simpler.photograph import CameraView, measure_photographed_fraction
from spear.evaluate.simpler.shifts import FLAT_TASKS, SAPIEN_AXES, SceneShift, sample_camera
from spear.geometry import quat_normalize, quat_to_matrix
from spear.sim.shifts import CAMERA_LEVELS, Shift

# The camera of the three tasks on the table, as mani_skill 3.0.1 has it.
POSITION_M = [0.0, -0.16, 0.36]  # in the robot's base frame
QUATERNION = [0.8992917, -0.09263245, 0.35892478, 0.23209205]  # w x y z
FOCAL_PX = 623.588
CENTER_PX = (319.501, 239.545)
TABLE_Z_M = -0.0005  # in the robot's base frame
NUM_SEEDS = 24  # per task: one for each official start


def make_camera() -> CameraView:
    """Make the camera of the photograph, with a quarter of its pixels along each side."""
    quaternion = quat_normalize(torch.tensor(QUATERNION, dtype=torch.float64))
    x_px, y_px = CENTER_PX
    return CameraView(
        position=np.array(POSITION_M),
        rotation=quat_to_matrix(quaternion).numpy() @ SAPIEN_AXES,
        focal_px=FOCAL_PX / 4,
        center_px=(x_px / 4, y_px / 4),
        size_px=(160, 120),
    )


def main(num_seeds: int = NUM_SEEDS) -> None:
    """Print the mean fraction of each level, and the smallest one."""
    camera = make_camera()
    print(f"level  photographed, mean  lowest   n = {num_seeds * len(FLAT_TASKS)}")
    for level, limits in CAMERA_LEVELS.items():
        fractions = []
        for task in FLAT_TASKS:
            for seed in range(num_seeds):
                rng = SceneShift(Shift("camera", level), seed).make_generator(task)
                moved = sample_camera(camera, TABLE_Z_M, limits, rng)
                fractions.append(measure_photographed_fraction(camera, moved, TABLE_Z_M))
        print(f"{level:5}  {np.mean(fractions):18.0%}  {np.min(fractions):6.0%}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
