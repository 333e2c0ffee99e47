"""A proposed spear.json: what the columns say, and what they leave open."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from refusals import refuses
from spear.cli import main
from spear.data.describe import describe
from spear.data.readers.formats import read_episodes
from spear.data.readers.spec import REGISTRY

IMAGES = {"external": "observation/images/image_0"}


@pytest.mark.parametrize("name", ["bridge_v2_sample", "lerobot/v3.0_image"])
def test_a_proposal_for_the_real_sample_is_right(shared: Path, tmp_path: Path, name: str) -> None:
    folder, known = shared / "data" / name, REGISTRY["bridge_dataset"]
    found = describe(folder)
    for key in ("position", "rotation", "gripper", "command", "logged_translation", "logged_rotation"):
        assert found[key] == getattr(known, key), key
    for key in ("rotation_format", "logged_kind", "logged_frame"):
        assert found[key] == getattr(known, key), key
    assert found["images"]["external"].startswith("observation/image") and "wrist" not in found["images"]
    closed, opened = found["gripper_range"]
    assert closed < opened  # and not the other way round
    (tmp_path / "layout.json").write_text(json.dumps({**found, "rate_hz": 5.0}))
    assert next(read_episodes(folder, dataset=tmp_path / "layout.json")).rate_hz == 5
    if name.startswith("bridge"):
        assert found["rate_hz"] is None and "rate_hz" in found["facts"]


def test_one_nan_decides_nothing(shared: Path, tmp_path: Path) -> None:
    whole = shared / "data" / "lerobot" / "v3.0_image"
    copy = shutil.copytree(whole, tmp_path / "copy", copy_function=shutil.copyfile)
    (file,) = copy.glob("data/*/*.parquet")
    table = pq.read_table(file)
    state = np.array(table["observation.state"].to_pylist(), np.float32)
    state[13, 2] = np.nan
    column = pa.FixedSizeListArray.from_arrays(pa.array(state.ravel()), state.shape[1])
    at = table.column_names.index("observation.state")
    file.chmod(0o644)
    pq.write_table(table.set_column(at, table.schema.field(at), column), file)
    found, expected = describe(copy), describe(whole)
    assert {k: v for k, v in found.items() if k != "facts"} == {
        k: v for k, v in expected.items() if k != "facts"
    }


def test_joints_are_no_pose_and_success_is_proposed(shared: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(
        shared / "data/lerobot/v3.0_image", tmp_path / "copy", copy_function=shutil.copyfile
    )
    info = json.loads((copy / "meta/info.json").read_text())
    taken = describe(copy)
    (file,) = copy.glob("data/*/*.parquet")
    table = pq.read_table(file)
    file.chmod(0o644)
    pq.write_table(table.append_column("next.success", pa.array([True] * len(table))), file)
    info["features"]["observation.state"]["names"] = {
        "motors": [f"joint_{i}" for i in range(6)] + ["gripper"]
    }
    (copy / "meta/info.json").chmod(0o644)
    (copy / "meta/info.json").write_text(json.dumps(info))
    found = describe(copy)
    assert found["position"] is None and found["success"] == "next/success" and "success" not in taken
    (copy / "spear.json").write_text(json.dumps(taken))
    refuses("joint_0", lambda: next(read_episodes(copy)))


def test_a_rate_that_the_metadata_contradict(shared: Path, tmp_path: Path) -> None:
    folder, layout = shared / "data/lerobot/v3.0_image", tmp_path / "layout.json"
    layout.write_text(json.dumps({"like": "bridge_dataset", "rate_hz": 30.0, "images": IMAGES}))
    refuses("rate_hz", lambda: next(read_episodes(folder, dataset=layout)))


def test_a_column_that_cannot_be_read_is_named(shared: Path, tmp_path: Path) -> None:
    folder, layout = shared / "data/lerobot/v3.0_image", tmp_path / "layout.json"
    bad = "observation/state[0;3]"
    layout.write_text(json.dumps({"like": "bridge_dataset", "position": bad, "images": IMAGES}))
    refuses(re.escape(bad), lambda: next(read_episodes(folder, dataset=layout)))


def test_the_command(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = shared / "data" / "lerobot" / "v3.0_image", tmp_path / "layout.json"
    for _ in range(2):
        code = main(["data", "describe", str(folder), "--out", str(out)])
    assert code == 2 and json.loads(out.read_text())["facts"]
    assert f"{folder / 'spear.json'} is to be this" in capsys.readouterr().err
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert main(["data", "describe", str(copy), "--out", str(copy / "spear.json")]) == 0
    assert f"{copy / 'spear.json'} is to be this" in capsys.readouterr().err  # not there before
    assert main(["data", "describe", str(shared / "data" / "bridge_v2_sample")]) == 0
    assert "1.0.0/spear.json" in capsys.readouterr().err  # where it is found
