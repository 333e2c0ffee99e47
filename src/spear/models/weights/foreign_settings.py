"""Compares the settings in the files of another project's checkpoint with ours.

The files are read as text: JSON, YAML, and the literal defaults in Python files. Python files are
parsed, and never run. Which names a setting may have is data (`names_SOURCE.toml`).
"""

import ast
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from spear.errors import SpearError, format_count, summarize_error
from spear.util.files import read_json_as

Verdict = Literal["agrees", "differs", "compare", "not found"]

MAX_FILE_BYTES = 2**20  # a tokenizer or an index of weights is larger, and has no settings
SUFFIXES = (".json", ".yaml", ".yml", ".py")
# Names of files without settings, such as "tokenizer_config.json" or "model.index.json".
SKIPPED_NAMES = re.compile(r"(tokenizer|vocab|special_tokens|added_tokens|.*\.index|merges).*")
MAX_VALUE_LENGTH = 100  # characters of a value in the table

COLUMNS = ["setting", "theirs", "place", "ours", "verdict", "known of theirs"]
"""The columns of `Comparison.to_row`."""

_CAPITAL_INSIDE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")  # the place before "S" in "numSteps"


@dataclass(frozen=True)
class Setting:
    """A setting that a source's checkpoint may have, as `names_SOURCE.toml` describes it.

    name             What the table calls it.
    keys             Pattern that the whole name of the setting must match, in lower case.
    our_value        Our value at full size.
    known_of_theirs  What is known of the source's value.
    agrees           Pattern that the whole value must match to agree with ours, as JSON in lower
                     case. None if a person has to compare.
    """

    name: str
    keys: str
    our_value: str
    known_of_theirs: str
    agrees: str | None = None


@dataclass(frozen=True)
class ForeignValue:
    """A value in a checkpoint's files.

    file   The name of the file.
    path   The keys that lead to the value, or the class and the name in a Python file.
    value  The value, as JSON or as Python writes it.
    """

    file: str
    path: tuple[str, ...]
    value: str


@dataclass(frozen=True)
class Comparison:
    """A setting, and one value that a checkpoint has for it; None if it has none."""

    setting: Setting
    foreign: ForeignValue | None

    @property
    def verdict(self) -> Verdict:
        """Whether the value agrees with ours; "compare" if a person has to judge."""
        if self.foreign is None:
            return "not found"
        if self.setting.agrees is None:
            return "compare"
        is_equal = re.fullmatch(self.setting.agrees, self.foreign.value.lower(), re.DOTALL)
        return "agrees" if is_equal else "differs"

    def to_row(self) -> list[str]:
        """The setting, the checkpoint's value and where it is, our value, the verdict, a note."""
        value = "–"
        location = "–"
        if self.foreign is not None:
            value = _shorten(self.foreign.value)
            location = f"{self.foreign.file}: {'.'.join(self.foreign.path)}"
        setting = self.setting
        return [
            setting.name,
            value,
            location,
            setting.our_value,
            self.verdict,
            setting.known_of_theirs,
        ]


def compare_settings(folder: Path, source: str = "spear1_franka") -> list[Comparison]:
    """Look for a source's settings in the small files of a checkpoint, and compare them with ours.

    Args:
        folder: The folder. Weights are neither needed nor read.
        source: The source, as in `names_SOURCE.toml`.

    Returns:
        Per setting, a comparison for each place that has it; one without a value if none has it.

    Raises:
        SpearError: The folder has no file with settings, or a file is broken.
    """
    settings = _read_settings(source)
    values = list(_read_values(folder))
    if not values:
        names = f"*{', *'.join(SUFFIXES)}"
        raise SpearError(
            f"{folder} has no file with settings ({names}). Give the folder with config.json."
        )
    comparisons = []
    for setting in settings:
        pattern = re.compile(setting.keys)
        matching = [value for value in values if pattern.fullmatch(_to_snake_case(value.path[-1]))]
        comparisons += [Comparison(setting, value) for value in matching]
        if not matching:
            comparisons.append(Comparison(setting, None))
    return comparisons


def summarize_verdicts(comparisons: list[Comparison]) -> str:
    """Return the number of comparisons with each verdict, in one line."""
    verdicts = [comparison.verdict for comparison in comparisons]
    counts = [
        f"{verdicts.count(verdict)} {verdict}"
        for verdict in ("agrees", "differs", "compare", "not found")
    ]
    return f"{format_count(len(comparisons), 'comparisons')}: {', '.join(counts)} (unverified)"


def _read_settings(source: str) -> list[Setting]:
    file = Path(__file__).with_name(f"names_{source}.toml")
    content = tomllib.loads(file.read_text(encoding="utf-8"))
    return [Setting(**fields) for fields in content["settings"]]


# --- Values in files ---


def _read_values(folder: Path) -> Iterator[ForeignValue]:
    """Yield every named value in the small files of a folder, file by file."""
    if not folder.is_dir():
        raise SpearError(f"there is no folder {folder}. Give the folder with config.json.")
    for path in sorted(folder.iterdir()):
        is_relevant = path.suffix in SUFFIXES and not SKIPPED_NAMES.fullmatch(path.name)
        if not is_relevant or not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
            continue
        for keys, value in _parse_file(path):
            yield ForeignValue(path.name, keys, value)


def _parse_file(path: Path) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (keys, value) of a file."""
    if path.suffix == ".json":
        yield from _flatten_with_inner_dicts(read_json_as(dict[str, Any], path, "copy it again"))
        return
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            values = list(_read_python_assignments_and_defaults(ast.parse(text)))
        else:
            content = yaml.load(text, Loader=_LoaderWithoutAliases)  # a SafeLoader
            values = list(_flatten_with_inner_dicts(content))
    except (OSError, ValueError, SyntaxError, RecursionError, yaml.YAMLError) as error:
        raise SpearError(
            f"{path} cannot be read ({summarize_error(error)}). Copy it again."
        ) from error
    yield from values


class _LoaderWithoutAliases(yaml.SafeLoader):
    """A safe loader that refuses aliases, by which a small file could stand for endless content."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Return the next node of the file."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def _flatten_with_inner_dicts(
    content: Any, keys: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the keys and the value of each entry of nested dicts, the dicts themselves included."""
    if keys:
        yield keys, json.dumps(content, ensure_ascii=False, default=str)
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _flatten_with_inner_dicts(value, (*keys, str(key)))


def _read_python_assignments_and_defaults(
    node: ast.AST, names: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the values that Python code gives to names and to parameters, as the code writes them.

    `names` are those of the classes and functions around the node.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            inner_names = (*names, child.name)
            if isinstance(child, ast.FunctionDef):
                yield from _read_parameter_defaults(child, inner_names)
            yield from _read_python_assignments_and_defaults(child, inner_names)
        elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            if child.value is not None:
                yield (*names, child.target.id), _format_expression(child.value)
        elif isinstance(child, ast.Assign) and isinstance(child.targets[0], ast.Name):
            yield (*names, child.targets[0].id), _format_expression(child.value)


def _read_parameter_defaults(
    function: ast.FunctionDef, names: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the parameters of a function that have defaults."""
    arguments = function.args
    num_required = len(arguments.args) - len(arguments.defaults)
    for parameter, default in zip(arguments.args[num_required:], arguments.defaults, strict=True):
        yield (*names, parameter.arg), _format_expression(default)
    for parameter, keyword_default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if keyword_default is not None:
            yield (*names, parameter.arg), _format_expression(keyword_default)


def _format_expression(expression: ast.expr) -> str:
    """Write an expression: a literal as JSON, anything else as in the code."""
    try:
        return json.dumps(ast.literal_eval(expression), ensure_ascii=False)
    except (ValueError, TypeError):
        return ast.unparse(expression)


def _to_snake_case(name: str) -> str:
    """Return a name in lower case, with an underscore before each capital inside.

    >>> _to_snake_case("halfCover")
    'half_cover'
    """
    return _CAPITAL_INSIDE.sub("_", name).lower()


def _shorten(text: str) -> str:
    """Return a text in one line of limited length, for a cell of a Markdown table."""
    line = " ".join(text.split()).replace("|", "/")
    return line if len(line) <= MAX_VALUE_LENGTH else f"{line[: MAX_VALUE_LENGTH - 1]}…"
