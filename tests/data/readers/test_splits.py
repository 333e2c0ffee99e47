"""Texts like "train[:20%]" select the episodes that TFDS (TensorFlow Datasets) selects."""

import pytest

from refusals import refuses
from spear.data.readers.splits import count_shared_episodes, parse_split

LENGTHS = {"train": 25, "val": 4}  # the number of episodes of each split


@pytest.mark.parametrize(
    ("split", "expected"),  # expected: (split, first episode, end)
    [
        ("train", [("train", 0, 25)]),
        ("train[:20%]", [("train", 0, 5)]),
        ("train[50%:]", [("train", 12, 25)]),  # 12.5 rounds to even, as Python and TFDS do
        ("train[5:]", [("train", 5, 25)]),
        ("train[-3:]", [("train", 22, 25)]),
        ("train[-10%:]", [("train", 23, 25)]),  # 2.5 rounds to 2
        # 1 % of 25 episodes is none. TFDS would take all 25, also those held out for validation.
        ("train[-1%:]", [("train", 25, 25)]),
        ("train[:-1%]", [("train", 0, 25)]),
        ("train[3:8]", [("train", 3, 8)]),
        ("train[:2]+val", [("train", 0, 2), ("val", 0, 4)]),
        ("all", [("train", 0, 25), ("val", 0, 4)]),
    ],
)
def test_splits_are_cut_as_tfds_cuts_them(split: str, expected: list[tuple[str, int, int]]) -> None:
    assert parse_split(LENGTHS, split, "bridge") == expected


@pytest.mark.parametrize(
    "split", ["train[", "train[5]", "train[a:b]", "train[:]", "train[1:2:3]", "train[5%:2]", ""]
)
def test_a_text_that_is_no_split_is_refused(split: str) -> None:
    refuses("is no split of bridge", parse_split, LENGTHS, split, "bridge")


def test_an_unknown_split_is_refused_with_a_suggestion() -> None:
    refuses("Did you mean 'train'", parse_split, LENGTHS, "trian[:5]", "bridge")


@pytest.mark.parametrize("split", ["train+train", "train[:60%]+val+train[40%:]", "all+val[:1]"])
def test_a_split_that_has_an_episode_twice_is_refused(split: str) -> None:
    refuses("twice", parse_split, LENGTHS, split, "bridge")


@pytest.mark.parametrize("split", ["train[:26]", "train[-26:]", "train[:101%]"])
def test_a_split_beyond_the_episodes_is_refused(split: str) -> None:
    refuses("beyond the 25 episodes", parse_split, LENGTHS, split, "bridge")


def test_shared_episodes_are_counted_per_split() -> None:
    ranges = [("train", 0, 10), ("val", 0, 4)]

    assert count_shared_episodes(ranges, [("train", 8, 12), ("val", 3, 9)]) == 3
    assert count_shared_episodes(ranges, [("train", 10, 12), ("test", 0, 4)]) == 0
