"""Self-contained HTML pages from the templates beside this file: no script, no network, light or dark.

Everything that an HTML template is given is escaped, unless it is `Markup`, which only templates make.
"""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from spear.util.images import to_data_uri


def render(template: str, **values: Any) -> str:
    """The template of this name (without .j2), filled in. HTML is `Markup`."""
    filled = _TEMPLATES.get_template(f"{template}.j2").render(values)
    return Markup(filled) if template.endswith(".html") else filled


def spaced(name: str) -> str:
    """A name as people write it: put_on -> put on."""
    return name.replace("_", " ")


_TEMPLATES = Environment(
    loader=PackageLoader("spear.report"),
    autoescape=select_autoescape(["html.j2"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {"spaced": spaced, "data_uri": to_data_uri}
_TEMPLATES.globals["part"] = _TEMPLATES.get_template("parts.html.j2").module
