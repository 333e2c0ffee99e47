"""The environment: Gymnasium's contract, determinism, and tasks that only work gets done."""

import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from refusals import refuses
from spear.sim import expert
from spear.sim.env import MAX_STEPS, TabletopEnv
from spear.sim.render import Renderer
from spear.sim.scene import FAMILIES
from spear.sim.world import is_source_on_target

STILL = np.array([0, 0, 0, 1, 0, 0, 0, 1], np.float32)


@pytest.mark.filterwarnings("ignore")
def test_keeps_gymnasiums_contract(renderer: Renderer) -> None:
    check_env(TabletopEnv("put_on", (64, 48), (32, 32)), skip_render_check=True)
    assert gymnasium.spec("spear/Tabletop-v0").entry_point == "spear.sim.env:TabletopEnv"
    made = gymnasium.make("spear/Tabletop-v0", family="stack_cube", images=False)
    observation, info = made.reset(seed=1)
    state = observation["observation/state"]
    assert (
        state.dtype == np.float32
        and state.shape == (8,)
        and state[3] >= 0
        and observation["prompt"]
    )
    assert set(info) >= {"success", "reached", "grasped", "wrong_object_moved", "unreachable"}
    refuses("quaternion", made.unwrapped.step, np.zeros(8))
    refuses("put_on", TabletopEnv, "put_onn")


def test_the_same_seed_gives_the_same_pixels_whatever_else_is_rendered(renderer: Renderer) -> None:
    def run() -> list[np.ndarray]:
        env = TabletopEnv("stack_cube", (96, 72), (48, 48))
        seen = [env.reset(seed=11)[0]]
        seen += [env.step(expert.act(env.world))[0] for _ in range(4)]
        return [o[key] for o in seen for key in sorted(o) if key != "prompt"]

    envs = [TabletopEnv(family, (96, 72), (48, 48)) for family in FAMILIES]
    alone = [env.reset(seed=2)[0]["observation/image"] for env in envs]
    np.testing.assert_equal(run(), run())
    np.testing.assert_array_equal(
        alone, [env.observe()["observation/image"] for env in reversed(envs)][::-1]
    )
    assert len({image.tobytes() for image in alone}) == len(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_expert_succeeds_and_doing_nothing_fails(family: str) -> None:
    env = TabletopEnv(family, images=False)
    for seed in range(3):
        _, info = env.reset(seed=seed)
        while not info["success"] and env.steps < MAX_STEPS:
            info = env.physics_step(expert.act(env.world))
        assert info["success"] and info["reached"] and info["grasped"], (family, seed)
        assert is_source_on_target(env.world) and env.steps < 40
    env.reset(seed=0)
    for _ in range(MAX_STEPS):
        _, reward, terminated, truncated, info = env.step(STILL)
        assert not terminated and reward == 0
    assert truncated and not info["success"] and not info["reached"]


def test_an_object_that_is_not_let_go_is_no_success() -> None:
    env = TabletopEnv("put_on", images=False)
    _, info = env.reset(seed=3)
    while env.steps < 40:
        action = expert.act(env.world)
        action[7] = 0.0 if info["grasped"] else action[7]
        info = env.physics_step(action)
        assert not info["success"]
    assert info["grasped"]
    for _ in range(3):
        info = env.physics_step(expert.act(env.world))
    assert info["success"]


def test_without_an_opengl_driver_the_packages_to_install_are_named(tmp_path: Path) -> None:
    no_driver = {**os.environ, "__EGL_VENDOR_LIBRARY_FILENAMES": str(tmp_path / "none.json")}
    command = [sys.executable, "-c", "from spear.sim.render import Renderer; Renderer()"]
    done = subprocess.run(command, env=no_driver, capture_output=True, text=True, check=False)
    assert "SpearError" in done.stderr and "libegl1 libgl1 libgl1-mesa-dri" in done.stderr
