"""Propose a layout (`spear.json`) for a dataset that has none, for a person to read and correct.

Columns are read in every way that the audit knows (`spear.audit.hypotheses`), and the way that
explains the recorded motion best is proposed. Some things no column can tell, such as where the
gripper's own axes point, or the rate of an RLDS dataset. These are left open. For each proposal, a
sentence (*fact*) says why.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from spear.audit.dataset_audit import MAX_UNEXPLAINED, MIN_MARGIN
from spear.audit.describe_joints import (
    list_state_joint_names,
    make_joint_fields_and_facts,
    make_lerobot_gripper_fields,
    resolve_joint_columns,
)
from spear.audit.hypotheses import (
    UNIT_QUATERNION,
    Fit,
    Stretches,
    find_formats_that_turn_otherwise,
    fit_rotations,
    fit_translations,
    guess_recorded_unit,
    round_to_known_unit_if_near,
)
from spear.checks.cameras import summarize_view
from spear.checks.gripper import (
    MIN_CORRELATION,
    MIN_EPISODES,
    MIN_MOTION,
    CommandedGripper,
    Judgment,
    correlate_commands_by_delay,
    judge_whether_high_is_open,
)
from spear.checks.instructions import looks_like_identifier
from spear.checks.recording import Recording
from spear.checks.states import find_plausible_length_unit
from spear.data.readers.columns import (
    RawEpisodes,
    are_raw_images,
    is_depth_png,
    read_encoded_images,
    walk_columns,
)
from spear.data.readers.dataset_layout import ANGLE_FORMATS, LAYOUT_FILE
from spear.data.readers.formats import Dataset, count_episodes, open_dataset
from spear.data.readers.lerobot import (
    JOINT_NAME_PATTERN,
    TASK_COLUMN,
    LeRobotFolder,
    may_be_task_indices,
)
from spear.data.store.episode_store import EpisodeStore
from spear.data.store.lerobot_write import is_own_format, make_layout_fields
from spear.errors import SpearError
from spear.types import Array
from spear.util.files import read_json
from spear.util.images import IMAGE_MAGIC_BYTES
from spear.util.units import ANGLE_UNITS, LENGTH_UNITS, get_unit_factor

MAX_EPISODES = 30  # at most this many episodes are read
MAX_SEARCH_EPISODES = 8  # columns of positions and rotations are sought in this many episodes
MAX_VIEWED_EPISODES = 5  # the images of this many episodes are decoded
MAX_NUMBERS = 32  # a column with more numbers per step is no measurement or command
MAX_CANDIDATES = 8  # rotations are sought for this many of the best columns of positions
UNEXPLAINED_WITHOUT_ROTATIONS = 1  # relative error of rotations for which no column was found
DEFAULT_RATE_HZ = 5.0  # if the dataset names no rate; only ratios of rates matter here

WRIST_WORDS = ("wrist", "hand", "gripper", "eye_in")
"""Parts of the names of wrist cameras."""
MIN_WRIST_RATIO = 2.0  # changed share of a wrist view divided by that of any other view
TEXT_WORDS = ("annotation", "description", "instruction", "language", "task")
"""Parts of the names of columns that tell what the robot should do."""
# Names (behind the last "/") of columns that are no measurement or command.
COLUMNS_WITHOUT_STATE = (
    "timestamp",
    "reward",
    "discount",
    "frame_index",
    "episode_index",
    "index",
    "task_index",
)
JOINT_ADVICE = "give it with --urdf FILE --tip LINK (docs/howto/describe.md)"
PREFERRED_ANSWERS = ("delta", "base", "+++", "0", "euler_xyz", "m", "rad")
"""The answers of hypotheses that are preferred to others that fit as well."""

Columns = Mapping[str, Sequence[Array]]
"""Column → its values [T, d] in each episode."""
JointNameFinder = Callable[[str], Sequence[str]]
"""A function from a column, or a range of it, to the names of the joints that it contains.

Such names come from a dataset's metadata (see `LeRobotFolder.find_joint_names`) and from the
column's own name.
"""


class ColumnRange(NamedTuple):
    """The neighboring numbers first … end - 1 of a column."""

    column: str
    first: int
    end: int

    @property
    def width(self) -> int:
        """How many numbers the range has."""
        return self.end - self.first

    def values(self, columns: Columns) -> list[Array]:
        """Return the range's values [T, width] in each episode."""
        return [values[:, self.first : self.end] for values in columns[self.column]]

    def name(self, columns: Columns) -> str:
        """Name the range as layouts do, for example "observation/state[0:3]"."""
        if self.width == columns[self.column][0].shape[1]:
            return self.column
        if self.width == 1:
            return f"{self.column}[{self.first}]"
        return f"{self.column}[{self.first}:{self.end}]"


class _Candidate(NamedTuple):
    """Numbers that may be positions, orientations, and actions that lead from a pose to the next.

    unexplained         relative error of the translations, rounded to two digits, plus relative
                        error of the rotations, each by the best hypothesis. Without
                        `action_rotation`, the second summand is `UNEXPLAINED_WITHOUT_ROTATIONS`.
    position            numbers of the state: positions of the end effector.
    action_translation  numbers of the action that lead from one position to the next.
    rotation            numbers of the state: orientations of the end effector; None if no numbers
                        near the position can be orientations.
    action_rotation     numbers of the action that lead from one orientation to the next; None if
                        such numbers have not been sought, or none fit.
    """

    unexplained: float
    position: ColumnRange
    action_translation: ColumnRange
    rotation: ColumnRange | None
    action_rotation: ColumnRange | None = None


class _Proposal:
    """The layout that is put together step by step.

    fields  key of `spear.json` → proposed value, None for a key that is left open.
    facts   key of `spear.json` → why its value is proposed or left open.
    """

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}
        self.facts: dict[str, str] = {
            "tool_rotation": "no column can say it: see docs/reference/spear-json.md"
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of `spear.json`."""
        return {**self.fields, "facts": self.facts}


def propose_layout(
    path: str | Path, urdf: Path | None = None, tip: str | None = None
) -> dict[str, Any]:
    """Propose the contents of `spear.json` for a dataset.

    Args:
        path: the dataset's folder.
        urdf: for joint angles, the URDF of the arm.
        tip: for joint angles, the URDF's link between the finger tips.

    Returns:
        The proposal. Its `facts` say why each value is proposed or left open.

    Raises:
        SpearError: the folder needs no description, no episode of it can be used, or it does not
            have the joints of the URDF.
    """
    folder = open_dataset(path)
    if isinstance(folder, EpisodeStore):
        raise SpearError(
            f"{path} is a store of episodes, whose columns are known, so it needs no "
            "description. Give the dataset that it was made from."
        )
    if isinstance(folder, LeRobotFolder):
        features = {name: item.component_names for name, item in folder.info.features.items()}
        if is_own_format(features):
            return _make_layout_of_exported_dataset(folder)
    num_episodes_of_split = count_episodes(path)
    split = next(iter(num_episodes_of_split))  # the first
    rate_hz = folder.info.fps if isinstance(folder, LeRobotFolder) else DEFAULT_RATE_HZ
    episodes = _read_first_episodes(folder, split, path)
    proposal = _Proposal()

    _propose_cameras(folder.read_steps(split), rate_hz, proposal)
    _propose_success(episodes, proposal)
    if isinstance(folder, LeRobotFolder):
        _propose_task_indices(episodes, folder.tasks, proposal)
    else:
        _propose_instruction(episodes[0], proposal)
        proposal.fields["rate_hz"] = None
        proposal.facts["rate_hz"] = "not in the metadata: write how many steps a second has"

    columns = _drop_columns_and_episodes_with_nan(_find_signal_columns(episodes))
    find_joint_names = _make_joint_name_finder(folder)
    if urdf is not None and tip is not None:
        _propose_joints(columns, folder, urdf, tip, proposal)
        return proposal.to_dict()
    used_ranges = _propose_motion(columns, rate_hz, find_joint_names, proposal)
    if isinstance(folder, LeRobotFolder):
        rotation_format = folder.find_quaternion_format(str(proposal.fields["rotation"]))
        if rotation_format:
            proposal.fields["rotation_format"] = rotation_format
            proposal.facts["rotation_format"] = "by the names of its components"

    unused_numbers = _find_unused_numbers(columns, used_ranges, find_joint_names)
    _propose_gripper(columns, unused_numbers, rate_hz, proposal)
    return proposal.to_dict()


def _propose_joints(
    columns: Columns, folder: Dataset, urdf: Path, tip: str, proposal: _Proposal
) -> None:
    """Propose the columns of the joint angles of an arm, and of its gripper."""
    joint_columns = resolve_joint_columns(columns, folder, urdf, tip)
    fields, facts = make_joint_fields_and_facts(columns, joint_columns, urdf, tip)
    proposal.fields |= fields
    proposal.facts |= facts

    gripper = make_lerobot_gripper_fields(columns, folder, joint_columns)
    if gripper:
        proposal.fields |= gripper
        proposal.facts["gripper"] = "by its name; LeRobot's 0 is closed, and 100 open"
        return
    proposal.fields |= dict.fromkeys(("gripper", "gripper_range"))
    proposal.facts["gripper"] = "no number is named gripper: name it yourself"


def _make_layout_of_exported_dataset(folder: LeRobotFolder) -> dict[str, Any]:
    """Describe a dataset that `spear data export` wrote, whose columns are known."""
    cameras: list[str] = []
    for feature_name in folder.image_features:
        if not folder.info.features[feature_name].is_depth:
            cameras.append(feature_name.removeprefix("observation.images."))
    facts = {"action": "`spear data export` wrote this dataset: its actions are canonical"}
    layout = {**make_layout_fields(cameras), "facts": facts}
    written_file = folder.path / LAYOUT_FILE
    if written_file.is_file():  # no column says which version the frames have
        frames = read_json(written_file, "remove it").get("frames")
        if frames:
            layout["frames"] = frames
    return layout


def _read_first_episodes(folder: Dataset, split: str, path: str | Path) -> list[dict[str, Any]]:
    """Read the columns of the first good episodes.

    Episodes are left out if their columns are not the same as those of most episodes.
    """
    episodes = []
    for _, steps in itertools.islice(folder.read_steps(split, image_columns=()), MAX_EPISODES):
        if not isinstance(steps, SpearError):
            episodes.append(dict(walk_columns(steps)))
    if not episodes:
        raise SpearError(
            f"no episode of {path} can be read. `spear data inspect {path}` shows why."
        )
    signatures = [_get_column_signature(episode) for episode in episodes]
    usual_signature, _ = Counter(signatures).most_common(1)[0]
    pairs = zip(episodes, signatures, strict=True)
    return [episode for episode, signature in pairs if signature == usual_signature]


def _get_column_signature(episode: Mapping[str, Any]) -> frozenset[Any]:
    """Return the names, types and shapes (without the steps) of an episode's columns, as a set."""
    signature = set()
    for name, values in episode.items():
        shape_of_step = getattr(values, "shape", ())[1:]
        signature.add((name, type(values), shape_of_step))
    return frozenset(signature)


def list_joint_names_without_pose(path: str | Path, proposal: Mapping[str, Any]) -> list[str]:
    """List the names of a dataset's joints, if no position was proposed; else an empty list."""
    folder = open_dataset(path)
    if proposal.get("position") is not None or not isinstance(folder, LeRobotFolder):
        return []
    columns = [name.replace(".", "/") for name in folder.info.features]
    return list_state_joint_names(columns, folder)


def _propose_success(episodes: Sequence[Mapping[str, Any]], proposal: _Proposal) -> None:
    """Propose a column for `success`.

    Its name ends in "success", and its last value is positive in some of the episodes.
    """
    for name, values in episodes[0].items():
        if not name.endswith("success") or not isinstance(values, np.ndarray):
            continue
        if any(np.ravel(episode[name])[-1] > 0 for episode in episodes):
            proposal.fields["success"] = name


def _propose_instruction(episode: Mapping[str, Any], proposal: _Proposal) -> None:
    """Propose the first column of texts whose name says that it contains an instruction."""
    proposal.fields["instruction"] = None
    for name, values in episode.items():
        if not isinstance(values, list) or _are_encoded_images(values):
            continue
        if "instruction" in name or "language" in name:
            proposal.fields["instruction"] = name
            return


def _propose_task_indices(
    episodes: Sequence[Mapping[str, Any]], tasks: Mapping[int, str], proposal: _Proposal
) -> None:
    """Propose a column of task indices as instruction, if LeRobot's own task is no sentence.

    Args:
        episodes: the columns of each episode.
        tasks: task index → text, from the dataset's metadata.
        proposal: the proposal to be completed.
    """
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
    """Return whether a column has the same task index in all rows, and that task several words."""
    if not may_be_task_indices(values):
        return False
    indices = set(np.ravel(values).tolist())
    if len(indices) != 1:
        return False
    task = tasks.get(indices.pop(), "")
    return " " in task.strip()


def _find_signal_columns(episodes: Sequence[Mapping[str, Any]]) -> dict[str, list[Array]]:
    """Select the columns of numbers that may be measurements or commands."""
    columns = {}
    for name, values in episodes[0].items():
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "iuf":
            continue
        last_name = name.rpartition("/")[2]
        is_too_wide = values.size > MAX_NUMBERS * len(values)
        if is_too_wide or last_name in COLUMNS_WITHOUT_STATE:
            continue
        columns[name] = [
            np.asarray(episode[name], np.float64).reshape(len(episode[name]), -1)
            for episode in episodes
        ]
    return columns


def _drop_columns_and_episodes_with_nan(columns: Columns) -> dict[str, list[Array]]:
    """Drop columns that contain NaN in most episodes, then episodes in which other columns do."""
    is_finite = {}  # column → [episodes]
    for name, episodes in columns.items():
        is_finite[name] = np.array([np.isfinite(values).all() for values in episodes])
    finite_columns = [name for name in columns if is_finite[name].mean() > 0.5]
    is_good_episode = np.logical_and.reduce([is_finite[name] for name in finite_columns])
    if not np.any(is_good_episode):
        raise SpearError("in each episode a column contains NaN. Leave these columns out.")
    return {
        name: list(itertools.compress(columns[name], is_good_episode)) for name in finite_columns
    }


def _make_joint_name_finder(folder: Dataset) -> JointNameFinder:
    """Make a function that finds names of joints in the dataset's metadata and columns' names."""

    def find_joint_names(column: str) -> list[str]:
        names_in_column_name = JOINT_NAME_PATTERN.findall(column)
        if isinstance(folder, LeRobotFolder):
            return [*folder.find_joint_names(column), *names_in_column_name]
        return names_in_column_name

    return find_joint_names


def _find_unused_numbers(
    columns: Columns, used_ranges: Sequence[ColumnRange], find_joint_names: JointNameFinder
) -> list[ColumnRange]:
    """List the single numbers that are neither joints nor used for positions and rotations."""
    used_numbers = set()  # (column, index)
    for used_range in used_ranges:
        for index in range(used_range.first, used_range.end):
            used_numbers.add((used_range.column, index))
    unused_numbers = []
    for name, episodes in columns.items():
        for index in range(episodes[0].shape[1]):
            number = ColumnRange(name, index, index + 1)
            if (name, index) not in used_numbers and not find_joint_names(number.name(columns)):
                unused_numbers.append(number)
    return unused_numbers


def _are_encoded_images(values: Any) -> bool:
    """Return whether the values of a column are encoded color images, such as JPEG files."""
    if not isinstance(values, list):
        return False
    first = values[0] if values else b""
    return first.startswith(IMAGE_MAGIC_BYTES) and not is_depth_png(first)


def _propose_cameras(raw_episodes: RawEpisodes, rate_hz: float, proposal: _Proposal) -> None:
    """Propose the columns of images, and which of them is the wrist camera.

    Args:
        raw_episodes: the episodes, with their images.
        rate_hz: steps per second.
        proposal: the proposal to be completed.
    """
    shares: dict[str, list[float]] = {}  # column → changing share of the pixels in each episode
    for source, steps in itertools.islice(raw_episodes, MAX_VIEWED_EPISODES):
        if isinstance(steps, SpearError):
            continue
        for name, values in walk_columns(steps):
            if not are_raw_images(values) and not _are_encoded_images(values):
                continue
            images = read_encoded_images(steps, name, source)
            # The positions are not known yet. These made-up ones move at every step, so that no
            # image is left out because the arm is idle.
            fast_position = np.arange(3 * len(values)).reshape(-1, 3)
            view = summarize_view(images, fast_position, rate_hz, f"{source} column {name!r}")
            shares.setdefault(name, [])
            if not view.is_blank:
                shares[name].append(view.changing_share)

    median_shares = {}
    for name, episode_shares in shares.items():
        if episode_shares:
            median_shares[name] = float(np.nanmedian(episode_shares))
    facts = []
    for name, share in median_shares.items():
        facts.append(f"{name}: {share:.0%} of its pixels change in a step")
    facts += [f"{name} is blank" for name in shares if name not in median_shares]
    proposal.facts["images"] = "; ".join(facts)
    proposal.fields["images"] = _choose_cameras(median_shares)


def _choose_cameras(changing_shares: Mapping[str, float]) -> dict[str, str]:
    """Choose which camera is external and which is on the wrist.

    The wrist camera is recognized by its name, or because most of its image changes.

    Args:
        changing_shares: column → share of the pixels that change in a step.

    Returns:
        Our camera name → column.
    """
    if not changing_shares:
        return {}

    def has_wrist_name(name: str) -> bool:
        return any(word in name for word in WRIST_WORDS)

    # A camera with a wrist camera's name comes first, then the one whose image changes most.
    wrist_candidate = max(
        changing_shares, key=lambda name: (has_wrist_name(name), changing_shares[name])
    )
    other_cameras = [name for name in changing_shares if name != wrist_candidate]
    is_wrist = has_wrist_name(wrist_candidate)
    if other_cameras:
        max_other_share = max(changing_shares[name] for name in other_cameras)
        is_wrist |= changing_shares[wrist_candidate] > MIN_WRIST_RATIO * max_other_share
    if not is_wrist:
        first_camera = next(iter(changing_shares))
        return {"external": first_camera}
    if not other_cameras:
        return {"wrist": wrist_candidate}
    return {"external": other_cameras[0], "wrist": wrist_candidate}


def _propose_motion(
    columns: Columns, rate_hz: float, find_joint_names: JointNameFinder, proposal: _Proposal
) -> list[ColumnRange]:
    """Propose the columns of positions, orientations, and logged translations and rotations.

    Args:
        columns: the columns that may be measurements or commands.
        rate_hz: steps per second.
        find_joint_names: finds names of joints in a range.
        proposal: the proposal to be completed.

    Returns:
        The ranges of numbers that the proposal uses.
    """
    # These keys are open (None) until a value is found, here or in `_propose_gripper`.
    keys = ("position", "rotation", "rotation_format", "gripper", "gripper_range")
    proposal.fields |= dict.fromkeys(keys)
    candidates = _find_position_and_action_candidates(columns, rate_hz, find_joint_names)
    if not candidates:
        proposal.facts["position"] = (
            "no column but joints leads to the next state by any action: name it yourself; joint "
            "angles of a Franka are rotation_format franka_joints (docs/reference/spear-json.md), "
            f"those of another arm need its URDF: {JOINT_ADVICE}"
        )
        return []

    tied = _select_best_candidates(candidates)
    best = tied[0]
    translation_fit = _propose_position_and_logged_translation(
        best, tied, columns, rate_hz, proposal
    )
    if best.rotation is None or best.action_rotation is None:
        proposal.facts["rotation"] = (
            "no numbers of an action lead from one orientation to the next: name the columns of "
            "orientations and logged rotations yourself"
        )
        return [best.position, best.action_translation]
    rotation_fits = _find_best_fits(
        fit_rotations, best.position, best.rotation, best.action_rotation, columns, rate_hz
    )
    proposal.fields["rotation"] = best.rotation.name(columns)
    proposal.facts["rotation"] = _explain_chosen_column(
        best.action_rotation.name(columns), "orientation", rotation_fits[0]
    )
    _propose_rotation_format(
        best.rotation.values(columns), rotation_fits, translation_fit, proposal
    )
    proposal.fields["logged_rotation"] = best.action_rotation.name(columns)
    proposal.fields["logged_rotation_format"] = rotation_fits[0].hypothesis.action_format
    _propose_logged_frame(rotation_fits[0], translation_fit, proposal)
    return [best.position, best.action_translation, best.rotation, best.action_rotation]


def _list_triples(columns: Columns, find_joint_names: JointNameFinder) -> list[ColumnRange]:
    """List every three neighboring numbers of a column that are not joints."""
    triples = []
    for name, episodes in columns.items():
        for first in range(episodes[0].shape[1] - 2):
            triple = ColumnRange(name, first, first + 3)
            if not find_joint_names(triple.name(columns)):
                triples.append(triple)
    return triples


def _find_position_and_action_candidates(
    columns: Columns, rate_hz: float, find_joint_names: JointNameFinder
) -> list[_Candidate]:
    """List candidates for positions, and for actions that lead from one position to the next.

    Orientations and the actions that rotate are only sought for the best candidates of positions,
    because trying all combinations would take too long.
    """
    triples = _list_triples(columns, find_joint_names)
    translations = [triple for triple in triples if "action" in triple.column]
    positions = [triple for triple in triples if "action" not in triple.column]
    few_episodes = {name: episodes[:MAX_SEARCH_EPISODES] for name, episodes in columns.items()}

    # Try all pairs of positions and logged translations. The orientations of the state matter if
    # translations are in the end-effector frame.
    candidates = []
    for position, translation in itertools.product(positions, translations):
        rotations: list[ColumnRange | None] = []
        rotations += _find_orientations_near(position, columns, find_joint_names)
        if not rotations:
            rotations = [None]  # a candidate without orientations
        for rotation in rotations:
            fits = _find_best_fits(
                fit_translations, position, rotation, translation, few_episodes, rate_hz
            )
            if fits:
                # Candidates are ranked by the sum of two relative errors. That of the rotations is
                # not known yet.
                unexplained = round(fits[0].relative_error, 2) + UNEXPLAINED_WITHOUT_ROTATIONS
                candidates.append(_Candidate(unexplained, position, translation, rotation))

    # Try the best candidates again, with logged rotations.
    for candidate in sorted(candidates, key=lambda c: c.unexplained)[:MAX_CANDIDATES]:
        if candidate.rotation is None:
            continue
        action_rotations = _find_orientations_near(
            candidate.action_translation, columns, find_joint_names
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
                # The relative error of the rotations replaces the number that stood for it.
                unexplained_translations = candidate.unexplained - UNEXPLAINED_WITHOUT_ROTATIONS
                unexplained = unexplained_translations + fits[0].relative_error
                candidates.append(
                    candidate._replace(unexplained=unexplained, action_rotation=action_rotation)
                )
    return candidates


def _select_best_candidates(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Select the candidates that explain about as much as the best one, sorted by their columns.

    If some of them have orientations of more than three numbers, only these are selected.
    """
    limit = min(candidate.unexplained for candidate in candidates) + MIN_MARGIN
    tied = [candidate for candidate in candidates if candidate.unexplained <= limit]
    tied.sort(key=lambda candidate: (candidate.position.first, candidate.action_translation.first))
    # A candidate of more than three numbers consists of unit vectors (`_find_orientations_near`
    # checks this), so it is certainly an orientation. Three numbers may be anything.
    with_certain_rotation = []
    for candidate in tied:
        if candidate.rotation is not None and candidate.rotation.width > 3:
            with_certain_rotation.append(candidate)
    return with_certain_rotation or tied


def _propose_position_and_logged_translation(
    best: _Candidate,
    tied: Sequence[_Candidate],
    columns: Columns,
    rate_hz: float,
    proposal: _Proposal,
) -> Fit:
    """Fill in position and logged translation.

    Args:
        best: the candidate that is proposed.
        tied: all candidates that fit about as well, which the facts name.
        columns: the columns that may be measurements or commands.
        rate_hz: steps per second.
        proposal: the proposal to be completed.

    Returns:
        The fit of the best hypothesis about the translations.
    """
    fits = _find_best_fits(
        fit_translations, best.position, best.rotation, best.action_translation, columns, rate_hz
    )
    fit = fits[0]
    distances = np.linalg.norm(np.concatenate(best.position.values(columns)), axis=1)
    reach = float(np.quantile(distances, 0.95))  # a few positions may be wrong
    proposal.fields |= {
        "position": best.position.name(columns),
        "logged_translation": best.action_translation.name(columns),
        "length_unit": find_plausible_length_unit(reach) or "m",
        "logged_kind": fit.hypothesis.kind,
    }
    # The hypotheses take recorded positions for meters, so their unit "m" is the positions' unit.
    meters_per_position_unit = LENGTH_UNITS[proposal.fields["length_unit"]]
    logged_unit = fit.hypothesis.unit.removesuffix("/s")
    position_units_per_logged_unit = get_unit_factor(logged_unit, LENGTH_UNITS)
    if position_units_per_logged_unit != 1:
        meters_per_logged_unit = position_units_per_logged_unit * meters_per_position_unit
        proposal.fields["logged_translation_unit"] = round_to_known_unit_if_near(
            meters_per_logged_unit, LENGTH_UNITS
        )
    fact = _explain_chosen_column(best.action_translation.name(columns), "position", fit)
    rivals = {candidate.position.name(columns) for candidate in tied}
    rivals.remove(best.position.name(columns))
    if rivals:
        fact += f"; {' or '.join(sorted(rivals))} do as well, so ask which it is"
    proposal.facts["position"] = fact
    return fit


def _propose_rotation_format(
    orientations: Sequence[Array],
    fits: Sequence[Fit],
    translation_fit: Fit,
    proposal: _Proposal,
) -> None:
    """Propose how orientations and logged rotations are written.

    Args:
        orientations: [T, d] of each episode.
        fits: the fits of the best hypotheses about the rotations, see `_select_best_fits`.
        translation_fit: the fit of the best hypothesis about the translations.
        proposal: the proposal to be completed.
    """
    best = fits[0].hypothesis
    state_unit = guess_recorded_unit(np.concatenate(orientations))
    # If the states have no angles, the layout's unit of angles is that of the actions.
    angle_unit = state_unit if best.state_format in ANGLE_FORMATS else best.unit
    proposal.fields["rotation_format"] = best.state_format
    proposal.fields["angle_unit"] = "deg" if angle_unit.startswith("deg") else "rad"
    logged_unit = best.unit.removesuffix("/s")
    if logged_unit not in (UNIT_QUATERNION, proposal.fields["angle_unit"]):
        proposal.fields["logged_rotation_unit"] = get_unit_factor(logged_unit, ANGLE_UNITS)

    tied_formats = {fit.hypothesis.state_format for fit in fits}
    other_formats = find_formats_that_turn_otherwise(
        orientations, best.state_format, tied_formats, translation_fit.hypothesis, best
    )
    if other_formats:
        proposal.fields["rotation_format"] = None
        names = " or ".join([best.state_format, *other_formats])
        proposal.facts["rotation_format"] = f"{names}; no action tells, so ask who recorded it"


def _propose_logged_frame(rotation_fit: Fit, translation_fit: Fit, proposal: _Proposal) -> None:
    """Propose the frame of logged translations, and that of logged rotations if it is another."""
    translation_frame = translation_fit.hypothesis.frame
    rotation_frame = rotation_fit.hypothesis.frame
    proposal.fields["logged_frame"] = translation_frame
    is_rotation_explained = rotation_fit.relative_error <= MAX_UNEXPLAINED
    if rotation_frame != translation_frame and is_rotation_explained:
        proposal.fields["logged_rotation_frame"] = rotation_frame


def _explain_chosen_column(column: str, moved: Literal["position", "orientation"], fit: Fit) -> str:
    """Say in words why logged actions were chosen.

    Args:
        column: the column of the logged actions.
        moved: what the actions change.
        fit: the fit of the best hypothesis about them.
    """
    hypothesis = fit.hypothesis
    doubt = ": too much to rely on" if fit.relative_error > MAX_UNEXPLAINED else ""
    return (
        f"{column} leads from one {moved} to the next except for {fit.relative_error:.0%} of the "
        f"motion{doubt} ({hypothesis.kind}, {hypothesis.frame} frame, {hypothesis.unit}, "
        f"{hypothesis.signs}, {hypothesis.delay_steps} late)"
    )


def _find_orientations_near(
    near: ColumnRange, columns: Columns, find_joint_names: JointNameFinder
) -> list[ColumnRange]:
    """Find where orientations may be if positions, or logged translations, are at `near`.

    Orientations are sought in three places: directly before or behind `near`; around it, if it is
    the translation of a homogeneous pose of 16 numbers; and at the beginning of the other columns
    (of actions, if `near` is an action, and of states otherwise). They are poses or rows of a
    rotation matrix, or else unit quaternions, or else any three numbers.
    """
    widths = {name: episodes[0].shape[1] for name, episodes in columns.items()}
    is_action = "action" in near.column
    other_columns = []
    for name in widths:
        if name != near.column and ("action" in name) == is_action:
            other_columns.append(name)

    # 16: pose; 6: two rows or columns of a rotation matrix; 4: quaternion; 3: angles or a rotation
    # vector. The first size with results decides.
    for size in (16, 6, 4, 3):
        starts = [(near.column, near.end), (near.column, near.first - size)]
        # A pose of 16 numbers in column order ends with its translation and a 1, so it begins 15
        # numbers before the translation ends. Rotations of a smaller size may begin at this
        # number, too.
        starts.append((near.column, near.end - 15))
        starts += [(name, 0) for name in other_columns]
        orientations = []
        for name, first in starts:
            if not 0 <= first <= widths[name] - size:
                continue
            candidate = ColumnRange(name, first, first + size)
            if find_joint_names(candidate.name(columns)):
                continue
            values = np.concatenate(candidate.values(columns))
            if size == 3 or _are_rotations(values):
                orientations.append(candidate)
        if orientations:
            return orientations
    return []


def _are_rotations(values: Array) -> bool:
    """Return whether numbers are unit quaternions, or perpendicular axes of length 1.

    Args:
        values: [N, 4] quaternions, [N, 6] two vectors, or [N, 16] poses with a rotation matrix.
    """
    width = values.shape[1]
    if width == 4:
        # Three small angles, followed by a gripper command of -1 or 1, also have a length near 1 as
        # a vector of four numbers.
        is_plus_or_minus_one = (np.abs(values) == 1).all(0)  # [4]
        takes_both_signs = np.ptp(values, axis=0) == 2
        if (is_plus_or_minus_one & takes_both_signs).any():
            return False
        axes = values.reshape(len(values), 1, 4)
    elif width == 16:
        axes = values.reshape(-1, 4, 4)[:, :3, :3]
    else:
        axes = values.reshape(len(values), -1, 3)
    # The axes [N, number of vectors, numbers] are orthonormal if their scalar products are the
    # identity.
    products = axes @ axes.swapaxes(1, 2)
    identity = np.eye(axes.shape[1])
    return bool(np.abs(products - identity).max() < 1e-2)  # recorded numbers may be rounded


def _find_best_fits(
    fit_hypotheses: Callable[[Sequence[Recording], Stretches], list[Fit]],
    position: ColumnRange,
    rotation: ColumnRange | None,
    logged: ColumnRange,
    columns: Columns,
    rate_hz: float,
) -> list[Fit]:
    """Find the best hypotheses about logged numbers.

    Args:
        fit_hypotheses: `fit_translations` or `fit_rotations`.
        position: the positions.
        rotation: the orientations; None if they are not known.
        logged: the logged translations or rotations.
        columns: the columns in which `position`, `rotation` and `logged` are.
        rate_hz: steps per second.

    Returns:
        The best fits, see `_select_best_fits`; none if no episode is long enough or nothing moves.
    """
    recordings = _make_recordings(position, rotation, logged, columns, rate_hz)
    stretches = Stretches(recordings)
    return _select_best_fits(fit_hypotheses(recordings, stretches)) if stretches.num else []


def _make_recordings(
    position: ColumnRange,
    rotation: ColumnRange | None,
    logged: ColumnRange,
    columns: Columns,
    rate_hz: float,
) -> list[Recording]:
    """Make recordings whose logged translations and logged rotations are both `logged`.

    Only one of them will be tested. Without `rotation`, the orientation is constant.
    """
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


def _select_best_fits(fits: Sequence[Fit]) -> list[Fit]:
    """Return the best fit, and behind it all fits that are as good.

    Of equally good fits, the one with the most `PREFERRED_ANSWERS` is the best. If nothing moves,
    the result is empty.
    """

    def count_preferred_answers(fit: Fit) -> int:
        return sum(str(answer) in PREFERRED_ANSWERS for answer in fit.hypothesis)

    # Answers are counted only for the fits that share the smallest rounded error, as most do not.
    smallest_error = round(min(fit.relative_error for fit in fits), 2)
    best_fits = [fit for fit in fits if round(fit.relative_error, 2) == smallest_error]
    best = max(best_fits, key=count_preferred_answers)
    if best.motion.sum() <= 0:
        return []
    limit = best.relative_error + MIN_MARGIN
    return [best, *(fit for fit in fits if fit is not best and fit.relative_error <= limit)]


def _propose_gripper(
    columns: Columns, unused_numbers: Sequence[ColumnRange], rate_hz: float, proposal: _Proposal
) -> None:
    """Propose the gripper: the unused number that follows a command best, and which end is open.

    Args:
        columns: the columns that may be measurements or commands.
        unused_numbers: single numbers that are not used for the motion of the arm.
        rate_hz: steps per second.
        proposal: the proposal to be completed.
    """
    values: dict[ColumnRange, list[Array]] = {}  # number → its readings [T] in each episode
    for number in unused_numbers:
        values[number] = [readings[:, 0] for readings in number.values(columns)]
    moving = [number for number in unused_numbers if np.ptp(np.concatenate(values[number])) > 0]
    commands = [number for number in moving if "action" in number.column]
    states = [number for number in moving if "action" not in number.column]
    pairs = []  # (strongest correlation over all delays, state, command)
    for state, command in itertools.product(states, commands):
        episodes = []
        for openings, commanded in zip(values[state], values[command], strict=True):
            episodes.append(CommandedGripper(openings, commanded, rate_hz))
        correlations = [
            following.correlation for following in correlate_commands_by_delay(episodes)
        ]
        pairs.append((max(correlations, key=abs), state, command))
    if not pairs:
        proposal.facts["gripper"] = (
            "no number is left that moves as an action does: name it yourself"
        )
        return

    correlation, state, command = max(pairs, key=lambda pair: abs(pair[0]))
    low, high = _compute_rounded_range(values[state])
    verdict, words = _judge_whether_high_reading_is_open(values[state], low, high)
    is_flipped = verdict == "wrong"  # the low end is open
    conclusions = {"agrees": "", "wrong": "; so the ends are exchanged"}
    conclusion = conclusions.get(verdict, ": check which end is open")
    evidence = words.partition("; exchange")[0]  # without the advice to correct a layout
    proposal.fields["gripper"] = state.name(columns)
    proposal.fields["gripper_range"] = [high, low] if is_flipped else [low, high]
    proposal.facts["gripper_range"] = f"as far as it went: {evidence}{conclusion}"
    proposal.facts["gripper"] = (
        f"of the free numbers it follows {command.name(columns)} best, "
        f"correlation {correlation:.2f}"
    )
    if abs(correlation) >= MIN_CORRELATION:
        command_low, command_high = _compute_rounded_range(values[command])
        # The command's high end opens the gripper if command and opening rise together and the
        # opening's high end is open, or if neither is the case.
        is_high_command_open = (correlation > 0) != is_flipped
        proposal.fields["command"] = command.name(columns)
        proposal.fields["command_range"] = (
            [command_low, command_high] if is_high_command_open else [command_high, command_low]
        )


def _judge_whether_high_reading_is_open(
    episodes: Sequence[Array], low: float, high: float
) -> Judgment:
    """Judge whether the high end of the readings is open, from episodes where the gripper moves.

    Args:
        episodes: readings [T] of each episode.
        low: the smallest reading.
        high: the largest reading.
    """
    openings = []
    for values in episodes:
        if np.ptp(values) > MIN_MOTION * (high - low):
            openings.append((values - low) / (high - low))
    if len(openings) < MIN_EPISODES:
        return Judgment("cannot tell", "it hardly moves")
    return judge_whether_high_is_open(openings)


def _compute_rounded_range(values: Sequence[Array]) -> tuple[float, float]:
    """Return the smallest and the largest reading, each rounded to four digits.

    If the readings nearly span 0 to 1, the ends are 0 and 1.
    """
    readings = np.concatenate(values)
    low = float(f"{np.min(readings):.4g}")
    high = float(f"{np.max(readings):.4g}")
    # A gripper may overshoot 0 or 1 a little, and need not have opened completely.
    if low >= -0.05 and 0.9 <= high <= 1.05:
        return 0.0, 1.0
    return low, high
