"""RLDS is read as tensorflow_datasets reads it, and BridgeData is converted to our conventions.

Every episode of the sample of BridgeData has ten steps. The fixtures `bridge` and `bridge_copy` are
in conftest.py: the original folder, and a copy that a test may change.
"""

import dataclasses
import io
import json
import math
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from data_tiny import assert_same, edit_json, write_records
from refusals import refuses
from spear.audit.dataset_audit import audit_dataset
from spear.audit.describe import propose_layout
from spear.audit.inspect import describe_dataset
from spear.data.readers.dataset_layout import REGISTRY
from spear.data.readers.formats import read_episodes
from spear.data.readers.rlds import open_rlds
from spear.data.readers.tfrecord import load_example_class, read_records
from spear.data.store.prepare import prepare
from spear.report.dataset import write_dataset_page
from spear.types import Episode
from spear.util.images import decode_image

SHARD = "bridge_dataset-train.tfrecord-00000-of-00001"  # the only one; one record per episode
NUM_EPISODES = 25
IMAGE_COLUMN = "observation/image_0"
PNG_START = b"\x89PNG"


def get_step_columns(features: dict[str, Any]) -> dict[str, Any]:
    """Find, in the content of a `features.json`, column of a step -> its description."""
    steps = features["featuresDict"]["features"]["steps"]["sequence"]["feature"]
    return steps["featuresDict"]["features"]


def edit_records(
    shard: Path, change: Callable[[Any], None], indices: range = range(NUM_EPISODES)
) -> None:
    """Change the features of some records of a shard.

    Args:
        shard: The file.
        change: Called with the features of a record, which it changes.
        indices: The records to change; by default all.
    """
    records = [bytes(record) for _, record in read_records(shard, start=0, stop=NUM_EPISODES)]
    for index in indices:
        example = load_example_class().FromString(records[index])
        change(example.features.feature)
        records[index] = example.SerializeToString()
    write_records(shard, records)


def write_layout(folder: Path, layout: dict[str, Any]) -> None:
    (folder / "spear.json").write_text(json.dumps(layout))


def read_good(folder: Path) -> tuple[list[Episode], list[str]]:
    """Read the good episodes of a folder, and the reasons why the other ones are bad."""
    reasons: list[str] = []
    episodes = list(read_episodes(folder, on_error=lambda error: reasons.append(str(error))))
    return episodes, reasons


@pytest.fixture(scope="module")
def raw_episodes(bridge: Path) -> list[tuple[str, Any]]:
    """(source, columns) of all episodes, before their conversion."""
    return list(open_rlds(bridge).read_steps("train"))


@pytest.fixture(scope="module")
def tfds_arrays(shared: Path) -> Any:
    """Actions and states as tensorflow_datasets read them, under keys like "00/action"."""
    return np.load(shared / "fixtures" / "rlds" / "bridge_by_tfds.npz")


@pytest.fixture(scope="module")
def tfds_values(shared: Path) -> list[dict[str, Any]]:
    """Other values of each episode as tensorflow_datasets read them."""
    return json.loads((shared / "fixtures" / "rlds" / "bridge_by_tfds.json").read_text())


def test_episodes_are_named_by_dataset_split_and_number(
    raw_episodes: list[tuple[str, Any]],
) -> None:
    sources = [source for source, _ in raw_episodes]

    assert sources == [f"bridge_dataset/train#{index}" for index in range(NUM_EPISODES)]


def test_numbers_are_those_that_tensorflow_datasets_reads(
    raw_episodes: list[tuple[str, Any]], tfds_arrays: Any
) -> None:
    for index, (_, steps) in enumerate(raw_episodes):
        assert steps["action"].dtype == np.float32
        np.testing.assert_array_equal(steps["action"], tfds_arrays[f"{index:02d}/action"])
        states = steps["observation"]["state"]
        np.testing.assert_array_equal(states, tfds_arrays[f"{index:02d}/state"])


def test_flags_and_instructions_are_those_that_tensorflow_datasets_reads(
    raw_episodes: list[tuple[str, Any]], tfds_values: list[dict[str, Any]]
) -> None:
    for (_, steps), expected in zip(raw_episodes, tfds_values, strict=True):
        assert len(steps["action"]) == expected["steps"]
        for flag in ("is_first", "is_last", "reward"):
            assert steps[flag].tolist() == expected[flag]
        instructions = {text.decode() for text in steps["language_instruction"]}
        assert instructions == {expected["instruction"]}


def test_values_of_an_episode_are_in_every_row(
    raw_episodes: list[tuple[str, Any]], tfds_values: list[dict[str, Any]]
) -> None:
    for (_, steps), expected in zip(raw_episodes, tfds_values, strict=True):
        num_steps = len(steps["action"])
        for key, value in expected["episode_metadata"].items():
            stored_value = value.encode() if isinstance(value, str) else value
            rows = list(steps[f"episode_metadata/{key}"])
            assert rows == [stored_value] * num_steps


def test_images_are_those_that_tensorflow_datasets_reads(
    raw_episodes: list[tuple[str, Any]], tfds_values: list[dict[str, Any]]
) -> None:
    """Mean levels of images agree up to one level, because two JPEG decoders differ a little."""
    for (_, steps), expected in zip(raw_episodes, tfds_values, strict=True):
        means = [decode_image(image).mean() for image in steps["observation"]["image_0"]]
        differences = np.abs(np.array(means) - expected["image_0_mean"])
        assert differences.max() < 1.0


def test_shards_are_named_as_tfds_names_them(bridge_copy: Path) -> None:
    def set_two_shards(info: dict[str, Any]) -> None:
        info["splits"][0]["shardLengths"] = ["10", "15"]
        info["splits"].append({"name": "val", "shardLengths": ["4"]})

    edit_json(bridge_copy / "dataset_info.json", set_two_shards)

    folder = open_rlds(bridge_copy)

    assert folder.split_lengths == {"train": 25, "val": 4}
    second_shard = folder.splits["train"][1]
    assert second_shard.file.name == "bridge_dataset-train.tfrecord-00001-of-00002"


def test_a_split_selects_its_episodes(bridge: Path) -> None:
    raw = open_rlds(bridge).read_steps("train[20%:28%]+train[-1:]")

    sources = [source for source, _ in raw]
    assert sources == [f"bridge_dataset/train#{index}" for index in (5, 6, 24)]


@pytest.fixture(scope="module")
def episodes(bridge: Path) -> list[Episode]:
    """All episodes, converted to our conventions."""
    return list(read_episodes(bridge))


def test_states_of_bridge_are_converted(
    episodes: list[Episode], raw_episodes: list[tuple[str, Any]]
) -> None:
    """A state of BridgeData is x, y, z, roll, pitch, yaw and the opening."""
    for episode, (_, steps) in zip(episodes, raw_episodes, strict=True):
        states = steps["observation"]["state"]  # [10, 7]
        expected_rotation = Rotation.from_euler("xyz", states[:, 3:6])
        rotation = Rotation.from_quat(episode.rotation, scalar_first=True)
        difference = expected_rotation.inv() * rotation
        np.testing.assert_array_equal(episode.position, states[:, :3])
        assert difference.magnitude().max() < 1e-5
        assert episode.gripper.min() >= 0
        assert episode.gripper.max() <= 1


def test_actions_of_bridge_lead_from_state_to_state(
    episodes: list[Episode], raw_episodes: list[tuple[str, Any]]
) -> None:
    """The last of the ten actions is not known, because no state follows it."""
    for episode, (_, steps) in zip(episodes, raw_episodes, strict=True):
        positions = steps["observation"]["state"][:, :3]
        translations = np.diff(positions, axis=0)  # [9, 3]
        np.testing.assert_array_equal(episode.action_mask, [True] * 9 + [False])
        np.testing.assert_allclose(episode.action[:9, :3], translations, atol=1e-7)


def test_commands_of_bridge_are_the_logged_ones(
    episodes: list[Episode], raw_episodes: list[tuple[str, Any]]
) -> None:
    """A logged command above 0.6 opens, and one below 0.4 closes; between them it is not clear."""
    for episode, (_, steps) in zip(episodes, raw_episodes, strict=True):
        logged_command = steps["action"][:, 6]
        is_clear = (logged_command > 0.6) | (logged_command < 0.4)
        is_open = logged_command[is_clear] > 0.5
        np.testing.assert_array_equal(episode.action[is_clear, 7], is_open)


def test_images_of_bridge_get_their_true_aspect_ratio(episodes: list[Episode]) -> None:
    image = decode_image(episodes[0].images["external"][0])

    assert image.shape == (64, 85, 3)  # 4:3, stored as 64 x 64


@pytest.fixture
def copy_with_broken_record(bridge_copy: Path) -> Path:
    """One bit in the middle of the shard, and so of one record's body, is wrong."""
    data = bytearray((bridge_copy / SHARD).read_bytes())
    data[len(data) // 2] ^= 1
    (bridge_copy / SHARD).write_bytes(data)
    return bridge_copy


def test_a_broken_record_is_named(copy_with_broken_record: Path) -> None:
    message = rf"record \d+ of .*{re.escape(SHARD)} is broken \(its checksum"

    refuses(message, list, read_episodes(copy_with_broken_record))


def test_a_broken_record_is_skipped_by_inspecting_and_preparing(
    copy_with_broken_record: Path, tmp_path: Path
) -> None:
    num_prepared, reasons = prepare(copy_with_broken_record, tmp_path / "store")
    overview = describe_dataset(copy_with_broken_record)

    assert num_prepared == NUM_EPISODES - 1
    assert len(reasons) == 1
    assert "checksum" in reasons[0]
    assert re.search(r"looked at +24 episodes.*\nskipped +record \d+ of .* is broken ", overview)


def test_a_prepared_folder_is_not_prepared_again(bridge_copy: Path, tmp_path: Path) -> None:
    """The same call writes nothing, and a call for another split is refused."""
    out = tmp_path / "store"
    first_result = prepare(bridge_copy, out)
    times_before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}

    second_result = prepare(bridge_copy, out)

    times_after = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert second_result == first_result
    assert times_after == times_before
    refuses("prepared from other episodes", prepare, bridge_copy, out, "train[:20]")


def test_a_truncated_shard_is_named(bridge_copy: Path, tmp_path: Path) -> None:
    """A third of the file has 8 of the 25 records."""
    data = (bridge_copy / SHARD).read_bytes()
    (bridge_copy / SHARD).write_bytes(data[: len(data) // 3])

    episodes, reasons = read_good(bridge_copy)

    assert len(episodes) == 8
    assert len(reasons) == 17
    assert "record 24 of " in reasons[-1]  # the last record, by the number in the metadata
    message = r"record 8 of .* is broken \(the file ends .* download it again"
    refuses(message, list, read_episodes(bridge_copy))
    refuses("17 of 25", prepare, bridge_copy, tmp_path / "store")


@pytest.fixture
def copy_with_more_records(bridge_copy: Path) -> Path:
    """A dataset whose `dataset_info.json` says that the shard has 20 records; it has 25."""
    edit_json(
        bridge_copy / "dataset_info.json",
        lambda info: info["splits"][0].update(shardLengths=["20"]),
    )
    return bridge_copy


def test_records_that_the_description_does_not_know_of_are_named(
    copy_with_more_records: Path, tmp_path: Path
) -> None:
    """Only the first unknown record is named."""
    message = r"record 20 of .* is broken \(dataset_info"
    refuses(message, list, read_episodes(copy_with_more_records))

    num_prepared, reasons = prepare(copy_with_more_records, tmp_path / "store")
    assert num_prepared == 20
    assert len(reasons) == 1


def test_unknown_records_behind_the_split_do_not_matter(copy_with_more_records: Path) -> None:
    episodes = list(read_episodes(copy_with_more_records, "train[:19]"))

    assert len(episodes) == 19


def test_an_episode_without_steps_is_skipped_by_all(bridge_copy: Path) -> None:
    def remove_steps(features: Any) -> None:
        for name, feature in features.items():
            if name.startswith("steps/"):
                getattr(feature, feature.WhichOneof("kind")).ClearField("value")

    edit_records(bridge_copy / SHARD, remove_steps, indices=range(1))

    episodes, reasons = read_good(bridge_copy)

    assert len(episodes) == NUM_EPISODES - 1
    assert "has no steps" in reasons[0]
    assert "looked at     24 episodes" in describe_dataset(bridge_copy)
    assert audit_dataset(bridge_copy).num_episodes == 24
    assert propose_layout(bridge_copy)["position"] == "observation/state[0:3]"


@pytest.mark.parametrize("command", [describe_dataset, audit_dataset, propose_layout])
def test_a_dataset_without_splits_is_refused(
    bridge_copy: Path, command: Callable[[Path], Any]
) -> None:
    edit_json(bridge_copy / "dataset_info.json", lambda info: info.update(splits=[]))

    refuses("names no split", command, bridge_copy)


def describe_tensor(dtype: str, *shape: str) -> dict[str, Any]:
    """The description of a tensor in `features.json`."""
    return {"tensor": {"dtype": dtype, "shape": {"dimensions": shape}}}


LIST_OF_TEXTS = {"sequence": {"feature": {"text": {}}}}
UNREADABLE_FEATURES = {
    "ragged": {"sequence": {"feature": describe_tensor("float32")}},  # lists of 0 or 2 numbers
    "texts": LIST_OF_TEXTS,  # two texts per step
    "words": describe_tensor("string", "2"),
    "cloud": describe_tensor("float32", "-1", "3"),  # another number of points at every step
    "nothing": describe_tensor("float32", "0"),
    "brain": describe_tensor("bfloat16", "1"),  # a type that NumPy does not have
    "sound": {"pythonClassName": "Audio", "audio": {}},
}
"""Columns that cannot be read -> their descriptions in `features.json`."""
READABLE_FEATURES = {
    "list": {"sequence": {"feature": describe_tensor("float32"), "length": "7"}},
    "text": LIST_OF_TEXTS,  # one text per step
}
"""Unusual columns that can be read -> their descriptions in `features.json`."""
ROW_LENGTHS = {"ragged": [0, 2] * 5, "texts": [2] * 10, "list": [7] * 10, "text": [1] * 10}
"""For each of these columns that is a list, the length of the list at each of the ten steps."""


def add_strange_features(features: Any) -> None:
    """Add values of the columns above to a record of ten steps."""
    state = features["steps/observation/state"].float_list.value  # 10 steps of 7 numbers
    instructions = list(features["steps/language_instruction"].bytes_list.value)
    for name, lengths in ROW_LENGTHS.items():
        features[f"steps/{name}/ragged_row_lengths_0"].int64_list.value.extend(lengths)

    features["steps/texts/ragged_flat_values"].bytes_list.value.extend(instructions * 2)
    features["steps/words"].bytes_list.value.extend(instructions * 2)
    features["steps/text/ragged_flat_values"].bytes_list.value.extend(instructions)
    features["steps/ragged/ragged_flat_values"].float_list.value.extend(state[:10])
    features["steps/list/ragged_flat_values"].float_list.value.extend(state)
    features["steps/nothing"].float_list.value.extend([])
    for name in ("brain", "sound", "cloud"):  # any numbers, because nothing reads them
        features[f"steps/{name}"].float_list.value.extend(state[:10])


@pytest.fixture
def strange_copy(bridge_copy: Path) -> Path:
    """A dataset with columns that cannot be read, and with unusual ones that can."""
    edit_json(
        bridge_copy / "features.json",
        lambda features: get_step_columns(features).update(UNREADABLE_FEATURES | READABLE_FEATURES),
    )
    edit_records(bridge_copy / SHARD, add_strange_features)
    return bridge_copy


def test_columns_that_cannot_be_read_do_not_matter_to_episodes(
    strange_copy: Path, episodes: list[Episode]
) -> None:
    for episode, expected in zip(read_episodes(strange_copy), episodes, strict=True):
        assert_same(episode, expected)


@pytest.mark.slow  # runs several commands
def test_columns_that_cannot_be_read_do_not_matter_to_commands(strange_copy: Path) -> None:
    page = strange_copy / "look.html"
    write_dataset_page(strange_copy, page, None)  # without a layout file

    assert describe_dataset(strange_copy).count("not read: ") == len(UNREADABLE_FEATURES)
    assert propose_layout(strange_copy)["gripper"]
    assert audit_dataset(strange_copy).num_episodes == NUM_EPISODES
    assert "the first 4 of 25 episodes" in page.read_text()


def test_columns_that_cannot_be_read_are_named_if_the_layout_names_them(
    strange_copy: Path,
) -> None:
    for column in UNREADABLE_FEATURES:
        for field in ("position", "instruction", "success"):
            write_layout(strange_copy, {"like": "bridge_dataset", field: column})
            message = f"column '{column}' of .* cannot be read"
            refuses(message, next, read_episodes(strange_copy))


def test_lists_of_one_length_and_single_texts_are_columns(
    strange_copy: Path, episodes: list[Episode]
) -> None:
    """The column "list" repeats the state, and the column "text" the instruction."""
    layout = {
        "like": "bridge_dataset",
        "position": "list[0:3]",
        "rotation": "list[3:6]",
        "gripper": "list[6]",
        "command": "action[6]",
        "instruction": "text",
    }
    write_layout(strange_copy, layout)

    for episode, expected in zip(read_episodes(strange_copy), episodes, strict=True):
        assert_same(episode, expected)


def test_depth_is_no_camera(bridge_copy: Path) -> None:
    """A column of 16-bit PNGs of 20 x 15 pixels is shown, but not proposed or read as a camera."""
    depth_mm = np.arange(300, dtype=np.uint16).reshape(15, 20)
    png = io.BytesIO()
    Image.fromarray(depth_mm).save(png, "PNG")
    depth_images = [png.getvalue()] * 10
    edit_json(
        bridge_copy / "features.json",
        lambda features: get_step_columns(features).update(depth={"image": {}}),
    )
    edit_records(
        bridge_copy / SHARD,
        lambda features: features["steps/depth"].bytes_list.value.extend(depth_images),
    )

    assert "depth" not in propose_layout(bridge_copy)["images"].values()
    assert "20 x 15 pixels" in describe_dataset(bridge_copy)
    write_layout(bridge_copy, {"like": "bridge_dataset", "images": {"external": "depth"}})
    refuses("column 'depth' of .* contains no images", next, read_episodes(bridge_copy))


def test_another_number_in_the_middle_of_a_shard_is_other_data(
    bridge_copy: Path, tmp_path: Path
) -> None:
    """The file keeps its size and its end, so only checksums of records tell the difference."""
    prepare(bridge_copy, tmp_path / "out")
    shard = bridge_copy / SHARD
    num_bytes = shard.stat().st_size

    def change_number(features: Any) -> None:
        features["steps/action"].float_list.value[6] = 0.5

    edit_records(shard, change_number, indices=range(3, 4))

    assert shard.stat().st_size == num_bytes
    refuses("prepared from other episodes", prepare, bridge_copy, tmp_path / "out")


MY_LAYOUT = {
    "images": {"external": "observation/image_1"},
    "instruction": "language_instruction",
    "position": "observation/state[0:3]",
    "rotation": "observation/state[3:6]",
    "rotation_format": "euler_xyz",
    "gripper": "observation/state[6]",
    "gripper_range": [1.01, 0.0],
    "tool_rotation": [0, 1, 0, 0],
    "rate_hz": 10,
}
"""A layout for the columns of BridgeData that differs from that of the registry: another camera,
an inverted gripper, half a turn of the tool about x, and another rate."""


@pytest.fixture
def my_arm(bridge_copy: Path) -> Path:
    """The sample under the name "my_arm", which the registry does not have."""

    def rename(info: dict[str, Any]) -> None:
        info["name"] = "my_arm"
        template = "bridge_dataset-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        info["splits"][0]["filepathTemplate"] = template  # the file keeps its name

    edit_json(bridge_copy / "dataset_info.json", rename)
    return bridge_copy


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("../{SHARD_X_OF_Y}", "outside this folder"),
        ("{SPLIT:>9999999999}", "has a placeholder that is not known"),
    ],
)
def test_names_of_files_stay_in_the_folder(bridge_copy: Path, template: str, message: str) -> None:
    def change_template(info: dict[str, Any]) -> None:
        info["splits"][0]["filepathTemplate"] = template

    edit_json(bridge_copy / "dataset_info.json", change_template)

    refuses(message, open_rlds, bridge_copy)


def test_a_dataset_without_a_layout_is_refused_with_a_command(my_arm: Path) -> None:
    refuses(r"'my_arm'.*data describe .*spear\.json", next, read_episodes(my_arm))


def test_a_dataset_is_read_by_the_layout_in_its_folder(my_arm: Path) -> None:
    write_layout(my_arm, MY_LAYOUT)

    episode = next(read_episodes(my_arm))

    _, steps = next(open_rlds(my_arm).read_steps("train"))
    states = steps["observation"]["state"]
    tool_rotation = Rotation.from_euler("x", np.pi)
    expected_rotation = Rotation.from_euler("xyz", states[:, 3:6]) * tool_rotation
    rotation = Rotation.from_quat(episode.rotation, scalar_first=True)
    assert episode.action is None
    assert episode.rate_hz == 10
    assert episode.source == "my_arm/train#0"
    assert list(episode.images["external"]) == steps["observation"]["image_1"]
    difference = expected_rotation.inv() * rotation
    assert difference.magnitude().max() < 1e-5
    # By `gripper_range`, a reading of 1.01 is closed and a reading of 0 is open.
    np.testing.assert_allclose(episode.gripper, 1 - states[:, 6] / 1.01, atol=1e-6)


def test_a_value_of_the_episode_can_be_its_instruction(my_arm: Path) -> None:
    """A file's path is stored once per episode; as the instruction it is shown by `inspect`."""
    write_layout(my_arm, {**MY_LAYOUT, "instruction": "episode_metadata/file_path"})

    assert "/out.npy" in describe_dataset(my_arm)


SAME_COLUMN_TWICE = dict.fromkeys(("external", "wrist"), "observation/image_0")


@pytest.mark.parametrize(
    ("change", "message"),  # change: fields of the layout that replace those of `MY_LAYOUT`
    [
        ({"rate_hz": None}, "the layout of dataset 'my_arm' lacks rate_hz"),
        ({"rate_hz": "5"}, "rate_hz in .*number"),
        ({"images": "observation/image_0"}, "images in .*dictionary"),
        ({"images": SAME_COLUMN_TWICE}, "the same column"),
        ({"gripper_range": [0.5, 0.5]}, r"gripper_range in .*spear\.json cannot be \[0\.5, "),
        ({"gripper_range": [0.0, math.nan]}, "gripper_range in .*finite"),
        ({"image_aspect": {"external": 0}}, "image_aspect in "),
        ({"image_aspect": {"external": 1e9}}, "image_aspect in "),
        ({"instruction": "reward"}, "reward"),
        ({"instruction": "action"}, "action"),
        ({"instruction": "observation/image_0"}, "observation/image_0"),
        ({"tool_rotation": [0, 0, 0, 0]}, "tool_rotation in .*give a unit quaternion"),
        ({"gripper_rang": [0, 1]}, "Did you mean 'gripper_range'"),
        ({"rotation_format": "euler-xyz"}, "Did you mean 'euler_xyz'"),
        ({"logged_rotation_format": "euler_zxy"}, "unknown logged_rotation_format .*'euler_zxy'"),
        ({"like": "bridge_datset"}, "Did you mean 'bridge_dataset'"),
        ({"gripper": "observation/state[7]"}, r"no column 'observation/state\[7\]'.*\(10, 7\)"),
        ({"position": "observation/pose"}, r"there is no 'pose'.*\(image_0"),
        ({"position": "observation/state[0:"}, "is no column"),
    ],
)
def test_a_wrong_layout_is_refused_by_its_key(
    my_arm: Path, change: dict[str, Any], message: str
) -> None:
    write_layout(my_arm, {**MY_LAYOUT, **change})

    refuses(message, next, read_episodes(my_arm))


def test_all_missing_fields_are_named_at_once(my_arm: Path) -> None:
    incomplete = {key: MY_LAYOUT[key] for key in MY_LAYOUT if key not in ("position", "images")}
    write_layout(my_arm, incomplete)

    message = r"'my_arm' lacks images, position\. .*spear\.json"
    refuses(message, next, read_episodes(my_arm))


@pytest.fixture
def prepared_from(bridge_copy: Path, tmp_path: Path) -> Path:
    """A dataset's folder with one version in it; two of its episodes are prepared in `out`."""
    dataset_folder = tmp_path / "above"
    dataset_folder.mkdir()
    bridge_copy.rename(dataset_folder / "1.0.0")
    prepare(dataset_folder, tmp_path / "out", "train[:2]")
    return dataset_folder


def test_the_same_layout_in_other_words_is_the_same_data(
    prepared_from: Path, tmp_path: Path
) -> None:
    """Without a `spear.json`, the layout is that of "bridge_dataset" already."""
    write_layout(prepared_from / "1.0.0", {"like": "bridge_dataset"})

    num_prepared, _ = prepare(prepared_from, tmp_path / "out", "train[:2]")

    assert num_prepared == 2


OTHER_LAYOUT = r"in another way \(layout is"  # words of the message


def test_another_layout_is_other_data(prepared_from: Path, tmp_path: Path) -> None:
    layout = {"like": "bridge_dataset", "command_range": [1.0, 0.0]}
    write_layout(prepared_from / "1.0.0", layout)

    refuses(OTHER_LAYOUT, prepare, prepared_from, tmp_path / "out", "train[:2]")


def test_a_corrected_registry_makes_other_data(
    prepared_from: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrected = dataclasses.replace(REGISTRY["bridge_dataset"], drop_idle=True)
    monkeypatch.setitem(REGISTRY, "bridge_dataset", corrected)

    refuses(OTHER_LAYOUT, prepare, prepared_from, tmp_path / "out", "train[:2]")


def test_another_description_is_other_data(prepared_from: Path, tmp_path: Path) -> None:
    """Any change of `features.json` counts, even that of a blank line."""
    features_file = prepared_from / "1.0.0" / "features.json"
    features_file.write_text(features_file.read_text() + "\n")

    message = r"in another way \(data is"
    refuses(message, prepare, prepared_from, tmp_path / "out", "train[:2]")


def test_numbers_that_do_not_fit_their_description_are_named(bridge_copy: Path) -> None:
    """Ten actions of 7 numbers are 70 numbers, which do not fill rows of 9."""
    edit_json(
        bridge_copy / "features.json",
        lambda features: get_step_columns(features)["action"]["tensor"].update(
            shape={"dimensions": ["9"]}
        ),
    )

    _, error = next(open_rlds(bridge_copy).read_steps("train"))

    assert re.search(r"record 0 of .*feature 'steps/action'.*70.*\[9\]", str(error))


def test_a_version_that_is_known_to_be_broken_is_refused(bridge_copy: Path) -> None:
    """By the registry, the newest good version of BC-Z is 0.1.0."""
    edit_json(
        bridge_copy / "dataset_info.json",
        lambda info: info.update(name="bc_z", version="1.0.0"),
    )

    refuses(r"version 1\.0\.0 in .* 0\.1\.0", open_rlds(bridge_copy).load_layout)


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
def test_a_broken_description_is_named(bridge_copy: Path, name: str) -> None:
    (bridge_copy / name).write_text("[]")

    refuses(name, open_rlds, bridge_copy)


RAW_SIZE = (20, 16)  # width, height of the raw images, px


def store_raw_pixels(folder: Path, encoding: str) -> None:
    """Store a camera's images as uint8 arrays, one of the ways in which TFDS writes arrays."""
    width, height = RAW_SIZE

    def describe_array(features: dict[str, Any]) -> None:
        get_step_columns(features)["observation"]["featuresDict"]["features"]["image_0"] = {
            "pythonClassName": "tensorflow_datasets.core.features.tensor_feature.Tensor",
            "tensor": {
                "shape": {"dimensions": [str(height), str(width), "3"]},
                "dtype": "uint8",
                "encoding": encoding,
            },
        }

    def replace_images(features: Any) -> None:
        column = features["steps/observation/image_0"]
        arrays: list[np.ndarray] = []
        for encoded in column.bytes_list.value:
            image = Image.open(io.BytesIO(encoded)).resize(RAW_SIZE)
            arrays.append(np.asarray(image))
        column.Clear()
        for array in arrays:
            if encoding == "none":
                column.int64_list.value.extend(array.reshape(-1).tolist())
            else:
                data = array.tobytes()
                column.bytes_list.value.append(zlib.compress(data) if encoding == "zlib" else data)

    edit_json(folder / "features.json", describe_array)
    edit_records(folder / SHARD, replace_images)


@pytest.mark.parametrize("encoding", ["none", "bytes", "zlib"])
def test_raw_pixels_are_read_as_images(
    bridge_copy: Path, episodes: list[Episode], encoding: str
) -> None:
    store_raw_pixels(bridge_copy, encoding)
    write_layout(bridge_copy, {"like": "bridge_dataset", "images": {"external": IMAGE_COLUMN}})

    episode = next(read_episodes(bridge_copy))

    np.testing.assert_array_equal(episode.position, episodes[0].position)
    pixels = decode_image(episode.images["external"][0])
    assert pixels.shape == (RAW_SIZE[1], RAW_SIZE[0], 3)
    assert episode.images["external"][0].startswith(PNG_START)


def test_raw_pixels_of_the_wrong_type_are_described(bridge_copy: Path) -> None:
    fields = {"like": "bridge_dataset", "images": {"external": "observation/state"}}
    write_layout(bridge_copy, fields)

    message = r"float32 of shape \[10, 7\]. Raw images are uint8 \[steps, height, width, 3\]"
    refuses(message, next, read_episodes(bridge_copy))
