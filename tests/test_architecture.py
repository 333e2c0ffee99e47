"""The house rules that a machine can check: imports point one way, and `import spear` is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "spear"

# room -> the rooms of ours that it may import. The order is that of docs/architecture.md.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "types": set(),
    "images": {"errors", "types"},
    "files": {"errors"},
    "processes": {"errors"},
    "threads": set(),
    "progress": set(),
    "fingerprint": set(),
    "geometry": {"errors", "types"},
    "flow": {"errors", "types", "geometry"},
    "tokens": {"errors", "types", "files"},
    "sim": {"errors", "types", "images", "geometry"},
    "labels": {"errors", "types", "images", "files", "geometry", "processes", "progress"},
    "data": {"errors", "types", "images", "files", "geometry", "processes", "progress"},
    "models": {"errors", "types", "geometry", "flow", "tokens"},
}
MATHEMATICS_AND_BELOW = set(MAY_IMPORT)
MAY_IMPORT["policy"] = MATHEMATICS_AND_BELOW - {"sim"}
MAY_IMPORT["pointmap"] = {"errors", "types", "labels", "models"}
MAY_IMPORT["scenes"] = MATHEMATICS_AND_BELOW
MAY_IMPORT["demonstrations"] = {"errors", "images", "files", "progress", "sim", "data"}
MAY_IMPORT["components"] = {"errors", "types", "geometry", "labels", "models", "pointmap"}
MAY_IMPORT["sources"] = {"errors", "types", "images", "geometry", "labels", "data", "sim"}
MAY_IMPORT["chunks"] = {"errors", "types", "geometry", "threads"}
MAY_IMPORT["embodiments"] = {"errors", "types", "geometry", "sim"}
MAY_IMPORT["simpler"] = {"errors", "types", "geometry", "embodiments"}
MAY_IMPORT["serve"] = {"errors", "types", "embodiments", "threads"}
MAY_IMPORT["train"] = MATHEMATICS_AND_BELOW - {"sim"}
MAY_IMPORT["evaluate"] = MATHEMATICS_AND_BELOW | {"policy", "scenes", "chunks", "serve"}
MAY_IMPORT["evaluate"] |= {"embodiments", "simpler"}
MAY_IMPORT["ui"] = MAY_IMPORT["evaluate"] | {"embodiments", "evaluate"}
MAY_IMPORT["ablations"] = MAY_IMPORT["evaluate"] | {"evaluate", "train", "demonstrations"}
MAY_IMPORT["demo"] = set(MAY_IMPORT) - {"cli"}
MAY_IMPORT["cli"] = set(MAY_IMPORT)
MAY_IMPORT["__init__"] = set()

HEAVY = (
    "mujoco",
    "gymnasium",
    "mani_skill",
    "sapien",
    "open3d",
    "av",
    "ray",
    "tensorboard",
    "crc32c",
    "google.genai",
    "websockets",
    "msgpack",
    "peft",
)


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = node.module == "spear"
            names = [f"spear.{alias.name}" if inside else node.module for alias in node.names]
            assert node.level == 0, f"{path}: imports are absolute in this project"
        found |= {name.split(".")[1] for name in names if name.startswith("spear.")}
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path: Path) -> None:
    here = room(path)
    assert here in MAY_IMPORT, f"{here} is a new room: give it a place in MAY_IMPORT and docs/architecture.md"
    wrong = imported_rooms(path) - MAY_IMPORT[here] - {here}
    assert not wrong, f"{path.relative_to(SOURCE)} imports {sorted(wrong)}, which lie above it"


@pytest.mark.parametrize(
    "module", ["spear", "spear.types", "spear.geometry", "spear.flow", "spear.tokens", "spear.models"]
)
def test_importing_pulls_in_no_heavy_extra(module: str) -> None:
    code = f"import sys, {module}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_command_line_starts_without_networks() -> None:
    code = (
        "import sys, spear.cli; print(*[m for m in ('torch', 'transformers', 'mujoco') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
