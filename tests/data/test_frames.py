"""Frames have versions, and data and policies of different versions are never mixed."""

import dataclasses
from typing import Any

import pytest

from refusals import refuses
from spear.data.frames import (
    LAYOUT_DEFAULTS,
    fill_in_frame_versions_if_simulator_only,
    get_newest_frame_version,
    hash_layout_for_preparation,
    list_names_with_outdated_frames,
    merge_frame_versions,
    read_store_frame_versions,
)
from spear.data.readers.dataset_layout import FRAME_FIELDS, REGISTRY


@pytest.mark.parametrize(("name", "version"), [("droid", 2), ("kuka", 1), ("mine", 1)])
def test_every_dataset_has_a_version(name: str, version: int) -> None:
    """The frames of "droid" were corrected, those of "kuka" never, and "mine" is not known."""
    assert get_newest_frame_version(name) == version


def test_frames_of_several_sources_are_merged() -> None:
    merged = merge_frame_versions([("a", {"droid": 2}), ("b", {"kuka": 1}), ("c", {"droid": 2})])

    assert merged == {"droid": 2, "kuka": 1}


@pytest.mark.parametrize("name", ["droid", "fractal20220817_data"])
def test_two_versions_of_the_same_frames_are_refused(name: str) -> None:
    sources = [("runs/old", {name: 1}), ("runs/new", {name: 2})]

    refuses(
        f"runs/old has version 1 of the frames of {name}, but runs/new",
        merge_frame_versions,
        sources,
    )


def test_only_frames_with_a_newer_version_are_outdated() -> None:
    """The newest versions are 2 of "droid" and "jaco_play", and 1 of "kuka"."""
    assert list_names_with_outdated_frames({"droid": 1, "kuka": 1, "jaco_play": 2}) == ["droid"]


@pytest.mark.parametrize(
    ("request_fields", "expected"),  # request_fields: the content of request.json
    [
        ({"path": "/data/droid/1.0.1"}, {"droid": 1}),
        ({"path": "/data/fractal20220817_data/0.1.0"}, {"fractal20220817_data": 1}),
        ({"path": "/data/bridge_dataset/1.0.0"}, {}),
        ({"path": "/data/droid/1.0.1", "frames": {"droid": 2}}, {"droid": 2}),
        ({}, {}),
    ],
)
def test_a_store_without_versions_has_the_first_ones_of_its_dataset(
    request_fields: dict[str, Any], expected: dict[str, int]
) -> None:
    assert read_store_frame_versions(request_fields) == expected


@pytest.mark.parametrize("name", ["droid", "jaco_play"])
def test_an_earlier_store_of_a_dataset_like_a_known_one_is_recognized(name: str) -> None:
    """The dataset's folder is called "mine", and its spear.json is "like" the known dataset.

    The store recorded the hash of this layout, in which the frames had their first version.
    """
    first_fields = {field: LAYOUT_DEFAULTS[field] for field in FRAME_FIELDS}
    first_layout = dataclasses.replace(REGISTRY[name], name="mine", **first_fields)
    request_fields = {"path": "/data/mine", "layout": hash_layout_for_preparation(first_layout)}

    assert read_store_frame_versions(request_fields) == {name: 1}


@pytest.mark.parametrize(
    ("recorded", "is_simulator_only", "expected"),
    [
        (None, True, {}),
        (None, False, None),  # not known
        ({"droid": 1}, True, {"droid": 1}),
    ],
)
def test_policies_before_versions_have_known_frames_if_they_saw_the_simulator_only(
    recorded: dict[str, int] | None, is_simulator_only: bool, expected: dict[str, int] | None
) -> None:
    assert fill_in_frame_versions_if_simulator_only(recorded, is_simulator_only) == expected
