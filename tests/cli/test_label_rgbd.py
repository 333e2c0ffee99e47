"""`spear label rgbd:FOLDER`, from the command line: scenes of the simulator, written as people's RGB-D
folders."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rgbd_folders import write_coco, write_plain, write_scannet
from spear.cli import main
from spear.labels.fit.quality import Accuracy, compare
from spear.labels.questions.store import read_questions
from spear.labels.scenes import label_frames
from spear.labels.store import read
from spear.types import Frame

TRUTH = ["--detector", "ground-truth", "--segmenter", "ground-truth", "--pointmap", "ground-truth"]


@pytest.fixture(scope="module")
def frames(renderer: Any) -> list[Frame]:
    """Two scenes of the simulator, the gripper not among their objects. Their cameras differ a little."""
    from spear.sim.render import clutter_frame
    from spear.sim.world import GRIPPER

    seen = [clutter_frame(seed, "external", (280, 210), renderer) for seed in (3, 4)]
    return [
        dataclasses.replace(frame, names={i: name for i, name in frame.names.items() if name != GRIPPER})
        for frame in seen
    ]


def accuracy(out: Path, frames: list[Frame]) -> Accuracy:
    """Of the labels that questions are asked about."""
    return compare(read(out), frames, min_visible=0.7)


def test_a_plain_folder_with_masks_from_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], frames: list[Frame]
) -> None:
    for name, scene in (("a", frames[:1]), ("b", [frames[1], frames[1]])):
        write_plain(tmp_path / name, scene)
    depth = tmp_path / "b" / "depth" / "0.png"
    depth.write_bytes(depth.read_bytes()[:100])  # the first of two frames is broken
    files = {"a/color/0.png": frames[0], "b/color/0.png": frames[1], "b/color/1.png": frames[1]}
    masks = f"file:{write_coco(tmp_path / 'masks.json', files)}"
    out = tmp_path / "labels"
    inputs = [f"rgbd:{tmp_path / 'a'}", f"rgbd:{tmp_path / 'b'}"]
    options = ["--detector", masks, "--segmenter", masks, "--pointmap", "ground-truth", "--workers", "0"]
    assert main(["label", *inputs, "--out", str(out), "--questions", *options]) == 0
    said = capsys.readouterr().out
    assert "2 labelled images" in said and "1 skipped" in said and "questions about 2 images" in said
    (aside,) = pq.read_table(out / "skipped.parquet").to_pylist()
    assert aside["source"] == str(tmp_path / "b" / "color" / "0.png")
    assert "not a readable PNG" in aside["reason"]
    labels = list(read(out))
    assert [label.source for label in labels] == [
        str(tmp_path / "a" / "color" / "0.png"), str(tmp_path / "b" / "color" / "1.png")
    ]  # fmt: skip
    for label, frame in zip(labels, frames, strict=True):
        assert label.unit == "metre" and label.provenance["pointmap"] == "ground-truth"
        assert {o.name for o in label.objects} <= set(frame.names.values())
        np.testing.assert_allclose(label.intrinsics, frame.intrinsics, atol=1e-6)
    found = accuracy(out, frames)
    assert found.n >= 5 and found.center < 0.008 and found.vertex < 0.02


def test_a_scannet_scan_is_labelled_with_its_own_truth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], frames: list[Frame]
) -> None:
    inputs = []
    for name, frame in zip("ab", frames, strict=True):
        inputs.append(f"rgbd:{write_scannet(tmp_path / name, [frame])}")
    out = tmp_path / "labels"
    assert main(["label", *inputs, "--out", str(out), "--questions", "--workers", "0", *TRUTH]) == 0
    assert "2 labelled images" in capsys.readouterr().out
    found, direct = accuracy(out, frames), compare(label_frames(iter(frames)), frames, min_visible=0.7)
    assert found.n == direct.n >= 5  # whole millimetres of depth cost little
    assert found.center < direct.center + 0.001 and found.vertex < direct.vertex + 0.002
    assert {source for source, _ in read_questions(out)} & {label.source for label in read(out)}
