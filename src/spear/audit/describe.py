"""Propose a layout (`spear.json`) for a dataset that nobody has described, to be read and
corrected.

Columns are read in every way that the audit knows, and the way that explains the recorded motion
best is proposed. What no column can tell (where the gripper's own axes point, the rate of RLDS) is
left open.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spear.audit.dataset_audit import MAX_UNEXPLAINED, MIN_MARGIN
from spear.audit.hypotheses import (
    UNIT_QUATERNION,
    Fit,
    Stretches,
    fit_rotations,
    fit_translations,
    formats_that_turn_otherwise,
    round_to_known_unit,
    state_quaternions,
)
from spear.checks.cameras import summarize_view
from spear.checks.gripper import (
    MIN_CORRELATION,
    MIN_EPISODES,
    MIN_MOTION,
    correlate_commands,
    judge_open_end,
)
from spear.checks.instructions import looks_like_identifier
from spear.checks.recording import Recording
from spear.checks.states import plausible_length_unit
from spear.data.readers.columns import (
    RawEpisodes,
    are_raw_images,
    is_depth_png,
    read_encoded_images,
    walk_columns,
)
from spear.data.readers.dataset_layout import ANGLE_FORMATS
from spear.data.readers.formats import Dataset, count_episodes, open_dataset
from spear.data.readers.lerobot import (
    JOINT_NAME_PATTERN,
    TASK_COLUMN,
    LeRobotFolder,
    is_index_column,
)
from spear.data.store.episode_store import EpisodeStore
from spear.data.store.lerobot_write import describe_layout, is_own_format
from spear.errors import SpearError
from spear.types import Array
from spear.util.images import IMAGE_MAGIC_BYTES
from spear.util.units import ANGLE_UNITS, LENGTH_UNITS, unit_factor

MAX_EPISODES = 30  # that are read
MAX_SEARCH_EPISODES = 8  # in which columns of positions and rotations are sought
MAX_VIEWED_EPISODES = 5  # whose images are decoded
MAX_NUMBERS = 32  # that a measurement has
MAX_CANDIDATES = 8  # best columns of positions, for which rotations are sought
UNEXPLAINED_WITHOUT_ROTATIONS = 1  # counts as all of their part: see `_Candidate`
DEFAULT_RATE_HZ = 5.0  # where the dataset names none; only ratios of rates matter here

WRIST_WORDS = ("wrist", "hand", "gripper", "eye_in")
"""Parts of the names of wrist cameras."""
MIN_WRIST_RATIO = 2.0  # how much more of a wrist view must change than of all others
TEXT_WORDS = ("annotation", "description", "instruction", "language", "task")
"""Parts of the names of columns that tell what the robot should do."""
COLUMNS_WITHOUT_STATE = (
    "timestamp",
    "reward",
    "discount",
    "frame_index",
    "episode_index",
    "index",
    "task_index",
)
PREFERRED_ANSWERS = ("delta", "base", "+++", "0", "euler_xyz", "m", "rad")
"""The answers that are taken where others fit as well."""

Columns = Mapping[str, Sequence[Array]]
"""Column → [T, d] of each episode."""
JointNames = Callable[[str], Sequence[str]]
"""Part of a column → the names of the joints that it holds (see `LeRobotFolder.find_joint_names`),
or that its own name says."""


class ColumnRange(NamedTuple):
    """Some neighboring numbers of a column."""

    column: str
    first: int
    end: int

    @property
    def width(self) -> int:
        """The number of columns in the range."""
        return self.end - self.first

    def values(self, columns: Columns) -> list[Array]:
        """[T, numbers] of each episode."""
        return [values[:, self.first : self.end] for values in columns[self.column]]

    def name(self, columns: Columns) -> str:
        """As a layout has it, for example "observation/state[0:3]"."""
        if self.width == columns[self.column][0].shape[1]:
            return self.column
        if self.width == 1:
            return f"{self.column}[{self.first}]"
        return f"{self.column}[{self.first}:{self.end}]"


class _Candidate(NamedTuple):
    """Columns that may be positions and rotations, and the actions that lead from one to the next.

    unexplained         sum of two parts that the best reading does not explain: the part of the
                        translations (0 … 1, rounded to two digits) and that of the rotations
                        (0 … 1). Without `action_rotation` the second counts as
                        `UNEXPLAINED_WITHOUT_ROTATIONS`.
    position            columns of the state: positions of the tool.
    action_translation  columns of the action that lead from one position to the next.
    rotation            columns of the state: orientations of the tool; None if none are near.
    action_rotation     columns of the action that lead from one orientation to the next; None if
                        none were sought or fit.
    """

    unexplained: float
    position: ColumnRange
    action_translation: ColumnRange
    rotation: ColumnRange | None
    action_rotation: ColumnRange | None = None


class _Proposal:
    """The layout as it is put together, and the facts that say why."""

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}
        self.facts: dict[str, str] = {
            "tool_rotation": "no column can say it: see docs/reference/spear-json.md"
        }

    def to_dict(self) -> dict[str, Any]:
        """As `spear.json` has it."""
        return {**self.fields, "facts": self.facts}


def describe(path: str | Path) -> dict[str, Any]:
    """Propose what `spear.json` could say of a dataset. Its `facts` tell why, and what is open.

    Raises:
        SpearError: the folder needs no description, or its data hold nothing to go by.
    """
    folder = open_dataset(path)
    if isinstance(folder, EpisodeStore):
        raise SpearError(
            f"nothing to describe: {path} is a store of episodes, whose columns are known"
        )
    if isinstance(folder, LeRobotFolder):
        features = {name: item.component_names for name, item in folder.info.features.items()}
        if is_own_format(features):
            return _describe_own_format(folder)
    split = next(iter(count_episodes(path)))
    rate_hz = folder.info.fps if isinstance(folder, LeRobotFolder) else DEFAULT_RATE_HZ
    episodes = _read_episodes(folder, split, path)
    proposal = _Proposal()

    proposal.fields["images"] = _describe_cameras(folder.read_steps(split), proposal, rate_hz)
    _describe_success(episodes, proposal)
    if isinstance(folder, LeRobotFolder):
        _describe_task_indices(episodes, folder.tasks, proposal)
    else:
        _describe_instruction(episodes[0], proposal)
        proposal.fields["rate_hz"] = None
        proposal.facts["rate_hz"] = "not in the metadata: write how many steps a second has"

    columns = _drop_columns_with_nan(_find_signal_columns(episodes))
    joint_names = _make_joint_name_finder(folder)
    used_ranges = _describe_motion(columns, rate_hz, joint_names, proposal)
    if isinstance(folder, LeRobotFolder):
        rotation_format = folder.find_quaternion_format(str(proposal.fields["rotation"]))
        if rotation_format:
            proposal.fields["rotation_format"] = rotation_format
            proposal.facts["rotation_format"] = "by the names of its components"

    free_numbers = _free_numbers(columns, used_ranges, joint_names)
    _describe_gripper(columns, free_numbers, rate_hz, proposal)
    return proposal.to_dict()


def _describe_own_format(folder: LeRobotFolder) -> dict[str, Any]:
    """The layout of a dataset that `spear data export` wrote, whose columns are known."""
    cameras: list[str] = []
    for feature_name in folder.cameras:
        if not folder.info.features[feature_name].is_depth:
            cameras.append(feature_name.removeprefix("observation.images."))
    facts = {"action": "`spear data export` wrote this dataset: its actions are canonical"}
    return {**describe_layout(cameras), "facts": facts}


def _read_episodes(folder: Dataset, split: str, path: str | Path) -> list[dict[str, Any]]:
    """The columns of the first good episodes; of those that have the columns that most have."""
    episodes = []
    for _, steps in itertools.islice(folder.read_steps(split, images=()), MAX_EPISODES):
        if not isinstance(steps, SpearError):
            episodes.append(dict(walk_columns(steps)))
    if not episodes:
        raise SpearError(f"no good episode: {path}: see spear data inspect")
    signatures = [_column_signature(episode) for episode in episodes]
    usual_signature, _ = Counter(signatures).most_common(1)[0]
    pairs = zip(episodes, signatures, strict=True)
    return [episode for episode, signature in pairs if signature == usual_signature]


def _column_signature(episode: Mapping[str, Any]) -> frozenset[Any]:
    """Names, types and widths of an episode's columns."""
    signature = set()
    for name, values in episode.items():
        width = getattr(values, "shape", ())[1:]
        signature.add((name, type(values), width))
    return frozenset(signature)


def _describe_success(episodes: Sequence[Mapping[str, Any]], proposal: _Proposal) -> None:
    """The column that says whether an episode succeeded: its last row is positive in some."""
    for name, values in episodes[0].items():
        if not name.endswith("success") or not isinstance(values, np.ndarray):
            continue
        if any(np.ravel(episode[name])[-1] > 0 for episode in episodes):
            proposal.fields["success"] = name


def _describe_instruction(episode: Mapping[str, Any], proposal: _Proposal) -> None:
    """The column of texts whose name says that it holds an instruction."""
    proposal.fields["instruction"] = None
    for name, values in episode.items():
        if not isinstance(values, list) or _are_images(values):
            continue
        if "instruction" in name or "language" in name:
            proposal.fields["instruction"] = name
            return


def _describe_task_indices(
    episodes: Sequence[Mapping[str, Any]], tasks: Mapping[int, str], proposal: _Proposal
) -> None:
    """Propose a column of task indices that leads to sentences where LeRobot's task does not."""
    default_texts: set[bytes] = set()
    for episode in episodes:
        default_texts.update(episode[TASK_COLUMN])
    if not all(looks_like_identifier(text.decode("utf-8", "replace")) for text in default_texts):
        return

    for name in episodes[0]:
        is_named_like_texts = any(word in name for word in TEXT_WORDS)
        if (
            name != "task_index"
            and is_named_like_texts
            and all(_leads_to_a_sentence(episode[name], tasks) for episode in episodes)
        ):
            proposal.fields["instruction"] = name
            proposal.facts["instruction"] = "its indices lead to sentences in meta/tasks"
            return


def _leads_to_a_sentence(values: Any, tasks: Mapping[int, str]) -> bool:
    """Whether a column has one index of a task in all rows, and that task is several words."""
    if not is_index_column(values):
        return False
    indices = set(np.ravel(values).tolist())
    return len(indices) == 1 and " " in tasks.get(indices.pop(), "").strip()


def _find_signal_columns(episodes: Sequence[Mapping[str, Any]]) -> dict[str, list[Array]]:
    """The columns that may be measurements or commands."""
    columns = {}
    for name, values in episodes[0].items():
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "iuf":
            continue
        last_name = name.rpartition("/")[2]
        if values.size > MAX_NUMBERS * len(values) or last_name in COLUMNS_WITHOUT_STATE:
            continue
        columns[name] = [
            np.asarray(episode[name], np.float64).reshape(len(episode[name]), -1)
            for episode in episodes
        ]
    return columns


def _drop_columns_with_nan(columns: Columns) -> dict[str, list[Array]]:
    """The columns that are finite in most episodes, of the episodes in which all of them are."""
    is_finite = {}
    for name, episodes in columns.items():
        is_finite[name] = np.array([np.isfinite(values).all() for values in episodes])
    finite_columns = [name for name in columns if is_finite[name].mean() > 0.5]
    is_good_episode = np.logical_and.reduce([is_finite[name] for name in finite_columns])
    if not np.any(is_good_episode):
        raise SpearError(
            "no good episode: in each of them a column holds NaN: leave these columns out"
        )
    return {
        name: list(itertools.compress(columns[name], is_good_episode)) for name in finite_columns
    }


def _make_joint_name_finder(folder: Dataset) -> JointNames:
    """Make a function that finds names of joints in the dataset's metadata and columns' names."""

    def find_joint_names(column: str) -> list[str]:
        by_name = JOINT_NAME_PATTERN.findall(column)
        if isinstance(folder, LeRobotFolder):
            return [*folder.find_joint_names(column), *by_name]
        return by_name

    return find_joint_names


def _free_numbers(
    columns: Columns, used_ranges: Sequence[ColumnRange], joint_names: JointNames
) -> list[ColumnRange]:
    """Single numbers that are neither part of the motion nor joints."""
    used = set()
    for used_range in used_ranges:
        for index in range(used_range.first, used_range.end):
            used.add((used_range.column, index))
    free = []
    for name, episodes in columns.items():
        for index in range(episodes[0].shape[1]):
            number = ColumnRange(name, index, index + 1)
            if (name, index) not in used and not joint_names(number.name(columns)):
                free.append(number)
    return free


def _are_images(values: Any) -> bool:
    """Whether the values of a column are encoded images."""
    if not isinstance(values, list):
        return False
    first = values[0] if values else b""
    return first.startswith(IMAGE_MAGIC_BYTES) and not is_depth_png(first)


def _describe_cameras(
    raw_episodes: RawEpisodes, proposal: _Proposal, rate_hz: float
) -> dict[str, str]:
    """Our camera name → column. A camera is on the wrist if its name or its motion says so."""
    shares: dict[str, list[float]] = {}
    for source, steps in itertools.islice(raw_episodes, MAX_VIEWED_EPISODES):
        if isinstance(steps, SpearError):
            continue
        for name, values in walk_columns(steps):
            if not are_raw_images(values) and not _are_images(values):
                continue
            images = read_encoded_images(steps, name, source)
            # As if the arm moved at every step.
            position = np.arange(3 * len(values)).reshape(-1, 3)
            view = summarize_view(images, position, rate_hz, f"{source} column {name!r}")
            shares.setdefault(name, [])
            if not view.is_blank:
                shares[name].append(view.changing_share)

    median_shares = {}
    for name, episode_shares in shares.items():
        if episode_shares:
            median_shares[name] = float(np.nanmedian(episode_shares))
    facts = [f"{name}: {share:.0%} of it change in a step" for name, share in median_shares.items()]
    facts += [f"{name} is blank" for name in shares if name not in median_shares]
    proposal.facts["images"] = "; ".join(facts)
    return _choose_cameras(median_shares)


def _choose_cameras(changing_shares: Mapping[str, float]) -> dict[str, str]:
    """Which cameras are external and on the wrist, from the share of each that changes in a
    step."""
    if not changing_shares:
        return {}

    def has_wrist_name(name: str) -> bool:
        return any(word in name for word in WRIST_WORDS)

    wrist = max(changing_shares, key=lambda name: (has_wrist_name(name), changing_shares[name]))
    other_cameras = [name for name in changing_shares if name != wrist]
    is_wrist = has_wrist_name(wrist)
    if other_cameras:
        most_changing_other = max(changing_shares[name] for name in other_cameras)
        is_wrist |= changing_shares[wrist] > MIN_WRIST_RATIO * most_changing_other
    if not is_wrist:
        return {"external": next(iter(changing_shares))}
    if not other_cameras:
        return {"wrist": wrist}
    return {"external": other_cameras[0], "wrist": wrist}


def _describe_motion(
    columns: Columns, rate_hz: float, joint_names: JointNames, proposal: _Proposal
) -> list[ColumnRange]:
    """Position, rotation, and the logged actions that lead from one to the next.

    Returns:
        The numbers that these take.
    """
    keys = ("position", "rotation", "rotation_format", "gripper", "gripper_range")
    proposal.fields |= dict.fromkeys(keys)
    candidates = _find_candidates(columns, rate_hz, joint_names)
    if not candidates:
        proposal.facts["position"] = (
            "no column but joints leads to the next state by any action: name it yourself"
        )
        return []

    tied = _best_candidates(candidates)
    best = tied[0]
    translation_fit = _describe_position(best, tied, columns, rate_hz, proposal)
    if best.rotation is None or best.action_rotation is None:
        proposal.facts["rotation"] = (
            "no numbers beside them lead from one to the next: name them yourself"
        )
        return [best.position, best.action_translation]
    rotation_fits = _find_best_fits(
        fit_rotations, best.position, best.rotation, best.action_rotation, columns, rate_hz
    )
    proposal.fields["rotation"] = best.rotation.name(columns)
    proposal.facts["rotation"] = _explain(best.action_rotation.name(columns), rotation_fits[0])
    _describe_rotation_format(
        best.rotation.values(columns), rotation_fits, translation_fit, proposal
    )
    proposal.fields["logged_rotation"] = best.action_rotation.name(columns)
    proposal.fields["logged_rotation_format"] = rotation_fits[0].hypothesis.action_format
    _describe_logged_frame(rotation_fits[0], translation_fit, proposal)
    return [best.position, best.action_translation, best.rotation, best.action_rotation]


def _find_triples(columns: Columns, joint_names: JointNames) -> list[ColumnRange]:
    """Every three neighboring numbers that are not joints."""
    triples = []
    for name, episodes in columns.items():
        for first in range(episodes[0].shape[1] - 2):
            triple = ColumnRange(name, first, first + 3)
            if not joint_names(triple.name(columns)):
                triples.append(triple)
    return triples


def _find_candidates(columns: Columns, rate_hz: float, joint_names: JointNames) -> list[_Candidate]:
    """Columns that may be positions and actions; the best of them with rotations as well."""
    triples = _find_triples(columns, joint_names)
    translations = [triple for triple in triples if "action" in triple.column]
    positions = [triple for triple in triples if "action" not in triple.column]
    few_episodes = {name: episodes[:MAX_SEARCH_EPISODES] for name, episodes in columns.items()}

    candidates = []
    for position, translation in itertools.product(positions, translations):
        rotations: Sequence[ColumnRange | None] = _find_orientations_near(
            position, columns, joint_names
        ) or [None]
        for rotation in rotations:
            fits = _find_best_fits(
                fit_translations, position, rotation, translation, few_episodes, rate_hz
            )
            if fits:
                unexplained = round(fits[0].relative_error, 2) + UNEXPLAINED_WITHOUT_ROTATIONS
                candidates.append(_Candidate(unexplained, position, translation, rotation))

    # The best candidates are tried again, with actions that rotate.

    for candidate in sorted(candidates, key=lambda c: c.unexplained)[:MAX_CANDIDATES]:
        if candidate.rotation is None:
            continue
        action_rotations = _find_orientations_near(
            candidate.action_translation, columns, joint_names
        )
        for action_rotation in action_rotations:
            fits = _find_best_fits(
                fit_rotations,
                candidate.position,
                candidate.rotation,
                action_rotation,
                few_episodes,
                rate_hz,
            )
            if fits:
                # The rotations' own part takes the place of the part without rotations.
                unexplained_translations = candidate.unexplained - UNEXPLAINED_WITHOUT_ROTATIONS
                unexplained = unexplained_translations + fits[0].relative_error
                candidates.append(
                    candidate._replace(unexplained=unexplained, action_rotation=action_rotation)
                )
    return candidates


def _best_candidates(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Select the candidates that explain about as much as the best one, in the order of columns."""
    limit = min(candidate.unexplained for candidate in candidates) + MIN_MARGIN
    tied = [candidate for candidate in candidates if candidate.unexplained <= limit]
    tied.sort(key=lambda candidate: (candidate.position.first, candidate.action_translation.first))
    # Numbers of length 1 are an orientation; three other numbers are only perhaps one.
    certain = []
    for candidate in tied:
        if candidate.rotation is not None and candidate.rotation.width > 3:
            certain.append(candidate)
    return certain or tied


def _describe_position(
    best: _Candidate,
    tied: Sequence[_Candidate],
    columns: Columns,
    rate_hz: float,
    proposal: _Proposal,
) -> Fit:
    """Fill in position and logged translation; returns the fit of the best hypothesis about
    them."""
    fits = _find_best_fits(
        fit_translations, best.position, best.rotation, best.action_translation, columns, rate_hz
    )
    fit = fits[0]
    distances = np.linalg.norm(np.concatenate(best.position.values(columns)), axis=1)
    reach = float(np.quantile(distances, 0.95))
    proposal.fields |= {
        "position": best.position.name(columns),
        "logged_translation": best.action_translation.name(columns),
        "length_unit": plausible_length_unit(reach) or "m",
        "logged_kind": fit.hypothesis.kind,
    }
    # The hypotheses took positions for meters, whatever their unit is.
    meters_per_state = LENGTH_UNITS[proposal.fields["length_unit"]]
    logged_unit = fit.hypothesis.unit.removesuffix("/s")
    states_per_logged = unit_factor(logged_unit, LENGTH_UNITS)
    if states_per_logged != 1:
        meters_per_logged = states_per_logged * meters_per_state
        proposal.fields["logged_translation_unit"] = round_to_known_unit(
            meters_per_logged, LENGTH_UNITS
        )
    fact = _explain(best.action_translation.name(columns), fit)
    rivals = {candidate.position.name(columns) for candidate in tied}
    rivals.remove(best.position.name(columns))
    if rivals:
        fact += f"; others do as well: {' or '.join(sorted(rivals))}: ask which it is"
    proposal.facts["position"] = fact
    return fit


def _describe_rotation_format(
    orientations: Sequence[Array],
    fits: Sequence[Fit],
    translation_fit: Fit,
    proposal: _Proposal,
) -> None:
    """How orientations ([T, d] of each episode) and logged rotations are written; `fits` are the
    best ones."""
    best = fits[0].hypothesis
    _, state_unit = state_quaternions(np.concatenate(orientations))
    angle_unit = state_unit if best.state_format in ANGLE_FORMATS else best.unit
    proposal.fields["rotation_format"] = best.state_format
    proposal.fields["angle_unit"] = "deg" if angle_unit.startswith("deg") else "rad"
    logged_unit = best.unit.removesuffix("/s")
    if logged_unit not in (UNIT_QUATERNION, proposal.fields["angle_unit"]):
        proposal.fields["logged_rotation_unit"] = unit_factor(logged_unit, ANGLE_UNITS)

    tied_formats = {fit.hypothesis.state_format for fit in fits}
    other_formats = formats_that_turn_otherwise(
        orientations, best.state_format, tied_formats, translation_fit.hypothesis, best
    )
    if other_formats:
        proposal.fields["rotation_format"] = None
        names = " or ".join([best.state_format, *other_formats])
        proposal.facts["rotation_format"] = f"{names}: no action tells: ask who recorded it"


def _describe_logged_frame(rotation_fit: Fit, translation_fit: Fit, proposal: _Proposal) -> None:
    """The frame of logged translations, and that of rotations if it is another."""
    translation_frame = translation_fit.hypothesis.frame
    rotation_frame = rotation_fit.hypothesis.frame
    proposal.fields["logged_frame"] = translation_frame
    is_rotation_explained = rotation_fit.relative_error <= MAX_UNEXPLAINED
    if rotation_frame != translation_frame and is_rotation_explained:
        proposal.fields["logged_rotation_frame"] = rotation_frame


def _explain(name: str, fit: Fit) -> str:
    """Why a column was chosen, in words."""
    hypothesis = fit.hypothesis
    doubt = ": too much to rely on" if fit.relative_error > MAX_UNEXPLAINED else ""
    return (
        f"{name} leads from one to the next but for {fit.relative_error:.0%} of the motion{doubt} "
        f"({hypothesis.kind}, {hypothesis.frame} frame, {hypothesis.unit}, {hypothesis.signs}, "
        f"{hypothesis.delay_steps} late)"
    )


def _find_orientations_near(
    near: ColumnRange, columns: Columns, joint_names: JointNames
) -> list[ColumnRange]:
    """Find where orientations may be if positions, or translations, are at `near`.

    They are perpendicular axes of length 1, or else unit quaternions, or else any three numbers.
    They stand beside `near`, around it in a pose, or at the beginning of other columns of states,
    or of actions.
    """
    widths = {name: episodes[0].shape[1] for name, episodes in columns.items()}
    is_action = "action" in near.column
    other_columns = []
    for name in widths:
        if name != near.column and ("action" in name) == is_action:
            other_columns.append(name)

    for size in (16, 6, 4, 3):
        starts = [(near.column, near.end), (near.column, near.first - size)]
        starts.append((near.column, near.end - 15))
        starts += [(name, 0) for name in other_columns]
        orientations = []
        for name, first in starts:
            if not 0 <= first <= widths[name] - size:
                continue
            candidate = ColumnRange(name, first, first + size)
            if joint_names(candidate.name(columns)):
                continue
            values = np.concatenate(candidate.values(columns))
            if size == 3 or _are_unit_vectors(values):
                orientations.append(candidate)
        if orientations:
            return orientations
    return []


def _are_unit_vectors(values: Array) -> bool:
    """Whether [N, 4] are of length 1, or [N, 6] and poses [N, 16] perpendicular triples of length
    1."""
    width = values.shape[1]
    if width == 4:
        is_binary = (np.abs(values) == 1).all(0) & (np.ptp(values, axis=0) == 2)
        if is_binary.any():
            return False  # a gripper's -1 and 1 beside small rotations
        axes = values.reshape(len(values), 1, 4)
    elif width == 16:
        axes = values.reshape(-1, 4, 4)[:, :3, :3]
    else:
        axes = values.reshape(len(values), -1, 3)
    products = axes @ axes.swapaxes(1, 2)
    return bool(np.abs(products - np.eye(axes.shape[1])).max() < 1e-2)


def _find_best_fits(
    fit_hypotheses: Callable[[Sequence[Recording], Stretches], list[Fit]],
    position: ColumnRange,
    rotation: ColumnRange | None,
    logged: ColumnRange,
    columns: Columns,
    rate_hz: float,
) -> list[Fit]:
    """Find the best hypotheses about logged numbers, see `_rank_fits`.

    `fit_hypotheses` is `fit_translations` or `fit_rotations`.
    """
    recordings = _make_recordings(position, rotation, logged, columns, rate_hz)
    stretches = Stretches(recordings)
    return _rank_fits(fit_hypotheses(recordings, stretches)) if stretches.num else []


def _make_recordings(
    position: ColumnRange,
    rotation: ColumnRange | None,
    logged: ColumnRange,
    columns: Columns,
    rate_hz: float,
) -> list[Recording]:
    """Recordings whose logged translations and rotations are both `logged`."""
    positions = position.values(columns)
    if rotation is None:
        rotations = [np.tile([1.0, 0, 0, 0], (len(values), 1)) for values in positions]
    else:
        rotations = rotation.values(columns)
    recordings = []
    episodes = zip(positions, rotations, logged.values(columns), strict=True)
    for episode_positions, episode_rotations, actions in episodes:
        recordings.append(
            Recording(
                source="",
                position=episode_positions,
                rotation=episode_rotations,
                translation=actions,
                turn=actions,
                valid=np.ones(len(episode_positions), bool),
                rate_hz=rate_hz,
            )
        )
    return recordings


def _rank_fits(fits: Sequence[Fit]) -> list[Fit]:
    """The best fit, of equals the plainest, then those that fit as well; none where nothing
    moves."""

    def rank(fit: Fit) -> tuple[float, int]:
        num_preferred = sum(str(answer) in PREFERRED_ANSWERS for answer in fit.hypothesis)
        return round(fit.relative_error, 2), -num_preferred

    best = min(fits, key=rank)
    if best.motion.sum() <= 0:
        return []
    limit = best.relative_error + MIN_MARGIN
    return [best, *(fit for fit in fits if fit is not best and fit.relative_error <= limit)]


def _describe_gripper(
    columns: Columns, free_numbers: Sequence[ColumnRange], rate_hz: float, proposal: _Proposal
) -> None:
    """The free number that follows a command best, and which end of it is open."""
    values = {number: [v[:, 0] for v in number.values(columns)] for number in free_numbers}
    moving = [number for number in free_numbers if np.ptp(np.concatenate(values[number])) > 0]
    commands = [number for number in moving if "action" in number.column]
    states = [number for number in moving if "action" not in number.column]
    pairs = []
    for state, command in itertools.product(states, commands):
        episodes = [(o, c, rate_hz) for o, c in zip(values[state], values[command], strict=True)]
        correlations = [following.correlation for following in correlate_commands(episodes)]
        pairs.append((max(correlations, key=abs), state, command))
    if not pairs:
        proposal.facts["gripper"] = (
            "no number is left that moves as an action does: name it yourself"
        )
        return

    correlation, state, command = max(pairs, key=lambda pair: abs(pair[0]))
    low, high = _range_ends(values[state])
    verdict, words = _judge_free_gripper(values[state], low, high)
    is_flipped = verdict == "wrong"
    conclusions = {"agrees": "", "wrong": "; so the ends are exchanged"}
    conclusion = conclusions.get(verdict, ": check which end is open")
    evidence = words.partition(": exchange")[0]
    proposal.fields["gripper"] = state.name(columns)
    proposal.fields["gripper_range"] = [high, low] if is_flipped else [low, high]
    proposal.facts["gripper_range"] = f"as far as it went: {evidence}{conclusion}"
    proposal.facts["gripper"] = (
        f"of the free numbers it follows {command.name(columns)} best, "
        f"correlation {correlation:.2f}"
    )
    if abs(correlation) >= MIN_CORRELATION:
        command_low, command_high = _range_ends(values[command])
        has_same_sense = (correlation > 0) != is_flipped
        proposal.fields["command"] = command.name(columns)
        proposal.fields["command_range"] = (
            [command_low, command_high] if has_same_sense else [command_high, command_low]
        )


def _judge_free_gripper(episodes: Sequence[Array], low: float, high: float) -> tuple[str, str]:
    """Whether the high end is the open one, from the episodes in which the gripper moves."""
    openings = []
    for values in episodes:
        if np.ptp(values) > MIN_MOTION * (high - low):
            openings.append((values - low) / (high - low))
    if len(openings) < MIN_EPISODES:
        return "cannot tell", "it hardly moves"
    return judge_open_end(openings)


def _range_ends(values: Sequence[Array]) -> tuple[float, float]:
    """The smallest and largest reading; 0 and 1 where these are meant."""
    readings = np.concatenate(values)
    low = float(f"{np.min(readings):.4g}")
    high = float(f"{np.max(readings):.4g}")
    if low >= -0.05 and 0.9 <= high <= 1.05:
        return 0.0, 1.0
    return low, high
