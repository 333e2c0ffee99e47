"""`spear label PHOTOS`, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from labels_stand_ins import BoxSegmenter, BrightDetector, SlopePointMap, photos
from spear.cli import main
from spear.labels import components
from spear.labels.questions.store import read_questions
from spear.labels.store import LabelStore, read

TRUTH = ["--detector", "ground-truth", "--segmenter", "ground-truth", "--pointmap", "ground-truth"]


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Runs a command that must fail; returns its last line, the only one that is no progress."""
    assert main(argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1]


def test_scenes_are_labelled_asked_about_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mujoco")
    pytest.importorskip("rerun")
    out = tmp_path / "labels"
    options = ["--out", str(out), "--workers", "0", "--questions", *TRUTH]
    assert main(["label", "sim:3-4", *options]) == 0
    said = capsys.readouterr().out
    assert all(words in said for words in ("2 labelled images", "0 skipped", "images/", "questions about"))
    labels = LabelStore(out)
    assert [labels[i].source for i in range(2)] == ["sim:3", "sim:4"] and labels[0].objects
    assert {source for source, _ in read_questions(out)} <= {"sim:3", "sim:4"}
    run = json.loads((out / "run.json").read_text())
    assert run["inputs"] == ["sim:3-4"] and run["pointmap"] == "ground-truth"
    assert main(["label", "sim:3-4", *options]) == 0
    assert "2 labelled images" in capsys.readouterr().out
    assert "inputs" in fails(capsys, "label", "sim:3-5", *options)
    rrd = tmp_path / "x.rrd"
    assert main(["label", "show", str(out), "--rerun", str(rrd)]) == 0
    assert rrd.stat().st_size > 500_000  # the clouds are in it


def test_what_did_not_get_through_is_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photos(tmp_path / "photos", 3, bad=False)
    command = ["label", str(folder), "--out", str(tmp_path / "out"), "--workers", "0"]
    monkeypatch.setitem(components.KINDS["segmenter"], "sam2", lambda *_: BoxSegmenter())
    monkeypatch.setitem(components.KINDS["point map"], "moge-2", lambda *_: SlopePointMap())
    detectors = components.KINDS["detector"]
    monkeypatch.setitem(detectors, "gemini", lambda *_: BrightDetector(unreached=("00001.png",)))
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "2 labelled images" in said and "1 skipped" in said and "--retry-skipped" in said
    monkeypatch.setitem(detectors, "gemini", lambda *_: BrightDetector())
    assert main([*command, "--retry-skipped"]) == 0
    said = capsys.readouterr().out
    assert "3 labelled images" in said and "0 skipped" in said and "retry" not in said
    names = [Path(label.source).name for label in read(tmp_path / "out")]
    assert names == ["00000.png", "00001.png", "00002.png"]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("photos --pointmap ground-truth", "rgbd:FOLDER"),
        ("photos --detector file:bad.json", "bad.json"),
        ("photos --detector owlv2 --vocabulary mug", "owlv2=PATH"),
        ("photos", "--detector owlv2"),
        ("sim:5-2", "sim:2-5"),
    ],
)
def test_what_cannot_be_labelled_is_refused_with_a_way_out_and_leaves_nothing(
    given: str,
    named: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for key in ("GEMINI_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    photos(tmp_path / "photos", 2, bad=False)
    (tmp_path / "bad.json").write_text("{}")
    there = set(tmp_path.iterdir())
    assert named in fails(capsys, "label", *given.split(), "--workers", "0")
    assert set(tmp_path.iterdir()) == there


def test_the_bill_comes_however_the_work_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Paid(BrightDetector):
        def bill(self) -> str:
            return "3 requests"

    folder = photos(tmp_path / "photos", 3, bad=False)
    monkeypatch.setitem(components.KINDS["segmenter"], "sam2", lambda *_: BoxSegmenter())
    monkeypatch.setitem(components.KINDS["point map"], "moge-2", lambda *_: SlopePointMap())
    for unreached, status in (("none", 0), (".png", 2)):
        monkeypatch.setitem(
            components.KINDS["detector"], "gemini", lambda *_, u=unreached: Paid(unreached=(u,))
        )
        assert main(["label", str(folder), "--out", str(tmp_path / unreached), "--workers", "0"]) == status
        assert "3 requests" in capsys.readouterr().out
