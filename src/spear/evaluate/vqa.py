"""3D answers of SPEAR-VLM against the truth, on labelled images that it has not seen.

Errors per question family, in millimetres (labels must be metric):
    box_vertices      distance between the centres (means of the eight vertices); and the mean vertex error.
    keypoint, offset  distance between the points, or between the offsets.
    distance          absolute difference; chain_of_thought: the mean of its two.
    back_projection   mean distance of the image points, in percent of the image (x of its width, y of its
                      height).
An answer counts as grammatical when it has exactly as many numbers and image points as it must have (24 3D
tokens for a box). One that has not has no error: errors are of the grammatical answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from spear.evaluate.stats import Estimate, bootstrap, wilson
from spear.images import decode_image
from spear.labels.draw import draw_boxes
from spear.labels.questions import FAMILIES, generate
from spear.types import Array, LabeledImage, Pixel, Question

if TYPE_CHECKING:
    from rich.table import Table

Segments = Sequence[str | float | Pixel]
TRUTH, PREDICTION = (74, 222, 128), (255, 176, 32)
"""Colours of boxes in drawings: green is the truth, orange the answer."""


class Answer(Protocol):
    """What a model said: text and numbers in reading order, as in `spear.types.Question`."""

    @property
    def segments(self) -> Segments: ...


class Answerer(Protocol):
    """A model that answers 3D questions (`spear.policy.VlmBundle`)."""

    def answer(
        self, images: Sequence[Array], prompts: Sequence[str], family: str | None = None
    ) -> Sequence[Answer]:
        """One answer per image and prompt, in the grammar of a question family, or free (None)."""
        ...


@dataclass(frozen=True)
class Asked:
    """A question about image number `image` of those that were asked about, and the answer's segments."""

    image: int
    question: Question
    answer: Segments

    @property
    def grammatical(self) -> bool:
        """Whether the answer has as many numbers and image points as the truth."""
        return _shape(self.answer) == _shape(self.question.segments)

    @property
    def error(self) -> float | None:
        """See the module; None for an answer without the right grammar, or one that has no numbers."""
        return error(self.question, self.answer) if self.grammatical else None

    @property
    def vertex_error(self) -> float | None:
        """Mean distance of the eight vertices, for boxes only."""
        if self.question.family != "box_vertices" or not self.grammatical:
            return None
        return float(np.linalg.norm(_points(self.answer) - _points(self.question.segments), axis=1).mean())


@dataclass(frozen=True)
class FamilyScore:
    """One question family. Errors in millimetres (back-projection: percent of the image).

    median, mean  of the errors; with intervals that resample images.
    constant      median error of the best constant answer: the family's median truth in these very questions.
    grammar       fraction of grammatical answers.
    vertex        median of the mean vertex errors, for boxes.
    """

    n: int
    median: Estimate | None
    mean: Estimate | None
    constant: float
    grammar: Estimate
    vertex: Estimate | None


@dataclass(frozen=True)
class Scores:
    """A whole evaluation; `free` holds the grammar rates of unconstrained answers to the same questions."""

    families: dict[str, FamilyScore]
    free: dict[str, FamilyScore]
    asked: Sequence[Asked]

    def save(self, path: Path) -> None:
        """Writes the scores (not the single answers) as JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        parts = {"constrained": self.families, "free": self.free}
        data = {k: {family: asdict(s) for family, s in part.items()} for k, part in parts.items()}
        temporary.write_text(json.dumps(data, indent=1))
        temporary.replace(path)

    def table(self) -> Table:
        """The scores for a terminal; "guess": constant answer, "free": grammar of unconstrained answers."""
        from rich.table import Table

        table = Table(title=f"SPEAR-VLM: {len(self.asked)} questions about held-out images")
        for column in ("question", "n", "median error \\[95 %]", "guess", "grammar", "free"):
            table.add_column(column, justify="left" if column == "question" else "right", no_wrap=True)
        for question, n, median, _, constant, grammar, free in self.rows():
            table.add_row(question, n, median.replace("[", "\\["), constant, grammar, free)
        return table

    def rows(self) -> list[list[str]]:
        """The cells of the table, as text."""
        rows = []
        for family, s in self.families.items():
            unit = "%" if family == "back_projection" else "mm"
            median = mean = "–"
            if s.median is not None and s.mean is not None:
                median = f"{s.median.value:.1f} {unit} [{s.median.low:.1f}, {s.median.high:.1f}]"
                mean = f"{s.mean.value:.1f} {unit}"
            free = self.free[family].grammar.value if family in self.free else None
            rows.append(
                [
                    family.replace("_", " "),
                    str(s.n),
                    median,
                    mean,
                    f"{s.constant:.1f} {unit}",
                    f"{s.grammar.value:.1%}",
                    "–" if free is None else f"{free:.1%}",
                ]
            )
        return rows


def evaluate(
    model: Answerer,
    labels: Sequence[LabeledImage],
    families: Sequence[str] = FAMILIES,
    per_image: int = 2,
    seed: int = 0,
    batch: int = 32,
    free: bool = True,
) -> Scores:
    """Ask up to `per_image` questions of each family about each image, and score the answers.

    free  also ask without constraining the grammar, to see how often it would have been right by itself.
    """
    rng = np.random.default_rng(seed)
    questions: dict[str, list[tuple[int, Question]]] = {f: [] for f in families}
    for index, label in enumerate(labels):
        for family in families:
            asked = generate(label, rng, (per_image, per_image), families=(family,))
            questions[family] += [(index, q) for q in asked]
    pictures = [decode_image(label.image) for label in labels]
    constrained = [a for f in families for a in ask(model, pictures, questions[f], f, batch)]
    open_ended = (
        [a for f in families for a in ask(model, pictures, questions[f], None, batch)] if free else []
    )
    return Scores(summarize(constrained), summarize(open_ended), constrained)


def ask(
    model: Answerer,
    pictures: Sequence[Array],
    questions: Sequence[tuple[int, Question]],
    family: str | None,
    batch: int = 32,
) -> list[Asked]:
    """Put questions, each about the picture of that index, to a model."""
    answered = []
    for start in range(0, len(questions), batch):
        some = questions[start : start + batch]
        answers = model.answer([pictures[i] for i, _ in some], [q.prompt for _, q in some], family)
        answered += [Asked(i, q, a.segments) for (i, q), a in zip(some, answers, strict=True)]
    return answered


def summarize(asked: Sequence[Asked]) -> dict[str, FamilyScore]:
    """Scores per question family, in the order in which families first appear."""
    scores = {}
    for family in dict.fromkeys(a.question.family for a in asked):
        rows = [a for a in asked if a.question.family == family]
        scale = 100 if family == "back_projection" else 1000
        errors = _by_image(rows, lambda a: a.error, scale)
        vertices = _by_image(rows, lambda a: a.vertex_error, scale)
        scores[family] = FamilyScore(
            n=len(rows),
            median=bootstrap(errors) if errors else None,
            mean=bootstrap(errors, np.mean) if errors else None,
            constant=scale * _constant_error(rows),
            grammar=wilson(sum(a.grammatical for a in rows), len(rows)),
            vertex=bootstrap(vertices) if vertices else None,
        )
    return scores


def error(question: Question, answer: Segments) -> float:
    """Distance between a grammatical answer and the truth; see the module for what it is in each family."""
    if question.family == "back_projection":
        return float(np.linalg.norm(_pixels(answer) - _pixels(question.segments), axis=1).mean())
    if question.family == "box_vertices":
        return float(np.linalg.norm((_points(answer) - _points(question.segments)).mean(0)))
    if question.family in ("keypoint", "offset"):
        return float(np.linalg.norm(_points(answer) - _points(question.segments)))
    return float(np.abs(_numbers(answer) - _numbers(question.segments)).mean())


def draw(asked: Asked, label: LabeledImage, scale: int = 3) -> Array:
    """A box answer (orange) and the truth (green) on the image: [scale·h, scale·w, 3] uint8."""
    boxes = [_points(asked.question.segments), _points(asked.answer)]
    return draw_boxes(
        decode_image(label.image), boxes, ["", ""], label.intrinsics, palette=[TRUTH, PREDICTION], scale=scale
    )


def _shape(segments: Segments) -> tuple[int, int]:
    return sum(isinstance(s, float) for s in segments), sum(isinstance(s, Pixel) for s in segments)


def _numbers(segments: Segments) -> Array:
    return np.array([s for s in segments if isinstance(s, float)])


def _points(segments: Segments) -> Array:
    return _numbers(segments).reshape(-1, 3)


def _pixels(segments: Segments) -> Array:
    return np.array([(s.x, s.y) for s in segments if isinstance(s, Pixel)]).reshape(-1, 2)


def _by_image(rows: Sequence[Asked], value: Callable[[Asked], float | None], scale: float) -> list[Array]:
    """The values of each image's questions, scaled, without those that have none."""
    groups: dict[int, list[float]] = {}
    for row in rows:
        found = value(row)
        if found is not None:
            groups.setdefault(row.image, []).append(scale * found)
    return [np.array(g) for g in groups.values()]


def _constant_error(rows: Sequence[Asked]) -> float:
    """The median error of answering the componentwise median of all the true answers."""
    truths = [r.question for r in rows]
    if rows[0].question.family == "back_projection":
        middle = np.median([_pixels(q.segments) for q in truths], axis=0)
        constant: Segments = [Pixel(float(x), float(y)) for x, y in middle]
    else:
        constant = [float(v) for v in np.median([_numbers(q.segments) for q in truths], axis=0)]
    return float(np.median([error(q, constant) for q in truths]))
