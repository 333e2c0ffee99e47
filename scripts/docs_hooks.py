"""What mkdocs needs beyond its configuration: a page of reference per room, and links into the
repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "spear"


def list_modules(room: Path) -> list[str]:
    """Return the public modules of a room, in order, by their whole names."""
    files = [room] if room.suffix == ".py" else sorted(room.rglob("*.py"))
    names = []
    for file in files:
        path = file.relative_to(ROOT / "src").with_suffix("")
        name = ".".join(path.parts).removesuffix(".__init__")
        if "._" not in name:
            names.append(name)
    return names


def list_rooms() -> list[Path]:
    """Return every file and folder of src/spear that can be imported."""
    rooms = []
    for path in sorted(SOURCE.iterdir()):
        is_importable = path.suffix == ".py" or (path / "__init__.py").is_file()
        if is_importable and not path.name.startswith("_"):
            rooms.append(path)
    return rooms


def on_config(config: Any) -> Any:
    """Let the pages of the rooms follow the reference's first page."""
    config.nav[-1]["Reference"] += [f"reference/{room.stem}.md" for room in list_rooms()]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add reference/ROOM.md for every room."""
    for room in list_rooms():
        lines = [f"# spear.{room.stem}"]
        lines += [f"::: {module}" for module in list_modules(room)]
        text = "\n\n".join(lines)
        files.append(File.generated(config, f"reference/{room.stem}.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turn links out of docs/ into plain text."""
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)
