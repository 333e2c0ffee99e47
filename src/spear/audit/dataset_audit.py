"""Does a dataset mean what its layout says? Every plausible reading of its logged actions against its states.

For each question (frame, unit, signs, …) `audit` says which answer fits best, by how much, and whether the
layout says the same. An answer is only called wrong, or right, when the 95 % interval (bootstrap over
episodes) of how much worse it does than the best, or the others do, is above `MARGIN`; else it is open.
"""

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch

from spear.audit.hypotheses import (
    UNSCALED,
    Fit,
    Reading,
    Recording,
    Stretches,
    rotation_fits,
    state_forms,
    tells_order,
    translation_fits,
    turning_otherwise,
)
from spear.checks.senses import (
    Check,
    Verdict,
    View,
    check_cameras,
    check_gripper,
    check_rate,
    doubts,
    look,
)
from spear.data.actions import check_instruction, check_unit_norm
from spear.data.readers.build_episode import (
    read_instruction,
    read_openings,
    read_pose,
    read_success,
)
from spear.data.readers.columns import RawEpisodes, Steps, read_column, read_numbers
from spear.data.readers.dataset_layout import (
    ANGLE_FORMATS,
    RECORDED_ONLY,
    DatasetLayout,
    RotationFormat,
)
from spear.data.readers.formats import (
    check_enough_good,
    convert_episodes,
    count_episodes,
    open_dataset,
    open_store_split,
)
from spear.data.readers.rotation_formats import ROTATION_FORMATS, to_quaternion
from spear.data.store.episode_store import EpisodeStore
from spear.errors import SpearError
from spear.geometry import quat_multiply
from spear.types import Array
from spear.util.skipped_items import SkippedItems

BELIEVED = (*RECORDED_ONLY, "euler_ZYX")
"""Formats of recorded orientations that are not judged, but made quaternions first (`state_forms`)."""
UNLIKE = ("franka_joints", "matrix4_columns", "matrix4_rows")
"""Formats that no other numbers could be."""
WIDTHS = {width for width, _ in ROTATION_FORMATS.values()}
"""How many numbers an orientation may have."""
_OWN: dict[str, Any] = {n: n for n in ("position", "rotation", "gripper", "action", "action_mask")}
STORE = DatasetLayout("store", rotation_format="quat_wxyz", gripper_range=(0.0, 1.0), **_OWN)
EPISODES, STEPS, VIEWED, MOST_SKIPPED = 50, 3000, 12, 0.5
"""How much of a dataset to read, of how many episodes the images, and the share that may be bad."""
MARGIN, UNEXPLAINED = 0.01, 1 / 3
"""Part of the motion by which a reading must be worse to be called worse; and relative error above which even
the best reading explains nothing."""
LEAST = {"translation": 2e-3, "rotation": np.radians(0.5)}
"""Mean motion over a stretch (m, rad) below which nothing can be told."""
RESAMPLES = 1000
_OPEN = {"wrong", "cannot tell"}


class Margin(NamedTuple):
    """How much worse than the best, as part of the motion: the value and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Finding:
    """The answer to one question about the logged translations or rotations.

    best      the answer of the best reading; said is the layout's, None where it says nothing.
    answers   answer -> its best reading's fit and how much worse than the best of all it is.
    tied      the answers that fit as well as the best one.
    """

    question: str
    best: str
    said: str | None
    answers: Mapping[str, tuple[Fit, Margin]]
    tied: Sequence[str]
    verdict: Verdict


@dataclass(frozen=True)
class Part:
    """What was found of the logged translations, or rotations.

    best, said  the best fit, and that of the layout's own reading (None where it does not say enough).
    margin      how much worse the layout's reading is.
    """

    name: str
    best: Fit
    said: Fit | None
    margin: Margin | None
    findings: Sequence[Finding]
    verdict: Verdict
    note: str


@dataclass(frozen=True)
class Report:
    """All that the audit found.

    states   what is wrong with the recorded states by themselves.
    checks   of gripper and cameras.
    forms    formats of the recorded orientations by which, unlike the layout's, everything else agrees.
    skipped  why some episodes were.
    """

    path: str
    episodes: int
    steps: int
    parts: Sequence[Part]
    states: Sequence[str]
    recordings: Sequence[Recording]
    checks: Sequence[Check] = ()
    forms: Sequence[str] = ()
    skipped: Sequence[str] = ()

    @property
    def outcome(self) -> Literal["consistent", "contradiction", "undecided"]:
        """Whether the data contradict the layout, agree with it, or say too little."""
        verdicts = {part.verdict for part in self.parts} | {check.verdict for check in self.checks}
        if self.states or self.forms or "wrong" in verdicts:
            return "contradiction"
        return "undecided" if verdicts - {"agrees"} else "consistent"


def audit(path: str | Path, split: str | None = None, layout: Path | None = None) -> Report:
    """Audit some episodes of a folder in any format that keeps its logged actions.

    split is the first one where None; layout is the dataset's own where None. Bad episodes are skipped.
    Raises SpearError for a layout without logged actions, and where no episode is good and of five steps.
    """
    split = split or next(iter(count_episodes(path)))
    spec = logged_layout(path, layout)
    report = _judge(path, split, spec)
    findings = [
        f for p in report.parts if p.name == "rotation" and p.verdict in _OPEN for f in p.findings
    ]
    forms: list[str] = []
    if findings and all(f.question != "state" or f.verdict != "wrong" for f in findings):
        # If the states are written otherwise, frames and signs of the actions look wrong as well.
        width = ROTATION_FORMATS.get(str(spec.rotation_format), (0, None))[0]
        same_width = [f for f in ROTATION_FORMATS if ROTATION_FORMATS[f][0] == width]
        for form in (f for f in same_width if f != spec.rotation_format):
            with contextlib.suppress(SpearError):
                other = _judge(
                    path, split, replace(spec, rotation_format=cast(RotationFormat, form))
                )
                if not other.states and not {part.verdict for part in other.parts} & _OPEN:
                    forms.append(form)
    cameras = check_cameras(look_at_cameras(path, split, spec))
    return replace(
        report, forms=forms, checks=[*report.checks, *cameras, *check_words(path, split, spec)]
    )


def _judge(path: str | Path, split: str, spec: DatasetLayout) -> Report:
    """The audit of the numbers."""
    skipped, recordings = SkippedItems(MOST_SKIPPED), list[Recording]()
    for recording in convert_episodes(
        episode_steps(path, split, ()), partial(make_recording, spec=spec), skipped
    ):
        recordings.append(recording)
        if len(recordings) == EPISODES or sum(len(r.position) for r in recordings) > STEPS:
            break
    check_enough_good(len(recordings), skipped, path, split)
    judged = (
        replace(spec, rotation_format="quat_wxyz") if spec.rotation_format in BELIEVED else spec
    )
    report = judge(recordings, claims(judged), str(path))
    checks = [*report.checks, *check_gripper(recordings)] + (
        [] if report.states else check_rate(recordings)
    )
    if spec.rotation_format not in UNLIKE:
        checks += _check_form(report, str(spec.rotation_format))
    return replace(report, skipped=skipped.reasons, checks=checks)


def _check_form(report: Report, said: str) -> list[Check]:
    """Whether the actions tell how orientations are written: targets that are the next states never do."""
    known = {part.name: part for part in report.parts if not part.note}
    tied = [f.tied for part in known.values() for f in part.findings if f.question == "state"]
    rotations = [r.rotation for r in report.recordings]
    forms = set(state_forms(rotations[0])).intersection(*tied)
    best = {name: part.best.reading for name, part in known.items()}
    fits = best.get("translation"), best.get("rotation")
    if said in BELIEVED:
        found = [] if tells_order(*fits) else ["euler_xyz"]
    else:
        found = turning_otherwise(rotations, said, forms, *fits)
    others = " or ".join(found)
    words = f"by {others} the gripper would turn otherwise, and the actions fit as well"
    return [Check("rotation_format", "cannot tell", words)] if others else []


def look_at_cameras(
    path: str | Path, split: str, spec: DatasetLayout
) -> dict[str, list[View | None]]:
    """Camera -> what the first episodes show; None where it is absent. Too many broken ones: SpearError."""
    views: dict[str, list[View | None]] = {camera: [] for camera in spec.images}
    skipped = SkippedItems(MOST_SKIPPED)
    for source, steps in itertools.islice(
        episode_steps(path, split, list(spec.images.values())), VIEWED
    ):
        try:
            if isinstance(steps, SpearError):
                raise steps
            position, _, _ = read_pose(steps, spec, source)
            for camera, where in spec.images.items():
                seen = None
                with contextlib.suppress(SpearError):
                    if isinstance(images := read_column(steps, where, source), list):
                        seen = look(
                            images, position, rate_of(steps, spec), f"{source} camera {camera!r}"
                        )
                views[camera].append(seen)
        except SpearError as error:
            skipped(error)
    skipped.check(max(map(len, views.values()), default=0), finished=True)
    return {camera: found for camera, found in views.items() if found}


def check_words(path: str | Path, split: str, spec: DatasetLayout) -> list[Check]:
    """What is wrong where instruction or success can be read of none of the first episodes."""
    folder, reasons = open_dataset(path), dict[str, list[str]]()
    if isinstance(folder, EpisodeStore):  # which refuses them when it is written
        return []
    read = itertools.islice(folder.read_steps(split, ()), VIEWED)
    first = [(steps, source) for source, steps in read if not isinstance(steps, SpearError)]
    readers = {"instruction": read_instruction, "success": read_success}
    for (steps, source), (name, read_field) in itertools.product(first, readers.items()):
        try:
            if isinstance(said := read_field(steps, spec, source), str):
                check_instruction(said, source)
        except SpearError as error:
            reasons.setdefault(name, []).append(str(error))
    return [
        Check(name, "wrong", each[0]) for name, each in reasons.items() if len(each) == len(first)
    ]


def episode_steps(path: str | Path, split: str, images: Sequence[str] | None) -> RawEpisodes:
    """The steps of a dataset's episodes, with the columns of images that are asked for; None for all."""
    folder = open_dataset(path)
    if not isinstance(folder, EpisodeStore):
        return folder.read_steps(split, images)
    store = open_store_split(path, split)
    read = store.__getitem__ if images or images is None else store.without_images
    return ((e.source, vars(e)) for e in map(read, range(len(store))))


def logged_layout(path: str | Path, layout: Path | None) -> DatasetLayout:
    """The layout of a dataset, which must name logged actions."""
    folder = open_dataset(path)
    if isinstance(folder, EpisodeStore):
        images = {camera: f"images/{camera}" for camera in folder.cameras}
        return replace(STORE, rate_hz=float(folder.rates_hz[0]), images=images)
    spec = folder.load_layout(layout)
    if spec.action is None and spec.logged_translation is None and spec.logged_rotation is None:
        add = 'logged_translation and logged_rotation, for example "logged_translation": "action[0:3]"'
        raise SpearError(
            f"nothing to audit: {spec.name}: its layout names no logged actions; add {add}"
        )
    return spec


def make_recording(steps: Steps, spec: DatasetLayout, source: str) -> Recording:
    """One episode's states and logged actions. Raises SpearError where shapes do not fit, or one is NaN."""
    names: tuple[str | None, str | None] = spec.logged_translation, spec.logged_rotation
    if spec.action is not None:
        names = f"{spec.action}[0:3]", f"{spec.action}[3:7]"
    logged = [None if n is None else read_numbers(steps, n, source) for n in names]
    position, rotation, form = read_pose(steps, spec, source)
    said = spec if spec.action is None else replace(spec, command=f"{spec.action}[7]")
    opening, command = read_openings(steps, said, source)
    valid = np.ones(len(position), bool)
    if spec.action_mask is not None:
        valid = read_numbers(steps, spec.action_mask, source).reshape(-1) != 0
    said_of, written = (
        ("position", "rotation", "logged translation", "logged rotation"),
        sorted(WIDTHS),
    )
    for what, values, widths in zip(
        said_of, (position, rotation, *logged), ([3], written) * 2, strict=True
    ):
        if values is not None and values.shape not in [(len(valid), width) for width in widths]:
            need = f"{len(valid)} x {' or '.join(map(str, widths))}"
            raise SpearError(f"wrong shape: {source}: {what} is {values.shape}, not {need}")
    quaternions = to_quaternion(rotation, form, source)
    if spec.rotation_format == "franka_joints":  # what is logged is the hand's own frame, O_T_EE
        half_turn = torch.tensor([0, 1, 0, 0], dtype=torch.float64)  # about x, from ours
        rotation = quat_multiply(torch.as_tensor(quaternions), half_turn).numpy()
    elif form in BELIEVED:
        rotation = quaternions
    elif form.startswith("quat"):
        check_unit_norm(rotation, source, "rotation")
    rate = rate_of(steps, spec)
    return Recording(
        source, position, rotation, logged[0], logged[1], valid, rate, opening, command
    )


def rate_of(steps: Steps, spec: DatasetLayout) -> float:
    """Steps per second of an episode: those of a store each have their own."""
    rate = steps.get("rate_hz")
    assert spec.rate_hz is not None
    return rate if isinstance(rate, float) else spec.rate_hz


def judge(
    recordings: Sequence[Recording], said: Mapping[str, Mapping[str, str | None]], path: str = ""
) -> Report:
    """Fit every reading to some recordings; said is what the layout says (see `claims`)."""
    stretches = Stretches(recordings)
    if not stretches.count:
        raise SpearError(f"nothing to audit: {path}: no episode has five known steps in a row")
    parts = []
    if recordings[0].translation is not None:
        parts.append(
            _part("translation", translation_fits(recordings, stretches), said["translation"])
        )
    if recordings[0].turn is not None:
        parts.append(_part("rotation", rotation_fits(recordings, stretches), said["rotation"]))
    steps, checks = sum(len(r.position) for r in recordings), []
    for part in parts if stretches.of_episodes else ():
        if (fit := part.said) is not None and not part.note and part.verdict != "wrong":
            left = fit.error / fit.moved.clip(1e-12)
            usual = np.clip(
                10 * np.median(left), 0.5, 1
            )  # our choice; of the real BridgeData all leave less
            if odd := int(((left > usual) & (fit.moved > fit.moved.mean() / 4)).sum()):
                words = f"in {odd} of {len(recordings)} episodes it explains little: recorded otherwise?"
                checks.append(Check(f"the {part.name}s' reading", "cannot tell", words))
    return Report(path, len(recordings), steps, parts, doubts(recordings), recordings, checks)


def claims(spec: DatasetLayout) -> dict[str, dict[str, str | None]]:
    """What a layout says of its logged actions: part -> question -> answer, None where it does not say."""
    kind, frame = (spec.logged_kind, spec.logged_frame) if spec.action is None else ("delta", None)
    form = spec.logged_rotation_format if spec.action is None else "quat_wxyz"
    own = {"translation": "base", "rotation": "ee"} if spec.action is not None else {}
    # No layout says signs: the plain ones are meant. How late an arm follows is its own, but for our actions.
    shift = None if spec.action is None else "0"
    shared = {"kind": kind, "signs": "+++", "shift": shift, "state": spec.rotation_format}
    rate = "/s" if kind == "velocity" else ""
    unit = spec.angle_unit + rate if form in ANGLE_FORMATS else UNSCALED
    frames = [own.get(part, frame) for part in ("translation", "rotation")]
    return {
        "translation": {**shared, "frame": frames[0], "unit": spec.length_unit + rate, "form": "-"},
        "rotation": {**shared, "frame": frames[1], "unit": unit, "form": form},
    }


def _part(name: str, fits: Sequence[Fit], said: Mapping[str, str | None]) -> Part:
    def same(fit: Fit, question: str) -> bool:
        return _answer(fit, question) in (said[question], "-")

    order = sorted(fits, key=lambda f: (round(f.relative, 4), -sum(same(f, q) for q in said)))
    best = order[0]
    units = len(best.error)  # of resampling; counts [RESAMPLES, units] is the same in every run
    counts = (
        np.random.default_rng(0)
        .multinomial(units, np.full(units, 1 / units), RESAMPLES)
        .astype(float)
    )
    moved = float(best.moved.sum() / best.steps)
    note = ""
    if moved < LEAST[name]:
        note = f"the robot hardly moves: {size(name, moved)} in a stretch"
    elif best.relative > UNEXPLAINED:
        note = f"no reading explains the states: the best leaves {best.relative:.0%} of the motion"
    findings = [_finding(q, order, said[q], counts, bool(note)) for q in Reading._fields]
    findings = [f for f in findings if f.best != "-" and len(f.answers) > 1]
    asked = [q for q in said if said[q] is not None and (q != "unit" or said["kind"])]
    own = next((fit for fit in order if all(same(fit, q) for q in asked)), None)
    margin = None if own is None else _margin(own, best, counts)
    verdict: Verdict = "agrees"
    if note:
        verdict = "cannot tell"
    elif margin is None or margin.low > MARGIN:
        verdict = "wrong"
    elif any(said[q] is None for q in ("kind", "frame", "form")):
        verdict = "not said"
    return Part(name, best, own, margin, findings, verdict, note)


def _answer(fit: Fit, question: str) -> str:
    return str(getattr(fit.reading, question))


def _finding(
    question: str, order: Sequence[Fit], said: str | None, counts: Array, blind: bool
) -> Finding:
    """order are all fits, the best one first."""
    answers: dict[str, tuple[Fit, Margin]] = {}
    for fit in order:
        answer = _answer(fit, question)
        if answer not in answers and (answer != "-" or fit is order[0]):
            answers[answer] = fit, _margin(fit, order[0], counts)
    tied = [answer for answer, (_, margin) in answers.items() if margin.low <= MARGIN]
    best = _answer(order[0], question)
    verdict: Verdict = "agrees"
    if blind:
        verdict = "cannot tell"
    elif said is None:
        verdict = "not said"
    elif said not in tied:
        verdict = "wrong"
    elif len(tied) > 1:
        verdict = "cannot tell"
    return Finding(question, best, said, answers, tied, verdict)


def size(name: str, value: float) -> str:
    """A distance (m) or an angle (rad) in words."""
    return f"{1000 * value:.3g} mm" if name == "translation" else f"{np.degrees(value):.3g}°"


def _margin(fit: Fit, best: Fit, counts: Array) -> Margin:
    """Paired: the same episodes are drawn for both."""
    draws = [(counts @ f.error) / np.maximum(counts @ f.moved, 1e-12) for f in (fit, best)]
    low, high = np.quantile(draws[0] - draws[1], [0.025, 0.975])
    if len(fit.error) < 3:  # too few to say how much they differ
        low = min(float(low), 0.0)
    return Margin(fit.relative - best.relative, float(low), float(high))
