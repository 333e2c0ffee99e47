"""Self-contained HTML pages from the templates beside this file: no script, no network, light or
dark.

HTML templates escape all of their values but `Markup`, which only templates make.
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


def render(template: str, **values: Any) -> str:
    """Fill in the template with this name, without .j2. HTML is returned as `Markup`."""
    return render_from(None, template, **values)


def render_from(folder: Path | None, template: str, **values: Any) -> str:
    """Fill in a template as `render` does; a folder's templates come before the package's."""
    text = _environment(folder).get_template(f"{template}.j2").render(values)
    return Markup(text) if template.endswith(".html") else text


def replace_underscores(name: str) -> str:
    """Return a name as people write it: put on for put_on."""
    return name.replace("_", " ")


@functools.cache
def _environment(folder: Path | None) -> Environment:
    """Load the templates of this package, after those of a folder."""
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
    environment.globals["part"] = environment.get_template("parts.html.j2").module
    return environment
