"""Robots, one file each: their observations as SPEAR-1 wants them, SPEAR-1's actions as they take them.

A file in this folder that has an `EMBODIMENT`, or any such Python file of yours, is a robot; its name is the
file's. docs/robots.md shows how to write one.
"""

import importlib
import pkgutil
import runpy
from pathlib import Path

from spear.embodiments.tools import Control, Embodiment, Observation
from spear.errors import SpearError, check_known

__all__ = ["Control", "Embodiment", "Observation", "load", "names"]


def names() -> list[str]:
    """The robots that come with this package."""
    modules = {module.name for module in pkgutil.iter_modules(__path__)}
    return sorted(modules - {"tools", "kinematics", "inverse_kinematics"})


def load(name: str) -> Embodiment:
    """A robot by name, or from a Python file of yours. Raises `SpearError` for an unknown or broken one."""
    if not name.endswith(".py"):
        check_known("embodiment", names(), name)
        return importlib.import_module(f"spear.embodiments.{name}").EMBODIMENT
    path = Path(name)
    if not path.is_file():
        others = ", ".join(names())
        raise SpearError(f"embodiment: {path}: no such file: give a Python file or one of {others}")
    try:
        found = runpy.run_path(str(path)).get("EMBODIMENT")
    except Exception as error:
        raise SpearError(
            f"embodiment: {path}: {type(error).__name__}: {error}: repair the file"
        ) from error
    if not isinstance(found, Embodiment):
        raise SpearError(
            f"embodiment: {path}: has no EMBODIMENT: see docs/robots.md for an example"
        )
    return found
