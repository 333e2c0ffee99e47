"""The simulator's overhead: environment steps with two cameras against bare MuJoCo doing the same work.

Both step the same scenes through the expert's motions (50 physics steps) and draw the same two pictures into
one buffer with one read-back, taking turns from the same states. Processor time is compared, all threads
together, so that other work on the machine does not count. The claim: at most 15 % over bare MuJoCo. Also
printed: how fast demonstrations are recorded, by the clock.

    python benchmarks/sim/speed.py [--scenes 12] [--width 192 --height 128 --wrist 96]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TypeVar

import mujoco
import numpy as np

from spear.sim import control, expert
from spear.sim.env import TabletopEnv
from spear.sim.record import record_episodes
from spear.sim.scene import FAMILIES, sample_scene
from spear.sim.world import World, base_spec
from spear.util.held_out import FIRST_TRAIN_SEED

T = TypeVar("T")


class Bare:
    """Nothing but MuJoCo: 50 steps, two pictures, one read-back. Call while its OpenGL context is current."""

    def __init__(self, world: World, size: tuple[int, int], wrist: int) -> None:
        self.model, self.data = world.model, world.data
        self.rectangles = [mujoco.MjrRect(0, 0, *size), mujoco.MjrRect(size[0], 0, wrist, wrist)]
        self.pixels = np.empty((max(size[1], wrist), size[0] + wrist, 3), np.uint8)
        shared = base_spec().copy()
        shared.visual.global_.offwidth, shared.visual.global_.offheight = (
            size[0] + wrist,
            self.pixels.shape[0],
        )
        self.context = mujoco.MjrContext(shared.compile(), mujoco.mjtFontScale.mjFONTSCALE_100)
        self.scene = mujoco.MjvScene(self.model, maxgeom=600)
        self.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self.option = mujoco.MjvOption()
        self.option.geomgroup[:] = 1
        self.option.geomgroup[control.HIDDEN_GROUP] = 0
        self.camera = mujoco.MjvCamera()
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self.nothing = mujoco.MjvPerturb()
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)

    def step(self, ctrl: np.ndarray) -> None:
        """Towards the joint angles `ctrl`, then look."""
        self.data.ctrl[:] = ctrl
        mujoco.mj_step(self.model, self.data, control.PHYSICS_STEPS_PER_CONTROL_STEP)
        for k, rectangle in enumerate(self.rectangles):
            self.camera.fixedcamid = k
            if k == 0:
                mujoco.mjv_updateScene(
                    self.model,
                    self.data,
                    self.option,
                    self.nothing,
                    self.camera,
                    mujoco.mjtCatBit.mjCAT_ALL,
                    self.scene,
                )
            else:
                mujoco.mjv_updateCamera(self.model, self.data, self.camera, self.scene)
            mujoco.mjr_render(rectangle, self.scene, self.context)
        whole = mujoco.MjrRect(0, 0, self.pixels.shape[1], self.pixels.shape[0])
        mujoco.mjr_readPixels(self.pixels, None, whole, self.context)


def timed(action: Callable[[], T]) -> tuple[float, T]:
    """Seconds of processor time that `action` takes, and what it returns."""
    begun = time.process_time()
    result = action()
    return time.process_time() - begun, result


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
    size, wrist = (args.width, args.height), (args.wrist, args.wrist)
    ours, bare, blind = [], [], []
    for i in range(args.scenes):
        family = FAMILIES[i % len(FAMILIES)]
        env = TabletopEnv(family, size, wrist)
        env.reset(seed=i)
        reference = Bare(World(sample_scene(family, i)), size, args.wrist)
        unseen = TabletopEnv(family, images=False)
        unseen.reset(seed=i)
        success = False
        while not success:
            action = expert.act(env.world)
            mujoco.mj_copyData(reference.data, reference.model, env.world.data)
            seconds, (_, _, success, _, _) = timed(lambda: env.step(action))  # noqa: B023
            ours.append(seconds)
            bare.append(timed(lambda: reference.step(env.world.data.ctrl))[0])  # noqa: B023
            blind.append(timed(lambda: unseen.step(action))[0])  # noqa: B023
    ratio = np.sum(ours) / np.sum(bare)
    print(
        f"steps with two cameras: {1 / np.mean(ours):.0f}/s of processor time, bare {1 / np.mean(bare):.0f}/s"
    )
    print(f"overhead over bare MuJoCo: {100 * (ratio - 1):.1f} % (claim: at most 15 %)")
    print(f"steps without pictures: {1 / np.mean(blind):.0f}/s of processor time")
    tasks = [(FAMILIES[i % 4], FIRST_TRAIN_SEED + i) for i in range(4 * args.scenes)]
    begun = time.perf_counter()
    episodes = list(record_episodes(tasks, size, wrist, workers=args.workers))
    seconds = time.perf_counter() - begun
    steps = sum(len(episode) for episode in episodes)
    print(
        f"recording in {args.workers} processes, their start included: "
        f"{60 * len(episodes) / seconds:.0f} demonstrations/min, {steps / seconds:.0f} steps/s"
    )


if __name__ == "__main__":
    main()
