"""3D question scores: errors by hand, grammar, the constant guess, and a model that knows the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from spear.evaluate import vqa
from spear.images import encode_jpeg
from spear.labels.box3d import make_box
from spear.labels.camera import project
from spear.types import Array, LabeledImage, LabeledObject, Pixel, Question

INTRINSICS = np.array([[140.0, 0, 70], [0, 140, 52.5], [0, 0, 1]])


@dataclass(frozen=True)
class Said:
    segments: vqa.Segments


class Oracle:
    """Knows every question's answer and adds an offset (m) to all 3D points and distances."""

    def __init__(self, offset: float = 0.0, drop_last: bool = False) -> None:
        self.offset, self.drop_last = offset, drop_last
        self.known: dict[str, vqa.Segments] = {}

    def answer(
        self, images: Sequence[Array], prompts: Sequence[str], family: str | None = None
    ) -> list[Said]:
        said = []
        for image, prompt in zip(images, prompts, strict=True):
            assert image.dtype == np.uint8
            segments = [s + self.offset if isinstance(s, float) else s for s in self.known[prompt]]
            said.append(Said(segments[:-1] if self.drop_last and family is None else segments))
        return said


def labelled(seed: int) -> LabeledImage:
    rng = np.random.default_rng(seed)
    objects = []
    for index, name in enumerate(("mug", "spoon", "bowl")):
        box = make_box(
            np.array([0.2 * index - 0.2, 0.02, 0.8 + 0.1 * rng.random()]), np.full(3, 0.06), np.eye(3)
        )
        corners = project(box.vertices, INTRINSICS)
        box2d = np.concatenate([corners.min(0), corners.max(0)])
        points = {k: box.center for k in ("closest", "furthest", "centre")}
        objects.append(LabeledObject(name, box2d, [140 * 105], box, points, {"visible": 1.0}))
    image = encode_jpeg(np.full((105, 140, 3), 90, np.uint8))
    return LabeledImage(image, 140, 105, INTRINSICS, objects, "metre", f"test/{seed}")


def ask_oracle(oracle: Oracle, labels: list[LabeledImage], monkeypatch: pytest.MonkeyPatch) -> vqa.Scores:
    real = vqa.generate

    def remember(*args: object, **kwargs: object) -> list[Question]:
        """Makes prompts unique per image, so that the oracle can look them up."""
        asked = []
        for q in real(*args, **kwargs):  # type: ignore[arg-type]
            prompt = f"{q.prompt} #{len(oracle.known)}"
            oracle.known[prompt] = q.segments
            asked.append(Question(q.family, prompt, q.segments, q.objects, q.unit))
        return asked

    monkeypatch.setattr(vqa, "generate", remember)
    return vqa.evaluate(oracle, labels, per_image=2)


def test_an_oracle_has_no_error_and_an_offset_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = [labelled(i) for i in range(6)]
    perfect = ask_oracle(Oracle(), labels, monkeypatch)
    assert set(perfect.families) == set(vqa.FAMILIES)
    for score in perfect.families.values():
        assert score.n > 0
        assert score.median is not None
        assert score.median.value == pytest.approx(0, abs=1e-9)
        assert score.grammar.value == 1
    monkeypatch.undo()
    off = ask_oracle(Oracle(0.01), labels, monkeypatch).families
    root3 = np.sqrt(3) * 10
    expected = {
        "box_vertices": root3,
        "keypoint": root3,
        "offset": root3,
        "distance": 10,
        "chain_of_thought": 10,
    }
    for family, millimetres in expected.items():
        median, mean = off[family].median, off[family].mean
        assert median is not None
        assert mean is not None
        assert median.value == pytest.approx(millimetres, rel=1e-6)
        assert mean.value == pytest.approx(millimetres, rel=1e-6)
    assert off["box_vertices"].vertex is not None
    assert off["box_vertices"].vertex.value == pytest.approx(root3, rel=1e-6)
    assert off["box_vertices"].constant > 5


def test_broken_grammar_is_counted_and_has_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scores = ask_oracle(Oracle(drop_last=True), [labelled(i) for i in range(3)], monkeypatch)
    assert scores.families["box_vertices"].grammar.value == 1
    assert scores.free["box_vertices"].grammar.value == 0
    assert scores.free["box_vertices"].median is None
    scores.save(tmp_path / "s.json")
    assert '"free"' in (tmp_path / "s.json").read_text()
    assert [row[0] for row in scores.rows()] == [f.replace("_", " ") for f in scores.families]
    assert any("0.0%" in cell for cell in scores.rows()[0])


def test_pixel_errors_are_fractions_of_the_image() -> None:
    truth = Question("back_projection", "?", [Pixel(0.1, 0.2), Pixel(0.5, 0.5)], ["x"])
    assert vqa.error(truth, [Pixel(0.4, 0.6), Pixel(0.5, 0.5)]) == pytest.approx(0.25)


def test_a_wrong_box_is_drawn_beside_the_truth() -> None:
    label = labelled(0)
    box = label.objects[0].box3d
    assert box is not None
    truth = [float(v) for v in box.vertices.ravel()]
    question = Question("box_vertices", "?", truth, ["mug"])
    picture = vqa.draw(vqa.Asked(0, question, [v + 0.03 for v in truth]), label)
    assert picture.shape == (315, 420, 3)
    for colour in (vqa.TRUTH, vqa.PREDICTION):
        assert (np.abs(picture.astype(int) - colour).sum(-1) < 20).sum() > 50
