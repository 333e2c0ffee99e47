"""Reads text and JSON that others wrote, with limits for the size, depth and length of numbers.

These functions raise `ValueError`s, which `spear.util.files.read_json` turns into `SpearError`s.
"""

import codecs
import re
from pathlib import Path
from typing import Any, TypeVar

from spear.errors import summarize_error

T = TypeVar("T")

MAX_JSON_BYTES = 256 * 2**20
"""Size of the largest config or metadata file. DROID's episodes.jsonl has 20 MB."""
MAX_ANNOTATIONS_BYTES = 4 * 2**30
"""Size of the largest file of image annotations. COCO's instances of 2017 have 0.5 GB."""
MAX_INTEGER_DIGITS = 39
"""Digits of the largest number of 128 bits, which the seeds of some datasets have. `float` would
take integers of up to 308 digits."""

UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

_MANY_DIGITS = re.compile(rb"\d{%d,}" % (MAX_INTEGER_DIGITS + 1))  # too many for an integer
_STRING_OR_NUMBER = re.compile(
    rb'"[^"\\]*(?:\\.[^"\\]*)*"'  # a string, in which digits do not matter
    rb"|-?\d+(?P<fraction>\.\d+)?(?P<exponent>[eE][+-]?\d+)?",  # -12, 3.5 or 1e-4
    re.DOTALL,
)


def read_utf8_bytes(path: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Read the bytes of a text in UTF-8, without the byte order mark that Windows' editors write.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is larger than `max_bytes`, or in UTF-16.
    """
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)  # one byte too many shows that the file is too large
    if len(data) > max_bytes:
        raise ValueError(f"it has more than {max_bytes / 2**20:.4g} MiB")

    has_utf_16_mark = data.startswith(UTF_16_MARKS)
    is_utf_16_without_mark = b"\0" in data[:2]  # half of each ASCII character is zero
    if has_utf_16_mark or is_utf_16_without_mark:
        raise ValueError("its text is in UTF-16. Save it in UTF-8")
    return data.removeprefix(codecs.BOM_UTF8)


def parse_json_as(json_type: type[T], data: bytes) -> T:
    """Parse JSON and validate its content.

    Args:
        json_type: a type that pydantic can validate.
        data: the JSON. pydantic's parser refuses lists and objects that are nested more than 200
            deep.

    Raises:
        ValueError: the text is not JSON of this type, or has an integer of too many digits. The
            message names the line and the column, or the key that is wrong.
    """
    from pydantic import TypeAdapter

    _check_integer_lengths(data)
    return TypeAdapter(json_type).validate_json(data)


def parse_json(text: str) -> Any:
    """Parse JSON of any content; limits and errors are those of `parse_json_as`."""
    from pydantic_core import from_json

    data = text.encode(errors="surrogatepass")  # lets the parser refuse halves of characters
    _check_integer_lengths(data)
    return from_json(data)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file that has a JSON object per line; empty lines are skipped.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is no JSON object. The message names the file and the line.
    """
    from pydantic import TypeAdapter

    adapter = TypeAdapter(dict[str, Any])
    objects = []
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            _check_integer_lengths(line)
            objects.append(adapter.validate_json(line))
        except ValueError as error:
            # The parser sees one line, so its line number is always 1.
            reason = summarize_error(error).replace("at line 1 column", "at column")
            raise ValueError(f"{path.name}, line {number}: {reason}") from error
    return objects


def _read_lines(path: Path) -> list[bytes]:
    """Return the lines of a text in UTF-8; a `ValueError` names the file."""
    try:
        return read_utf8_bytes(path).splitlines()
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _check_integer_lengths(data: bytes) -> None:
    """Raise `ValueError` for an integer of more than `MAX_INTEGER_DIGITS` digits.

    Python reads longer integers, but code that converts one to `float` would then raise an
    `OverflowError`, far from the file that is wrong.
    """
    if _MANY_DIGITS.search(data) is None:  # the fast way for almost every file
        return
    for match in _STRING_OR_NUMBER.finditer(data):
        is_string = match[0].startswith(b'"')
        if is_string or match["fraction"] or match["exponent"]:
            continue
        num_digits = len(match[0].removeprefix(b"-"))
        if num_digits > MAX_INTEGER_DIGITS:
            line = data.count(b"\n", 0, match.start()) + 1
            line_break = data.rfind(b"\n", 0, match.start())  # -1 in the first line
            column = match.start() - line_break
            raise ValueError(
                f"an integer of {num_digits} digits at line {line} column {column}, where"
                f" {MAX_INTEGER_DIGITS} are possible"
            )
