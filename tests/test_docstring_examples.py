"""The examples in docstrings print the output that follows them."""

import doctest
import importlib
import warnings
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"


def list_modules_with_examples() -> list[str]:
    """Return the names of modules whose files contain examples."""
    names = []
    for path in sorted(SOURCE.rglob("*.py")):
        if ">>> " in path.read_text(encoding="utf-8"):
            path_names = path.relative_to(SOURCE).with_suffix("").parts
            names.append(".".join(path_names).removesuffix(".__init__"))
    return names


@pytest.mark.parametrize("name", list_modules_with_examples())
def test_examples_in_docstrings_are_right(name: str) -> None:
    module = importlib.import_module(name)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # examples may cause notices, which they do not show
        results = doctest.testmod(module, optionflags=doctest.ELLIPSIS)

    assert results.failed == 0
