"""Renders self-contained HTML pages from the templates in the folder `templates`.

The pages need no script and no network, and are readable in light and dark. HTML templates escape
all of their values except `Markup`, and only rendered templates are `Markup`.
"""

import functools
from pathlib import Path
from typing import Any

from jinja2 import (
    BaseLoader,
    ChoiceLoader,
    Environment,
    FileSystemLoader,
    PackageLoader,
    StrictUndefined,
    select_autoescape,
)
from markupsafe import Markup

from spear.util.images import to_data_uri

Fact = tuple[str, str]
"""A large number at the top of a page, and its meaning in words."""


def render(template_name: str, **values: Any) -> str:
    """Fill in a template of this package, and return its text; for HTML as `Markup`.

    Args:
        template_name: name of the template's file, without the ending .j2.
        values: the values that the template shows, by name.
    """
    return render_from(None, template_name, **values)


def render_from(folder: Path | None, template_name: str, **values: Any) -> str:
    """Fill in a template as `render` does. Templates in `folder` precede those of the package."""
    text = _get_environment(folder).get_template(f"{template_name}.j2").render(values)
    return Markup(text) if template_name.endswith(".html") else text


def replace_underscores(name: str) -> str:
    """Return a name with spaces for its underscores, as people write it: "put on" for "put_on"."""
    return name.replace("_", " ")


@functools.cache
def _get_environment(folder: Path | None) -> Environment:
    """Make Jinja's environment, which finds the templates of `folder`, then of the package."""
    loaders: list[BaseLoader] = [PackageLoader("spear.report")]
    if folder is not None:
        loaders.insert(0, FileSystemLoader(folder))
    environment = Environment(
        loader=ChoiceLoader(loaders),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"spaced": replace_underscores, "data_uri": to_data_uri}
    # Every template can call the macros of parts.html.j2, as part.NAME.
    environment.globals["part"] = environment.get_template("parts.html.j2").module
    return environment
