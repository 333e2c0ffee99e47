"""How many bad items are skipped before the work stops."""

import pytest

from refusals import refuses
from spear.util.skipped_items import SkippedItems


@pytest.fixture
def skipped() -> SkippedItems:
    return SkippedItems(limit=0.5, patience=4)


def test_unfinished_work_goes_on_while_few_items_have_been_seen(skipped: SkippedItems) -> None:
    skipped("broken: 1")

    skipped.check(good=0)


def test_finished_work_is_judged_however_few_items_it_had(skipped: SkippedItems) -> None:
    skipped("broken: 1")

    refuses("1 of 1", skipped.check, good=0, finished=True)


def test_as_many_bad_items_as_the_limit_allows_are_skipped(skipped: SkippedItems) -> None:
    skipped("broken: 1")
    skipped("broken: 2")

    skipped.check(good=2)


def test_too_many_bad_items_stop_the_work_once_enough_are_seen(skipped: SkippedItems) -> None:
    skipped("broken: 1")
    skipped("broken: 2")
    skipped("broken: 3")

    refuses("3 of 5", skipped.check, good=2)
