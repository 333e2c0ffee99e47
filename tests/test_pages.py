"""The commands of the pages print what the pages show.

`page_blocks` in tests/support says how a page marks its blocks.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest

from page_blocks import (
    Block,
    find_difference,
    make_folder_like_a_clone,
    read_blocks,
    run_block,
)

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def is_in_every_run(block: Block) -> bool:
    """Return whether the quick tests run a block."""
    return block.is_tested and not block.is_slow


def name_page(page: Path) -> str:
    """Return the path of a page in the repository."""
    return str(page.relative_to(ROOT))


def has_quick_blocks(page: Path) -> bool:
    """Return whether the quick tests run a block of a page."""
    return any(is_in_every_run(block) for block in read_blocks(page))


def has_slow_blocks(page: Path) -> bool:
    """Return whether only the slow tests run all tested blocks of a page."""
    return any(block.is_slow for block in read_blocks(page))


QUICK_PAGES = list(filter(has_quick_blocks, PAGES))
SLOW_PAGES = list(filter(has_slow_blocks, PAGES))


def check_blocks(blocks: list[Block], folder: Path) -> None:
    """Run blocks in their order in a folder, and compare what they print."""
    make_folder_like_a_clone(folder)
    variables: dict[str, Any] = {}
    for block in blocks:
        printed = run_block(block, folder, variables)

        if block.output is not None:
            assert not find_difference(block.output, printed, block.max_relative_error)


def link_data(blocks: list[Block], folder: Path, request: pytest.FixtureRequest) -> None:
    """Link the real data that blocks read into a folder; skip the test if they are missing."""
    names = {block.data for block in blocks if block.data is not None}
    for name in names:
        data = request.getfixturevalue("shared") / "data" / name
        if not data.exists():
            pytest.skip(f"no {data}")
        shutil.copytree(data, folder / name)


@pytest.mark.parametrize("page", QUICK_PAGES, ids=name_page)
def test_quick_commands_print_what_the_page_shows(
    page: Path, tmp_path: Path, renderer: object, request: pytest.FixtureRequest
) -> None:
    blocks = [block for block in read_blocks(page) if is_in_every_run(block)]
    link_data(blocks, tmp_path, request)

    check_blocks(blocks, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW_PAGES, ids=name_page)
def test_all_tested_commands_print_what_the_page_shows(
    page: Path, tmp_path: Path, renderer: object, request: pytest.FixtureRequest
) -> None:
    blocks = [block for block in read_blocks(page) if block.is_tested]
    link_data(blocks, tmp_path, request)

    check_blocks(blocks, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=name_page)
def test_a_command_is_tested_or_says_what_it_needs(page: Path) -> None:
    for block in read_blocks(page):
        if block.language == "sh":
            advice = f"mark it as tested, or begin it with `# needs …` or `# takes …`: {block.code}"
            assert block.is_tested or block.says_what_it_needs(), advice


@pytest.mark.parametrize("page", PAGES, ids=name_page)
def test_a_tested_command_is_followed_by_its_output(page: Path) -> None:
    for block in read_blocks(page):
        if block.is_tested:
            assert block.output is not None, block.code


def test_a_block_has_its_mark_and_its_output(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- tested slowly within 30 % -->\n```sh\nspear recipes\n```\n\n    nano\n\n    post\n\n"
        "```sh\n# needs a GPU\nspear train\n```\n"
    )

    first, second = read_blocks(page)

    assert first.code == "spear recipes\n"
    assert first.output is not None
    assert first.output.split() == ["nano", "post"]
    assert first.is_slow
    assert first.max_relative_error == 0.3
    assert not second.is_tested
    assert second.says_what_it_needs()
    assert second.output is None


@pytest.mark.parametrize(
    ("page_text", "printed"),
    [
        ("error 1.00 mm", "error  1.04 mm"),
        ("25 s, 3 scenes", "70 s, 3 scenes"),
        ("first\n…\nlast", "zero\nfirst\nsecond\nlast\n"),
        ("open …/page.html", "open /tmp/x/page.html"),
    ],
)
def test_outputs_with_small_differences_agree(page_text: str, printed: str) -> None:
    assert find_difference(page_text, printed, max_relative_error=0.05) is None


@pytest.mark.parametrize(
    ("page_text", "printed"),
    [
        ("error 1.00 mm", "error 1.10 mm"),
        ("3 scenes", "4 scenes"),
        ("first\nlast", "first\nsecond\nlast"),
        ("last\n…\nfirst", "first\nlast"),
        ("consistent", "contradiction"),
    ],
)
def test_outputs_that_differ(page_text: str, printed: str) -> None:
    assert find_difference(page_text, printed, max_relative_error=0.05) is not None
