"""Every template gets the values that it shows, under the names by which it calls them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from jinja2 import nodes
from jinja2.meta import find_undeclared_variables

import spear
from spear.report.page import _get_environment

PACKAGE = Path(spear.__file__).parent
ENVIRONMENT = _get_environment(None)


def find_render_calls() -> Iterator[tuple[str, frozenset[str]]]:
    """Yield the template and the names of the values of each call of `render` that lists them."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if "spear.report.page import" not in path.read_text("utf-8"):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            names = [keyword.arg for keyword in node.keywords]
            if node.func.id == "render" and None not in names:  # None stands for **values
                template = node.args[0]
                assert isinstance(template, ast.Constant), f"{path}:{node.lineno}"
                template_file = str(template.value) + ".j2"
                yield template_file, frozenset(name for name in names if name)


def find_shown_values(template: str) -> set[str]:
    """Return the names of all values that a template, and the one that it extends, show."""
    assert ENVIRONMENT.loader is not None
    text, _, _ = ENVIRONMENT.loader.get_source(ENVIRONMENT, template)
    tree = ENVIRONMENT.parse(text)
    names = find_undeclared_variables(tree)
    for extended in tree.find_all(nodes.Extends):
        assert isinstance(extended.template, nodes.Const)
        names |= find_shown_values(str(extended.template.value))
    return names - set(ENVIRONMENT.globals)


RENDER_CALLS = sorted(find_render_calls(), key=str)


def test_calls_of_render_are_found() -> None:
    assert ("histogram.html.j2", {"counts", "most", "low", "high"}) in RENDER_CALLS


@pytest.mark.parametrize(("template", "names"), RENDER_CALLS)
def test_a_template_gets_every_value_that_it_shows(template: str, names: frozenset[str]) -> None:
    assert find_shown_values(template) <= names


@pytest.mark.parametrize(("template", "names"), RENDER_CALLS)
def test_a_template_shows_every_value_that_it_gets(template: str, names: frozenset[str]) -> None:
    assert names <= find_shown_values(template)
