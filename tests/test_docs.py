"""The README and the pages are right: commands and files exist, links lead somewhere, code runs."""

import ast
import re
import runpy
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spear.cli import COMMANDS, load_command, resolve_command
from spear.cli.parsing import get_options_class, parse_options
from spear.data.readers.dataset_layout import resolve_layout
from spear.util.options import list_option_names

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
RECORDS = [
    *sorted((ROOT / "experiments").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
]
"""Pages of studies and benchmarks. Their commands run the scripts of their folders."""

# "spear …" in a page: at the beginning of a line (maybe after "$"), after a backtick, a folder
# (".venv/bin/spear …") or the assignment of a variable ("HF_HUB_OFFLINE=1 spear …").
COMMAND = re.compile(r"(?:^[ $]*|`|\.venv/bin/|=\S+ )spear ([a-z][^`#\n]*)", re.MULTILINE)
NAMED_FILE = re.compile(
    r"(?<![\w/])((?:benchmarks|experiments|docs|tests|scripts|examples|src)/[\w./-]+\.\w+)"
)
CODE_FOLDERS = ("src", "benchmarks", "experiments", "scripts")


def parametrize_pages(pages: list[Path]) -> pytest.MarkDecorator:
    """Make a decorator that runs a test for each page."""
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


def read_page(page: Path) -> str:
    """Return the text of a page. A line that ends in a backslash is joined to the next line."""
    return page.read_text().replace("\\\n", " ")


def find_blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", read_page(page), re.DOTALL)


def list_options(name: str) -> set[str]:
    """Return the options of a command."""
    options_class = get_options_class(load_command(name))
    if options_class is None:
        return {"--help"}
    return {"--help", *list_option_names(options_class)}


def find_named_command(line: str) -> str | None:
    """Return the command whose name a line begins with; None for the first word of a group.

    line: the words after "spear".
    """
    words = line.split()
    for name in (" ".join(words[:2]), words[0]):
        if name in COMMANDS:
            return name
    return None


@parametrize_pages(PAGES)
def test_commands_and_their_options_exist(page: Path) -> None:
    first_words = {name.split()[0] for name in COMMANDS}
    for line in COMMAND.findall(read_page(page)):
        words = line.split()
        if words[0] not in first_words:  # a sentence about spear
            continue
        name = find_named_command(line)
        if name is None:
            is_group_alone = words[1:] in ([], ["…"])
            assert is_group_alone, f"spear {line}"
            continue
        command, _, _ = line.partition(" & ")
        for option in re.findall(r"(?<=\s)--[a-z][a-z-]*", command):
            assert option.replace("--no-", "--") in list_options(name), f"spear {line}"


@parametrize_pages(PAGES)
def test_commands_in_blocks_are_understood(page: Path) -> None:
    """The command line can parse them, with values and positional arguments."""
    for block in find_blocks(page, "sh"):
        for line in block.splitlines():
            command, _, _ = line.partition(" & ")
            words = shlex.split(command.removeprefix(".venv/bin/"), comments=True)
            if words[:1] != ["spear"] or "…" in line or "*" in line:
                continue
            name = resolve_command(words[1:])
            arguments = words[1 + len(name.split()) :]
            parse_options(name, load_command(name), arguments, help_text="")


def test_commands_are_found() -> None:
    """Otherwise the pattern `COMMAND` could be wrong without a failing test."""
    num_commands = sum(len(COMMAND.findall(read_page(page))) for page in PAGES)

    assert num_commands > 100


def test_docstrings_have_nothing_that_markdown_takes_for_a_link() -> None:
    """`make docs` turns docstrings into the reference, and fails at a link that leads nowhere."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in sorted((ROOT / "src" / "spear").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, documented):
                docstring = ast.get_docstring(node) or ""
                assert not re.search(r"\][\[(]", docstring), file  # [text](target), [text][name]


def find_anchors(page: Path) -> list[str]:
    """Return a page's headings, as GitHub names them in links."""
    anchors = []
    for heading in re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE):
        anchors.append(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))
    return anchors


@parametrize_pages([*PAGES, *RECORDS, ROOT / "CHANGELOG.md"])
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in find_anchors(target), link


def list_code_files() -> Iterator[Path]:
    """Yield the Python files outside the tests."""
    for folder in CODE_FOLDERS:
        yield from (ROOT / folder).rglob("*.py")


def test_files_that_are_named_exist() -> None:
    for file in [*PAGES, *RECORDS, *list_code_files()]:
        for name in NAMED_FILE.findall(file.read_text()):
            if "NAME" not in name:  # a name that the reader has to fill in
                assert (ROOT / name).exists(), f"{file}: {name}"


def test_files_of_the_ways_through_the_code_exist() -> None:
    page = ROOT / "docs" / "explanation" / "architecture.md"
    _, _, rest_of_page = page.read_text().partition("## Three ways through the code")
    section, _, _ = rest_of_page.partition("## To change something")

    paths = re.findall(r"`([\w/]+/[\w.]+\.(?:py|toml))`", section)

    assert len(paths) > 40
    for path in paths:
        assert (ROOT / "src" / "spear" / path).exists(), path


def find_named_files(name: str) -> list[Path]:
    """Return the files that a path in the page on the architecture stands for.

    The path is below `src/spear` or the repository. A folder stands for all files in it, and NAME
    for any name.
    """
    pattern = name.replace("NAME", "*")
    paths = [*(ROOT / "src" / "spear").glob(pattern), *ROOT.glob(pattern)]
    files: list[Path] = []
    for path in paths:
        files.extend(path.rglob("*.py") if path.is_dir() else [path])
    return files


def test_functions_of_the_page_on_the_architecture_are_in_the_files_that_it_names() -> None:
    """A list's item, or a row of a table, names files and what the reader finds in them."""
    page = ROOT / "docs" / "explanation" / "architecture.md"
    items = re.findall(r"^(?:\d+\.|\|) .*(?:\n   .*)*", page.read_text(), re.MULTILINE)

    num_checked = 0
    for item in items:
        quoted_words = re.findall(r"`([^`]+)`", item)
        files: list[Path] = []
        for word in quoted_words:
            if "/" in word or "." in word:
                files += find_named_files(word)
        code = "\n".join(file.read_text() for file in files)
        for word in quoted_words:
            # "test_noise_of_…" stands for several functions with this beginning.
            match = re.fullmatch(r"([A-Za-z_]\w*)(…?)", word)
            if match is not None and files:
                name, has_more = match.groups()
                end = "" if has_more else r"\b"
                assert re.search(rf"\b{name}{end}", code), f"{name} is not in the files of: {item}"
                num_checked += 1

    assert num_checked > 50


def test_experiments_that_are_named_can_be_run() -> None:
    for file in [*PAGES, *RECORDS, *list_code_files()]:
        for name in re.findall(r"-m (experiments(?:\.\w+)+)", file.read_text()):
            module = ROOT.joinpath(*name.split("."))
            is_package = (module / "__main__.py").exists()
            assert is_package or module.with_suffix(".py").exists(), file


def test_scripts_report_errors_as_commands_do() -> None:
    """A script calls tyro inside `run_reporting_errors`."""
    files = [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    for file in files:
        assert not re.search(r"^ *(tyro|app)\.cli\(", file.read_text(), re.MULTILINE), file


@parametrize_pages(PAGES)
def test_imports_in_the_python_of_a_page_exist(page: Path) -> None:
    for block in find_blocks(page, "python"):
        imports = re.findall(r"^from spear\b.*", block, re.MULTILINE)
        exec("\n".join(imports), {})


def test_the_python_of_the_readme_runs() -> None:
    (block,) = find_blocks(PAGES[0], "python")
    names: dict[str, Any] = {}

    exec(block, names)

    assert names["actions"].shape == (5, 8)


def test_figures_follow_the_theme_of_the_reader() -> None:
    figures = sorted((ROOT / "docs" / "figures").glob("*.svg"))

    assert len(figures) > 5
    for figure in figures:
        assert "@media (prefers-color-scheme: dark)" in figure.read_text("utf-8"), figure


def test_the_page_of_the_datasets_repeats_the_facts_of_their_layouts() -> None:
    """If this fails after a change of oxe.toml, run `python scripts/datasets_page.py`."""
    names = runpy.run_path(str(ROOT / "scripts" / "datasets_page.py"))

    assert names["PAGE"].read_text("utf-8") == names["format_page"]()


def test_the_tutorial_shows_the_whole_layout_that_like_bridge_dataset_stands_for(
    tmp_path: Path,
) -> None:
    page = (ROOT / "docs" / "tutorials" / "widowx.md").read_text("utf-8")
    (json_text,) = re.findall(r"^```json\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "shown.json").write_text(json_text)
    (tmp_path / "like.json").write_text('{"like": "bridge_dataset"}')

    shown_layout = resolve_layout("mine", tmp_path, tmp_path / "shown.json")
    meant_layout = resolve_layout("mine", tmp_path, tmp_path / "like.json")

    # Facts and frames say how the layout is known, and the weight is that of the paper's mixture.
    origin = {"facts": {}, "frames": {}, "weight": None}
    assert replace(shown_layout, **origin) == replace(meant_layout, **origin)


def list_message_headings() -> list[str]:
    """Return the headings of troubleshooting.md that are words of messages."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    messages, _, _ = page.partition("\n## Symptoms without a message")
    return re.findall(r"^### (.*)", messages, re.MULTILINE)


def test_headings_of_the_page_for_troubles_are_words_of_messages() -> None:
    source = "\n".join(file.read_text("utf-8") for file in (ROOT / "src").rglob("*.py"))
    source = re.sub(r"[\"']\s*\n\s*f?[\"']", "", source)  # joins the lines of a long text
    headings = list_message_headings()

    assert len(headings) > 20
    for heading in headings:
        assert heading in source, heading
