"""What the README and the pages show works when pasted: commands, links, the Python, the tutorial."""

import ast
import json
import re
import shlex
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve_here import SPEAR_CLI_CODE, run_python
from spear import cli
from spear.cli.parsing import get_options_class, parse_options
from spear.data.readers.formats import read_episodes
from spear.evaluate.open_loop import build_observations
from spear.serve.client import RemotePolicy
from spear.util.options import list_option_names

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:^[ $]*|`|\.venv/bin/|=\S+ )spear ([a-z][^`#\n]*)", re.MULTILINE)


def joined(page: Path) -> str:
    """A page, with lines that end in a backslash joined to the next."""
    return page.read_text().replace("\\\n", " ")


def options(name: str) -> set[str]:
    known = get_options_class(cli.load_command(name))
    return {"--help", *(list_option_names(known) if known else ())}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page: Path) -> None:
    for line in COMMAND.findall(joined(page)):
        words = line.split()
        if all(name.split()[0] != words[0] for name in cli.COMMANDS):
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
            name = cli.find_command(words[1:])
            function, rest = cli.load_command(name), words[1 + len(name.split()) :]
            parse_options(name, function, rest, "")


def test_commands_are_found() -> None:
    assert sum(len(COMMAND.findall(joined(page))) for page in PAGES) > 100


def test_docstrings_have_nothing_that_markdown_takes_for_a_link() -> None:
    """`make docs` makes the reference of them, and fails at a link that leads nowhere."""
    for file in sorted((ROOT / "src" / "spear").rglob("*.py")):
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = [
            node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, documented)
        ]
        assert not [n for n in nodes if re.search(r"\][\[(]", ast.get_docstring(n) or "")], file


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        where, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / where if where else page
        assert target.exists(), link
        # a page's headings, as GitHub names them
        titles = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE) if anchor else []
        named = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not anchor or anchor in named, link


def test_files_that_are_named_exist() -> None:
    named = re.compile(
        r"(?<![\w/])((?:benchmarks|experiments|docs|tests|scripts|examples|src)/[\w./-]+\.\w+)"
    )
    rooms = ("src", "benchmarks", "experiments", "scripts")
    code = (file for room in rooms for file in (ROOT / room).rglob("*.py"))
    files = [*PAGES, *code]
    names = {
        (file, name)
        for file in files
        for name in named.findall(file.read_text())
        if "NAME" not in name
    }
    assert not [(file, name) for file, name in names if not (ROOT / name).exists()]


def test_experiments_that_are_named_can_be_run() -> None:
    readmes = (ROOT / "experiments").rglob("*.md")
    code = [*(ROOT / "experiments").rglob("*.py"), *(ROOT / "src").rglob("*.py")]
    for file in [*PAGES, *readmes, *code]:
        for name in re.findall(r"-m (experiments(?:\.\w+)+)", file.read_text()):
            module = ROOT.joinpath(*name.split("."))
            assert (module / "__main__.py").exists() or module.with_suffix(".py").exists(), file


def test_scripts_end_as_commands_do() -> None:
    files = [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    scripts = {file: file.read_text() for file in files}
    assert not [
        f for f, text in scripts.items() if re.search(r"^ *(tyro|app)\.cli\(", text, re.MULTILINE)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_the_python_of_a_page_imports_exists(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec("\n".join(re.findall(r"^from spear\b.*", block, re.MULTILINE)), {})


def test_the_python_of_the_readme_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["actions"].shape == (5, 8)


def test_the_tutorial_runs_and_what_it_trains_can_be_served(
    renderer: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its cells in order, with few scenes and steps: label, ask, act, record, audit, fine-tune, score; then
    docs/finetune.md's last step."""
    cells = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    monkeypatch.setenv("SPEAR_QUICK", "1")
    monkeypatch.setenv("SPEAR_TUTORIAL", str(tmp_path))
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    said = capsys.readouterr().out
    assert "(5, 8)" in said and "WRONG" not in said and "trained: " in said
    assert len(list(tmp_path.glob("label-*.png"))) == 2
    header, *rows = said.partition("1 held-out episode")[2].splitlines()
    assert header.endswith("last action")
    assert len(rows) == 4 and all(
        row.count("(n = 1)") == 3 for row in rows
    )  # one episode gives no interval
    (episode,) = read_episodes(tmp_path / "my_robot", "train[2:]")
    with run_python(SPEAR_CLI_CODE, "serve", str(tmp_path / "mine"), "--port", "0") as server:
        said = server.stdout.readline()
        found = re.search(r"ws://\S+", said)
        assert found, said
        with closing(RemotePolicy(found[0])) as policy:
            actions = policy.infer(build_observations(episode)[0])["actions"]
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    assert actions.shape == (5, 8) and np.isfinite(actions).all()
    np.testing.assert_allclose(np.linalg.norm(actions[:, 3:7], axis=1), 1, atol=1e-5)
