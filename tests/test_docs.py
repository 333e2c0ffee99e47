"""What the README and the pages show works when pasted: commands, links, the Python, the tutorial."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spear import cli
from spear.util.options import option_names

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:^[ $]*|`|\.venv/bin/|=\S+ )spear ([a-z][^`#\n]*)", re.MULTILINE)
FIRST = {name.split()[0] for name in cli.COMMANDS}


def joined(page: Path) -> str:
    """A page, with lines that end in a backslash joined to the next."""
    return page.read_text().replace("\\\n", " ")


def options(name: str) -> set[str]:
    """The options of a command, as they are written."""
    known = cli.options_of(cli.load(name))
    return {"--help", *(option_names(known) if known else ())}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page: Path) -> None:
    for line in COMMAND.findall(joined(page)):
        words = line.split()
        if words[0] not in FIRST:
            continue
        name = next((n for n in (" ".join(words[:2]), words[0]) if n in cli.COMMANDS), None)
        if name is None:
            assert words[1:] in ([], ["…"]), f"spear {line}"  # the group by itself
            continue
        for option in re.findall(r"(?<=\s)--[a-z][a-z-]*", line.partition(" & ")[0]):
            assert option.replace("--no-", "--") in options(name), f"spear {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_blocks_are_understood(page: Path) -> None:
    """Read as the command line reads them, values and positional arguments included."""
    for block in re.findall(r"```sh\n(.*?)```", joined(page), re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line.partition(" & ")[0].removeprefix(".venv/bin/"), comments=True)
            if words[:1] != ["spear"] or "…" in line or "*" in line:
                continue
            name = cli._command(words[1:])
            function, rest = cli.load(name), words[1 + len(name.split()) :]
            cli.parse(name, function, rest)


def test_commands_are_found() -> None:
    assert sum(len(COMMAND.findall(joined(page))) for page in PAGES) > 100


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        where, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / where if where else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    named = r"(?<![\w/])((?:benchmarks|tests|scripts|examples|src)/[\w./-]+\.\w+)"
    names = [name for name in re.findall(named, page.read_text()) if "NAME" not in name]
    assert [name for name in names if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_the_python_of_a_page_imports_exists(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec("\n".join(re.findall(r"^from spear\b.*", block, re.MULTILINE)), {})


def test_the_python_of_the_readme_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["actions"].shape == (5, 8)


def test_the_tutorial_runs(tmp_path: Path) -> None:
    """Its cells in order, in a process of their own, with few scenes and steps."""
    pytest.importorskip("mujoco")
    cells = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    program = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    here = {**os.environ, "SPEAR_QUICK": "1", "SPEAR_TUTORIAL": str(tmp_path / "out")}
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=here, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "(5, 8)" in ran.stdout and (tmp_path / "out" / "mine" / "final").is_dir()
