"""The commands on robot data, from a folder of episodes to their output."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_tiny import edit_json, make_episode
from refusals import Command, no_warning
from spear.data.readers.formats import read_episodes
from spear.data.store.episode_store import EpisodeStore, append_episodes
from spear.data.store.prepare import prepare
from spear.labels.sources import list_items


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Three episodes of 6 steps, 9 steps and one step."""
    episodes = [
        make_episode(0, num_steps=6, success=True),
        make_episode(1, num_steps=9),
        make_episode(2, num_steps=1),
    ]
    append_episodes(episodes, tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def exported(store: Path, tmp_path: Path, run_command: Command) -> Path:
    """The first two episodes as a LeRobot dataset."""
    out = tmp_path / "set"
    output = run_command("data", "export", str(store), "--out", str(out), "--split", "train[:2]")
    assert "2 episodes in" in output
    return out


def test_exported_episodes_can_be_read(exported: Path) -> None:
    assert [episode.source for episode in read_episodes(exported)] == ["made#0", "made#1"]


def test_exported_episodes_can_be_inspected(exported: Path, run_command: Command) -> None:
    output = run_command("data", "inspect", str(exported))

    assert "a LeRobot dataset, v3.0" in output
    assert "episodes      train 2, 15 steps (6 … 7 … 9 each)" in output
    assert re.search(r"observation/images/external +images, 64 x 80 x 3", output)
    assert "layout        described by" in output
    assert "1 × push the block 0" in output


def describe_without_facts(exported: Path, run_command: Command) -> dict[str, Any]:
    out = exported.with_name("described.json")
    run_command("data", "describe", str(exported), "--out", str(out))
    fields = json.loads(out.read_text())
    del fields["facts"]
    return fields


def test_a_description_of_exported_episodes_is_that_of_the_export(
    exported: Path, run_command: Command
) -> None:
    layout = json.loads((exported / "spear.json").read_text())

    assert describe_without_facts(exported, run_command) == layout


@pytest.mark.parametrize("frames", [{"droid": 1}, {"droid": 2, "kuka": 1}])
def test_a_description_of_exported_episodes_has_their_frames(
    exported: Path, run_command: Command, frames: dict[str, int]
) -> None:
    edit_json(exported / "spear.json", lambda fields: fields.update(frames=frames))

    assert describe_without_facts(exported, run_command)["frames"] == frames


@pytest.mark.slow
def test_recorded_demonstrations_are_exported_described_and_prepared_without_a_notice(
    tmp_path: Path, run_command: Command
) -> None:
    """As the tutorial on fine-tuning does it."""
    recorded_folder = tmp_path / "recorded"
    exported = tmp_path / "exported"
    run_command("record", "--num-episodes", "3", "--tasks", "put_on", "--out", str(recorded_folder))
    run_command("data", "export", str(recorded_folder), "--out", str(exported))

    with no_warning():
        run_command("data", "describe", str(exported), "--out", str(tmp_path / "spear.json"))
        prepare(exported, tmp_path / "prepared")


def test_exported_episodes_can_be_prepared(
    exported: Path, tmp_path: Path, run_command: Command
) -> None:
    run_command(
        "data", "prepare", str(exported), "--out", str(tmp_path / "again"), "--workers", "0"
    )

    assert len(EpisodeStore(tmp_path / "again")) == 2


def test_exported_episodes_can_be_listed_for_labeling(exported: Path) -> None:
    items = list(list_items([str(exported)], per_episode=2))

    assert [item.key for item in items] == [
        f"{exported}/train#0/1-of-2",
        f"{exported}/train#0/2-of-2",
        f"{exported}/train#1/1-of-2",
        f"{exported}/train#1/2-of-2",
    ]
    # The first listed image of an episode is that of its first step.
    third_item = items[2]
    (image,) = third_item.reader(third_item.path, [third_item.location])
    assert image == make_episode(1, num_steps=9).images["external"][0]


@pytest.fixture
def prepare_two(store: Path, tmp_path: Path) -> list[str]:
    """The words of a command that prepares two datasets, with an external and a wrist camera."""
    wrist_episode = make_episode(3, images={"wrist": make_episode(3).images["external"]})
    append_episodes([wrist_episode], tmp_path / "other")
    folders = [str(store), str(tmp_path / "other")]
    return ["data", "prepare", *folders, "--workers", "0", "--out", str(tmp_path / "out")]


def test_each_prepared_dataset_keeps_its_cameras(
    prepare_two: list[str], tmp_path: Path, run_command: Command
) -> None:
    run_command(prepare_two, "--image-size", "32x32", "wrist=16x16")

    assert EpisodeStore(tmp_path / "out" / "store").cameras == ["external"]
    assert EpisodeStore(tmp_path / "out" / "other").cameras == ["wrist"]


def test_a_size_of_an_unknown_camera_is_refused(
    prepare_two: list[str], tmp_path: Path, run_refused_command: Command
) -> None:
    assert "'wrist'" in run_refused_command(prepare_two, "--image-size", "wrsit=16x16")

    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("version", ["v2.1_video", "v3.0_image", "v3.0_video"])
def test_data_without_a_layout_are_shown_with_what_is_needed_to_write_one(
    shared: Path, tmp_path: Path, run_command: Command, version: str
) -> None:
    page = tmp_path / "look.html"

    run_command(
        "data", "inspect", str(shared / "data" / "lerobot" / version), "--report", str(page)
    )

    html = page.read_text()
    assert html.count("<h2") == 5  # for four episodes and the text about the dataset
    assert html.count("<img") == 4 * 8  # eight images per episode
    assert html.count("<script") == 0
    _, _, body = html.partition("</pre>")  # what follows the text
    for words in ("observation/state[3:6]", "observation/state[6:7]", "action[0:3]", "spear.json"):
        assert words in body, words
    assert "counts from 0 to 9" in body
    assert "<b>frame_index</b>" not in body  # a row's number is no signal
    for plot in re.findall(r"<svg.*?</svg>", body):
        assert "nan" not in plot


@pytest.fixture
def wrong_layout(tmp_path: Path) -> Path:
    """A layout that names a camera that the dataset does not have."""
    layout = tmp_path / "layout.json"
    content = {
        "like": "bridge_dataset",
        "images": {"external": "observation/image_9"},
        "image_aspect": {},
    }
    layout.write_text(json.dumps(content))
    return layout


@pytest.mark.parametrize(
    ("command", "words", "message"),  # spear data COMMAND FOLDER WORDS
    [
        ("inspect", "--report {out} --layout {layout}", "'observation/image_9'"),
        ("export", "--out {out} --layout {layout}", "'observation/image_9'"),
        ("export", "--out x --images gif", "gif"),
        ("prepare", "--out {out} --control-hz nan", "--control-hz nan"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    command: str,
    words: str,
    message: str,
    shared: Path,
    tmp_path: Path,
    wrong_layout: Path,
    run_refused_command: Command,
) -> None:
    out = tmp_path / "out"
    data = shared / "data" / "lerobot" / "v3.0_image"
    arguments = words.format(out=out, layout=wrong_layout).split()

    assert message in run_refused_command("data", command, str(data), arguments)

    assert not out.exists()


def test_an_empty_folder_is_no_robot_data(tmp_path: Path, run_refused_command: Command) -> None:
    assert "contains no robot data" in run_refused_command("data", "inspect", str(tmp_path))


COMMANDS_WITH_LAYOUT = pytest.mark.parametrize(
    "words",
    [
        "audit {folder}",
        "export {folder} --out {out}",
        "inspect {folder}",
        "prepare {folder} --out {out}",
    ],
)


@COMMANDS_WITH_LAYOUT
@pytest.mark.parametrize("source", ["set", "store"])  # a LeRobot dataset, and our own format
def test_a_layout_that_does_not_exist_is_refused(
    words: str, source: str, exported: Path, tmp_path: Path, run_refused_command: Command
) -> None:
    layout = tmp_path / "layout.json"
    out = tmp_path / "out"
    command = words.format(folder=tmp_path / source, out=out)

    message = run_refused_command("data", command.split(), "--layout", str(layout))

    assert f"--layout {layout} does not exist" in message
    assert not out.exists()


@COMMANDS_WITH_LAYOUT
def test_a_layout_for_a_store_is_refused(
    words: str, store: Path, exported: Path, tmp_path: Path, run_refused_command: Command
) -> None:
    """A store, our own format, always has the same columns."""
    layout = shutil.copy(exported / "spear.json", tmp_path / "layout.json")
    out = tmp_path / "out"
    command = words.format(folder=store, out=out)

    assert "has no effect, because" in run_refused_command(
        "data", command.split(), "--layout", str(layout)
    )

    assert not out.exists()


def test_inspect_uses_a_layout_for_its_page_alone(
    exported: Path, tmp_path: Path, run_command: Command, run_refused_command: Command
) -> None:
    layout = str(shutil.copy(exported / "spear.json", tmp_path / "layout.json"))
    page = tmp_path / "look.html"

    run_refused_command("data", "inspect", str(exported), "--layout", layout)  # without a page
    run_command("data", "inspect", str(exported), "--layout", layout, "--report", str(page))

    assert page.exists()
