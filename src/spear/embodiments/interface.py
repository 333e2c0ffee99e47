"""Defines embodiments, the adapters between robots and SPEAR-1.

An embodiment converts one robot's observations to observations that SPEAR-1 understands, and
SPEAR-1's actions to commands for this robot. A robot may offer several ways to command it, for
example joint velocities or poses. Each way is a `Control`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from spear.embodiments.observations import (
    SEED_KEY,
    CheckedObservation,
    Observation,
    check_keys,
    read_optional_seed,
    validate_observation,
)
from spear.errors import SpearError, check_known
from spear.types import Array


def keep_actions(actions: Array, state: Array, observation: Observation) -> Array:
    """Return SPEAR-1's actions unchanged, for robots that take them as commands."""
    return actions


@dataclass(frozen=True)
class Control:
    """One way to command a robot, by rows of n numbers.

    Attributes:
        description: what the numbers of a row are, with units and frames. The server sends this
            text to clients.
        rate_hz: how many rows the robot executes per second.
        convert: a function that converts an action chunk to rows. Its arguments are the actions
            [H, 8] (`Action.to_vector`), and the state [8] and the robot's observation from which
            the actions were predicted. Its result is [N, n].

    Example:
        >>> def move_only(actions, state, observation):
        ...     return actions[:, :3] * 1000
        >>> control = Control("translation, mm, base frame", rate_hz=5.0, convert=move_only)
        >>> control.rate_hz
        5.0
    """

    description: str
    rate_hz: float
    convert: Callable[[Array, Array, Observation], Array] = keep_actions


@dataclass(frozen=True)
class Embodiment:
    """The adapter between one robot and SPEAR-1.

    Attributes:
        required: key → description of its value, for the keys that every observation of the robot
            must have.
        observe: a function that converts the robot's observation to an observation with the keys of
            `spear.types.Policy`. It raises a `SpearError` that names the key if a value is wrong.
            `spear.embodiments.observations` has functions that read and check values.
        controls: name → `Control`; the first one is the default.
        example: a function that returns an observation as the robot sends it, the same at every
            call.
        optional: key → description of its value, for the keys that an observation may have. The
            key of the seed is always among them. An observation with any other key is rejected.
        greeting: a function that makes the server's first message from the name of the control, for
            clients that expect another message than `spear.serve.service.Service` makes.
        frame: the name of the robot or dataset in whose end-effector frame the policy acts, if this
            frame has versions.
        frame_version: the version of this frame (`spear.data.frames`).
        earlier_versions: version → the embodiment with this version of the frame, for policies that
            learned it.
        direct_reply: a function that returns the text that answers a request without the policy, or
            None if the request is an observation.

    Example:
        >>> from spear.embodiments import load
        >>> robot = load("droid")
        >>> list(robot.controls)
        ['joint_velocity', 'joint_position', 'cartesian_position']
    """

    required: Mapping[str, str]
    observe: Callable[[Observation], dict[str, Any]]
    controls: Mapping[str, Control]
    example: Callable[[], dict[str, Any]]
    optional: Mapping[str, str] = field(default_factory=dict)
    greeting: Callable[[str], dict[str, Any]] | None = None
    direct_reply: Callable[[Observation], str | None] = lambda request: None
    frame: str | None = None
    frame_version: int = 1
    earlier_versions: "Mapping[int, Embodiment]" = field(default_factory=dict)

    def __post_init__(self) -> None:
        seed_description = "a whole number that fixes what is random in the answer"
        object.__setattr__(self, "optional", {**self.optional, SEED_KEY: seed_description})

    def read(self, observation: Any) -> CheckedObservation:
        """Convert the robot's observation to one of `spear.types.Policy`, and check it.

        Args:
            observation: what the robot sends.

        Returns:
            The observation that the policy takes.

        Raises:
            SpearError: the observation is no map, a key is missing or unknown, or a value is wrong.
                The message names the key.

        Example:
            >>> from spear.embodiments import load
            >>> robot = load("widowx")
            >>> robot.read(robot.example())["observation/state"].shape
            (8,)
        """
        if not isinstance(observation, Mapping):
            raise SpearError(
                f"the observation is of type {type(observation).__name__}. Send a map of keys to "
                "values."
            )
        check_keys(observation, self.required, self.optional)
        policy_observation = {**self.observe(observation), **read_optional_seed(observation)}
        return validate_observation(policy_observation)

    def with_frames(self, frames: Mapping[str, int] | None) -> "Embodiment":
        """Return the embodiment with the version of the frame in which a policy acts.

        The end-effector frame of some robots was corrected once, and a policy that was trained
        before acts in the frame of that time (`spear.data.frames`).

        Args:
            frames: name of a robot or dataset → version that the policy learned; None for a policy
                that was made before versions were recorded, which acts in the first version.

        Returns:
            The embodiment with this version.

        Raises:
            SpearError: this program does not know the policy's version.
        """
        if self.frame is None:
            return self
        version = 1 if frames is None else frames.get(self.frame, self.frame_version)
        if version == self.frame_version:
            return self
        if version not in self.earlier_versions:
            known_versions = ", ".join(map(str, [*self.earlier_versions, self.frame_version]))
            raise SpearError(
                f"the policy acts in version {version} of the frames of {self.frame}, and this "
                f"program knows {known_versions}. Update it."
            )
        return self.earlier_versions[version]

    def select_control(self, name: str | None) -> tuple[str, Control]:
        """Return a control with its name.

        Args:
            name: the control's name; None is the first control.

        Returns:
            The name and the control.

        Raises:
            SpearError: the name is unknown.
        """
        if name is None:
            name = next(iter(self.controls))
        check_known("control", self.controls, name)
        return name, self.controls[name]
