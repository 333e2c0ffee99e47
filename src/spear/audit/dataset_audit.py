"""Does a dataset mean what its layout says? The audit tests logged actions against recorded states.

`spear.audit.hypotheses` computes how well every plausible meaning (hypothesis) of the logged
actions explains the recorded states. A *question* is one field of a hypothesis: frame, unit, signs
and so on. For each question, the audit compares the layout's answer with the answer that fits best.

The audit cuts episodes into short *stretches*, over which actions are added up and compared with
the states. The *margin* of an answer is by how much its error exceeds that of the best answer, with
a 95 % interval from a bootstrap. The bootstrap draws *units of resampling*: whole episodes, or
stretches if there are only few episodes. An answer is wrong only if its whole interval lies above
`MIN_MARGIN`. An answer is right only if this is the case for all other answers. Otherwise the
question stays open.
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
    NO_INFLUENCE,
    UNIT_QUATERNION,
    Fit,
    Hypothesis,
    Stretches,
    can_tell_euler_order,
    find_formats_that_turn_otherwise,
    fit_rotations,
    fit_translations,
    list_tested_state_formats,
)
from spear.audit.joint_limits import judge_joint_limits
from spear.checks.cameras import (
    View,
    find_absent_or_blank_cameras,
    judge_camera_exchange,
    summarize_view,
)
from spear.checks.gripper import judge_gripper
from spear.checks.recording import Recording
from spear.checks.result import Check, Verdict
from spear.checks.states import examine_speeds, find_state_problems
from spear.data.actions import check_instruction, compute_and_check_norms
from spear.data.readers.bad_rows import mask_actions_before_gaps
from spear.data.readers.build_episode import (
    drop_bad_rows_unless_most_are_bad,
    read_instruction,
    read_measured_and_commanded_openings,
    read_poses_in_recorded_frames,
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
    read_steps_with_task_texts,
)
from spear.data.readers.joint_angles import compute_tip_poses
from spear.data.readers.rotation_formats import ROTATION_FORMATS, to_quaternion
from spear.data.store.episode_store import EpisodeStore
from spear.errors import SpearError
from spear.geometry import quat_multiply
from spear.types import Array
from spear.util.skipped_items import SkippedItems
from spear.util.units import ANGLE_UNITS, LENGTH_UNITS, name_unit

TRUSTED_FORMATS = (*RECORDED_ONLY, "euler_ZYX")
"""Formats of recorded orientations that hypotheses do not try (see `list_tested_state_formats`).

The audit takes the layout's word for them, and converts such orientations to quaternions first.
"""
UNMISTAKABLE_FORMATS = ("franka_joints", "urdf_joints", "matrix4_columns", "matrix4_rows")
"""Formats whose numbers show that they are of this format. The audit does not check whether the
layout names the right format if it names one of these."""
ROTATION_WIDTHS = sorted({encoding.num_components for encoding in ROTATION_FORMATS.values()})
"""How many numbers an orientation may have."""

_STORE_COLUMNS: dict[str, Any] = {
    name: name for name in ("position", "rotation", "gripper", "action", "action_mask")
}
STORE_LAYOUT = DatasetLayout(
    "store", rotation_format="quat_wxyz", gripper_range=(0.0, 1.0), **_STORE_COLUMNS
)
"""The layout of episode stores, without cameras and rate."""

MAX_EPISODES = 50  # the audit reads at most this many episodes
MAX_STEPS = 3000  # the audit reads no further episode after this many steps
MAX_VIEWED_EPISODES = 12  # the images of this many episodes are decoded, the first ones
# If a larger share of the episodes is unreadable, the rest says little about the dataset: give up.
MAX_BAD_SHARE = 0.5
# A hypothesis is worse than the best one if its relative error (error ÷ motion) is larger by this.
MIN_MARGIN = 0.01
MAX_UNEXPLAINED = 1 / 3  # if even the best hypothesis has a larger relative error, none is believed
MIN_MOTION = {"translation": 2e-3, "rotation": np.radians(0.5)}
"""Mean motion since the start of a stretch (m, rad) below which there is too little to judge."""
ODD_EPISODE_FACTOR = 10
"""An episode is odd if its relative error is above this many times the median of all episodes."""
MIN_ODD_EPISODE_LIMIT = 0.5
"""An episode with a smaller relative error is not odd, however small the median is."""
MAX_ODD_EPISODE_LIMIT = 1.0
"""An episode with a larger relative error is odd, however large the median is: its actions predict
the motion worse than standing still would."""
MIN_SHARE_OF_MEAN_MOTION = 1 / 4
"""Episodes with a smaller share of the episodes' mean motion are not called odd, because in them
small errors are a large part of the motion."""
NUM_RESAMPLES = 1000  # draws of the bootstrap
MIN_DIVISOR = 1e-12  # prevents a division by zero where nothing moves

_NOT_CONFIRMED = {"wrong", "cannot tell"}
"""Verdicts by which the data contradict their layout, or are not enough to confirm it."""

LayoutAnswers = Mapping[str, Mapping[str, str | None]]
"""Part ("translation" or "rotation") → question → the layout's answer; None if it gives none."""


class LoggedUnits(NamedTuple):
    """Units that logged actions may have: name → factor to meters, or to radians."""

    translation: Mapping[str, float]
    rotation: Mapping[str, float]


KNOWN_UNITS = LoggedUnits(LENGTH_UNITS, ANGLE_UNITS)


class Margin(NamedTuple):
    """By how much an error exceeds that of the best hypothesis, with the ends of the 95 % interval.

    All three numbers are fractions of the motion.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Finding:
    """The answer to one question about the logged translations or rotations.

    question       a field of `Hypothesis`.
    best_answer    the answer of the best hypothesis.
    layout_answer  the layout's answer; None if the layout gives none.
    answers        maps each answer to the fit of the best hypothesis that gives this answer, and to
                   the margin of that fit.
    tied_answers   the answers that fit as well as the best one, which is among them.
    verdict        whether the layout's answer is right.
    """

    question: str
    best_answer: str
    layout_answer: str | None
    answers: Mapping[str, tuple[Fit, Margin]]
    tied_answers: Sequence[str]
    verdict: Verdict


@dataclass(frozen=True)
class ActionPart:
    """The findings about the logged translations, or about the logged rotations.

    name        "translation" or "rotation".
    best_fit    the fit of the best hypothesis.
    layout_fit  the fit of the best hypothesis that agrees with all answers of the layout; None if
                no hypothesis does.
    margin      the margin of `layout_fit`; None without a `layout_fit`.
    findings    one finding per question.
    verdict     whether the layout as a whole is right.
    note        why the data are not enough to judge; "" if they are enough.
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

    path             the dataset.
    num_episodes     how many episodes were read.
    num_steps        how many steps these episodes have.
    action_parts     the findings about logged translations and logged rotations.
    state_problems   what is wrong with the recorded states by themselves, one remark per problem.
    recordings       the episodes that were read.
    checks           the checks of rate, gripper, cameras, instructions and success.
    fitting_formats  formats of the recorded orientations with which everything would agree,
                     although it does not with the layout's format.
    skipped          why episodes were skipped, one reason each.
    """

    path: str
    num_episodes: int
    num_steps: int
    action_parts: Sequence[ActionPart]
    state_problems: Sequence[str]
    recordings: Sequence[Recording]
    checks: Sequence[Check] = ()
    fitting_formats: Sequence[str] = ()
    skipped: Sequence[str] = ()

    @property
    def outcome(self) -> Literal["consistent", "contradiction", "undecided"]:
        """Whether the data agree with the layout, contradict it, or are not enough to decide."""
        verdicts = {action_part.verdict for action_part in self.action_parts}
        verdicts |= {check.verdict for check in self.checks}
        if self.state_problems or self.fitting_formats or "wrong" in verdicts:
            return "contradiction"
        if verdicts - {"agrees"}:
            return "undecided"
        return "consistent"


def audit_dataset(
    path: str | Path, split: str | None = None, layout_file: Path | None = None
) -> Report:
    """Audit some episodes of a dataset, in any format that has logged actions.

    Args:
        path: the dataset's folder.
        split: which split the episodes are from; the dataset's first split if None.
        layout_file: a layout file like spear.json; the dataset's own layout if None.

    Returns:
        All findings. Episodes that cannot be read are skipped, and the report says why.

    Raises:
        SpearError: the layout names no logged actions, or no readable episode has five steps.
    """
    if split is None:
        split = next(iter(count_episodes(path)))  # the name of the first split
    layout = load_layout_with_logged_actions(path, layout_file)
    report = _audit_numbers(path, split, layout)
    views = summarize_cameras(path, split, layout)
    cameras = find_absent_or_blank_cameras(views)
    exchange = judge_camera_exchange(views.get("external", ()), views.get("wrist", ()))
    if exchange is not None:
        cameras.append(exchange)
    texts = examine_instruction_and_success(path, split, layout)
    joints = []
    if layout.arm is not None:
        folder = open_dataset(path)
        assert not isinstance(folder, EpisodeStore)  # stores have poses
        joints = judge_joint_limits(folder, split, layout)
    return replace(
        report,
        fitting_formats=_find_fitting_formats(path, split, layout, report),
        checks=[*report.checks, *joints, *cameras, *texts],
    )


def _audit_numbers(path: str | Path, split: str, layout: DatasetLayout) -> Report:
    """Audit everything but images and texts, and without the search for fitting formats."""
    recordings, skipped = _read_first_recordings(path, split, layout)
    # `make_recording` converted orientations in trusted formats to quaternions.
    trusted_layout = layout
    if layout.rotation_format in TRUSTED_FORMATS:
        trusted_layout = replace(layout, rotation_format="quat_wxyz")
    if layout.logged_rotation_format == "urdf_joints":  # converted, too
        trusted_layout = replace(
            trusted_layout, logged_rotation_format="quat_wxyz", length_unit="m"
        )
    answers = collect_answers_about_logged_actions(trusted_layout)
    units = list_possible_logged_units(layout)
    report = audit_recordings(recordings, answers, str(path), units)
    if layout.logged_rotation_format == "urdf_joints":
        report = _drop_rotation_format_findings(report)

    checks = [*report.checks, *judge_gripper(recordings)]
    if not report.state_problems:
        checks += examine_speeds(recordings)
    if layout.rotation_format not in UNMISTAKABLE_FORMATS:
        checks += _examine_rotation_format(report, str(layout.rotation_format))
    return replace(report, skipped=skipped.reasons, checks=checks)


def _drop_rotation_format_findings(report: Report) -> Report:
    """Drop the findings about formats of rotations, which were computed from joints."""
    action_parts = []
    for action_part in report.action_parts:
        findings = [
            finding
            for finding in action_part.findings
            if finding.question not in ("state_format", "action_format")
        ]
        action_parts.append(replace(action_part, findings=findings))
    return replace(report, action_parts=action_parts)


def _read_first_recordings(
    path: str | Path, split: str, layout: DatasetLayout
) -> tuple[list[Recording], SkippedItems]:
    """Read the first episodes, up to `MAX_EPISODES` and about `MAX_STEPS`.

    Returns:
        The episodes, and those that could not be read.
    """
    skipped = SkippedItems(MAX_BAD_SHARE)
    recordings: list[Recording] = []
    num_steps = 0
    raw_episodes = read_episode_steps(path, split, image_columns=())
    for recording in convert_episodes(
        raw_episodes, partial(make_recording, layout=layout), skipped
    ):
        recordings.append(recording)
        num_steps += len(recording.position)
        if len(recordings) == MAX_EPISODES or num_steps > MAX_STEPS:
            break
    check_enough_good(len(recordings), skipped, path, split)
    return recordings, skipped


def _find_fitting_formats(
    path: str | Path, split: str, layout: DatasetLayout, report: Report
) -> list[str]:
    """Find other formats of the recorded orientations with which the audit finds nothing wrong.

    If the states are written in another format than the layout says, the audit may also find wrong
    frames and signs of the logged rotations. So this function repeats the audit with every other
    format that has as many numbers. It returns no formats if the logged rotations agree with the
    states, or if the audit already found that the state format is wrong.
    """
    findings: list[Finding] = []  # about the logged rotations, if these do not agree
    for action_part in report.action_parts:
        if action_part.name == "rotation" and action_part.verdict in _NOT_CONFIRMED:
            findings += action_part.findings
    is_state_format_wrong = any(
        finding.question == "state_format" and finding.verdict == "wrong" for finding in findings
    )
    if not findings or is_state_format_wrong:
        return []

    layout_encoding = ROTATION_FORMATS.get(str(layout.rotation_format))
    if layout_encoding is None:
        return []
    fitting_formats = []
    for name, encoding in ROTATION_FORMATS.items():
        has_same_width = encoding.num_components == layout_encoding.num_components
        if name == layout.rotation_format or not has_same_width:
            continue
        other_layout = replace(layout, rotation_format=cast(RotationFormat, name))
        with contextlib.suppress(SpearError):  # by this format, the numbers may be no rotations
            other_report = _audit_numbers(path, split, other_layout)
            other_verdicts = {action_part.verdict for action_part in other_report.action_parts}
            is_part_unconfirmed = bool(other_verdicts & _NOT_CONFIRMED)
            if not other_report.state_problems and not is_part_unconfirmed:
                fitting_formats.append(name)
    return fitting_formats


def _examine_rotation_format(report: Report, layout_format: str) -> list[Check]:
    """Check whether the actions tell in which format orientations are written.

    Logged rotations that are targets never tell, because they are the next states in the same
    format.
    """
    # Parts of the actions for which the data are enough to judge.
    explained = {
        action_part.name: action_part for action_part in report.action_parts if not action_part.note
    }
    best = {name: action_part.best_fit.hypothesis for name, action_part in explained.items()}
    translation = best.get("translation")
    rotation = best.get("rotation")

    if layout_format in TRUSTED_FORMATS:
        # The caller excluded unmistakable formats, so this one is angles, which may be in the other
        # order.
        is_order_known = can_tell_euler_order(translation, rotation)
        other_formats = [] if is_order_known else ["euler_xyz"]
    else:
        rotations = [recording.rotation for recording in report.recordings]
        tied_formats = set(list_tested_state_formats(rotations[0]))
        for action_part in explained.values():
            for finding in action_part.findings:
                if finding.question == "state_format":
                    tied_formats &= set(finding.tied_answers)
        other_formats = find_formats_that_turn_otherwise(
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
    """Summarize what each camera shows in the first episodes.

    Returns:
        Camera name → one summary per episode, None where the camera is absent.

    Raises:
        SpearError: too many episodes are broken.
    """
    views: dict[str, list[View | None]] = {camera: [] for camera in layout.images}
    skipped = SkippedItems(MAX_BAD_SHARE)
    raw_episodes = read_episode_steps(path, split, list(layout.images.values()))
    for source, steps in itertools.islice(raw_episodes, MAX_VIEWED_EPISODES):
        try:
            if isinstance(steps, SpearError):
                raise steps
            position, _, _ = read_poses_in_recorded_frames(steps, layout, source)
        except SpearError as error:
            skipped(error)
            continue
        for camera in layout.images:
            views[camera].append(_summarize_camera(steps, layout, camera, position, source))
    num_viewed = max((len(episodes) for episodes in views.values()), default=0)
    skipped.check_limit(num_viewed, is_finished=True)
    return {camera: episodes for camera, episodes in views.items() if episodes}


def _summarize_camera(
    steps: Steps, layout: DatasetLayout, camera: str, position: Array, source: str
) -> View | None:
    """Summarize what a camera shows in an episode; None if it is absent or cannot be decoded."""
    with contextlib.suppress(SpearError):
        images = read_encoded_images(steps, layout.images[camera], source)
        context = f"{source} camera {camera!r}"
        return summarize_view(images, position, get_stated_rate_hz(steps, layout), context)
    return None


def examine_instruction_and_success(
    path: str | Path, split: str, layout: DatasetLayout
) -> list[Check]:
    """Report instructions, and success, if they can be read in none of the first episodes."""
    folder = open_dataset(path)
    if isinstance(folder, EpisodeStore):  # its writer already refused unreadable texts
        return []
    first_episodes = []
    raw_episodes = read_steps_with_task_texts(folder, split, layout, image_columns=())
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


def read_episode_steps(
    path: str | Path, split: str, image_columns: Sequence[str] | None
) -> RawEpisodes:
    """Read the steps of a dataset's episodes.

    Args:
        path: the dataset's folder.
        split: which split the episodes are from.
        image_columns: columns of images to read; all of them if None.

    Returns:
        (source, columns) of each episode.
    """
    folder = open_dataset(path)
    if not isinstance(folder, EpisodeStore):
        return folder.read_steps(split, image_columns)
    store = open_store_split(path, split)
    needs_images = image_columns is None or len(image_columns) > 0
    read_episode = store.__getitem__ if needs_images else store.without_images
    episodes = map(read_episode, range(len(store)))
    # The attributes of a store's episode have the names of columns in `STORE_LAYOUT`.
    return ((episode.source, vars(episode)) for episode in episodes)


def load_layout_with_logged_actions(path: str | Path, layout_file: Path | None) -> DatasetLayout:
    """Find the layout of a dataset. Raises `SpearError` if it does not name logged actions."""
    folder = open_dataset(path)
    if isinstance(folder, EpisodeStore):
        images = {camera: f"images/{camera}" for camera in folder.cameras}
        return replace(STORE_LAYOUT, rate_hz=float(folder.rates_hz[0]), images=images)
    layout = folder.load_layout(layout_file)
    action_columns = (layout.action, layout.logged_translation, layout.logged_rotation)
    if all(name is None for name in action_columns):
        raise SpearError(
            f"the layout of {layout.name} names no logged actions, so there is nothing to "
            'audit. Add logged_translation and logged_rotation, such as "logged_translation": '
            '"action[0:3]".'
        )
    return layout


def make_recording(steps: Steps, layout: DatasetLayout, source: str) -> Recording:
    """Make the recording of one episode from its columns.

    Args:
        steps: the episode's columns.
        layout: what the columns mean.
        source: names the episode in errors.

    Raises:
        SpearError: shapes do not fit, or a number is NaN.
    """
    translation_column = layout.logged_translation
    rotation_column = layout.logged_rotation
    layout_with_command = layout
    if layout.action is not None:  # canonical actions: one column of 8 numbers
        translation_column = f"{layout.action}[0:3]"
        rotation_column = f"{layout.action}[3:7]"
        layout_with_command = replace(layout, command=f"{layout.action}[7]")

    steps, rows = drop_bad_rows_unless_most_are_bad(steps, layout, source)
    logged_translation = _read_optional(steps, translation_column, source)
    logged_rotation = _read_optional(steps, rotation_column, source)
    if layout.logged_rotation_format == "urdf_joints" and logged_rotation is not None:
        logged_translation, logged_rotation = compute_tip_poses(logged_rotation, layout, source)
    position, rotation, rotation_format = read_poses_in_recorded_frames(steps, layout, source)
    opening, command = _read_openings_and_commands_if_moving(steps, layout_with_command, source)
    is_valid = np.ones(len(position), bool)
    if layout.action_mask is not None:
        is_valid = read_numbers(steps, layout.action_mask, source).reshape(-1) != 0
    leads_to_next_row = mask_actions_before_gaps(rows)
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
        rotation=_convert_to_quaternions_if_trusted_format(
            rotation, rotation_format, layout, source
        ),
        translation=logged_translation,
        turn=logged_rotation,
        valid=is_valid,
        rate_hz=get_stated_rate_hz(steps, layout),
        opening=opening,
        command=command,
    )


def _read_openings_and_commands_if_moving(
    steps: Steps, layout: DatasetLayout, source: str
) -> tuple[Array | None, Array | None]:
    """Read openings and commands [T]; None if the layout says that the gripper never moves."""
    if layout.gripper_opening is not None:
        return None, None
    return read_measured_and_commanded_openings(steps, layout, source)


def _read_optional(steps: Steps, column_name: str | None, source: str) -> Array | None:
    return None if column_name is None else read_numbers(steps, column_name, source)


def _check_shape(
    values: Array | None, name: str, widths: Sequence[int], num_steps: int, source: str
) -> None:
    """Raise `SpearError` unless values are None or have shape [num_steps, one of `widths`]."""
    if values is None or values.shape in [(num_steps, width) for width in widths]:
        return
    expected = f"{num_steps} x {' or '.join(map(str, widths))}"
    raise SpearError(
        f"{name} of {source} has the shape {values.shape}, not {expected}. Correct the column's "
        "name in spear.json."
    )


def _convert_to_quaternions_if_trusted_format(
    rotation: Array, rotation_format: RotationFormat, layout: DatasetLayout, source: str
) -> Array:
    """Convert recorded orientations to what hypotheses can read.

    Args:
        rotation: [T, d] orientations as `read_poses_in_recorded_frames` returns them.
        rotation_format: their format, which is that of the layout except for "franka_joints", where
            `read_poses_in_recorded_frames` computes quaternions from joint angles.
        layout: the dataset's layout.
        source: names the episode in errors.

    Returns:
        Quaternions [T, 4] for the formats in `TRUSTED_FORMATS`, which hypotheses do not try;
        otherwise `rotation` without changes.

    Raises:
        SpearError: the numbers are no rotations in the dataset's format.
    """
    # This also checks the numbers, so it is done even if the quaternions are not needed.
    quaternions = to_quaternion(rotation, rotation_format, source)
    if layout.rotation_format == "franka_joints":
        # The logged rotations are in the hand's frame (libfranka's O_T_EE), which differs by half a
        # turn from the frame that the joints give.
        half_turn_about_x = torch.tensor([0, 1, 0, 0], dtype=torch.float64)
        return quat_multiply(torch.as_tensor(quaternions), half_turn_about_x).numpy()
    if rotation_format in TRUSTED_FORMATS:
        return quaternions
    if rotation_format.startswith("quat"):
        compute_and_check_norms(rotation, source, "rotation")  # only the check matters here
    return rotation


def get_stated_rate_hz(steps: Steps, layout: DatasetLayout) -> float:
    """Return the steps per second of an episode: its own rate (in a store), or the layout's."""
    rate_hz = steps.get("rate_hz")
    if isinstance(rate_hz, float):
        return rate_hz
    assert layout.rate_hz is not None
    return layout.rate_hz


def audit_recordings(
    recordings: Sequence[Recording],
    answers: LayoutAnswers,
    path: str = "",
    units: LoggedUnits = KNOWN_UNITS,
) -> Report:
    """Fit every hypothesis to some recordings, and compare the best with the layout's answers.

    Args:
        recordings: The episodes.
        answers: The layout's answers about their logged actions.
        path: The dataset, for messages.
        units: The units to try.

    Raises:
        SpearError: no episode has five known steps in a row.
    """
    # A step can be compared only if the actions of all delays are known, so that the shortest
    # stretch takes five known steps.
    stretches = Stretches(recordings)
    if not stretches.num:
        raise SpearError(
            f"no episode of {path} has five known steps in a row, so there is nothing to audit. "
            "Give longer episodes."
        )

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
            checks += _examine_odd_episodes(action_part, len(recordings))
    return Report(
        path=path,
        num_episodes=len(recordings),
        num_steps=sum(len(recording.position) for recording in recordings),
        action_parts=action_parts,
        state_problems=find_state_problems(recordings),
        recordings=recordings,
        checks=checks,
    )


def _examine_odd_episodes(action_part: ActionPart, num_episodes: int) -> list[Check]:
    """Check whether the layout explains some episodes far less well than the others.

    The units of resampling must be episodes.
    """
    fit = action_part.layout_fit
    if fit is None or action_part.note or action_part.verdict == "wrong":
        return []
    relative_errors = fit.error / fit.motion.clip(MIN_DIVISOR)  # [episodes]
    limit = np.clip(
        ODD_EPISODE_FACTOR * np.median(relative_errors),
        MIN_ODD_EPISODE_LIMIT,
        MAX_ODD_EPISODE_LIMIT,
    )
    has_motion = fit.motion > MIN_SHARE_OF_MEAN_MOTION * fit.motion.mean()
    is_odd = (relative_errors > limit) & has_motion
    num_odd = int(is_odd.sum())
    if not num_odd:
        return []
    words = (
        f"the layout explains little of {num_odd} of {num_episodes} episodes, which may be "
        "recorded in another way"
    )
    return [Check(f"{action_part.name}s", "cannot tell", words)]


def collect_answers_about_logged_actions(layout: DatasetLayout) -> LayoutAnswers:
    """Collect what a layout says about its logged actions, see `LayoutAnswers`.

    Layouts have no key for signs, so "+++" is their answer. A layout does not say either by how
    many steps the arm is late, except for canonical actions, which lead from each state to the
    next without delay.
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

    translation_unit: str = layout.length_unit
    rotation_unit: str = layout.angle_unit
    if layout.logged_translation_unit is not None:
        translation_unit = name_unit(layout.logged_translation_unit, LENGTH_UNITS)
    if layout.logged_rotation_unit is not None:
        rotation_unit = name_unit(layout.logged_rotation_unit, ANGLE_UNITS)
    if kind == "velocity":
        translation_unit += "/s"
        rotation_unit += "/s"
    if action_format not in ANGLE_FORMATS:
        rotation_unit = UNIT_QUATERNION

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
            "unit": translation_unit,
            "action_format": NO_INFLUENCE,
        },
        "rotation": {
            **shared,
            "frame": rotation_frame,
            "unit": rotation_unit,
            "action_format": action_format,
        },
    }


def list_possible_logged_units(layout: DatasetLayout) -> LoggedUnits:
    """List the known units and those that the layout names for logged actions."""
    length_units = dict(LENGTH_UNITS)
    if layout.logged_translation_unit is not None:
        name = name_unit(layout.logged_translation_unit, LENGTH_UNITS)
        length_units[name] = layout.logged_translation_unit
    angle_units = dict(ANGLE_UNITS)
    if layout.logged_rotation_unit is not None:
        name = name_unit(layout.logged_rotation_unit, ANGLE_UNITS)
        angle_units[name] = layout.logged_rotation_unit
    return LoggedUnits(length_units, angle_units)


def _judge_part(
    part_name: str, fits: Sequence[Fit], answers: Mapping[str, str | None]
) -> ActionPart:
    """Judge the logged translations or rotations.

    Args:
        part_name: "translation" or "rotation".
        fits: the fits of all hypotheses.
        answers: question → the layout's answer.
    """

    def agrees(fit: Fit, question: str) -> bool:
        """Return whether a hypothesis gives the layout's answer, or a question does not matter."""
        return _get_answer(fit, question) in (answers[question], NO_INFLUENCE)

    def rank(fit: Fit) -> tuple[float, int]:
        """Sort better fits first, and equal ones by how many of the layout's answers they give."""
        num_agreements = sum(agrees(fit, question) for question in answers)
        return round(fit.relative_error, 4), -num_agreements

    ranked = sorted(fits, key=rank)
    best = ranked[0]
    resamples = _sample_bootstrap_counts(len(best.error))
    note = _explain_undecidable(part_name, best)
    is_undecidable = note != ""

    # For each question: which answers fit as well as the best? A question is skipped if all
    # hypotheses give the same answer, or if it has no influence on the best one.
    findings = []
    for question in Hypothesis._fields:
        finding = _judge_question(question, ranked, answers[question], resamples, is_undecidable)
        if finding.best_answer != NO_INFLUENCE and len(finding.answers) > 1:
            findings.append(finding)

    # The layout as a whole: how much worse is the best hypothesis that agrees with all its answers?
    questions = _list_answered_questions(answers)
    agreeing = (fit for fit in ranked if all(agrees(fit, question) for question in questions))
    layout_fit = next(agreeing, None)
    margin = None if layout_fit is None else _compute_margin(layout_fit, best, resamples)
    verdict = _judge_layout(answers, margin, is_undecidable)
    return ActionPart(part_name, best, layout_fit, margin, findings, verdict, note)


def _list_answered_questions(answers: Mapping[str, str | None]) -> list[str]:
    """List the questions that a layout answers.

    A layout that states a unit but no kind does not answer the question of the unit, because the
    unit depends on the kind, for example "m" for a delta and "m/s" for a velocity.
    """
    questions = []
    for question, answer in answers.items():
        is_unit_without_kind = question == "unit" and not answers["kind"]
        if answer is not None and not is_unit_without_kind:
            questions.append(question)
    return questions


def _judge_layout(
    stated_answers: Mapping[str, str | None],
    margin_behind_best: Margin | None,
    is_undecidable: bool,
) -> Verdict:
    """Judge whether the layout as a whole fits as well as the best hypothesis.

    Args:
        stated_answers: question → the layout's answer.
        margin_behind_best: the margin of the best hypothesis that agrees with the layout. None if
            none does.
        is_undecidable: whether the data are not enough to judge.
    """
    if is_undecidable:
        return "cannot tell"
    if margin_behind_best is None or margin_behind_best.low > MIN_MARGIN:
        return "wrong"
    if any(stated_answers[question] is None for question in ("kind", "frame", "action_format")):
        return "not said"
    return "agrees"


def _sample_bootstrap_counts(num_resampling_units: int) -> Array:
    """Draw, for each resample of the bootstrap, how often it contains each unit of resampling.

    Returns:
        [NUM_RESAMPLES, num_resampling_units] counts, the same in every run.
    """
    rng = np.random.default_rng(0)
    probabilities = np.full(num_resampling_units, 1 / num_resampling_units)
    counts = rng.multinomial(num_resampling_units, probabilities, NUM_RESAMPLES)
    return counts.astype(float)


def _explain_undecidable(part_name: str, best: Fit) -> str:
    """Return why the data are not enough to judge the translations or rotations; "" if they are."""
    mean_motion = float(best.motion.sum() / best.num_steps)
    if mean_motion < MIN_MOTION[part_name]:
        return f"the robot hardly moves, by {format_size(part_name, mean_motion)} in a stretch"
    if best.relative_error > MAX_UNEXPLAINED:
        return (
            "no hypothesis explains the states, and "
            f"the best leaves {best.relative_error:.0%} of the motion"
        )
    return ""


def _get_answer(fit: Fit, question: str) -> str:
    """Return the answer of a fit's hypothesis to one question."""
    return str(getattr(fit.hypothesis, question))


def _judge_question(
    question: str,
    ranked: Sequence[Fit],
    layout_answer: str | None,
    resamples: Array,
    is_undecidable: bool,
) -> Finding:
    """Compare the answers to one question.

    Args:
        question: a field of `Hypothesis`.
        ranked: all fits, the best one first.
        layout_answer: the layout's answer; None if it gives none.
        resamples: how often each draw of the bootstrap contains each unit of resampling.
        is_undecidable: whether the data are not enough to judge.
    """
    best = ranked[0]
    best_answer = _get_answer(best, question)
    answers: dict[str, tuple[Fit, Margin]] = {}
    for fit in ranked:
        answer = _get_answer(fit, question)
        if answer == NO_INFLUENCE and fit is not best:
            continue
        if answer not in answers:  # the first fit with an answer is the best with that answer
            answers[answer] = (fit, _compute_margin(fit, best, resamples))
    tied_answers = []
    for answer, (_, margin) in answers.items():
        if margin.low <= MIN_MARGIN:
            tied_answers.append(answer)

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


def format_size(part_name: str, value: float) -> str:
    """Format a distance (m) for translations in mm, or an angle (rad) for rotations in degrees."""
    if part_name == "translation":
        return f"{1000 * value:.3g} mm"
    return f"{np.degrees(value):.3g}°"


def _compute_margin(fit: Fit, best: Fit, resamples: Array) -> Margin:
    """Compute the margin of a fit: by how much its relative error exceeds that of the best fit.

    Each draw of the bootstrap contains the same units of resampling for both fits, because paired
    differences vary less.
    """
    difference = _compute_resampled_errors(fit, resamples) - _compute_resampled_errors(
        best, resamples
    )
    low, high = np.quantile(difference, [0.025, 0.975])  # 95 % of the draws lie between
    if len(fit.error) < 3:  # too few units to say how much they differ, so it may be by nothing
        low = min(float(low), 0.0)
    return Margin(fit.relative_error - best.relative_error, float(low), float(high))


def _compute_resampled_errors(fit: Fit, resamples: Array) -> Array:
    """Compute a fit's relative error in each draw of the bootstrap: [NUM_RESAMPLES]."""
    return (resamples @ fit.error) / np.maximum(resamples @ fit.motion, MIN_DIVISOR)
