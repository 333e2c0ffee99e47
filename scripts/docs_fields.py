"""For `make docs`: lists of fields in docstrings keep their columns, and examples are code.

A line of such a list has a name, spaces, and what it is.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

FIELD = re.compile(r"\w[\w, .\[\]]*?  +\S|\S+(, \S+)*  \S")
"""A line that begins with one name or several, and has its text in a column."""


def format_columns(text: str) -> str:
    """Return a docstring whose paragraphs in columns are blocks of code."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        lines = paragraph.split("\n")
        fields = FIELD.match(lines[0]) and not lines[0].startswith(" ")
        aligned = [line for line in lines[1:] if line.startswith("      ")]
        if fields and (len(lines) == 1 or aligned or all(FIELD.match(line) for line in lines)):
            paragraph = f"```text\n{paragraph}\n```"
        paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


def name_examples(text: str) -> str:
    """Return a docstring whose section "Example:" has the name that griffe reads as code."""
    return re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


class Fields(Extension):
    """Apply both to every docstring."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = format_columns(name_examples(obj.docstring.value))
