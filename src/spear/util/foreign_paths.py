"""Checks names of files in data and metadata that others wrote, so that they stay in their folder.

People share prepared data. If the rows or metadata of a dataset name `/home/me/private.jpg` or
`../../private.jpg`, preparing would copy that picture into the data that are shared, so such names
are refused. Symbolic links in the folder are followed, because its owner made them: the cache of
Hugging Face consists of links.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath

from spear.errors import SpearError

ZERO_PADDED_WIDTH = re.compile(r"(0?\d{1,2})?d?")  # the part 06d of {episode_index:06d}


def join_inside(folder: Path, name: str) -> Path:
    """Join a folder and the name of a file that data or metadata of others contain.

    Args:
        folder: The folder of the dataset or model.
        name: A relative path, with `/` between its parts.

    Returns:
        The path of the file, which need not exist.

    Raises:
        SpearError: If the name is an absolute path, has a part `..`, or has a null character.

    Example:
        >>> join_inside(Path("data"), "images/0.png").as_posix()
        'data/images/0.png'
    """
    # Windows splits paths at slashes and at backslashes, so its rules recognize the absolute paths
    # of every system.
    if "\0" in name:
        raise SpearError(
            f"the data in {folder} name the file {name!r}, which cannot exist. Correct its path."
        )
    path = PureWindowsPath(name)
    if path.root or path.drive or ".." in path.parts:
        raise SpearError(
            f"the data in {folder} name the file {name!r}, which lies outside this folder. Copy "
            "the file into the folder, and name it by its path from there."
        )
    return folder / name


def fill_path_template(template: str, values: Mapping[str, str | int]) -> str:
    """Fill the placeholders of a path that metadata contain, such as `{episode_index:06d}`.

    Args:
        template: The path. A placeholder is a name in braces. For numbers a width of at most two
            digits may follow the name.
        values: Name → value. Names that the template does not use are ignored.

    Returns:
        The path with all placeholders filled.

    Raises:
        SpearError: If a placeholder has another name or form: Python's format strings could read
            attributes of objects, or ask for gigabytes of spaces.

    Example:
        >>> fill_path_template("data/episode_{episode_index:06d}.parquet", {"episode_index": 7})
        'data/episode_000007.parquet'
    """
    _check_template(template, frozenset(values))
    return template.format(**values)


@functools.lru_cache(maxsize=256)  # a dataset fills the same template for each of its episodes
def _check_template(template: str, names: frozenset[str]) -> None:
    """Raise `SpearError` unless all placeholders have known names and a plain width."""
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise SpearError(
            f"the path {template!r} of the metadata is no template ({error}). It may use "
            f"{_format_placeholders(names)}."
        ) from error

    for _, name, format_spec, conversion in pieces:
        if name is None:  # text after the last placeholder
            continue
        is_known = name in names and conversion is None
        has_plain_width = ZERO_PADDED_WIDTH.fullmatch(format_spec or "") is not None
        if not is_known or not has_plain_width:
            raise SpearError(
                f"The path {template[:200]!r} of the metadata has a placeholder that is not known."
                f" It may use {_format_placeholders(names)}, with a width such as :06d."
            )


def _format_placeholders(names: frozenset[str]) -> str:
    """Return the placeholders with these names, as text."""
    return ", ".join(f"{{{name}}}" for name in sorted(names))
