"""The docstrings of the public names say what a user of the package needs to know."""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
ROOT = Path(__file__).parents[1]
HOOKS_SOURCE = (ROOT / "scripts" / "docs_hooks.py").read_text("utf-8")


def read_constant(constant: str) -> Any:
    """Return a constant of the script of the reference, which cannot be imported without mkdocs."""
    for node in ast.parse(HOOKS_SOURCE).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == constant:
            return ast.literal_eval(node.value)
    raise AssertionError(constant)


PUBLIC_NAMES = [
    (module, name) for module, names in read_constant("PUBLIC_NAMES").items() for name in names
]
PUBLIC_METHODS = read_constant("PUBLIC_METHODS")


def list_public_methods(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the public methods that a class defines itself, without functions in its fields."""
    for name, member in vars(value).items():
        if name in getattr(value, "__dataclass_fields__", {}):
            continue
        function = member.__func__ if isinstance(member, staticmethod | classmethod) else member
        is_public = name in PUBLIC_METHODS.get(value.__name__, [name])
        if inspect.isfunction(function) and is_public and not name.startswith("_"):
            yield name, inspect.unwrap(function)


def find_missing_sections(function: Any) -> list[str]:
    """Return the sections that the docstring of a function should have, but has not."""
    docstring = inspect.getdoc(function) or ""
    signature = inspect.signature(function)
    parameters = [name for name in signature.parameters if name not in ("self", "cls")]
    missing = []
    if parameters and "Args:" not in docstring:
        missing.append("Args")
    has_result = signature.return_annotation not in (None, "None")
    if has_result and not re.search("(Returns|Yields):", docstring):
        missing.append("Returns")
    source = textwrap.dedent(inspect.getsource(function))
    has_raise = any(isinstance(node, ast.Raise) for node in ast.walk(ast.parse(source)))
    if has_raise and "Raises:" not in docstring:
        missing.append("Raises")
    return missing


def test_there_are_forty_public_names() -> None:
    assert len(PUBLIC_NAMES) == 40


def test_the_overview_lists_all_public_names() -> None:
    page = (ROOT / "docs" / "reference" / "index.md").read_text("utf-8")

    for module, name in PUBLIC_NAMES:
        (row,) = re.findall(rf"^\| `{re.escape(module)}` .*", page, re.MULTILINE)
        assert f"`{name}`" in row


@pytest.mark.parametrize(("module", "name"), PUBLIC_NAMES)
def test_a_public_name_is_documented_with_an_example(module: str, name: str) -> None:
    value = getattr(importlib.import_module(module), name)
    docstring = inspect.getdoc(value) or ""

    assert "Example:" in docstring
    assert re.search(r"^ *>>> ", docstring, re.MULTILINE)
    if inspect.isclass(value):
        has_no_fields = issubclass(value, Exception) or getattr(value, "_is_protocol", False)
        assert has_no_fields or "Attributes:" in docstring or "Args:" in docstring
    else:
        assert find_missing_sections(value) == []


@pytest.mark.parametrize(("module", "name"), PUBLIC_NAMES)
def test_the_methods_of_a_public_class_are_documented(module: str, name: str) -> None:
    value = getattr(importlib.import_module(module), name)
    if not inspect.isclass(value):
        return

    missing = {}
    for method_name, method in list_public_methods(value):
        sections = find_missing_sections(method)
        if sections or not inspect.getdoc(method):
            missing[method_name] = sections

    assert missing == {}
