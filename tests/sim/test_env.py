"""The environment: Gymnasium's contract, determinism, and success only when the task is done."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from refusals import refuses
from spear.embodiments.observations import is_camera_key
from spear.sim import expert, world
from spear.sim.env import MAX_STEPS, TabletopEnv
from spear.sim.scene import FAMILIES
from spear.sim.world import is_source_on_target

NO_MOTION = np.array([0, 0, 0, 1, 0, 0, 0, 1], np.float32)  # an action with an open gripper
IMAGE_SIZES = {"external": (96, 72), "wrist": (48, 48)}  # (width, height), small to be fast
MAX_EXPERT_STEPS = 40  # steps in which the expert solves any task of these tests


# --- Gymnasium ---


@pytest.mark.usefixtures("renderer")
@pytest.mark.filterwarnings("ignore")
def test_keeps_gymnasiums_contract() -> None:
    check_env(
        TabletopEnv("put_on", {"external": (64, 48), "wrist": (32, 32)}), skip_render_check=True
    )


@pytest.mark.usefixtures("renderer")
def test_only_the_cameras_that_are_asked_for_are_rendered() -> None:
    env = TabletopEnv("put_on", {"external": (64, 48), "ceiling": (32, 32)})

    observation, _ = env.reset(seed=1)

    camera_keys = [key for key in observation if is_camera_key(key)]
    assert camera_keys == ["observation/image"]  # there is no camera called ceiling


@pytest.mark.usefixtures("renderer")
def test_a_camera_that_is_added_to_the_world_is_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = world.get_shared_base_spec().copy()
    spec.worldbody.add_camera(name="ceiling", pos=(0.4, 0, 1.5))  # looks down
    monkeypatch.setattr(world, "get_shared_base_spec", lambda: spec)
    env = TabletopEnv("put_on", {**IMAGE_SIZES, "ceiling": (40, 24)})

    observation, _ = env.reset(seed=1)

    image = observation["observation/ceiling_image"]
    assert image.shape == (24, 40, 3)
    assert image.std() > 5  # it shows something


class TestRegisteredEnvironment:
    @pytest.fixture
    def env(self) -> Any:
        return gymnasium.make("spear/Tabletop-v0", family="stack_cube", images=False)

    def test_is_the_tabletop(self) -> None:
        assert gymnasium.spec("spear/Tabletop-v0").entry_point == "spear.sim.env:TabletopEnv"

    def test_observations_are_the_policys(self, env: Any) -> None:
        observation, _ = env.reset(seed=1)

        state = observation["observation/state"]
        assert state.dtype == np.float32
        assert state.shape == (8,)
        assert state[3] >= 0
        assert observation["prompt"]

    def test_info_has_the_milestones(self, env: Any) -> None:
        _, info = env.reset(seed=1)

        milestones = {"success", "reached", "grasped", "wrong_object_moved"}
        assert set(info) >= milestones | {"unreachable"}

    def test_an_action_without_unit_quaternion_is_refused(self, env: Any) -> None:
        env.reset(seed=1)

        refuses("quaternion", env.unwrapped.step, np.zeros(8))


def test_an_unknown_family_gets_a_suggestion() -> None:
    refuses("put_on", TabletopEnv, "put_onn")


# --- Determinism ---


def run_episode() -> list[np.ndarray]:
    """The images and states of a scene's first observation and of the four steps after it."""
    env = TabletopEnv("stack_cube", IMAGE_SIZES)
    observation, _ = env.reset(seed=11)
    observations = [observation]
    for _ in range(4):
        observation, *_ = env.step(expert.act(env.world))
        observations.append(observation)
    arrays = []
    for observation in observations:
        arrays += [observation[key] for key in sorted(observation) if key != "prompt"]
    return arrays


@pytest.mark.usefixtures("renderer")
def test_the_same_seed_gives_the_same_pixels() -> None:
    np.testing.assert_equal(run_episode(), run_episode())


@pytest.mark.usefixtures("renderer")
def test_an_image_does_not_depend_on_what_else_is_rendered() -> None:
    envs = [TabletopEnv(family, IMAGE_SIZES) for family in FAMILIES]
    images = []
    for env in envs:
        observation, _ = env.reset(seed=2)
        images.append(observation["observation/image"])

    # Observe the same states again, in the opposite order of environments.
    images_again = [env.observe()["observation/image"] for env in reversed(envs)]

    np.testing.assert_array_equal(images, images_again[::-1])
    assert len({image.tobytes() for image in images}) == len(FAMILIES)  # the images differ


# --- Tasks ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_the_expert_succeeds(family: str, seed: int) -> None:
    env = TabletopEnv(family, images=False)
    _, info = env.reset(seed=seed)

    while not info["success"] and env.steps < MAX_STEPS:
        info = env.step_without_observing(expert.act(env.world))

    assert info["success"]
    assert info["reached"]
    assert info["grasped"]
    assert is_source_on_target(env.world)
    assert env.steps < MAX_EXPERT_STEPS


@pytest.mark.parametrize("family", FAMILIES)
def test_doing_nothing_fails(family: str) -> None:
    env = TabletopEnv(family, images=False)
    env.reset(seed=0)

    for _ in range(MAX_STEPS):
        _, reward, terminated, truncated, info = env.step(NO_MOTION)
        assert not terminated
        assert reward == 0

    assert truncated
    assert not info["success"]
    assert not info["reached"]


def test_an_object_is_placed_only_when_it_is_let_go() -> None:
    """The expert solves the task, but the gripper is kept closed as soon as it holds the object."""
    env = TabletopEnv("put_on", images=False)
    _, info = env.reset(seed=3)
    while env.steps < MAX_EXPERT_STEPS:
        action = expert.act(env.world)
        if info["grasped"]:
            action[7] = 0.0  # hold it
        info = env.step_without_observing(action)
        assert not info["success"]
    assert info["grasped"]

    for _ in range(3):
        info = env.step_without_observing(expert.act(env.world))

    assert info["success"]


def test_without_an_opengl_driver_the_error_names_the_packages_to_install(tmp_path: Path) -> None:
    """The variable names a driver description that does not exist, so EGL finds no driver."""
    no_driver = {**os.environ, "__EGL_VENDOR_LIBRARY_FILENAMES": str(tmp_path / "none.json")}
    command = [sys.executable, "-c", "from spear.sim.render import Renderer; Renderer()"]

    result = subprocess.run(command, env=no_driver, capture_output=True, text=True, check=False)

    assert "SpearError" in result.stderr
    assert "libegl1 libgl1 libgl1-mesa-dri" in result.stderr
