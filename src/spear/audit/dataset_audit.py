"""Does a dataset mean what its layout says? Every hypothesis about its logged actions against its
states.

For each question (frame, unit, signs, …) the audit finds the answer that fits best and compares it
with the layout's. An answer is called wrong only if the 95 % interval (bootstrap over episodes) of
how much worse it fits than the best lies above `MIN_MARGIN`, and right only if that of all others
does; else it stays open.
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
    UNIT_QUATERNION,
    Fit,
    Hypothesis,
    Stretches,
    can_tell_euler_order,
    fit_rotations,
    fit_translations,
    formats_that_turn_otherwise,
    state_formats,
)
from spear.checks.cameras import View, check_cameras, summarize_view
from spear.checks.gripper import check_gripper
from spear.checks.recording import Recording
from spear.checks.result import Check, Verdict
from spear.checks.states import check_rate, find_implausible_states
from spear.data.actions import check_instruction, validate_unit_norm
from spear.data.readers.bad_rows import mask_gaps
from spear.data.readers.build_episode import (
    drop_bad_rows,
    read_instruction,
    read_openings,
    read_pose,
    read_success,
)
from spear.data.readers.columns import RawEpisodes, Steps, read_encoded_images, read_numbers
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
    read_layout_steps,
)
from spear.data.readers.rotation_formats import ROTATION_FORMATS, to_quaternion
from spear.data.store.episode_store import EpisodeStore
from spear.errors import SpearError
from spear.geometry import quat_multiply
from spear.types import Array
from spear.util.skipped_items import SkippedItems
from spear.util.units import ANGLE_UNITS, LENGTH_UNITS, name_unit

TRUSTED_FORMATS = (*RECORDED_ONLY, "euler_ZYX")
"""Formats of recorded orientations that are not tested, but made quaternions first (see
`state_formats`)."""
UNMISTAKABLE_FORMATS = ("franka_joints", "matrix4_columns", "matrix4_rows")
"""Formats that no other numbers could be."""
ROTATION_WIDTHS = sorted({width for width, _ in ROTATION_FORMATS.values()})
"""How many numbers an orientation may have."""

_STORE_COLUMNS: dict[str, Any] = {
    name: name for name in ("position", "rotation", "gripper", "action", "action_mask")
}
STORE_LAYOUT = DatasetLayout(
    "store", rotation_format="quat_wxyz", gripper_range=(0.0, 1.0), **_STORE_COLUMNS
)
"""The layout of episode stores, without cameras and rate."""

MAX_EPISODES = 50  # that are read
MAX_STEPS = 3000  # that are read
MAX_VIEWED_EPISODES = 12  # whose images are decoded
MAX_BAD_SHARE = 0.5  # of the episodes that may be bad
MIN_MARGIN = 0.01  # fraction of the motion by which a hypothesis must be worse to be called worse
MAX_UNEXPLAINED = 1 / 3  # relative error above which even the best hypothesis explains nothing
MIN_MOTION = {"translation": 2e-3, "rotation": np.radians(0.5)}
"""Mean motion over a stretch (m, rad) below which nothing can be told."""
MAX_UNEXPLAINED_OF_EPISODE = (0.5, 1.0)
"""An episode is odd if its error exceeds a limit between these two fractions of its motion."""
NUM_RESAMPLES = 1000

_NOT_CONFIRMED = {"wrong", "cannot tell"}

LayoutAnswers = Mapping[str, Mapping[str, str | None]]
"""Part name ("translation", "rotation") → question → the layout's answer; None without one."""


class LoggedUnits(NamedTuple):
    """Units that logged actions may have: name → factor to meters, or to radians."""

    translation: Mapping[str, float]
    rotation: Mapping[str, float]


KNOWN_UNITS = LoggedUnits(LENGTH_UNITS, ANGLE_UNITS)


class Margin(NamedTuple):
    """Excess error over the best hypothesis, as a fraction of the motion, and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Finding:
    """The answer to one question about the logged translations or rotations.

    question       a field of `Hypothesis`.
    best_answer    the answer of the best hypothesis.
    layout_answer  the layout's answer, None where it says nothing.
    answers        maps each answer to two values: the fit of the best hypothesis that gives this
                   answer, and by how much the error of that fit exceeds the error of the best
                   hypothesis of all.
    tied_answers   the answers that fit as well as the best one.
    """

    question: str
    best_answer: str
    layout_answer: str | None
    answers: Mapping[str, tuple[Fit, Margin]]
    tied_answers: Sequence[str]
    verdict: Verdict


@dataclass(frozen=True)
class ActionPart:
    """The findings about the logged translations, or rotations.

    best_fit    the best hypothesis' fit.
    layout_fit  the fit of the best hypothesis that agrees with all answers of the layout; None
                where no hypothesis does.
    margin      how much worse `layout_fit` is than `best_fit`; None without a `layout_fit`.
    note        why nothing can be told, or "".
    """

    name: str
    best_fit: Fit
    layout_fit: Fit | None
    margin: Margin | None
    findings: Sequence[Finding]
    verdict: Verdict
    note: str


@dataclass(frozen=True)
class Report:
    """All that the audit found.

    states           what is wrong with the recorded states by themselves.
    checks           of rate, gripper, cameras, instructions and success.
    fitting_formats  formats of the recorded orientations by which, unlike the layout's, all else
                     agrees.
    skipped          why episodes were skipped.
    """

    path: str
    num_episodes: int
    num_steps: int
    action_parts: Sequence[ActionPart]
    states: Sequence[str]
    recordings: Sequence[Recording]
    checks: Sequence[Check] = ()
    fitting_formats: Sequence[str] = ()
    skipped: Sequence[str] = ()

    @property
    def outcome(self) -> Literal["consistent", "contradiction", "undecided"]:
        """Whether the data contradict the layout, agree with it, or say too little."""
        verdicts = {action_part.verdict for action_part in self.action_parts} | {
            check.verdict for check in self.checks
        }
        if self.states or self.fitting_formats or "wrong" in verdicts:
            return "contradiction"
        return "undecided" if verdicts - {"agrees"} else "consistent"


def audit(path: str | Path, split: str | None = None, layout_file: Path | None = None) -> Report:
    """Audit some episodes of a dataset in any format that keeps its logged actions.

    Args:
        path: the dataset's folder.
        split: which episodes; the first split if None.
        layout_file: a file like spear.json; the dataset's own layout if None.

    Returns:
        What was found. Episodes that cannot be read are skipped.

    Raises:
        SpearError: the layout names no logged actions, or no episode is good and has five steps.
    """
    split = split or next(iter(count_episodes(path)))
    layout = find_logged_layout(path, layout_file)
    report = _audit_numbers(path, split, layout)
    cameras = check_cameras(summarize_cameras(path, split, layout))
    texts = check_texts(path, split, layout)
    return replace(
        report,
        fitting_formats=_find_fitting_formats(path, split, layout, report),
        checks=[*report.checks, *cameras, *texts],
    )


def _audit_numbers(path: str | Path, split: str, layout: DatasetLayout) -> Report:
    """Audit everything but images and texts."""
    recordings, skipped = _read_recordings(path, split, layout)
    trusted_layout = layout
    if layout.rotation_format in TRUSTED_FORMATS:
        trusted_layout = replace(layout, rotation_format="quat_wxyz")
    report = judge(recordings, layout_answers(trusted_layout), str(path), logged_units(layout))

    checks = [*report.checks, *check_gripper(recordings)]
    if not report.states:
        checks += check_rate(recordings)
    if layout.rotation_format not in UNMISTAKABLE_FORMATS:
        checks += _check_rotation_format(report, str(layout.rotation_format))
    return replace(report, skipped=skipped.reasons, checks=checks)


def _read_recordings(
    path: str | Path, split: str, layout: DatasetLayout
) -> tuple[list[Recording], SkippedItems]:
    """The first episodes, up to `MAX_EPISODES` and about `MAX_STEPS`, and what was skipped."""
    skipped = SkippedItems(MAX_BAD_SHARE)
    recordings: list[Recording] = []
    num_steps = 0
    sources = episode_steps(path, split, ())
    for recording in convert_episodes(sources, partial(make_recording, layout=layout), skipped):
        recordings.append(recording)
        num_steps += len(recording.position)
        if len(recordings) == MAX_EPISODES or num_steps > MAX_STEPS:
            break
    check_enough_good(len(recordings), skipped, path, split)
    return recordings, skipped


def _find_fitting_formats(
    path: str | Path, split: str, layout: DatasetLayout, report: Report
) -> list[str]:
    """Rotation formats of the states by which all that looks wrong would be right.

    If the states are written otherwise than the layout says, frames and signs of the actions look
    wrong, too.
    """
    findings: list[Finding] = []
    for action_part in report.action_parts:
        if action_part.name == "rotation" and action_part.verdict in _NOT_CONFIRMED:
            findings += action_part.findings
    is_state_format_wrong = any(
        finding.question == "state_format" and finding.verdict == "wrong" for finding in findings
    )
    if not findings or is_state_format_wrong:
        return []

    width, _ = ROTATION_FORMATS.get(str(layout.rotation_format), (0, None))
    fitting_formats = []
    for name in ROTATION_FORMATS:
        if name == layout.rotation_format or ROTATION_FORMATS[name][0] != width:
            continue
        other_layout = replace(layout, rotation_format=cast(RotationFormat, name))
        with contextlib.suppress(SpearError):
            other_report = _audit_numbers(path, split, other_layout)
            other_verdicts = {action_part.verdict for action_part in other_report.action_parts}
            if not other_report.states and not other_verdicts & _NOT_CONFIRMED:
                fitting_formats.append(name)
    return fitting_formats


def _check_rotation_format(report: Report, layout_format: str) -> list[Check]:
    """Whether the actions tell how orientations are written. Targets that are the next states never
    do."""
    explained = {
        action_part.name: action_part for action_part in report.action_parts if not action_part.note
    }
    best = {name: action_part.best_fit.hypothesis for name, action_part in explained.items()}
    translation = best.get("translation")
    rotation = best.get("rotation")

    if layout_format in TRUSTED_FORMATS:
        is_order_known = can_tell_euler_order(translation, rotation)
        other_formats = [] if is_order_known else ["euler_xyz"]
    else:
        rotations = [recording.rotation for recording in report.recordings]
        tied_formats = set(state_formats(rotations[0]))
        for action_part in explained.values():
            for finding in action_part.findings:
                if finding.question == "state_format":
                    tied_formats &= set(finding.tied_answers)
        other_formats = formats_that_turn_otherwise(
            rotations, layout_format, tied_formats, translation, rotation
        )
    if not other_formats:
        return []
    words = (
        f"by {' or '.join(other_formats)} the gripper would turn otherwise, "
        "and the actions fit as well"
    )
    return [Check("rotation_format", "cannot tell", words)]


def summarize_cameras(
    path: str | Path, split: str, layout: DatasetLayout
) -> dict[str, list[View | None]]:
    """What each camera shows in the first episodes; None where it is absent.

    Raises:
        SpearError: too many episodes are broken.
    """
    views: dict[str, list[View | None]] = {camera: [] for camera in layout.images}
    skipped = SkippedItems(MAX_BAD_SHARE)
    sources = episode_steps(path, split, list(layout.images.values()))
    for source, steps in itertools.islice(sources, MAX_VIEWED_EPISODES):
        try:
            if isinstance(steps, SpearError):
                raise steps
            position, _, _ = read_pose(steps, layout, source)
        except SpearError as error:
            skipped(error)
            continue
        for camera in layout.images:
            views[camera].append(_summarize_camera(steps, layout, camera, position, source))
    num_viewed = max((len(episodes) for episodes in views.values()), default=0)
    skipped.check(num_viewed, finished=True)
    return {camera: episodes for camera, episodes in views.items() if episodes}


def _summarize_camera(
    steps: Steps, layout: DatasetLayout, camera: str, position: Array, source: str
) -> View | None:
    """What a camera shows in an episode; None where it is absent or cannot be decoded."""
    with contextlib.suppress(SpearError):
        images = read_encoded_images(steps, layout.images[camera], source)
        context = f"{source} camera {camera!r}"
        return summarize_view(images, position, episode_rate_hz(steps, layout), context)
    return None


def check_texts(path: str | Path, split: str, layout: DatasetLayout) -> list[Check]:
    """What is wrong where instruction or success can be read of none of the first episodes."""
    folder = open_dataset(path)
    if isinstance(folder, EpisodeStore):  # which refuses them when it is written
        return []
    first_episodes = []
    raw_episodes = read_layout_steps(folder, split, layout, images=())
    for source, steps in itertools.islice(raw_episodes, MAX_VIEWED_EPISODES):
        if not isinstance(steps, SpearError):
            first_episodes.append((steps, source))

    checks = []
    for name, read in (("instruction", read_instruction), ("success", read_success)):
        reasons = []
        for steps, source in first_episodes:
            try:
                value = read(steps, layout, source)
                if isinstance(value, str):
                    check_instruction(value, source)
            except SpearError as error:
                reasons.append(str(error))
        if reasons and len(reasons) == len(first_episodes):
            checks.append(Check(name, "wrong", reasons[0]))
    return checks


def episode_steps(path: str | Path, split: str, images: Sequence[str] | None) -> RawEpisodes:
    """The steps of a dataset's episodes, with the columns of `images`; None for all columns."""
    folder = open_dataset(path)
    if not isinstance(folder, EpisodeStore):
        return folder.read_steps(split, images)
    store = open_store_split(path, split)
    read = store.__getitem__ if images or images is None else store.without_images
    episodes = map(read, range(len(store)))
    return ((episode.source, vars(episode)) for episode in episodes)


def find_logged_layout(path: str | Path, layout_file: Path | None) -> DatasetLayout:
    """The layout of a dataset, which must name logged actions. Raises `SpearError` if it does
    not."""
    folder = open_dataset(path)
    if isinstance(folder, EpisodeStore):
        images = {camera: f"images/{camera}" for camera in folder.cameras}
        return replace(STORE_LAYOUT, rate_hz=float(folder.rates_hz[0]), images=images)
    layout = folder.load_layout(layout_file)
    action_columns = (layout.action, layout.logged_translation, layout.logged_rotation)
    if all(name is None for name in action_columns):
        raise SpearError(
            f"nothing to audit: {layout.name}: its layout names no logged actions; "
            "add logged_translation and logged_rotation, "
            'for example "logged_translation": "action[0:3]"'
        )
    return layout


def make_recording(steps: Steps, layout: DatasetLayout, source: str) -> Recording:
    """One episode's states and logged actions as numbers.

    Raises:
        SpearError: shapes do not fit, or a number is NaN.
    """
    translation_column = layout.logged_translation
    rotation_column = layout.logged_rotation
    layout_with_command = layout
    if layout.action is not None:
        translation_column = f"{layout.action}[0:3]"
        rotation_column = f"{layout.action}[3:7]"
        layout_with_command = replace(layout, command=f"{layout.action}[7]")

    steps, rows = drop_bad_rows(steps, layout, source)
    logged_translation = _read_optional(steps, translation_column, source)
    logged_rotation = _read_optional(steps, rotation_column, source)
    position, rotation, rotation_format = read_pose(steps, layout, source)
    opening, command = _read_moving_gripper(steps, layout_with_command, source)
    is_valid = np.ones(len(position), bool)
    if layout.action_mask is not None:
        is_valid = read_numbers(steps, layout.action_mask, source).reshape(-1) != 0
    leads_to_next_row = mask_gaps(rows)
    if leads_to_next_row is not None:
        is_valid = is_valid & leads_to_next_row

    num_steps = len(is_valid)
    _check_shape(position, "position", [3], num_steps, source)
    _check_shape(rotation, "rotation", ROTATION_WIDTHS, num_steps, source)
    _check_shape(logged_translation, "logged translation", [3], num_steps, source)
    _check_shape(logged_rotation, "logged rotation", ROTATION_WIDTHS, num_steps, source)

    return Recording(
        source=source,
        position=position,
        rotation=_rotation_to_judge(rotation, rotation_format, layout, source),
        translation=logged_translation,
        turn=logged_rotation,
        valid=is_valid,
        rate_hz=episode_rate_hz(steps, layout),
        opening=opening,
        command=command,
    )


def _read_moving_gripper(
    steps: Steps, layout: DatasetLayout, source: str
) -> tuple[Array | None, Array | None]:
    """Openings and commands [T]; None where the layout says that the gripper never moves."""
    if layout.gripper_opening is not None:
        return None, None
    return read_openings(steps, layout, source)


def _read_optional(steps: Steps, column_name: str | None, source: str) -> Array | None:
    return None if column_name is None else read_numbers(steps, column_name, source)


def _check_shape(
    values: Array | None, name: str, widths: Sequence[int], num_steps: int, source: str
) -> None:
    """Raises `SpearError` unless values are absent or [num_steps, one of widths]."""
    if values is None or values.shape in [(num_steps, width) for width in widths]:
        return
    expected = f"{num_steps} x {' or '.join(map(str, widths))}"
    raise SpearError(f"wrong shape: {source}: {name} is {values.shape}, not {expected}")


def _rotation_to_judge(
    rotation: Array, rotation_format: RotationFormat, layout: DatasetLayout, source: str
) -> Array:
    """Recorded orientations as hypotheses read them: trusted formats as quaternions, others as they
    are."""
    quaternions = to_quaternion(rotation, rotation_format, source)
    if (
        layout.rotation_format == "franka_joints"
    ):  # logged rotations are of the hand's frame, O_T_EE
        half_turn_about_x = torch.tensor([0, 1, 0, 0], dtype=torch.float64)
        return quat_multiply(torch.as_tensor(quaternions), half_turn_about_x).numpy()
    if rotation_format in TRUSTED_FORMATS:
        return quaternions
    if rotation_format.startswith("quat"):
        validate_unit_norm(rotation, source, "rotation")
    return rotation


def episode_rate_hz(steps: Steps, layout: DatasetLayout) -> float:
    """Steps per second of an episode. Those of a store each have their own."""
    rate_hz = steps.get("rate_hz")
    if isinstance(rate_hz, float):
        return rate_hz
    assert layout.rate_hz is not None
    return layout.rate_hz


def judge(
    recordings: Sequence[Recording],
    answers: LayoutAnswers,
    path: str = "",
    units: LoggedUnits = KNOWN_UNITS,
) -> Report:
    """Fit every hypothesis to some recordings, and compare the best with the layout's answers.

    Args:
        recordings: The episodes.
        answers: What the layout says of their actions.
        path: The dataset, for messages.
        units: The units to try.

    Raises:
        SpearError: no episode has five known steps in a row.
    """
    stretches = Stretches(recordings)
    if not stretches.num:
        raise SpearError(f"nothing to audit: {path}: no episode has five known steps in a row")

    action_parts = []
    if recordings[0].translation is not None:
        fits = fit_translations(recordings, stretches, units.translation)
        action_parts.append(_judge_part("translation", fits, answers["translation"]))
    if recordings[0].turn is not None:
        fits = fit_rotations(recordings, stretches, units.rotation)
        action_parts.append(_judge_part("rotation", fits, answers["rotation"]))

    checks = []
    if stretches.are_units_episodes:
        for action_part in action_parts:
            checks += _check_odd_episodes(action_part, len(recordings))
    return Report(
        path=path,
        num_episodes=len(recordings),
        num_steps=sum(len(recording.position) for recording in recordings),
        action_parts=action_parts,
        states=find_implausible_states(recordings),
        recordings=recordings,
        checks=checks,
    )


def _check_odd_episodes(action_part: ActionPart, num_episodes: int) -> list[Check]:
    """Whether the layout explains some episodes far less well than the others."""
    fit = action_part.layout_fit
    if fit is None or action_part.note or action_part.verdict == "wrong":
        return []
    unexplained = fit.error / fit.motion.clip(1e-12)
    limit = np.clip(10 * np.median(unexplained), *MAX_UNEXPLAINED_OF_EPISODE)
    has_motion = fit.motion > fit.motion.mean() / 4
    num_odd = int(((unexplained > limit) & has_motion).sum())
    if not num_odd:
        return []
    words = f"in {num_odd} of {num_episodes} episodes it explains little: recorded otherwise?"
    return [Check(f"the {action_part.name}s' reading", "cannot tell", words)]


def layout_answers(layout: DatasetLayout) -> dict[str, dict[str, str | None]]:
    """What a layout says of its logged actions, see `LayoutAnswers`.

    No layout says signs; the plain ones are meant. How late an arm follows is its own matter,
    except for canonical actions, which lead from each state to the next.
    """
    has_canonical_actions = layout.action is not None
    if has_canonical_actions:
        kind: str | None = "delta"
        translation_frame: str | None = "base"
        rotation_frame: str | None = "ee"
        action_format: str | None = "quat_wxyz"
        delay: str | None = "0"
    else:
        kind = layout.logged_kind
        translation_frame = layout.logged_frame
        rotation_frame = layout.logged_rotation_frame or layout.logged_frame
        action_format = layout.logged_rotation_format
        delay = None

    per_second = "/s" if kind == "velocity" else ""
    has_angles = action_format in ANGLE_FORMATS
    translation_unit: str = layout.length_unit
    rotation_unit: str = layout.angle_unit
    if layout.logged_translation_unit is not None:
        translation_unit = name_unit(layout.logged_translation_unit, LENGTH_UNITS)
    if layout.logged_rotation_unit is not None:
        rotation_unit = name_unit(layout.logged_rotation_unit, ANGLE_UNITS)
    shared = {
        "kind": kind,
        "signs": "+++",
        "delay_steps": delay,
        "state_format": layout.rotation_format,
    }
    return {
        "translation": {
            **shared,
            "frame": translation_frame,
            "unit": translation_unit + per_second,
            "action_format": "-",
        },
        "rotation": {
            **shared,
            "frame": rotation_frame,
            "unit": rotation_unit + per_second if has_angles else UNIT_QUATERNION,
            "action_format": action_format,
        },
    }


def logged_units(layout: DatasetLayout) -> LoggedUnits:
    """The known units, and those that the layout names for logged actions."""
    length_units = dict(LENGTH_UNITS)
    if layout.logged_translation_unit is not None:
        name = name_unit(layout.logged_translation_unit, LENGTH_UNITS)
        length_units[name] = layout.logged_translation_unit
    angle_units = dict(ANGLE_UNITS)
    if layout.logged_rotation_unit is not None:
        name = name_unit(layout.logged_rotation_unit, ANGLE_UNITS)
        angle_units[name] = layout.logged_rotation_unit
    return LoggedUnits(length_units, angle_units)


def _judge_part(name: str, fits: Sequence[Fit], answers: Mapping[str, str | None]) -> ActionPart:
    """Judge the logged translations or rotations."""

    def agrees(fit: Fit, question: str) -> bool:
        return _answer(fit, question) in (answers[question], "-")

    def rank(fit: Fit) -> tuple[float, int]:
        """Better fits first; of equals those that agree more with the layout."""
        num_agreements = sum(agrees(fit, question) for question in answers)
        return round(fit.relative_error, 4), -num_agreements

    ranked = sorted(fits, key=rank)
    best = ranked[0]
    resamples = _draw_resamples(len(best.error))
    note = _why_undecidable(name, best)

    # Question by question: which answers fit as well as the best?
    findings = []
    for question in Hypothesis._fields:
        finding = _judge_question(question, ranked, answers[question], resamples, bool(note))
        if finding.best_answer != "-" and len(finding.answers) > 1:
            findings.append(finding)

    # The layout as a whole: how much worse is the best hypothesis that agrees with all it says?
    questions = _answered_questions(answers)
    agreeing = (fit for fit in ranked if all(agrees(fit, question) for question in questions))
    layout_fit = next(agreeing, None)
    margin = None if layout_fit is None else _margin(layout_fit, best, resamples)
    verdict = _judge_layout(answers, margin, bool(note))
    return ActionPart(name, best, layout_fit, margin, findings, verdict, note)


def _answered_questions(answers: Mapping[str, str | None]) -> list[str]:
    """The questions that a layout answers. A unit says nothing without a kind."""
    questions = []
    for question, answer in answers.items():
        is_unit_without_kind = question == "unit" and not answers["kind"]
        if answer is not None and not is_unit_without_kind:
            questions.append(question)
    return questions


def _judge_layout(
    answers: Mapping[str, str | None], margin: Margin | None, is_undecidable: bool
) -> Verdict:
    """Whether the layout as a whole fits as well as the best hypothesis."""
    if is_undecidable:
        return "cannot tell"
    if margin is None or margin.low > MIN_MARGIN:
        return "wrong"
    if any(answers[question] is None for question in ("kind", "frame", "action_format")):
        return "not said"
    return "agrees"


def _draw_resamples(num_units: int) -> Array:
    """[NUM_RESAMPLES, num_units] how often each unit is drawn; the same in every run."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(num_units, np.full(num_units, 1 / num_units), NUM_RESAMPLES)
    return counts.astype(float)


def _why_undecidable(name: str, best: Fit) -> str:
    """Why nothing can be told of the logged translations or rotations, or ""."""
    mean_motion = float(best.motion.sum() / best.num_steps)
    if mean_motion < MIN_MOTION[name]:
        return f"the robot hardly moves: {format_size(name, mean_motion)} in a stretch"
    if best.relative_error > MAX_UNEXPLAINED:
        return (
            "no reading explains the states: "
            f"the best leaves {best.relative_error:.0%} of the motion"
        )
    return ""


def _answer(fit: Fit, question: str) -> str:
    return str(getattr(fit.hypothesis, question))


def _judge_question(
    question: str,
    ranked: Sequence[Fit],
    layout_answer: str | None,
    resamples: Array,
    is_undecidable: bool,
) -> Finding:
    """Compare the answers to one question; `ranked` are all fits, the best one first."""
    best = ranked[0]
    best_answer = _answer(best, question)
    answers: dict[str, tuple[Fit, Margin]] = {}
    for fit in ranked:
        answer = _answer(fit, question)
        if answer not in answers and (answer != "-" or fit is best):
            answers[answer] = (fit, _margin(fit, best, resamples))
    tied_answers = [a for a, (_, margin) in answers.items() if margin.low <= MIN_MARGIN]

    verdict: Verdict = "agrees"
    if is_undecidable:
        verdict = "cannot tell"
    elif layout_answer is None:
        verdict = "not said"
    elif layout_answer not in tied_answers:
        verdict = "wrong"
    elif len(tied_answers) > 1:
        verdict = "cannot tell"
    return Finding(question, best_answer, layout_answer, answers, tied_answers, verdict)


def format_size(name: str, value: float) -> str:
    """A distance (m) of translations or an angle (rad) of rotations in words."""
    return f"{1000 * value:.3g} mm" if name == "translation" else f"{np.degrees(value):.3g}°"


def _margin(fit: Fit, best: Fit, resamples: Array) -> Margin:
    """How much worse a fit is than the best. Paired: the same units are drawn for both."""
    difference = _resampled_error(fit, resamples) - _resampled_error(best, resamples)
    low, high = np.quantile(difference, [0.025, 0.975])
    if len(fit.error) < 3:  # too few to say how much they differ
        low = min(float(low), 0.0)
    return Margin(fit.relative_error - best.relative_error, float(low), float(high))


def _resampled_error(fit: Fit, resamples: Array) -> Array:
    """[NUM_RESAMPLES] relative errors."""
    return (resamples @ fit.error) / np.maximum(resamples @ fit.motion, 1e-12)
