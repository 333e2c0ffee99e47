"""Components by name."""

from __future__ import annotations

import importlib
import json
import pickle
from pathlib import Path

import pytest

from spear.errors import SpearError
from spear.labels.components import KINDS, Choice, build, graph
from spear.labels.models.ground_truth import GroundTruthDetector, GroundTruthPointMap, GroundTruthSegmenter
from spear.labels.objects import BoxSettings


def test_ground_truth_is_made_from_its_name() -> None:
    made = pickle.loads(pickle.dumps(graph("ground-truth", "ground-truth", "ground-truth", Choice())))
    assert isinstance(made.detector(), GroundTruthDetector)
    assert isinstance(made.segmenter(), GroundTruthSegmenter)
    assert isinstance(made.pointmap(), GroundTruthPointMap)
    assert made.boxes == BoxSettings()
    assert graph("gemini", "sam2", "moge-2", Choice()).boxes.erosion > 0


def test_annotations_come_first_and_leave_the_rest_to_another(tmp_path: Path) -> None:
    pytest.importorskip("spear.labels.models.annotations")
    pytest.importorskip("spear.labels.models.coco")
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    alone = build("detector", f"file:{path}", Choice())
    both = build("detector", f"file:{path}+ground-truth", Choice())
    assert "boxes.json" in alone.name and both.name == f"{alone.name}, otherwise ground-truth"
    assert "ground-truth" in build("segmenter", f"file:{path}+ground-truth", Choice()).name


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("gemini", ["GeminiDetector"]),
        ("open_vocabulary", ["GroundingDinoDetector", "Owlv2Detector"]),
        ("sam2", ["Sam2Segmenter"]),
        ("from_files", ["FileDetector", "FileSegmenter"]),
        ("coco", ["CocoAnnotations"]),
        ("egoexo", ["RelationAnnotations"]),
    ],
)
def test_what_is_wired_is_there(module: str, names: list[str]) -> None:
    found = pytest.importorskip(f"spear.labels.{module}")
    assert all(hasattr(found, name) for name in names)


def test_moge_is_wired() -> None:
    pytest.importorskip("spear.labels.models.pointmap")
    assert hasattr(importlib.import_module("spear.labels.models.pointmap").MogePointMap, "load")


@pytest.mark.parametrize(
    ("kind", "description", "hint"),
    [
        ("detector", "gemni", "did you mean 'gemini'"),
        ("segmenter", "sam", "did you mean 'sam2'"),
        ("point map", "mog-2=x", "did you mean 'moge-2'"),
        ("detector", "file:absent.json", "no such file: write file:PATH"),
        ("detector", "file", "no such file"),
        ("detector", "ground-truth+gemini", "only file:"),
        ("detector", "owlv2", "--vocabulary"),
    ],
)
def test_what_makes_no_sense_is_named(kind: str, description: str, hint: str) -> None:
    if description == "owlv2":
        pytest.importorskip("spear.labels.models.open_vocabulary")
    with pytest.raises(SpearError) as stop:
        build(kind, description, Choice())
    assert hint in str(stop.value) and "\n" not in str(stop.value)
    assert set(KINDS) == {"detector", "segmenter", "point map"}
