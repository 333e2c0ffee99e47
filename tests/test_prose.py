"""Pages, help texts and messages are written as the rest of the project's texts.

The rules are: no phrase of `BANNED_PHRASES`, American spelling, an actor for what is said or told,
no more than 40 words in a sentence of a page, and no second colon in a sentence.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from spear.cli import COMMANDS, load_command
from spear.cli.parsing import get_options_class
from spear.util.options import list_option_help

ROOT = Path(__file__).parents[1]
MESSAGES = Path(__file__).with_name("messages.txt")
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
GENERATED_PAGES = ("datasets.md",)
"""Pages that a script writes from facts in the words of others."""
MAX_WORDS = 40  # of a sentence; a reader loses the beginning of a longer one
COLONS_PER_SENTENCE = 1

BANNED_PHRASES = (
    r"behaves? otherwise",
    r"make again",
    r"made again",
    r"what is left out",
    r"as it is",
    r"so many",
    r"of its own",
    r"of their own",
    r"whose units to use",
    r"looks again",
    r"once more",
    r"a page for people",
    r"troubles and their cures",
    r"\(default: (None|'')\)",
)
BRITISH_SPELLINGS = (
    r"metres?",
    r"(milli|centi|kilo)metres?",
    r"colou?red? grey",
    r"colours?",
    r"coloured",
    r"centres?",
    r"labell(ed|ing)",
    r"modell(ed|ing)",
    r"travell(ed|ing)",
    r"behaviours?",
    r"neighbours?",
    r"favou?rites?",
    r"grey",
    r"(normal|optim|summar|organ|recogn|initial|general|real|util|visual|local|minim|maxim)is(e|es|ed|ing)",
    r"(normal|optim|organ|initial|general|real|util|visual|local|minim|maxim)isation",
    r"analys(e|es|ed|ing)",
)
WITHOUT_ACTOR = (
    r"\b(?:is|are|was|were|be|been) (?:told|said|noted)\b(?! (?:by|to|in|on|at|with|from|apart)\b)"
)


def join_alternatives(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """Compile a pattern that matches any of these whole words, in upper or lower case."""
    return re.compile(rf"(?<![\w-])(?:{'|'.join(patterns)})(?![\w-])", re.IGNORECASE)


BANNED = join_alternatives(BANNED_PHRASES)
BRITISH = join_alternatives(BRITISH_SPELLINGS)


def remove_code(text: str) -> str:
    """Replace code in backticks by one word, and remove links' targets and HTML."""
    text = re.sub(r"`[^`]*`", "Code", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"<[^>]*>|\$[^$]*\$|\*\*|https?://\S+", "", text)


def list_paragraphs(page: str) -> Iterator[str]:
    """Yield the paragraphs and list items of a Markdown page, without code, tables and headings."""
    # Remove code between ``` and ```, and the header between --- and ---.
    page = re.sub(r"^( *)```.*?^\1```", "", page, flags=re.DOTALL | re.MULTILINE)
    page = re.sub(r"\A---\n.*?\n---\n", "", page, flags=re.DOTALL)
    for block in re.split(r"\n\s*\n", page):
        lines = block.splitlines()
        is_output = all(line.startswith("    ") for line in lines if line.strip())
        if is_output:
            continue
        # Tables, headings, admonitions, BibTeX entries
        text_lines = [line for line in lines if not re.match(r"\s*(\||#|!!!|@|\w+ = )", line)]
        items = re.split(r"^\s*(?:[-*]|\d+\.) ", "\n".join(text_lines), flags=re.MULTILINE)
        for item in items:
            paragraph = " ".join(remove_code(item).split())
            if paragraph:
                yield paragraph


def list_sentences(paragraph: str) -> list[str]:
    """Split a paragraph into sentences, which end where a capital letter follows."""
    return re.split(r"(?<=[.?!])[)*\"”]*\s+(?=[A-Zπ\d\"“(*])|; ", paragraph)


def find_problems(text: str, max_words: int | None = None) -> list[str]:
    """List what is wrong with the sentences of a paragraph."""
    problems = []
    for pattern in (BANNED, BRITISH, re.compile(WITHOUT_ACTOR)):
        problems += [f"{match[0]!r} in {text[:120]!r}" for match in pattern.finditer(text)]
    for sentence in list_sentences(text):
        if len(re.findall(r":(?= )", sentence)) > COLONS_PER_SENTENCE:
            problems.append(f"two colons: {sentence!r}")
        num_words = len(sentence.split())
        if max_words is not None and num_words > max_words:
            problems.append(f"{num_words} words: {sentence!r}")
    return problems


def list_help_texts() -> Iterator[tuple[str, str]]:
    """Yield the options of all commands, each with its help text."""
    for name in COMMANDS:
        options_class = get_options_class(load_command(name))
        if options_class is not None:
            for option in list_option_help(options_class):
                yield f"{name} {option.name}", option.text or ""


def list_messages_in_the_code() -> Iterator[tuple[str, str]]:
    """Yield the place and the text of each `SpearError` that the code raises with a text.

    X stands for each value that the code fills in.
    """
    for file in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            if node.func.id != "SpearError" or not node.args:
                continue
            (text, *_) = node.args
            if isinstance(text, ast.Constant):
                yield f"{file.name}:{node.lineno}", str(text.value)
            if isinstance(text, ast.JoinedStr):
                pieces = [
                    piece.value if isinstance(piece, ast.Constant) else "X" for piece in text.values
                ]
                yield f"{file.name}:{node.lineno}", "".join(map(str, pieces))


def list_messages() -> list[str]:
    """Return the lines of the file of messages that are messages."""
    lines = MESSAGES.read_text("utf-8").splitlines()
    return [line.removeprefix("error: ") for line in lines if line and line[0] not in "$#"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("It holds once more.", "once more"),
        ("The colour is red.", "colour"),
        ("It is said that it works.", "is said"),
        ("Two things: one: another.", "two colons"),
        ("Word " * 41 + "end.", "42 words"),
    ],
)
def test_a_broken_rule_is_found(text: str, problem: str) -> None:
    problems = find_problems(text, MAX_WORDS)

    assert len(problems) == 1
    assert problem in problems[0]


def test_paragraphs_have_no_code_and_no_tables() -> None:
    page = (
        "# Title\n\nUse `a: b: c` now.\n\n```sh\nspear\n```\n\n| a | b |\n\n    output\n\n- 1\n- 2"
    )

    assert list(list_paragraphs(page)) == ["Use Code now.", "1", "2"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_follows_the_rules(page: Path) -> None:
    if page.name in GENERATED_PAGES:
        pytest.skip("a script writes this page")
    problems = []
    for paragraph in list_paragraphs(page.read_text("utf-8")):
        problems += find_problems(paragraph, MAX_WORDS)

    assert problems == []


def test_help_texts_follow_the_rules() -> None:
    problems = []
    for option, text in list_help_texts():
        problems += [f"{option}: {problem}" for problem in find_problems(remove_code(text))]

    assert problems == []


def test_messages_follow_the_rules() -> None:
    for message in list_messages():
        assert find_problems(message) == [], message


def test_messages_in_the_code_are_sentences() -> None:
    """A message says what happened, and then in another sentence what to do."""
    problems = []
    for location, message in list_messages_in_the_code():
        has_two_sentences = re.search(r"[.?!X] [A-Z`-]", message) or message.endswith("X")
        if not has_two_sentences and " is now " not in message:  # a renamed option
            problems.append(f"{location}: one sentence: {message}")
        if remove_code(message).count(": ") > COLONS_PER_SENTENCE:
            problems.append(f"{location}: colons: {message}")

    assert problems == []


def test_messages_end_their_last_sentence() -> None:
    for message in list_messages():
        assert message[-1] in ".?!…" or message.endswith("]'"), message
