"""How true the labeller's boxes are: its boxes against the simulator's, with exact masks and depth.

    python benchmarks/label_accuracy.py --scenes 150 --first-seed 3000

The robot's gripper is left out. Medians over all objects that got a box; "vertex" is the mean distance of the
eight vertices, up to the box's symmetries.
"""

from __future__ import annotations

import dataclasses

import tyro

from spear.labels.accuracy import compare
from spear.scenes import label_frames
from spear.sim.frames import frame_of
from spear.sim.render import Renderer
from spear.sim.scene import clutter_scene
from spear.sim.world import GRIPPER, World


def main(scenes: int = 150, first_seed: int = 3000) -> None:
    """Label scenes and compare.

    Args:
        scenes: how many clutter scenes. first_seed: of the first.
    """
    renderer = Renderer()
    worlds = [World(clutter_scene(seed)) for seed in range(first_seed, first_seed + scenes)]
    print("| view | objects | centre | vertex | IoU |\n|---|---|---|---|---|")
    for camera, size in (("external", (192, 128)), ("external", (280, 210)), ("wrist", (112, 112))):
        frames = [frame_of(world, camera, size, renderer) for world in worlds]
        frames = [
            dataclasses.replace(f, names={i: name for i, name in f.names.items() if name != GRIPPER})
            for f in frames
        ]
        a = compare(list(label_frames(iter(frames))), frames)
        print(
            f"| {camera} {size[0]}×{size[1]} | {a.n} | {1000 * a.center:.1f} mm | {1000 * a.vertex:.1f} mm "
            f"| {a.iou:.2f} |"
        )


if __name__ == "__main__":
    tyro.cli(main)
