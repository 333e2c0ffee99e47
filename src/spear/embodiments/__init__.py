"""Embodiments: adapters between robots and SPEAR-1, one file per robot.

The Python file of an embodiment defines `EMBODIMENT`. An embodiment of this folder is known by the
name of its file, and an embodiment of yours by the path of its file. docs/howto/own-robot.md shows
how to write one.
"""

import importlib
import pkgutil
import runpy
from pathlib import Path

from spear.embodiments.interface import Control, Embodiment
from spear.embodiments.observations import Observation
from spear.errors import SpearError, check_known

__all__ = ["Control", "Embodiment", "Observation", "list_names", "load"]

_SHARED_MODULES = {
    "actions",
    "interface",
    "inverse_kinematics",
    "kinematics",
    "observations",
    "urdf",
    "urdf_inverse_kinematics",
}
"""Modules of this folder that are no embodiments."""


def list_names() -> list[str]:
    """Return the names of the embodiments that this package contains.

    Returns:
        The names, each of which `load` takes.

    Example:
        >>> "droid" in list_names()
        True
    """
    modules = {module.name for module in pkgutil.iter_modules(__path__)}
    return sorted(modules - _SHARED_MODULES)


def load(name: str) -> Embodiment:
    """Load an embodiment.

    Args:
        name: one of `list_names()`, or the path of a Python file that defines `EMBODIMENT`.

    Returns:
        The embodiment.

    Raises:
        SpearError: the name is unknown, or the file is missing, fails or defines no `EMBODIMENT`.

    Example:
        >>> sorted(load("droid").controls)
        ['cartesian_position', 'joint_position', 'joint_velocity']
    """
    if not name.endswith(".py"):
        check_known("embodiment", list_names(), name)
        return importlib.import_module(f"spear.embodiments.{name}").EMBODIMENT

    path = Path(name)
    if not path.is_file():
        raise SpearError(
            f"there is no file {path}. Give the path of a Python file, or the name of a robot, "
            "which `spear serve --help` lists."
        )
    try:
        module = runpy.run_path(str(path))
    except Exception as error:
        raise SpearError(
            f"embodiment {path} fails with {type(error).__name__} ({error}). Repair the file."
        ) from error
    embodiment = module.get("EMBODIMENT")
    if not isinstance(embodiment, Embodiment):
        raise SpearError(
            f"embodiment {path} defines no EMBODIMENT. See docs/howto/own-robot.md for an example."
        )
    return embodiment
