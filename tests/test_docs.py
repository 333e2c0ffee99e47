"""What the README and the pages show works when pasted: its Python, and the words and options of its
commands."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from spear.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:^[ $]*|`|\.venv/bin/|=\S+ )spear ([a-z][^`#\n]*)", re.MULTILINE)


def commands(page: Path) -> list[str]:
    """What stands after `spear` at the start of a line or of a span of code."""
    text = page.read_text().replace("\\\n", " ")
    return [line for line in COMMAND.findall(text) if line.split()[0] in {n.split()[0] for n in COMMANDS}]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page: Path) -> None:
    for line in commands(page):
        words = line.split()
        name = next((n for n in (" ".join(words[:2]), words[0]) if n in COMMANDS), None)
        if name is None:
            assert words[1:] in ([], ["…"]), f"spear {line}"  # the group by itself
            continue
        known = {parameter.replace("_", "-") for parameter in inspect.signature(COMMANDS[name]).parameters}
        for option in re.findall(r"(?<=\s--)[a-z][a-z-]*", line.partition(" & ")[0]):
            assert option.removeprefix("no-") in known | {"help"}, f"spear {line}"


def test_commands_are_found() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 150


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        where, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / where if where else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_python_of_the_readme_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["actions"].shape == (5, 8)
