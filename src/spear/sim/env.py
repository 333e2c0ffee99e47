"""`spear/Tabletop-v0`: the simulator as a Gymnasium environment.

An observation is a dict that `spear.types.Policy.infer` accepts, and an action is one of the H
actions [8] of the chunk that `infer` returns.
"""

import string
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from spear.embodiments.observations import DEFAULT_IMAGE_SIZES, get_camera_key
from spear.sim.control import validate_and_split_action
from spear.sim.render import get_thread_renderer
from spear.sim.scene import sample_scene
from spear.sim.world import World, get_milestone_states, list_cameras
from spear.sim.worlds import place_in_world, validate_world
from spear.types import CONTROL_RATE_HZ, WidthAndHeight
from spear.util.held_out import FIRST_TRAIN_SEED

MAX_STEPS = 60
"""Control steps of an episode: 12 s (our choice)."""
MAX_PROMPT_LENGTH = 200  # characters; no instruction of the simulator is longer

Observation = dict[str, Any]


class ActionSpace(gymnasium.spaces.Box):
    """The space of actions [8]. Unlike a plain `Box`, it samples quaternions of unit length."""

    def sample(self, mask: None = None, probability: None = None) -> NDArray[Any]:
        """Draw a random valid action."""
        action = super().sample(mask, probability)
        quaternion = self.np_random.normal(size=4)
        action[3:7] = quaternion / np.linalg.norm(quaternion)
        return action


class TabletopEnv(gymnasium.Env[Observation, NDArray[np.floating]]):
    """One task family of the embedded simulator.

    A step takes 0.2 s (5 Hz). The reward is 1 when the task is achieved, which ends the episode,
    and 0 otherwise. The dict `info` has these keys:

        "success"             whether the task is achieved now.
        "reached", "grasped", "wrong_object_moved"  whether the milestone (see
                              `spear.sim.world.get_milestone_states`) was true at any time so far.
        "unreachable"         whether the arm could not reach the target of the last action.
        "steps"               number of steps so far.

    Args:
        family: the task family, one of `spear.sim.scene.FAMILIES`.
        image_sizes: camera → (width, height) of its images in pixels. Observations have images of
            those cameras that the world has (`spear.sim.world.list_cameras`).
        images: whether observations have images. Without them no rendering library is needed.
        render_mode: "rgb_array" or None, as Gymnasium defines it.
        world: the surroundings of the scenes, see `spear.sim.worlds`.

    Example:
        >>> env = TabletopEnv("put_on", images=False)
        >>> observation, info = env.reset(seed=0)
        >>> sorted(observation)
        ['observation/state', 'prompt']
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_RATE_HZ}  # noqa: RUF012

    def __init__(
        self,
        family: str = "put_on",
        image_sizes: Mapping[str, WidthAndHeight] = DEFAULT_IMAGE_SIZES,
        images: bool = True,
        render_mode: str | None = "rgb_array",
        world: str = "default",
    ) -> None:
        sample_scene(family, 0)  # raises for unknown families
        self.family = family
        self.images = images
        self.render_mode = render_mode
        self.world_name = validate_world(world)
        self.image_sizes = {
            camera: image_sizes[camera] for camera in list_cameras() if camera in image_sizes
        }

        spaces: dict[str, gymnasium.Space[Any]] = {
            "observation/state": gymnasium.spaces.Box(-10.0, 10.0, (8,), np.float32),
            "prompt": gymnasium.spaces.Text(
                MAX_PROMPT_LENGTH, min_length=0, charset=f"{string.ascii_lowercase} "
            ),
        }
        if images:
            for camera, size in self.image_sizes.items():
                spaces[get_camera_key(camera)] = _make_image_space(size)
        self.observation_space = gymnasium.spaces.Dict(spaces)
        self.action_space: gymnasium.Space[NDArray[Any]] = ActionSpace(-1.0, 1.0, (8,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start the scene that `seed` stands for; without a seed, a random held-out scene."""
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(0, FIRST_TRAIN_SEED))
        scene = place_in_world(sample_scene(self.family, seed), self.world_name)
        self.start_episode_in(World(scene))
        return self.observe(), self._update_info(is_unreachable=False)

    def start_episode_in(self, world: World) -> None:
        """Start an episode in `world` instead of in a scene of a seed."""
        self.world = world
        self.steps = 0
        self._milestones = {"reached": False, "grasped": False, "wrong_object_moved": False}

    def step(
        self, action: NDArray[np.floating]
    ) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Apply one action [8] (the layout of `spear.types.Action`) for 0.2 s.

        Raises `SpearError` for actions that are not 8 finite numbers with a unit quaternion.
        """
        info = self.step_without_observing(action)
        success = info["success"]
        is_truncated = self.steps >= MAX_STEPS and not success
        return self.observe(), float(success), success, is_truncated, info

    def step_without_observing(self, action: NDArray[np.floating]) -> dict[str, Any]:
        """Apply one action [8] and return `info`, without computing an observation."""
        translation, rotation, opening = validate_and_split_action(action)
        is_unreachable = self.world.servo.move_for_one_control_step(translation, rotation, opening)
        self.steps += 1
        return self._update_info(is_unreachable)

    def observe(self) -> Observation:
        """Return the present observation."""
        servo = self.world.servo
        position, rotation = servo.measure_pose()
        state = np.concatenate([position, rotation, [servo.measure_opening()]])
        observation: Observation = {
            "observation/state": state.astype(np.float32),
            "prompt": self.world.spec.instruction,
        }
        if self.images:
            images = get_thread_renderer().render_images(self.world, list(self.image_sizes.items()))
            for camera, image in zip(self.image_sizes, images, strict=True):
                observation[get_camera_key(camera)] = image
        return observation

    @property
    def seed(self) -> int:
        """The seed of the present scene."""
        return self.world.spec.seed

    def render(self) -> NDArray[np.uint8]:
        """Return the external camera's image."""
        view = ("external", self.image_sizes["external"])
        return get_thread_renderer().render_images(self.world, [view])[0]

    def _update_info(self, is_unreachable: bool) -> dict[str, Any]:
        """Measure the milestones, add them to those so far, and return `info` with both."""
        info: dict[str, Any] = dict(get_milestone_states(self.world))
        for key, was_reached in self._milestones.items():
            info[key] = was_reached or info[key]
            self._milestones[key] = info[key]
        info["unreachable"] = is_unreachable
        info["steps"] = self.steps
        return info


def _make_image_space(size: WidthAndHeight) -> gymnasium.spaces.Box:
    width, height = size
    return gymnasium.spaces.Box(0, 255, (height, width, 3), np.uint8)
