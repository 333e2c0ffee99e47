"""`spear label` of photos, scenes and RGB-D folders, from the command line."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from labels_scenes import random_frame
from labels_stand_ins import BoxSegmenter, BrightDetector, SlopePointMap, photos
from refusals import Command
from rgbd_folders import write_scannet
from spear.cli import main
from spear.doctor import Machine
from spear.labels import model_factories
from spear.labels.fit.quality import compare_labels
from spear.labels.models import resources
from spear.labels.questions.store import read_questions
from spear.labels.store import read_labels

TRUTH = ["--detector", "ground-truth", "--segmenter", "ground-truth", "--pointmap", "ground-truth"]


def test_scenes_are_labelled_asked_and_shown(
    tmp_path: Path, done: Command, refused: Command
) -> None:
    pytest.importorskip("mujoco")
    pytest.importorskip("rerun")
    out = tmp_path / "labels"
    options = ["--out", str(out), "--workers", "0", "--questions", *TRUTH]
    said = done("label", "sim:3-4", *options)
    assert all(
        words in said for words in ("2 labelled images", "0 skipped", "images/", "questions about")
    )
    labels = list(read_labels(out))
    assert [one.source for one in labels] == ["sim:3", "sim:4"] and labels[0].objects
    assert {source for source, _ in read_questions(out)} <= {"sim:3", "sim:4"}
    run = json.loads((out / "run.json").read_text())
    assert run["inputs"] == ["sim:3-4"] and run["pointmap"] == "ground-truth"
    assert "2 labelled images" in done("label", "sim:3-4", *options)
    assert "inputs" in refused("label", "sim:3-5", *options)
    rrd = tmp_path / "x.rrd"
    done("label", "show", str(out), "--rerun", str(rrd))
    assert rrd.stat().st_size > 500_000  # the clouds are in it


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ("photos --pointmap ground-truth", "rgbd:FOLDER"),
        ("photos --detector file:bad.json", "bad.json"),
        ("photos --detector owlv2 --vocabulary mug", "owlv2=PATH"),
        ("photos --detector owlv2", "--vocabulary"),
        ("photos", "--detector owlv2"),
        ("sim:5-2", "sim:2-5"),
        ("photos --rate 0", "--rate"),
        ("photos --engine ray --copies 0 1 1", "--copies"),
        ("photos --gpus 0 -1 0", "--gpus"),
        ("photos --gpus 1 1 1", "--gpus"),
        ("photos --engine ray", "--workers"),
        ("photos --detector file:bad.json --vocabulary mug", "--vocabulary"),
        ("photos --detector owlv2 --vocabulary mug --per-minute 9", "--per-minute"),
        ("--scenes 2 --engine ray", "--engine"),
        ("simpler:10000 --detector owlv2", "--detector"),
        ("--scenes 2 --retry-skipped", "--retry-skipped"),
        ("photos --seed 3", "--questions"),
        ("photos --detector gemni", "did you mean 'gemini'"),
        ("photos --detector file:absent.json", "no such file: write file:PATH"),
        ("photos --detector ground-truth+gemini", "only file:"),
        ("photos --segmenter ground-truth=foo", "no network"),
    ],
)
def test_what_cannot_be_labelled_is_refused_with_a_way_out_and_leaves_nothing(
    given: str, key: str, tmp_path: Path, refused: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    photos(tmp_path / "photos", 2, bad=False)
    (tmp_path / "bad.json").write_text("{}")
    there = set(tmp_path.iterdir())
    assert (
        key in refused("label", *given.split(), "--workers", "0")
        and set(tmp_path.iterdir()) == there
    )


def test_a_plan_says_what_labelling_costs_and_gets_nothing(
    tmp_path: Path, done: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder, out = photos(tmp_path / "photos", 3, bad=False), tmp_path / "out"
    monkeypatch.setattr(
        "spear.doctor.machine", lambda *_: Machine(1e10, 1e11)
    )  # measured in its own tests
    batch = ["--batch-size", "2", "--out", str(out), "--plan"]
    said = done(
        "label", str(folder), "--segmenter", "sam2=somebody/else", "--pointmap", "moge", *batch
    )
    assert said.startswith("3 images, 2 at a time") and "314 M parameters, 1.17 GiB" in said
    assert "before it is loaded: somebody/else" in said and "tokens in" in said and not out.exists()
    need = resources.estimate_resources("moge", 2, 840, 8)
    tokens, width = 2500, 1024  # ViT-L's matrix products, without MoGe's head
    encoder = 24 * (24 * tokens * width**2 + 4 * tokens**2 * width)
    assert 1.1 * encoder < need.flops < 1.5 * encoder
    assert f"activations {need.activations / 2**30:.2f} GiB" in said
    assert (
        main(["label", str(folder), "--detector", "grounding-dino", *TRUTH[2:], *batch]) == 2
    )  # no depth


def test_the_bill_comes_however_the_work_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Paid(BrightDetector):
        def bill(self) -> str:
            return "3 requests"

    folder = photos(tmp_path / "photos", 3, bad=False)
    made: dict[str, Any] = {
        "sam2:Sam2Segmenter": BoxSegmenter,
        "pointmap:load_point_map_model": SlopePointMap,
    }
    monkeypatch.setattr(model_factories, "_make_model", lambda entry, *_: made[entry.location]())
    (boxes := tmp_path / "boxes.json").write_text(
        '{"images": [], "annotations": [], "categories": []}'
    )
    for unreached, status, before in (
        ("none", 0, ""),
        (".png", 2, ""),
        ("no", 0, f"file:{boxes}+"),
    ):
        made["gemini:GeminiDetector"] = partial(Paid, unreached=(unreached,))
        words = [
            "--out",
            str(tmp_path / unreached),
            "--workers",
            "0",
            "--detector",
            f"{before}gemini",
        ]
        assert (
            main(["label", str(folder), *words]) == status
            and "3 requests" in capsys.readouterr().out
        )


def test_a_broken_frame_is_set_aside(tmp_path: Path, done: Command) -> None:
    frames = [random_frame(np.random.default_rng(seed), width=96, height=64) for seed in (0, 0, 1)]
    folder, out = write_scannet(tmp_path / "scan", frames), tmp_path / "labels"
    depth = folder / "depth" / "0.png"
    depth.write_bytes(depth.read_bytes()[:100])
    command = ("label", f"rgbd:{folder}", "--out", str(out), "--workers", "0", *TRUTH)
    assert "2 labelled images" in done(*command)
    (aside,) = pq.read_table(out / "skipped.parquet").to_pylist()
    assert aside["source"] == str(folder / "color" / "0.png")
    assert [label.source for label in read_labels(out)] == [
        str(folder / f"color/{i}.png") for i in (1, 2)
    ]
    assert (
        compare_labels(
            read_labels(out), [replace(f, names=frames[2].names) for f in frames[1:]]
        ).center
        < 0.005
    )
    depth.write_bytes((folder / "depth" / "1.png").read_bytes())
    assert "3 labelled images" in done(*command)
