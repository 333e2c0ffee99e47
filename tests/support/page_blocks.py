"""Blocks of code in pages: the ones that a test runs, and the output that the page shows.

A comment before a block, which no reader sees, says that a test runs the block:

    <!-- tested -->             in every run of the tests
    <!-- tested slowly -->      with the slow tests only
    <!-- tested with NAME -->   on the folder NAME of the real data, if the data are there

`within 30 %` behind it allows numbers to differ by more than 5 %. The output is the next block of
text before another command. A line `…` stands for lines that the page leaves out, and `…` in a line
for a part of the line. The shown lines may begin anywhere in the output.

A block that no test runs says in its first line what it needs, such as `# needs a GPU`.

To see what the tested blocks of a page print: python tests/support/page_blocks.py [--slow] PAGE
"""

import contextlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_here import SPEAR_CLI_CODE
from spear.cli import main

ROOT = Path(__file__).parents[2]
MARK = re.compile(
    r"<!-- tested(?P<is_slow> slowly)?(?: with (?P<data>\S+))?(?: within (?P<percent>\d+) %)? -->"
)
BLOCK = re.compile(
    r"(?:^(?P<mark><!-- tested[^\n]*-->)\n)?"
    r"^```(?P<language>\w+)\n(?P<code>.*?)^```$|(?P<indented>(?:^    [^\n]*\n|^\n(?=    ))+)",
    re.DOTALL | re.MULTILINE,
)
"""A block between fences, which a mark may precede; or an indented block, which is an output."""
BOX = re.compile(r"^!!! [^\n]*\n(?:    [^\n]*\n|\n(?=    ))+", re.MULTILINE)
"""An admonition, whose text is indented like an output."""
NEEDS = re.compile(r"# (?:needs|takes|downloads|runs until|begins with) ")
DEFAULT_PERCENT = 5
NUMBER = re.compile(r"[-−+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
PROGRESS = re.compile(r"[\w ,./-]+: \d+ of \d+ \w+, [\d.]+ \w+/\w+")
"""The line of a progress bar, which a slow command prints."""
DURATION = re.compile(r"\b\d[\d.,]* (?=(?:s|ms|min|h|scenes/s)\b)")
"""The number and the space before a unit of time."""


@dataclass(frozen=True)
class Block:
    """A block of commands or of Python in a page, and the output that the page shows for it."""

    code: str
    language: str
    """"sh" or "python"."""
    output: str | None
    is_tested: bool
    is_slow: bool = False
    data: str | None = None
    """The folder of real data that the block reads."""
    max_relative_error: float = DEFAULT_PERCENT / 100

    def says_what_it_needs(self) -> bool:
        """Return whether the first line says why no test runs this block."""
        return NEEDS.match(self.code) is not None


def read_blocks(page: Path) -> list[Block]:
    """Return the blocks of commands and Python of a page, each with the output that follows it."""
    text = BOX.sub("", page.read_text("utf-8"))
    matches = list(BLOCK.finditer(text))
    blocks = []
    for index, match in enumerate(matches):
        if match["language"] not in ("sh", "python"):
            continue
        output = None
        following_match = matches[index + 1] if index + 1 < len(matches) else None
        if following_match is not None and following_match["language"] in (None, "text"):
            output = following_match["code"] or following_match["indented"]
        blocks.append(_make_block(match, output))
    return blocks


def _make_block(match: re.Match[str], output: str | None) -> Block:
    """Make a block from a match of `BLOCK`."""
    if match["mark"] is None:
        return Block(match["code"], match["language"], output, is_tested=False)
    mark = MARK.fullmatch(match["mark"])
    assert mark is not None, match["mark"]
    return Block(
        match["code"],
        match["language"],
        output,
        is_tested=True,
        is_slow=mark["is_slow"] is not None,
        data=mark["data"],
        max_relative_error=int(mark["percent"] or DEFAULT_PERCENT) / 100,
    )


def make_folder_like_a_clone(folder: Path) -> None:
    """Link into a folder what commands read from the folder of the clone."""
    for name in ("benchmarks", "examples", "experiments", "tests"):
        (folder / name).symlink_to(ROOT / name)


def run_block(block: Block, folder: Path, variables: dict[str, Any]) -> str:
    """Run a block in a folder, and return what it prints.

    variables: those of the page's Python, which the block may read and change.
    """
    printed = io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        if block.language == "python":
            exec(block.code, variables)
        else:
            for line in block.code.replace("\\\n", " ").splitlines():
                run_line(line, printed)
    return printed.getvalue()


def run_line(line: str, printed: io.StringIO) -> None:
    """Run a line of a shell: a command of spear in this process, any other in a shell."""
    words = shlex.split(line, comments=True)
    if words[:2] == ["spear", "serve"]:
        printed.write(_start_server(words[2:]))
    elif words[:1] == ["spear"]:
        main(words[1:])
    elif words:
        completed = subprocess.run(
            ["bash", "-c", line],
            env=_make_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
        printed.write(completed.stdout)


def _make_environment() -> dict[str, str]:
    """Return the environment of a command: with this Python's programs, as a user has it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    environment.pop("PYTHONWARNDEFAULTENCODING", None)  # the tests' own; it prints warnings
    return environment


def _start_server(arguments: list[str]) -> str:
    """Start `spear serve` at a free port, stop it, and return the lines until it is ready.

    The returned text names the port 8000, or the one in the arguments.
    """
    arguments = list(arguments)
    port = "8000"
    if "--port" in arguments:
        index = arguments.index("--port")
        port = arguments[index + 1]
        del arguments[index : index + 2]
    lines = []
    command = [sys.executable, "-c", SPEAR_CLI_CODE, "serve", *arguments, "--port", "0"]
    text_of_last_line = "http://" if "--ui" in arguments else "ws://"
    with subprocess.Popen(
        command,
        env=_make_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as server:
        assert server.stdout is not None
        for line in server.stdout:
            lines.append(re.sub(r"://([^:/]+):\d+", rf"://\1:{port}", line))
            if text_of_last_line in line:
                break
        server.send_signal(signal.SIGTERM)
    return "".join(lines)


def find_difference(page_text: str, printed: str, max_relative_error: float) -> str | None:
    """Return how the printed text differs from the text that a page shows, or None.

    Spaces, the characters of tables' lines and durations do not count.
    """
    printed_lines = list(_simplify_lines(printed))
    begin = 0
    for segment in _split_at_gaps(list(_simplify_lines(page_text))):
        position = _find_segment(segment, printed_lines, begin, max_relative_error)
        if position is None:
            printed_text = "\n".join(printed_lines[begin:])
            return "the page shows\n{}\nbut the rest of the output is\n{}".format(
                "\n".join(segment), printed_text
            )
        begin = position + len(segment)
    return None


def _simplify_lines(text: str) -> Iterator[str]:
    """Yield the lines that contain something, without indentation and doubled spaces.

    "T" stands for the number of a duration.
    """
    for line in text.splitlines():
        words = re.sub(r"[─━│┃┡╇┩┏┳┓└┴┘]+", " ", line).split()
        if words and not PROGRESS.match(line):
            yield DURATION.sub("T ", " ".join(words))


def _split_at_gaps(lines: list[str]) -> list[list[str]]:
    """Split lines where a line is `…`."""
    segments: list[list[str]] = [[]]
    for line in lines:
        if line == "…":
            segments.append([])
        else:
            segments[-1].append(line)
    return [segment for segment in segments if segment]


def _find_segment(
    segment: list[str], lines: list[str], begin: int, max_relative_error: float
) -> int | None:
    """Return where the lines of a segment follow each other in `lines`, at `begin` or later."""
    for position in range(begin, len(lines) - len(segment) + 1):
        candidates = lines[position : position + len(segment)]
        pairs = zip(segment, candidates, strict=True)
        if all(_is_same_line(page_line, line, max_relative_error) for page_line, line in pairs):
            return position
    return None


def _is_same_line(page_line: str, printed: str, max_relative_error: float) -> bool:
    """Return whether a line is the shown one, up to the errors of its numbers."""
    # In the text between the gaps `…`, "\0" stands for a number.
    literals = [re.escape(literal) for literal in NUMBER.sub("\0", page_line).split("…")]
    pattern = ".*".join(literal.replace("\0", f"({NUMBER.pattern})") for literal in literals)
    match = re.fullmatch(pattern, printed)
    if match is None:
        return False
    for shown_number, printed_number in zip(NUMBER.findall(page_line), match.groups(), strict=True):
        difference = abs(_read_number(shown_number) - _read_number(printed_number))
        allowed = max_relative_error * abs(_read_number(shown_number))
        if difference > max(allowed, _find_precision(shown_number)):
            return False
    return True


def _read_number(text: str) -> float:
    """Return the number that is written in a text, with commas between thousands."""
    return float(text.replace(",", "").replace("−", "-"))


def _find_precision(text: str) -> float:
    """Return what one unit of the last decimal of a number is worth; 0 for an integer."""
    _, _, decimals = text.partition(".")
    return 0.1 ** len(decimals) if decimals.isdigit() else 0.0


def print_outputs(page: Path, with_slow_blocks: bool) -> None:
    """Print every tested block of a page and its output."""
    shared = ROOT / ".." / "shared" / "data"
    variables: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_folder_like_a_clone(Path(folder))
        for block in read_blocks(page):
            if not block.is_tested or (block.is_slow and not with_slow_blocks):
                continue
            if block.data is not None and not Path(folder, block.data).exists():
                Path(folder, block.data).symlink_to(shared.resolve() / block.data)
            print(f"```\n{block.code}```")
            printed = run_block(block, Path(folder), variables)
            print(printed)
            if block.output is not None:
                difference = find_difference(block.output, printed, block.max_relative_error)
                print(f"=> {difference or 'as the page shows'}\n")


if __name__ == "__main__":
    page_names = [argument for argument in sys.argv[1:] if argument != "--slow"]
    for page_name in page_names:
        print_outputs(Path(page_name), with_slow_blocks="--slow" in sys.argv)
