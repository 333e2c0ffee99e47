"""What an embodiment is: how one robot's observations and commands become SPEAR-1's, and back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from spear.embodiments.observations import (
    SEED_KEY,
    CheckedObservation,
    Observation,
    check_keys,
    read_seed,
    validate_observation,
)
from spear.errors import SpearError, check_known
from spear.types import Array


def keep_actions(actions: Array, state: Array, observation: Observation) -> Array:
    """Send SPEAR-1's own actions to the robot."""
    return actions


@dataclass(frozen=True)
class Control:
    """One way to command a robot.

    Attributes:
        description: what a row of the result is, with units and frames; the server sends it to
            clients.
        rate_hz: rows per second.
        convert: (actions [H, 8] of `spear.types.Action`, the state [8] and the robot's own
            observation from which they were predicted) → [N, n] rows for the robot.
    """

    description: str
    rate_hz: float
    convert: Callable[[Array, Array, Observation], Array] = keep_actions


@dataclass(frozen=True)
class Embodiment:
    """The adapter between one robot's observations and commands and SPEAR-1's.

    Attributes:
        required: observation key → what it is; an observation must have all of them.
        observe: the robot's observation → one with the keys of `spear.types.Policy`; raises
            `SpearError` naming a key whose value is wrong. `spear.embodiments.observations` has
            functions for it.
        controls: name → `Control`; the first one is the default.
        example: returns an observation as the robot sends it, the same at every call.
        optional: as `required`, for keys that an observation may have; the seed is always added. An
            observation with any other key is rejected.
        greeting: control's name → the server's first message, for clients that expect another one
            than `spear.serve.service.Service` makes.
        frame: name of the robot or dataset whose end-effector frame this is, if it has versions.
        frame_version: the version of this frame (`spear.data.frames`).
        earlier_versions: version → the embodiment with that version of the frame, for policies
            that learned it.
        direct_reply: request → the text that answers it without the policy, None if it is an
            observation.
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
        """Read the robot's observation as SPEAR-1's.

        Raises:
            SpearError: the observation is no map, a key is missing or unknown, or a value is wrong;
                the message names the key.

        Example:
            >>> from spear.embodiments import load
            >>> robot = load("widowx")
            >>> robot.read(robot.example())["observation/state"].shape
            (8,)
        """
        if not isinstance(observation, Mapping):
            raise SpearError(
                f"the observation is a {type(observation).__name__}. Send a map of keys to values."
            )
        check_keys(observation, self.required, self.optional)
        return validate_observation({**self.observe(observation), **read_seed(observation)})

    def with_frames(self, frames: Mapping[str, int] | None) -> "Embodiment":
        """Return the embodiment with the version of the frame in which a policy acts.

        Args:
            frames: name of a robot or dataset → version that the policy learned; None for a policy
                that was made before versions were recorded, which acts in the first version.

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
        """Return a control with its name, the default one for None.

        Raises `SpearError` for an unknown name.
        """
        if name is None:
            name = next(iter(self.controls))
        check_known("control", self.controls, name)
        return name, self.controls[name]
