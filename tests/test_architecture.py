"""Imports point one way, without circles, and `import spear` stays light."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from data_tiny import make_episode, make_png
from spear.data.store.episode_store import append_episodes

SOURCE = Path(__file__).parents[1] / "src" / "spear"


def _get_module_name(path: Path) -> str:
    """Return the name by which a file of the package is imported."""
    names = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(names).removesuffix(".__init__")


MODULES = {_get_module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}
"""The name of each module of this package -> its file."""

# A room is a file or a folder directly in `src/spear`. Many rooms may import these sets of rooms.
BASIC = {"errors", "types", "util", "geometry", "gripper"}
LOW = BASIC | {"flow", "tokens", "question_types"}
MIDDLE = LOW | {"sim", "data", "models", "labels"}
HIGH = MIDDLE | {"monitor", "policy", "chunks", "embodiments", "serve", "train", "evaluate"}
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "types": {"errors"},
    "util": {"errors", "types"},
    "geometry": {"errors", "types"},
    "gripper": {"errors", "types"},
    "question_types": set(),
    "flow": {"errors", "types", "geometry"},
    "tokens": {"errors", "types", "util"},
    "checks": BASIC,
    "embodiments": BASIC,
    "sim": BASIC | {"embodiments"},
    "data": BASIC | {"checks", "embodiments"},
    "monitor": BASIC | {"checks", "data"},
    "models": LOW,
    "labels": LOW | {"data", "models"},
    "sim_data": BASIC | {"sim", "data", "labels"},
    "chunks": BASIC | {"embodiments"},
    "policy": LOW | {"data", "models", "monitor", "embodiments"},
    "serve": BASIC | {"data", "embodiments"},
    "train": LOW | {"data", "models", "labels", "monitor"},
    "evaluate": MIDDLE | {"sim_data", "policy", "chunks", "embodiments", "serve"},
    "audit": BASIC | {"checks", "data", "embodiments"},
    "diagnose": HIGH | {"checks"},
    "report": HIGH | {"audit", "checks", "diagnose"},
    "ui": HIGH,
    "demo": HIGH | {"report"},
    "doctor": HIGH | {"__init__"},
    "cli": HIGH | {"sim_data", "audit", "diagnose", "report", "ui", "demo", "doctor", "__init__"},
}
"""Room -> the rooms of this package that it may import.

The order is that of docs/explanation/architecture.md.
"""

OPTIONAL_MODULES = (
    "mujoco", "gymnasium", "mani_skill", "sapien", "open3d", "av", "matplotlib", "ray",
    "tensorboard", "crc32c", "google.genai", "websockets", "msgpack", "peft", "rerun", "vla_eval",
    "pycocotools",
)  # fmt: skip
"""Modules that `pip install spear-vla` without extras does not install."""


def get_room(module: str) -> str:
    """Return the room of a module: "data" for "spear.data.actions"."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def list_imports(module: str) -> set[str]:
    """Return the modules of this package that a module imports, anywhere in its file."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute in this project"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                names.add(submodule if submodule in MODULES else str(node.module))
    return {name for name in names if name in MODULES and name != module}


@pytest.mark.parametrize("room", sorted({get_room(module) for module in MODULES}))
def test_a_room_imports_only_rooms_below_it(room: str) -> None:
    assert room in MAY_IMPORT, (
        f"{room} is a new room: give it a place in MAY_IMPORT and docs/explanation/architecture.md"
    )
    allowed_rooms = MAY_IMPORT[room] | {room, "__init__"}

    for module in MODULES:
        if get_room(module) != room:
            continue
        imports = list_imports(module)
        wrong_imports = sorted(name for name in imports if get_room(name) not in allowed_rooms)
        assert not wrong_imports, f"{module} imports {wrong_imports}, which lie above it"


def test_no_modules_import_each_other_in_a_circle() -> None:
    imports = {module: list_imports(module) for module in MODULES}

    TopologicalSorter(imports).prepare()  # raises an error that names the circle


@pytest.mark.slow  # labels and trains in a fresh process
def test_labeling_and_training_run_without_optional_packages(tmp_path: Path) -> None:
    """So docs/howto/label.md and docs/tutorials/finetune.md need not name these packages."""
    append_episodes([make_episode(0)], tmp_path)
    (tmp_path / "photo.png").write_bytes(make_png(0))
    label = "label photo.png --dry-run --batch-size 1"
    train = "train nano-post --init nano --episodes . --steps 1 --set batch_size=2 --out out"
    # Importing a module fails if `sys.modules` has None for it.
    code = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL_MODULES}))
from spear.cli import main
for command in ({label!r}, {train!r}):
    exit_code = main(command.split())
    if exit_code != 0:
        sys.exit(exit_code)
"""

    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_one_module_loads_models_of_others() -> None:
    """Only `spear.util.pretrained` calls `from_pretrained`, so that no model folder runs code."""
    callers = [name for name, path in MODULES.items() if ".from_pretrained(" in path.read_text()]

    assert callers == ["spear.util.pretrained"]
