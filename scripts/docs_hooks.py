"""What mkdocs needs beyond its configuration: a page of reference per room, and links into the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "spear"


def modules(room: Path) -> list[str]:
    """The public modules of a room, in order, by their whole names."""
    files = [room] if room.suffix == ".py" else sorted(room.rglob("*.py"))
    names = [".".join(file.relative_to(ROOT / "src").with_suffix("").parts) for file in files]
    return [
        name.removesuffix(".__init__")
        for name in names
        if "._" not in name.removesuffix(".__init__")
    ]


def rooms() -> list[Path]:
    """Every file and folder of src/spear that can be imported."""
    found = (path for path in SOURCE.iterdir() if not path.name.startswith("_"))
    return sorted(
        path for path in found if path.suffix == ".py" or (path / "__init__.py").is_file()
    )


def on_config(config: Any) -> Any:
    """The pages of the rooms follow the reference's first page."""
    config.nav[-1]["Reference"] += [f"reference/{room.stem}.md" for room in rooms()]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds reference/ROOM.md for every room."""
    for room in rooms():
        text = "\n\n".join([f"# spear.{room.stem}", *(f"::: {module}" for module in modules(room))])
        files.append(File.generated(config, f"reference/{room.stem}.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links out of docs/ become plain text."""
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)
