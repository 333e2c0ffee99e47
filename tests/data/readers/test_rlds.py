"""RLDS: the same as tensorflow_datasets reads; BridgeData's conventions, checked against its own states."""

import dataclasses
import io
import json
import math
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from data_tiny import assert_same, copy_dataset, edit_json, write_records
from refusals import refuses
from spear.audit.dataset_audit import audit
from spear.audit.describe import describe
from spear.audit.inspect import inspect
from spear.data.readers.build_episode import build_episode, read_openings
from spear.data.readers.columns import read_column
from spear.data.readers.dataset_layout import REGISTRY
from spear.data.readers.formats import read_episodes
from spear.data.readers.rlds import open_rlds
from spear.data.readers.splits import parse_split
from spear.data.readers.tfrecord import load_example_class, read_records
from spear.data.store.prepare import prepare
from spear.errors import SpearError
from spear.report.dataset import write_page
from spear.util.images import decode_image

SHARD = "bridge_dataset-train.tfrecord-00000-of-00001"


@pytest.fixture(scope="session")
def bridge(shared: Path) -> Path:
    return shared / "data" / "bridge_v2_sample"


@pytest.fixture
def copy(bridge: Path, tmp_path: Path) -> Path:
    return copy_dataset(bridge / "1.0.0", tmp_path / "rlds", None)


def columns(features: dict[str, Any]) -> dict[str, Any]:
    """What a `features.json` says of each column of a step."""
    return features["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"][
        "features"
    ]


def edit_records(shard: Path, change: Callable[[Any], None], which: range = range(25)) -> None:
    """Change the features of some of a shard's records."""
    records = [bytes(record) for _, record in read_records(shard, 0, 25)]
    for number in which:
        example = load_example_class().FromString(records[number])
        change(example.features.feature)
        records[number] = example.SerializeToString()
    write_records(shard, records)


def test_equal_to_what_tensorflow_datasets_reads(bridge: Path, shared: Path) -> None:
    """All numbers, texts and flags exactly; images to within the difference between two JPEG decoders."""
    arrays = np.load(shared / "fixtures" / "rlds" / "bridge_by_tfds.npz")
    truth = json.loads((shared / "fixtures" / "rlds" / "bridge_by_tfds.json").read_text())
    read = list(open_rlds(bridge).read_steps("train"))
    assert len(read) == len(truth) == 25
    for index, ((source, steps), expected) in enumerate(zip(read, truth, strict=True)):
        assert source == f"bridge_dataset/train#{index}"
        np.testing.assert_array_equal(steps["action"], arrays[f"{index:02d}/action"])
        np.testing.assert_array_equal(steps["observation"]["state"], arrays[f"{index:02d}/state"])
        assert steps["action"].dtype == np.float32 and len(steps["action"]) == expected["steps"]
        for flag in ("is_first", "is_last", "reward"):
            assert steps[flag].tolist() == expected[flag]
        assert {text.decode() for text in steps["language_instruction"]} == {
            expected["instruction"]
        }
        for key, value in expected["episode_metadata"].items():  # said once, in every row
            whole = [value.encode() if isinstance(value, str) else value] * len(steps["action"])
            assert list(steps[f"episode_metadata/{key}"]) == whole
        means = [decode_image(image).mean() for image in steps["observation"]["image_0"]]
        assert np.abs(np.array(means) - expected["image_0_mean"]).max() < 1.0


def test_splits_are_cut_as_tfds_cuts_them(copy: Path) -> None:
    def two_shards(info: dict[str, Any]) -> None:
        info["splits"][0]["shardLengths"] = ["10", "15"]
        info["splits"].append({"name": "val", "shardLengths": ["4"]})

    edit_json(copy / "dataset_info.json", two_shards)
    folder = open_rlds(copy)
    expected = {
        "train": [("train", 0, 25)],
        "train[:20%]": [("train", 0, 5)],
        "train[50%:]": [("train", 12, 25)],  # 12.5 rounds to even, as Python and TFDS do
        "train[5:]": [("train", 5, 25)],
        "train[-3:]": [("train", 22, 25)],
        "train[-10%:]": [("train", 23, 25)],
        "train[-1%:]": [
            ("train", 25, 25)
        ],  # none; TFDS takes all, so that what is held out was trained on
        "train[:-1%]": [("train", 0, 25)],
        "train[3:8]": [("train", 3, 8)],
        "train[:2]+val": [("train", 0, 2), ("val", 0, 4)],
        "all": [("train", 0, 25), ("val", 0, 4)],
    }
    for split, ranges in expected.items():
        assert parse_split(folder.split_lengths, split, copy) == ranges, split
    assert folder.splits["train"][1][0].name == "bridge_dataset-train.tfrecord-00001-of-00002"
    for bad in ("train[", "train[5]", "train[a:b]", "train[:]", "train[1:2:3]", "train[5%:2]", ""):
        refuses("unreadable split", parse_split, folder.split_lengths, bad, copy)
    refuses("did you mean 'train'", parse_split, folder.split_lengths, "trian[:5]", copy)
    for twice in ("train+train", "train[:60%]+val+train[40%:]", "all+val[:1]"):
        refuses("twice", parse_split, folder.split_lengths, twice, copy)
    for far in ("train[:26]", "train[-26:]", "train[:101%]"):
        refuses("beyond the 25 episodes", parse_split, folder.split_lengths, far, copy)


def test_bridge_episodes_are_canonical(bridge: Path) -> None:
    sources = [source for source, _ in open_rlds(bridge).read_steps("train[20%:28%]+train[-1:]")]
    assert sources == [f"bridge_dataset/train#{i}" for i in (5, 6, 24)]
    episodes = list(read_episodes(bridge))
    assert len(episodes) == 25
    for episode, (_, steps) in zip(episodes, open_rlds(bridge).read_steps("train"), strict=True):
        state = steps["observation"]["state"]
        np.testing.assert_array_equal(episode.position, state[:, :3])
        got = Rotation.from_quat(episode.rotation, scalar_first=True)
        assert (Rotation.from_euler("xyz", state[:, 3:6]).inv() * got).magnitude().max() < 1e-5
        assert (episode.gripper >= 0).all() and (episode.gripper <= 1).all()
        np.testing.assert_array_equal(episode.action_mask, [True] * 9 + [False])
        np.testing.assert_allclose(episode.action[:9, :3], np.diff(state[:, :3], axis=0), atol=1e-7)
        agree = episode.action[:, 7] == (steps["action"][:, 6] > 0.5)
        assert agree[(steps["action"][:, 6] > 0.6) | (steps["action"][:, 6] < 0.4)].all()
        assert decode_image(episode.images["external"][0]).shape == (64, 85, 3)  # 4:3 again


def test_broken_records_are_named_or_skipped(copy: Path, tmp_path: Path) -> None:
    data = bytearray((copy / SHARD).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / SHARD).write_bytes(data)
    refuses(
        rf"broken record: .*{re.escape(SHARD)} record \d+: its checksum", list, read_episodes(copy)
    )
    assert re.search(r"looked at +24 episodes.*\nskipped +broken record: ", inspect(copy))
    written, reasons = prepare(copy, tmp_path / "store")
    assert written == 24 and len(reasons) == 1 and "checksum" in reasons[0]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    assert prepare(copy, tmp_path / "store") == (
        written,
        reasons,
    )  # it is there: nothing is done again
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")} == before
    refuses("prepared from other episodes", prepare, copy, tmp_path / "store", "train[:20]")


def test_a_truncated_shard_is_named(copy: Path, tmp_path: Path) -> None:
    data = (copy / SHARD).read_bytes()
    (copy / SHARD).write_bytes(data[: len(data) // 3])
    refuses(r"record 8: the file ends .* copy the file again", list, read_episodes(copy))
    reasons: list[str] = []
    assert len(list(read_episodes(copy, on_error=lambda error: reasons.append(str(error))))) == 8
    assert len(reasons) == 17 and "record 24: " in reasons[-1]  # what was promised and is not there
    refuses("17 of 25", prepare, copy, tmp_path / "store")


def test_records_that_the_description_does_not_know_of_are_named(
    copy: Path, tmp_path: Path
) -> None:
    edit_json(
        copy / "dataset_info.json", lambda info: info["splits"][0].update(shardLengths=["20"])
    )
    refuses(r"broken record: .* record 20: dataset_info", list, read_episodes(copy))
    written, reasons = prepare(copy, tmp_path / "store")
    assert (
        written == 20 and len(reasons) == 1 and len(list(read_episodes(copy, "train[:19]"))) == 19
    )


def test_an_episode_without_steps_is_skipped_by_all(copy: Path) -> None:
    def empty(features: Any) -> None:
        for name, feature in features.items():
            if name.startswith("steps/"):
                getattr(feature, feature.WhichOneof("kind")).ClearField("value")

    edit_records(copy / SHARD, empty, range(1))
    reasons: list[SpearError] = []
    assert len(list(read_episodes(copy, on_error=reasons.append))) == 24 and "empty" in str(
        reasons[0]
    )
    assert "looked at     24 episodes" in inspect(copy) and audit(copy).num_episodes == 24
    assert describe(copy)["position"] == "observation/state[0:3]"
    edit_json(copy / "dataset_info.json", lambda info: info.update(splits=[]))
    for look in (inspect, audit, describe):
        refuses("names no split", look, copy)


def test_what_cannot_be_read_matters_only_where_it_is_named(copy: Path) -> None:
    tensor = lambda dtype, *shape: {"tensor": {"dtype": dtype, "shape": {"dimensions": shape}}}  # noqa: E731
    strange = {
        "ragged": {"sequence": {"feature": tensor("float32")}},
        "texts": {"sequence": {"feature": {"text": {}}}},
        "words": tensor("string", "2"),
        "cloud": tensor("float32", "-1", "3"),
        "nothing": tensor("float32", "0"),
        "brain": tensor("bfloat16", "1"),
        "sound": {"pythonClassName": "Audio", "audio": {}},
    }
    alike = {
        "list": {"sequence": {"feature": tensor("float32"), "length": "7"}},
        "text": strange["texts"],
    }

    def add(features: Any) -> None:
        state = features["steps/observation/state"].float_list.value
        lengths = {"ragged": [0, 2] * 5, "texts": [2] * 10, "list": [7] * 10, "text": [1] * 10}
        for name, rows in lengths.items():
            features[f"steps/{name}/ragged_row_lengths_0"].int64_list.value.extend(rows)
        said = list(features["steps/language_instruction"].bytes_list.value)
        for name, times in {
            "texts/ragged_flat_values": 2,
            "words": 2,
            "text/ragged_flat_values": 1,
        }.items():
            features[f"steps/{name}"].bytes_list.value.extend(said * times)
        for name, values in {"ragged": state[:10], "list": state}.items():
            features[f"steps/{name}/ragged_flat_values"].float_list.value.extend(values)
        for name in ("nothing", "brain", "sound", "cloud"):
            features[f"steps/{name}"].float_list.value.extend(state[: 10 * (name != "nothing")])

    plain = list(read_episodes(copy))
    edit_json(copy / "features.json", lambda features: columns(features).update(strange | alike))
    edit_records(copy / SHARD, add)
    for ours, theirs in zip(read_episodes(copy), plain, strict=True):
        assert_same(ours, theirs)
    assert inspect(copy).count("not read: ") == len(strange)
    assert describe(copy)["gripper"] and audit(copy).num_episodes == 25
    write_page(copy, copy / "look.html", None)
    assert "the first 4 of 25 episodes" in (copy / "look.html").read_text()
    for name in strange:
        for key in ("position", "instruction", "success"):
            (copy / "spear.json").write_text(json.dumps({"like": "bridge_dataset", key: name}))
            refuses(f"no column '{name}': .*cannot be read: ", next, read_episodes(copy))
    own = {
        "like": "bridge_dataset",
        "position": "list[0:3]",
        "rotation": "list[3:6]",
        "gripper": "list[6]",
    }
    (copy / "spear.json").write_text(
        json.dumps({**own, "command": "action[6]", "instruction": "text"})
    )
    for ours, theirs in zip(read_episodes(copy), plain, strict=True):
        assert_same(ours, theirs)


def test_depth_is_no_camera(copy: Path) -> None:
    depth = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint16).reshape(15, 20)).save(depth, "PNG")
    edit_json(
        copy / "features.json", lambda features: columns(features).update(depth={"image": {}})
    )
    shown = [depth.getvalue()] * 10
    edit_records(
        copy / SHARD, lambda features: features["steps/depth"].bytes_list.value.extend(shown)
    )
    assert "depth" not in describe(copy)["images"].values() and "20 x 15 pixels" in inspect(copy)
    (copy / "spear.json").write_text('{"like": "bridge_dataset", "images": {"external": "depth"}}')
    refuses("no images in column 'depth'", next, read_episodes(copy))


def test_another_number_in_the_middle_of_a_shard_is_other_data(copy: Path, tmp_path: Path) -> None:
    prepare(copy, tmp_path / "out")
    size = (copy / SHARD).stat().st_size
    change = lambda features: features["steps/action"].float_list.value.__setitem__(6, 0.5)  # noqa: E731
    edit_records(copy / SHARD, change, range(3, 4))
    assert (copy / SHARD).stat().st_size == size
    refuses("prepared from other episodes", prepare, copy, tmp_path / "out")


def test_a_folder_described_beside_its_data(copy: Path) -> None:
    def rename(info: dict[str, Any]) -> None:
        info["name"] = "my_arm"
        info["splits"][0]["filepathTemplate"] = "bridge_dataset-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"

    edit_json(copy / "dataset_info.json", rename)
    refuses(r"'my_arm'.*data describe .*spear\.json", next, read_episodes(copy))
    mine = {
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
    (copy / "spear.json").write_text(json.dumps(mine))
    episode = next(read_episodes(copy))
    steps = next(open_rlds(copy).read_steps("train"))[1]
    state = steps["observation"]["state"]
    assert episode.action is None and episode.rate_hz == 10 and episode.source == "my_arm/train#0"
    assert list(episode.images["external"]) == steps["observation"]["image_1"]
    np.testing.assert_allclose(episode.gripper, 1 - state[:, 6] / 1.01, atol=1e-6)
    (copy / "spear.json").write_text(
        json.dumps({**mine, "instruction": "episode_metadata/file_path"})
    )
    assert "/out.npy" in inspect(copy)
    half_turn = Rotation.from_euler("xyz", state[:, 3:6]) * Rotation.from_euler("x", np.pi)
    got = Rotation.from_quat(episode.rotation, scalar_first=True)
    assert (half_turn.inv() * got).magnitude().max() < 1e-5
    for change, message in (
        ({"rate_hz": None}, "not enough is known of dataset 'my_arm': rate_hz: "),
        ({"rate_hz": "5"}, "rate_hz is .*number"),
        ({"images": "observation/image_0"}, "images is .*dictionary"),
        (
            {"images": dict.fromkeys(("external", "wrist"), "observation/image_0")},
            "the same column",
        ),
        (
            {"gripper_range": [0.5, 0.5]},
            r"wrong value: .*spear\.json: gripper_range is \[0\.5, 0\.5\]",
        ),
        ({"gripper_range": [0.0, math.nan]}, "gripper_range is .*finite"),
        *(({"image_aspect": {"external": bad}}, "image_aspect is ") for bad in (0, 1e9)),
        *(({"instruction": bad}, bad) for bad in ("reward", "action", "observation/image_0")),
        ({"tool_rotation": [0, 0, 0, 0]}, "tool_rotation is .*: give a unit quaternion"),
        ({"gripper_rang": [0, 1]}, "did you mean 'gripper_range'"),
        ({"rotation_format": "euler-xyz"}, "did you mean 'euler_xyz'"),
        ({"logged_rotation_format": "euler_zxy"}, "unknown logged_rotation_format .*'euler_zxy'"),
        ({"like": "bridge_datset"}, "did you mean 'bridge_dataset'"),
        ({"gripper": "observation/state[7]"}, r"no column 'observation/state\[7\]'.*\(10, 7\)"),
        ({"position": "observation/pose"}, "no 'pose' \\(there is: image_0"),
        ({"position": "observation/state[0:"}, "unreadable column"),
    ):
        (copy / "spear.json").write_text(json.dumps({**mine, **change}))
        refuses(message, next, read_episodes(copy))
    del mine["position"], mine["images"]
    (copy / "spear.json").write_text(json.dumps(mine))
    refuses(r"'my_arm': images; position: say it in .*spear\.json", next, read_episodes(copy))


def test_every_column_of_a_layout_is_checked(copy: Path) -> None:
    """Not only the pose: a NaN of the gripper's command would be a gripper that is always closed."""
    spec = REGISTRY["bridge_dataset"]
    ((source, raw),) = open_rlds(copy).read_steps("train[:1]")
    for where in (
        "action[6]",
        "observation/state[6]",
        "observation/state[4]",
        "observation/state[1]",
    ):
        name, _, index = where.rstrip("]").partition("[")
        steps = deepcopy(raw)
        read_column(steps, name, source)[3, int(index)] = np.nan
        refuses(rf"{source} step 3: {re.escape(name)}", build_episode, steps, spec, source)
    own = dataclasses.replace(spec, success="reward")  # whoever wrote it
    assert build_episode(raw, spec, source).success is None
    for reward, success in ((0, False), (1, True), (-1, None)):
        assert (
            build_episode({**raw, "reward": np.append(np.zeros(9), reward)}, own, source).success
            is success
        )
    unknown = {**raw, "reward": np.append(np.zeros(9), np.nan)}
    refuses(rf"{source} step 9: reward", build_episode, unknown, own, source)
    where = "episode_metadata/file_path"
    assert where == REGISTRY["droid"].success
    own = dataclasses.replace(spec, success=where)
    for folder, success in (("failure", False), ("success", True), ("unsuccessful", None)):
        paths = [f"gs://a/success-rates/{folder}/2023-04-21/trajectory.h5".encode()] * 10
        assert build_episode({**raw, where: paths}, own, source).success is success
    own = dataclasses.replace(spec, action="mine", action_mask="reward")
    unknown["mine"] = np.tile([0, 0, 0, 1.0, 0, 0, 0, 1], (10, 1))
    refuses(rf"{source} step 9: reward", build_episode, unknown, own, source)
    own = dataclasses.replace(spec, action="language_instruction")
    refuses("no numbers in column 'language_instruction'", build_episode, raw, own, source)
    narrow = dataclasses.replace(spec, gripper_range=(0.0, 0.08))
    refuses(r"step 0: .*gripper_range is \[0, 0\.08\].* to 1", build_episode, raw, narrow, source)
    broken = deepcopy(raw)
    broken["observation"]["image_0"][4] = b"\xff\xd8no image"
    refuses(
        r"train#0 step 4 camera 'external': [^<]*$", build_episode, broken, spec, source
    )  # and no address


def test_idle_steps_are_left_out_where_the_layout_says_so(copy: Path) -> None:
    ((source, raw),) = open_rlds(copy).read_steps("train[5:6]")
    steps, spec = deepcopy(raw), REGISTRY["bridge_dataset"]
    steps["observation"]["state"][2:5] = steps["observation"]["state"][2]
    whole = build_episode(steps, spec, source)
    busy = build_episode(steps, dataclasses.replace(spec, drop_idle=True), source)
    assert len(whole) == 10 and len(busy) == 8 == len(busy.images["external"])
    np.testing.assert_array_equal(busy.position, whole.position[[0, 1, 4, 5, 6, 7, 8, 9]])
    assert busy.action is not None and REGISTRY["droid"].drop_idle
    np.testing.assert_allclose(
        busy.action[:-1, :3].sum(0), whole.position[-1] - whole.position[0], atol=1e-6
    )

    # Whatever its orientation: in float32 the scalar product of a quaternion with itself may lie below 1.
    still = dataclasses.replace(spec, drop_idle=True, rate_hz=15)
    steps["action"][:, 6] = 1
    for roll in np.linspace(-1, 1, 20):
        steps["observation"]["state"][:] = [0.3, 0, 0.2, roll, 0.4, -0.7, 1]
        assert len(build_episode(steps, still, source)) == 1
    # What creeps, each step by less than counts, moves: else it would be the action of the step before.
    steps["observation"]["state"][1:, 0] += 0.01 + 0.0019 * np.arange(9)
    crept = build_episode(steps, dataclasses.replace(still, rate_hz=1), source)
    assert crept.action is not None and 0.01 <= crept.action[:, 0].max() < 0.013


def test_an_opening_that_is_its_command_but_for_rounding_was_not_measured() -> None:
    said = {
        "gripper": "state",
        "gripper_range": (0, 0.08),
        "command": "action",
        "command_range": (0, 1),
    }
    steps = {"state": np.array([0.08, 0, 0.04]), "action": np.array([1, 0.0003, 0.5])}
    both = read_openings(steps, dataclasses.replace(REGISTRY["bridge_dataset"], **said), "it")
    np.testing.assert_allclose(both, ([1, 1, 0], [1, 0, 0.5]), atol=1e-3)


def test_another_layout_or_description_is_other_data(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    above = tmp_path / "above"
    above.mkdir()
    copy = copy.rename(above / "1.0.0")
    made = prepare(above, tmp_path / "out", "train[:2]")
    (copy / "spear.json").write_text('{"like": "bridge_dataset"}')
    assert prepare(above, tmp_path / "out", "train[:2]") == made  # the same meaning in other words
    (copy / "spear.json").write_text('{"like": "bridge_dataset", "command_range": [1.0, 0.0]}')
    refuses(r"in another way \(layout is", prepare, above, tmp_path / "out", "train[:2]")
    (copy / "spear.json").unlink()
    corrected = dataclasses.replace(REGISTRY["bridge_dataset"], drop_idle=True)
    with monkeypatch.context() as later:  # a release that knows the dataset better
        later.setitem(REGISTRY, "bridge_dataset", corrected)
        refuses(r"in another way \(layout is", prepare, above, tmp_path / "out", "train[:2]")
    (copy / "features.json").write_text((copy / "features.json").read_text() + "\n")
    refuses(r"in another way \(data is", prepare, above, tmp_path / "out", "train[:2]")


def test_broken_versions_and_descriptions_that_do_not_fit_are_refused(copy: Path) -> None:
    wrong = {"dimensions": ["9"]}
    edit_json(
        copy / "features.json",
        lambda features: columns(features)["action"]["tensor"].update(shape=wrong),
    )
    _, error = next(open_rlds(copy).read_steps("train"))
    assert re.search(r"record 0: feature 'steps/action'.*70.*\[9\]", str(error))
    edit_json(copy / "dataset_info.json", lambda info: info.update(name="bc_z", version="1.0.0"))
    refuses(r"1\.0\.0: .* 0\.1\.0", open_rlds(copy).load_layout)
    for name in ("features.json", "dataset_info.json"):
        (copy / name).write_text("[]")
        refuses(name, open_rlds, copy)
