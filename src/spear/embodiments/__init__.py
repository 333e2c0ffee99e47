"""Robots, one file each: their observations as SPEAR-1 wants them, SPEAR-1's actions as they take them.

A file in this folder (all but tools.py), or any Python file of yours, that has an `EMBODIMENT` is a robot;
its name is the file's. docs/robots.md shows how to write one.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spear.embodiments.tools import ANY_SEED, SEED, Checked, seed
from spear.errors import SpearError, check_known, unknown_name
from spear.types import Array

Observation = Mapping[str, Any]


@dataclass(frozen=True)
class Control:
    """One way to command a robot.

    about    what a row of the result is, with units and frames: clients are told.
    rate_hz  rows per second.
    convert  (actions [H, 8] of `spear.types.Action`, state [8] and the robot's own observation from which
             they were predicted) → [N, n] rows for the robot; left out, they are the actions themselves.
    """

    about: str
    rate_hz: float
    convert: Callable[[Array, Array, Observation], Array] = lambda actions, state, observation: actions


@dataclass(frozen=True)
class Embodiment:
    """A robot.

    about      one line.
    required   observation key → what it is; every one must be there.
    observe    the robot's observation → that of `spear.types.Policy`; raises `SpearError` naming the key.
    controls   name → `Control`; the first is the default.
    example    an observation as the robot sends it, the same at every call.
    optional   as `required`, for keys that may be there, the seed always; any other key is refused.
    greeting   control's name → the server's first message, for clients that want another than `Service`'s.
    direct_reply  request → the text that answers it without the policy, None where it is an observation.
    """

    about: str
    required: Mapping[str, str]
    observe: Callable[[Observation], dict[str, Any]]
    controls: Mapping[str, Control]
    example: Callable[[], dict[str, Any]]
    optional: Mapping[str, str] = field(default_factory=dict)
    greeting: Callable[[str], dict[str, Any]] | None = None
    direct_reply: Callable[[Observation], str | None] = lambda request: None

    def __post_init__(self) -> None:
        object.__setattr__(self, "optional", {**self.optional, SEED: ANY_SEED})

    def read(self, observation: Any) -> Checked:
        """The robot's observation as SPEAR-1 wants it. Raises `SpearError` naming the key that is wrong."""
        if not isinstance(observation, Mapping):
            raise SpearError(f"observation: a {type(observation).__name__}: send a map of keys to values")
        known = [*self.required, *self.optional]
        for key in observation:
            if key not in known:
                raise unknown_name("observation key", str(key)[:80], known)
        for key, about in self.required.items():
            if key not in observation:
                raise SpearError(f"observation without {key!r}: send {about}")
        return Checked({**self.observe(observation), **seed(observation)})

    def control(self, name: str | None) -> tuple[str, Control]:
        """A control by name, the default for None. Raises `SpearError` for an unknown one."""
        name = name or next(iter(self.controls))
        check_known("control", self.controls, name)
        return name, self.controls[name]


def names() -> list[str]:
    """The robots that come with this package."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "tools")


def load(name: str) -> Embodiment:
    """A robot by name, or from a Python file of yours. Raises `SpearError` for an unknown or broken one."""
    if name.endswith(".py"):
        return _from_file(Path(name))
    check_known("embodiment", names(), name)
    found: Embodiment = importlib.import_module(f"spear.embodiments.{name}").EMBODIMENT
    return found


def _from_file(path: Path) -> Embodiment:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        others = ", ".join(names())
        raise SpearError(f"embodiment: {path}: no such file: give a Python file or one of {others}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise SpearError(f"embodiment: {path}: {type(error).__name__}: {error}: repair the file") from error
    found = getattr(module, "EMBODIMENT", None)
    if not isinstance(found, Embodiment):
        raise SpearError(f"embodiment: {path}: has no EMBODIMENT: see docs/robots.md for an example")
    return found
