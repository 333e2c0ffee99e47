"""Bad items are skipped, until they are too many and the work stops."""

import pytest

from refusals import refuses
from spear.util.skipped_items import SkippedItems


@pytest.fixture
def skipped() -> SkippedItems:
    """At most half of the items may be skipped; unfinished work is judged after 4 items."""
    return SkippedItems(limit=0.5, patience=4)


def test_unfinished_work_goes_on_while_few_items_have_been_seen(skipped: SkippedItems) -> None:
    skipped("broken: 1")

    skipped.check_limit(num_good=0)


def test_finished_work_is_judged_however_few_items_it_had(skipped: SkippedItems) -> None:
    skipped("broken: 1")

    refuses("1 of 1", skipped.check_limit, num_good=0, is_finished=True)


def test_as_many_bad_items_as_the_limit_allows_are_skipped(skipped: SkippedItems) -> None:
    skipped("broken: 1")
    skipped("broken: 2")

    skipped.check_limit(num_good=2)


def test_the_most_frequent_reasons_are_counted(skipped: SkippedItems) -> None:
    """Messages that differ only in numbers have the same reason, and the first one is shown."""
    messages = [
        "dark: a#1",
        *[f"blurred: a#{i} by {i}.5 px" for i in range(4)],
        "cut: a#9",
        "cut: a#7",
        "empty: a#3",
    ]
    for message in messages:
        skipped(message)

    assert skipped.summarize() == (
        "4 × blurred: a#0 by 0.5 px; 2 × cut: a#9; 1 × dark: a#1; and 1 rarer reasons"
    )


def test_a_single_reason_is_summarized_by_its_first_message(skipped: SkippedItems) -> None:
    skipped("no camera 'wrist': set#4")
    skipped("no camera 'wrist': set#5")

    assert skipped.summarize() == "2 × no camera 'wrist': set#4"


def test_too_many_bad_items_stop_the_work_once_enough_are_seen(skipped: SkippedItems) -> None:
    skipped("broken: 1")
    skipped("broken: 2")
    skipped("broken: 3")

    refuses("3 of 5", skipped.check_limit, num_good=2)
