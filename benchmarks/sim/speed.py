"""The simulator's overhead: environment steps with two cameras against bare MuJoCo doing the same
work.

Both step the same scenes through the expert's motions (50 physics steps) and draw the same two
images into one buffer with one read-back, taking turns from the same states. Processor time is
compared, of all threads together, so that other work on the machine does not count. The claim: at
most 15 % over bare MuJoCo. Also printed: how fast demonstrations are recorded, by the clock.

    python benchmarks/sim/speed.py [--scenes 12] [--width 192 --height 128 --wrist 96]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mujoco
import numpy as np

from spear.doctor import measure_one_run_s
from spear.sim import control, expert
from spear.sim.env import TabletopEnv
from spear.sim.record import record_episodes
from spear.sim.scene import FAMILIES, sample_scene
from spear.sim.world import World, get_shared_base_spec
from spear.util.held_out import FIRST_TRAIN_SEED

MAX_GEOMS = 600
MAX_OVERHEAD_PERCENT = 15  # the claim

Size = tuple[int, int]


class BareSimulator:
    """Nothing but MuJoCo: 50 physics steps, two images, one read-back.

    Its methods must be called while its OpenGL context is current.
    """

    def __init__(self, world: World, image_sizes: Mapping[str, Size]) -> None:
        self.model = world.model
        self.data = world.data
        width, height = image_sizes["external"]
        wrist_width, wrist_height = image_sizes["wrist"]
        self.camera_ids = [self.model.camera(name).id for name in ("external", "wrist")]
        self.rectangles = [
            mujoco.MjrRect(0, 0, width, height),
            mujoco.MjrRect(width, 0, wrist_width, wrist_height),
        ]
        self.pixels = np.empty((max(height, wrist_height), width + wrist_width, 3), np.uint8)

        spec = get_shared_base_spec().copy()
        spec.visual.global_.offwidth = self.pixels.shape[1]
        spec.visual.global_.offheight = self.pixels.shape[0]
        self.context = mujoco.MjrContext(spec.compile(), mujoco.mjtFontScale.mjFONTSCALE_100)
        self.scene = mujoco.MjvScene(self.model, maxgeom=MAX_GEOMS)
        self.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self.options = mujoco.MjvOption()
        self.options.geomgroup[:] = 1
        self.options.geomgroup[control.HIDDEN_GROUP] = 0
        self.camera = mujoco.MjvCamera()
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self.perturbation = mujoco.MjvPerturb()  # none
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)

    def copy_state(self, world: World) -> None:
        """Take the state of another world of the same scene."""
        mujoco.mj_copyData(self.data, self.model, world.data)

    def step(self, joint_command: np.ndarray) -> None:
        """Move towards the joint angles, then draw both cameras."""
        self.data.ctrl[:] = joint_command
        mujoco.mj_step(self.model, self.data, control.PHYSICS_STEPS_PER_CONTROL_STEP)
        self.camera.fixedcamid = self.camera_ids[0]
        mujoco.mjv_updateScene(
            self.model,
            self.data,
            self.options,
            self.perturbation,
            self.camera,
            mujoco.mjtCatBit.mjCAT_ALL,
            self.scene,
        )
        mujoco.mjr_render(self.rectangles[0], self.scene, self.context)
        self.camera.fixedcamid = self.camera_ids[1]
        mujoco.mjv_updateCamera(self.model, self.data, self.camera, self.scene)
        mujoco.mjr_render(self.rectangles[1], self.scene, self.context)
        viewport = mujoco.MjrRect(0, 0, self.pixels.shape[1], self.pixels.shape[0])
        mujoco.mjr_readPixels(self.pixels, None, viewport, self.context)


@dataclass
class StepTimes:
    """Seconds of processor time per control step."""

    ours: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    without_images: list[float] = field(default_factory=list)


def measure_scene(
    family: str, seed: int, image_sizes: Mapping[str, Size], times: StepTimes
) -> None:
    """Let the expert solve a scene, and add the time of each step."""
    env = TabletopEnv(family, image_sizes)
    env.reset(seed=seed)
    bare = BareSimulator(World(sample_scene(family, seed)), image_sizes)
    env_without_images = TabletopEnv(family, images=False)
    env_without_images.reset(seed=seed)

    success = False
    while not success:
        action = expert.act(env.world)
        bare.copy_state(env.world)
        results: list[Any] = []

        # The default values bind this iteration's action and list.
        def step_ours(action: np.ndarray = action, results: list[Any] = results) -> None:
            results.append(env.step(action))

        times.ours.append(measure_processor_seconds(step_ours))
        times.bare.append(measure_processor_seconds(partial(bare.step, env.world.data.ctrl)))
        step_without_images = partial(env_without_images.step, action)
        times.without_images.append(measure_processor_seconds(step_without_images))
        _, _, success, _, _ = results[0]


def measure_processor_seconds(run: Any) -> float:
    return measure_one_run_s(run, "cpu", use_processor_time=True)


def measure_recording(num_scenes: int, image_sizes: Mapping[str, Size], workers: int) -> None:
    """Print how fast demonstrations are recorded, by the clock."""
    tasks = []
    for i in range(len(FAMILIES) * num_scenes):
        tasks.append((FAMILIES[i % len(FAMILIES)], FIRST_TRAIN_SEED + i))
    start = time.perf_counter()
    episodes = list(record_episodes(tasks, image_sizes, workers=workers))
    seconds = time.perf_counter() - start
    num_steps = sum(len(episode) for episode in episodes)
    print(
        f"recording in {workers} processes, their start included:"
        f" {60 * len(episodes) / seconds:.0f} demonstrations/min, {num_steps / seconds:.0f} steps/s"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=12)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--wrist", type=int, default=96)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    image_sizes = {
        "external": (args.width, args.height),
        "wrist": (args.wrist, args.wrist),
    }

    times = StepTimes()
    for seed in range(args.scenes):
        measure_scene(FAMILIES[seed % len(FAMILIES)], seed, image_sizes, times)
    ratio = np.sum(times.ours) / np.sum(times.bare)
    print(
        f"steps with two cameras: {1 / np.mean(times.ours):.0f}/s of processor time,"
        f" bare {1 / np.mean(times.bare):.0f}/s"
    )
    print(
        f"overhead over bare MuJoCo: {100 * (ratio - 1):.1f} %"
        f" (claim: at most {MAX_OVERHEAD_PERCENT} %)"
    )
    print(f"steps without images: {1 / np.mean(times.without_images):.0f}/s of processor time")
    measure_recording(args.scenes, image_sizes, args.workers)


if __name__ == "__main__":
    main()
