"""Imports point one way, without circles, and `import spear` stays light."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from data_tiny import make, png
from spear.data.store.episode_store import write_episodes

SOURCE = Path(__file__).parents[1] / "src" / "spear"
FILES = {
    ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}

BASIC = {"errors", "types", "util", "geometry", "gripper"}
LOW = BASIC | {"flow", "tokens"}
MIDDLE = LOW | {"sim", "data", "models", "labels"}
HIGH = MIDDLE | {"monitor", "policy", "chunks", "embodiments", "serve", "train", "evaluate"}
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "types": {"errors"},
    "util": {"errors", "types"},
    "geometry": {"errors", "types"},
    "gripper": {"errors", "types"},
    "flow": {"errors", "types", "geometry"},
    "tokens": {"errors", "types", "util"},
    "checks": BASIC,
    "embodiments": BASIC,
    "sim": BASIC | {"embodiments"},
    "data": BASIC | {"checks", "embodiments"},
    "monitor": BASIC | {"data"},
    "models": LOW,
    "labels": LOW | {"data", "models"},
    "sim_data": BASIC | {"sim", "data", "labels"},
    "chunks": BASIC,
    "policy": MIDDLE - {"sim"} | {"monitor", "chunks", "embodiments"},
    "serve": BASIC | {"chunks", "embodiments"},
    "train": MIDDLE - {"sim"} | {"monitor"},
    "evaluate": MIDDLE | {"sim_data", "policy", "chunks", "embodiments", "serve"},
    "audit": BASIC | {"checks", "data"},
    "report": HIGH | {"audit"},
    "ui": HIGH,
    "demo": HIGH | {"report"},
    "doctor": HIGH | {"__init__"},
    "cli": HIGH | {"sim_data", "audit", "report", "ui", "demo", "doctor", "__init__"},
}
"""Room -> the rooms of ours that it may import. The order is that of docs/architecture.md."""

HEAVY = (
    "mujoco", "gymnasium", "mani_skill", "sapien", "open3d", "av", "matplotlib", "ray", "tensorboard",
    "crc32c", "google.genai", "websockets", "msgpack", "peft", "rerun", "vla_eval", "pycocotools",
)  # fmt: skip


def room(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def imported(module: str) -> set[str]:
    """The modules of ours that a file imports, inside functions and under TYPE_CHECKING as well."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute in this project"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else str(node.module) for name in names}
    return {name for name in found if name in FILES and name != module}


@pytest.mark.parametrize("here", sorted({room(module) for module in FILES}))
def test_imports_point_one_way(here: str) -> None:
    assert here in MAY_IMPORT, (
        f"{here} is a new room: give it a place in MAY_IMPORT and docs/architecture.md"
    )
    for module in (m for m in FILES if room(m) == here):
        wrong = {
            m for m in imported(module) if room(m) not in MAY_IMPORT[here] | {here, "__init__"}
        }
        assert not wrong, f"{module} imports {sorted(wrong)}, which lie above it"


def test_the_package_does_not_import_experiments() -> None:
    for module, path in FILES.items():
        assert not re.search(r"\b(from|import) experiments\b", path.read_text()), module


def test_no_files_import_each_other_in_a_circle() -> None:
    TopologicalSorter(
        {module: imported(module) for module in FILES}
    ).prepare()  # else it names the circle


def test_what_needs_no_extra_runs_without_any(tmp_path: Path) -> None:
    """Nor what docs/label.md and docs/finetune.md do not name."""
    write_episodes([make(0)], tmp_path)
    (tmp_path / "photo.png").write_bytes(png(0))
    train = "train nano-post --init nano --episodes . --steps 1 --set batch_size=2 --out out"
    code = f"import sys; sys.modules.update(dict.fromkeys({HEAVY})); from spear.cli import main"
    code += f"; sys.exit(any(main(c.split()) for c in ('label photo.png --plan --batch-size 1', {train!r})))"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
