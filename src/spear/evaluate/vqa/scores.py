"""Answers to 3D questions summed up per family and way of reading numbers, with baselines and calibration."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from rich.table import Table

from spear.evaluate.results import build_terminal_table
from spear.evaluate.stats import Estimate, bootstrap
from spear.evaluate.vqa.calibration import Calibration, Certainty, Trust, calibrate, group_by_image
from spear.evaluate.vqa.measures import (
    MEASURES,
    guess_constants,
    guess_from_depth,
    is_grammatical,
    measure_answer,
)
from spear.models.readout import DECODE_METHODS, Decode
from spear.types import LabeledImage, Question, Segments, Unit
from spear.util.files import write_text


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question about a labelled image, number `image` of those that were asked about, and the answer.

    readings   the answer as each way of reading its numbers has it, where the model said what it held
               possible. `answer` is the one that is scored.
    certainty  how sure it was of its numbers, and whether rightly; None where it did not say, for answers
               without numbers and for those with the wrong grammar.
    """

    image: int
    label: LabeledImage = field(repr=False)
    question: Question
    answer: Segments
    readings: Mapping[Decode, Segments] = field(default_factory=dict)
    certainty: Certainty | None = None

    @cached_property
    def measures(self) -> dict[str, float]:
        """See `evaluate.vqa.measures`."""
        return measure_answer(self.question, self.answer, self.label)


@dataclass(frozen=True)
class FamilyScore:
    """One question family.

    n, images   questions, and how many images they are about.
    grammar     fraction of grammatical answers, held to the grammar; free: without.
    measures    summed up as `MEASURES` says, with 95 % intervals: medians and means resample images, rates
                are Wilson's.
    constant, depth_only  the same of the baselines; empty where there is none.
    """

    n: int
    images: int
    grammar: Estimate
    free: Estimate
    measures: Mapping[str, Estimate]
    constant: Mapping[str, float]
    depth_only: Mapping[str, float]


@dataclass(frozen=True)
class Readings:
    """One family's ways of reading numbers off their probabilities.

    error   of each, the median relative error in percent.
    gain    of "mean" and "median": how much smaller the mean relative error is than that of "mode", as a part
            of it, from the same answers; negative where it is larger.
    """

    error: Mapping[Decode, float]
    gain: Mapping[Decode, Estimate]

    @property
    def best(self) -> Decode:
        """The one with the smallest median error."""
        return min(self.error, key=lambda d: self.error[d])


@dataclass(frozen=True)
class Scores:
    """A whole evaluation. readings, calibration: of families with numbers, if distributions were given."""

    unit: Unit
    decode: Decode
    images: int
    families: Mapping[str, FamilyScore]
    readings: Mapping[str, Readings]
    calibration: Mapping[str, Calibration]
    asked: Sequence[AnsweredQuestion]

    def save(self, path: Path, about: Mapping[str, object]) -> None:
        """Writes the scores (not the single answers) as JSON, whole or not at all; `about` comes first."""
        content = {
            **about,
            "unit": self.unit,
            "decode": self.decode,
            "images": self.images,
            "families": {family: asdict(s) for family, s in self.families.items()},
            "readings": {f: {**asdict(r), "best": r.best} for f, r in self.readings.items()},
            "calibration": {f: {**asdict(c), "miss": c.miss} for f, c in self.calibration.items()},
        }
        plain = json.loads(json.dumps(content), parse_constant=lambda _: None)  # no interval: null
        write_text(path, json.dumps(plain, indent=1))

    def tables(self) -> list[Table]:
        """The scores for a terminal."""
        title = f"SPEAR-VLM in 3D (questions: {len(self.asked)}, images: {self.images})"
        found = [(title, self.rows()), ("More about them", self.detail_rows())]
        if self.readings:
            found.append(("Numbers read off their probabilities", self.reading_rows()))
            found.append(("Calibration", self.certainty_rows()))
        return [build_terminal_table(title, *rows) for title, rows in found]

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Headers and cells of the main table, as text."""
        headers = [
            "question",
            "n",
            "median error [95 %]",
            "of the distance",
            "constant guess",
            "depth only",
        ]
        rows = []
        for family, s in self.families.items():
            main = "error" if self.unit == "metre" else "relative"
            main = "pixels" if family == "back_projection" else main
            errors = [_said(name, s.measures.get(name)) for name in (main, "relative")]
            guesses = [_said(main, guess.get(main)) for guess in (s.constant, s.depth_only)]
            grammar = [f"{s.grammar.value:.1%}", f"{s.free.value:.1%}"]
            rows.append([family.replace("_", " "), str(s.n), *errors, *guesses, *grammar])
        return [*headers, "grammar", "free"], rows

    def detail_rows(self) -> tuple[list[str], list[list[str]]]:
        """What only some families have: vertices, overlap, which is closer."""
        rows = []
        for family, s in self.families.items():
            for name, estimate in s.measures.items():
                if name not in ("relative", "error", "pixels"):
                    cells = [
                        _said(name, e)
                        for e in (estimate, s.constant.get(name), s.depth_only.get(name))
                    ]
                    rows.append([family.replace("_", " "), MEASURES[name].title, *cells])
        return ["question", "what", "value [95 %]", "constant guess", "depth only"], rows

    def reading_rows(self) -> tuple[list[str], list[list[str]]]:
        """Median relative errors of each way of reading numbers."""
        headers = ["question", *DECODE_METHODS, "best", "mean error saved by mean", "by median"]
        rows = []
        for family, r in self.readings.items():
            errors = [f"{r.error[d]:.2f} %" for d in DECODE_METHODS]
            saved = [gain.to_text("+.1f", 100, " %") for gain in r.gain.values()]
            rows.append([family.replace("_", " "), *errors, r.best, *saved])
        return headers, rows

    def certainty_rows(self) -> tuple[list[str], list[list[str]]]:
        """How often the truth lies in the central intervals, and what the spread tells of the error."""
        rows, inside = (
            [],
            [*dict.fromkeys(name for c in self.calibration.values() for name in c.coverage)],
        )
        for family, c in self.calibration.items():
            covered = [c.coverage[n].to_text(".0%") if n in c.coverage else "–" for n in inside]
            halves = [f"{c.surer:.1f} %", f"{c.less_sure:.1f} %"]
            rows.append(
                [
                    family.replace("_", " "),
                    str(c.n),
                    *covered,
                    f"{100 * c.miss:.0f} points",
                    *halves,
                ]
            )
        return ["question", "numbers", *inside, "off by", "surer half", "other half"], rows


def summarize(
    asked: Sequence[AnsweredQuestion],
    free: Mapping[str, Sequence[bool]],
    labels: Sequence[LabeledImage],
    decode: Decode,
    trust: Trust | None = None,
) -> Scores:
    """Scores per question family. free: of each, whether its unconstrained answers were grammatical."""
    factors = trust.factors if trust else {}
    scores, readings, calibration = {}, {}, {}
    for family, freely in free.items():
        rows = [a for a in asked if a.question.family == family]
        scores[family] = _score(rows, freely)
        if sure := [
            (a.image, a.certainty, a.measures["relative"]) for a in rows if a.certainty is not None
        ]:
            readings[family] = _readings([a for a in rows if a.certainty is not None])
            calibration[family] = calibrate(sure, factors.get(family))
    return Scores(labels[0].unit, decode, len(labels), scores, readings, calibration, asked)


def _said(name: str, value: Estimate | float | None) -> str:
    return "–" if value is None else MEASURES[name].to_text(value)


def _score(rows: Sequence[AnsweredQuestion], free: Sequence[bool]) -> FamilyScore:
    failed = {n: np.inf if m.statistic == "median" else 0.0 for n, m in MEASURES.items()}
    kinds = {n: bool if m.statistic == "rate" else float for n, m in MEASURES.items()}
    had = [n for n in MEASURES if any(n in a.measures for a in rows)]
    found = {n: np.array([a.measures.get(n, failed[n]) for a in rows], kinds[n]) for n in had}
    questions, images = [a.question for a in rows], [a.image for a in rows]
    grammar = [is_grammatical(a.question, a.answer) for a in rows]
    return FamilyScore(
        n=len(rows),
        images=len({*images}),
        grammar=bootstrap(group_by_image(images, grammar), np.mean),
        free=bootstrap(group_by_image(images, free), np.mean),
        measures={
            n: bootstrap(group_by_image(images, v), MEASURES[n].average) for n, v in found.items()
        },
        constant=_guess(rows, guess_constants(questions)),
        depth_only=_guess(rows, guess_from_depth(questions, [a.label for a in rows])),
    )


def _guess(
    rows: Sequence[AnsweredQuestion], answers: Sequence[Segments] | None
) -> dict[str, float]:
    if answers is None:
        return {}
    measured = [
        measure_answer(a.question, guess, a.label) for a, guess in zip(rows, answers, strict=True)
    ]
    names = [name for name in MEASURES if name in measured[0] and name != "consistent"]
    return {n: float(MEASURES[n].average([m[n] for m in measured])) for n in names}


def _readings(rows: Sequence[AnsweredQuestion]) -> Readings:
    found = {
        d: [measure_answer(a.question, a.readings[d], a.label) for a in rows]
        for d in DECODE_METHODS
    }
    errors = {d: np.array([each["relative"] for each in some]) for d, some in found.items()}
    both = {d: np.stack([errors["mode"], e], axis=1) for d, e in errors.items()}
    gain: dict[Decode, Estimate] = {}
    for d in DECODE_METHODS[1:]:
        pairs = group_by_image([a.image for a in rows], both[d])
        gain[d] = bootstrap(pairs, lambda flat: 1 - flat[1::2].sum() / max(flat[::2].sum(), 1e-12))
    return Readings({d: float(np.median(e)) for d, e in errors.items()}, gain)
