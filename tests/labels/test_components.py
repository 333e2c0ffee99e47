"""Components by name."""

import json
import re
from pathlib import Path

import pytest

from refusals import refuses
from spear.labels.components import component
from spear.labels.options import LabelOptions


def test_annotations_come_first_and_leave_the_rest_to_another(tmp_path: Path) -> None:
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    alone = component("detector", f"file:{path}", LabelOptions())()
    both = component("detector", f"file:{path}+ground-truth", LabelOptions())()
    assert "boxes.json" in alone.name and both.name == f"{alone.name}, otherwise ground-truth"
    segmenter = component("segmenter", f"file:{path}+ground-truth", LabelOptions())()
    assert "ground-truth" in segmenter.name


@pytest.mark.parametrize(
    ("kind", "description", "hint"),
    [
        ("detector", "gemni", "did you mean 'gemini'"),
        ("detector", "file:absent.json", "no such file: write file:PATH"),
        ("detector", "ground-truth+gemini", "only file:"),
        ("segmenter", "ground-truth=foo", "no network"),
    ],
)
def test_what_makes_no_sense_is_named(kind: str, description: str, hint: str) -> None:
    refuses(re.escape(hint), component, kind, description, LabelOptions())
