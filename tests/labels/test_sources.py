"""Listing the images behind arguments: frames of robot episodes, and each image only once."""

import os
from pathlib import Path

import pytest

from data_tiny import make_episode, make_png
from refusals import refuses
from spear.data.store.episode_store import append_episodes
from spear.labels.inputs import hash_content, read_contents
from spear.labels.pipeline import read_and_encode_images
from spear.labels.sources import list_items
from spear.types import Episode
from spear.util.held_out import is_held_out_scene


def make_gray_episode(num_steps: int, camera: str, first_value: int) -> Episode:
    """An episode whose image of `camera` at step i has the gray value `first_value` + i.

    It also has a white image of the wrist camera at each step.
    """
    images = {
        camera: [make_png(first_value + i) for i in range(num_steps)],
        "wrist": [make_png(255)] * num_steps,
    }
    return make_episode(0, num_steps, images=images)


@pytest.fixture
def episodes(tmp_path: Path) -> Path:
    """A store with an episode of ten steps, and one of two steps without an external camera."""
    folder = tmp_path / "robot"
    long_episode = make_gray_episode(num_steps=10, camera="external", first_value=0)
    short_episode = make_gray_episode(num_steps=2, camera="front", first_value=100)
    append_episodes([long_episode, short_episode], folder)
    return folder


def test_frames_are_spread_over_each_episode(episodes: Path) -> None:
    images = read_and_encode_images(list(list_items([str(episodes)], per_episode=4)))

    values = [image.frame.image[0, 0, 0] for image in images if image.frame is not None]
    # Four frames of the long episode, and both of the short one, which has no more
    assert values == [0, 3, 6, 9, 100, 101]


def test_keys_name_episode_and_frame(episodes: Path) -> None:
    items = list_items([str(episodes)], per_episode=4)

    names = [item.key.rpartition("#")[2] for item in items]
    expected = [f"{episode}/{frame}-of-4" for episode in (0, 1) for frame in (1, 2, 3, 4)]
    assert names == expected


def test_frames_that_an_episode_does_not_have_are_refused(episodes: Path) -> None:
    images = read_and_encode_images(list(list_items([str(episodes)], per_episode=4)))

    # Four frames of each episode are listed: the last two of the short episode do not exist.
    assert len(images) == 8
    for image in images[6:]:
        assert "only 2 steps" in str(image.error)


def test_another_episode_changes_the_stamp_of_all_and_the_content_of_its_frames(
    episodes: Path, tmp_path: Path
) -> None:
    """The second episode gets a third step, so that its third frame exists."""
    items = list(list_items([str(episodes)], per_episode=4))
    hashes = [hash_content(content) for content in read_contents(items)]
    long_episode = make_gray_episode(num_steps=10, camera="external", first_value=0)
    other_episode = make_gray_episode(num_steps=3, camera="front", first_value=100)
    append_episodes([long_episode, other_episode], tmp_path / "anew")

    new_items = list(list_items([str(tmp_path / "anew")], per_episode=4))

    new_hashes = [hash_content(content) for content in read_contents(new_items)]
    assert new_items[0].stamp != items[0].stamp
    assert new_hashes[:6] == hashes[:6]
    assert new_hashes[6] != hashes[6]  # was an error, is a frame
    assert new_hashes[7] != hashes[7]  # was and is an error, which names the number of steps


@pytest.mark.parametrize(
    "prefix",
    [
        "sim:",
        "sim/clutter/",
        "simpler:",
        "simpler/PutCarrotOnPlateInScene-v1/",
        "libero/libero_goal-3/",
    ],
)
def test_a_scene_is_held_out_by_its_seed(prefix: str) -> None:
    assert is_held_out_scene(f"{prefix}9999")
    assert not is_held_out_scene(f"{prefix}10000")


def test_a_photo_is_no_held_out_scene() -> None:
    assert not is_held_out_scene("photos/sim/7.jpg")


def test_without_a_simulator_its_scenes_are_refused() -> None:
    refuses("sim:7", list, list_items(["sim:7"]))


@pytest.fixture
def two_photos(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(make_png(3))
    return tmp_path


def test_an_image_behind_several_arguments_is_listed_once(two_photos: Path) -> None:
    arguments = [str(two_photos / "b.png"), f"{two_photos}/", f"{two_photos}/./*.png"]

    names = [Path(item.key).name for item in list_items(arguments)]

    assert names == ["b.png", "a.png"]


def test_a_relative_and_an_absolute_path_are_the_same_image(
    two_photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(two_photos)

    keys = [item.key for item in list_items([".", str(two_photos)])]

    assert keys == ["./a.png", "./b.png"]


def test_file_names_that_are_no_text_become_keys_that_are(tmp_path: Path) -> None:
    # Letters in Latin-1, which are no valid UTF-8. Old disks and archives have such names.
    for letter in (b"\xe8", b"\xe9"):
        name = os.fsdecode(os.fsencode(tmp_path) + b"/caf" + letter + b".png")
        Path(name).write_bytes(make_png(3))

    images = read_and_encode_images(list(list_items([str(tmp_path)])))

    assert [image.error for image in images] == [None, None]
    distinct_sources = {image.source.encode() for image in images}  # `encode` raises for no text
    assert len(distinct_sources) == 2
