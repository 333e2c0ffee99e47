"""`spear/Tabletop-v0`: the simulator as a Gymnasium environment that speaks the policy's own language.

Observations are the dict that `spear.types.Policy.infer` takes, actions are rows of what it returns.
"""

import string
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from spear.sim.control import check_action
from spear.sim.render import ImageSize, get_thread_renderer
from spear.sim.scene import sample_scene
from spear.sim.world import World, measure_milestones
from spear.types import CONTROL_RATE_HZ
from spear.util.held_out import FIRST_TRAIN_SEED

MAX_STEPS = 60
"""Control steps of an episode: 12 s (our choice)."""

Observation = dict[str, Any]


class ActionSpace(gymnasium.spaces.Box):
    """Actions [8]; what it samples are valid ones: the quaternion has unit length."""

    def sample(self, mask: None = None, probability: None = None) -> NDArray[Any]:
        """A random action."""
        action = super().sample(mask, probability)
        quat = self.np_random.normal(size=4)
        action[3:7] = quat / np.linalg.norm(quat)
        return action


class TabletopEnv(gymnasium.Env[Observation, NDArray[np.floating]]):
    """One task family of the embedded simulator.

    Parameters
        family       one of `spear.sim.scene.FAMILIES`.
        image_size   (width, height) of the external camera, pixels; wrist_size the same of the wrist camera.
        images       whether observations have images; without them no rendering library is needed.

    A step is 0.2 s (5 Hz). `step` raises `SpearError` for actions that are not 8 finite numbers with a unit
    quaternion. `info` has `measure_milestones` (all but success: at any time so far), and whether the
    target of the action was "unreachable". Reward is 1 at success, where the episode ends, else 0.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_RATE_HZ}  # noqa: RUF012

    def __init__(
        self,
        family: str = "put_on",
        image_size: ImageSize = (280, 210),
        wrist_size: ImageSize = (112, 112),
        images: bool = True,
        render_mode: str | None = "rgb_array",
    ) -> None:
        sample_scene(family, 0)  # refuses unknown families
        self.family, self.images, self.render_mode = family, images, render_mode
        self.image_size, self.wrist_size = image_size, wrist_size
        spaces: dict[str, gymnasium.Space[Any]] = {
            "observation/state": gymnasium.spaces.Box(-10.0, 10.0, (8,), np.float32),
            "prompt": gymnasium.spaces.Text(
                200, min_length=0, charset=f"{string.ascii_lowercase} "
            ),
        }
        sizes = {"observation/image": image_size, "observation/wrist_image": wrist_size}
        for key, (width, height) in sizes.items() if images else ():
            spaces[key] = gymnasium.spaces.Box(0, 255, (height, width, 3), np.uint8)
        self.observation_space = gymnasium.spaces.Dict(spaces)
        self.action_space: gymnasium.Space[NDArray[Any]] = ActionSpace(-1.0, 1.0, (8,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start the scene of `seed`; without a seed, one of the held-out scenes at random."""
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(0, FIRST_TRAIN_SEED))
        self.load(World(sample_scene(self.family, seed)))
        return self.observe(), self._info(False)

    def load(self, world: World) -> None:
        """Start from a given world."""
        self.world = world
        self.steps = 0
        self._milestones = {"reached": False, "grasped": False, "wrong_object_moved": False}

    def step(
        self, action: NDArray[np.floating]
    ) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Apply one action [8] (the layout of `spear.types.Action`) for 0.2 s."""
        info = self.physics_step(action)
        success = info["success"]
        return (
            self.observe(),
            float(success),
            success,
            self.steps >= MAX_STEPS and not success,
            info,
        )

    def physics_step(self, action: NDArray[np.floating]) -> dict[str, Any]:
        """`step` without looking: moves the world and returns `info`."""
        translation, rotation, opening = check_action(action)
        unreachable = self.world.servo.move(translation, rotation, opening)
        self.steps += 1
        return self._info(unreachable)

    def observe(self) -> Observation:
        """What the policy sees now."""
        position, rotation = self.world.servo.pose()
        state = np.concatenate([position, rotation, [self.world.servo.opening()]]).astype(
            np.float32
        )
        result: Observation = {"observation/state": state, "prompt": self.world.spec.instruction}
        if self.images:
            views = [("external", self.image_size), ("wrist", self.wrist_size)]
            image, wrist = get_thread_renderer().images(self.world, views)
            result["observation/image"], result["observation/wrist_image"] = image, wrist
        return result

    @property
    def seed(self) -> int:
        """Of the scene that is running."""
        return self.world.spec.seed

    def render(self) -> NDArray[np.uint8]:
        """The external camera's image."""
        return get_thread_renderer().images(self.world, [("external", self.image_size)])[0]

    def _info(self, unreachable: bool) -> dict[str, Any]:
        now = measure_milestones(self.world)
        for key in self._milestones:
            self._milestones[key] = now[key] = self._milestones[key] or now[key]
        return {**now, "unreachable": unreachable, "steps": self.steps}
