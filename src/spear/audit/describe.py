"""A proposal of `spear.json` for a dataset that nobody has described: to be read and corrected.

The columns are read in every way that the audit knows; what explains the recorded motion best is proposed.
What no column can say (where the gripper's own axes point, the rate of RLDS) is left open.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spear.audit import hypotheses
from spear.audit.dataset_audit import MARGIN, UNEXPLAINED
from spear.checks.senses import FARTHEST, FEWEST, FOLLOWS, MOVES, follows, look, sense
from spear.data.readers.columns import RawEpisodes, is_depth_png, walk_columns
from spear.data.readers.dataset_layout import ANGLE_FORMATS
from spear.data.readers.formats import count_episodes, open_dataset
from spear.data.readers.lerobot import JOINT_NAME_PATTERN, LeRobotFolder
from spear.data.store.episode_store import EpisodeStore
from spear.errors import SpearError
from spear.types import Array
from spear.util.images import IMAGE_MAGIC_BYTES
from spear.util.units import LENGTH_UNITS

EPISODES, FEW, VIEWED, WIDEST, WAYS = 30, 8, 5, 32, 8
"""Episodes that are read, those in which columns are sought, and whose images are looked at; numbers that a
measurement has at most, and ways to choose the columns of positions by which rotations are sought."""
AT_WRIST, TWICE = ("wrist", "hand", "gripper", "eye_in"), 2.0
"""Parts of the names of wrist cameras; how many times as much of their view must change as of all others."""
NO_STATE = (
    "timestamp",
    "reward",
    "discount",
    "frame_index",
    "episode_index",
    "index",
    "task_index",
)
PLAIN = ("delta", "base", "+++", "0", "euler_xyz", "m", "rad")
"""The answers that are taken where others fit as well."""
Columns = Mapping[str, Sequence[Array]]
"""Column -> [T, d] of each episode."""
Joints = Callable[[str], Sequence[str]]
"""See `LeRobotFolder.joints`; or what a column's own name says."""


class Window(NamedTuple):
    """Some of the numbers of a column."""

    column: str
    first: int
    end: int

    def of(self, columns: Columns) -> list[Array]:
        """[T, numbers] of each episode."""
        return [values[:, self.first : self.end] for values in columns[self.column]]

    def name(self, columns: Columns) -> str:
        """As a layout has it."""
        if self.end - self.first == columns[self.column][0].shape[1]:
            return self.column
        span = f"{self.first}:{self.end}" if self.end > self.first + 1 else f"{self.first}"
        return f"{self.column}[{span}]"


def describe(path: str | Path) -> dict[str, Any]:
    """What `spear.json` could say of a dataset; its `facts` tell why, and what is open.

    Raises SpearError for a folder that needs none, and for data that hold nothing to go by.
    """
    folder = open_dataset(path)
    if isinstance(folder, EpisodeStore):
        raise SpearError(
            f"nothing to describe: {path} is a store of episodes, whose columns are known"
        )
    split = next(iter(count_episodes(path)))
    read = itertools.islice(folder.read_steps(split, images=()), EPISODES)
    episodes = [dict(walk_columns(steps)) for _, steps in read if not isinstance(steps, SpearError)]
    if not episodes:
        raise SpearError(f"no good episode: {path}: see spear data inspect")
    has = [
        frozenset((n, type(v), getattr(v, "shape", ())[1:]) for n, v in each.items())
        for each in episodes
    ]
    usual = Counter(has).most_common(1)[0][0]
    episodes = [each for each, columns in zip(episodes, has, strict=True) if columns == usual]
    facts = {"tool_rotation": "no column can say it: see docs/data.md"}
    rate = folder.info.fps if isinstance(folder, LeRobotFolder) else 5.0
    found: dict[str, Any] = {"images": _cameras(folder.read_steps(split), facts, rate)}
    won = (n for n, v in episodes[0].items() if n.endswith("success") and isinstance(v, np.ndarray))
    found |= [("success", name) for name in won if any(np.ravel(e[name])[-1] > 0 for e in episodes)]
    if not isinstance(folder, LeRobotFolder):
        texts = (n for n, v in episodes[0].items() if isinstance(v, list) and not _is_image(v))
        found["instruction"] = next(
            (n for n in texts if "instruction" in n or "language" in n), None
        )
        found["rate_hz"], facts["rate_hz"] = (
            None,
            "not in the metadata: write how many steps a second has",
        )
    columns = {
        name: [np.asarray(e[name], np.float64).reshape(len(e[name]), -1) for e in episodes]
        for name, values in episodes[0].items()
        if isinstance(values, np.ndarray) and values.dtype.kind in "iuf"
        if values.size <= WIDEST * len(values) and name.rpartition("/")[2] not in NO_STATE
    }
    finite = _finite(columns)
    named: Joints = folder.joints if isinstance(folder, LeRobotFolder) else lambda where: []
    joints: Joints = lambda where: [*named(where), *JOINT_NAME_PATTERN.findall(where)]  # noqa: E731
    taken = _motion(found, facts, finite, rate, joints)
    if isinstance(folder, LeRobotFolder) and (form := folder.quaternion(str(found["rotation"]))):
        found["rotation_format"], facts["rotation_format"] = form, "by the names of its components"
    used = {(window.column, i) for window in taken for i in range(window.first, window.end)}
    free = [Window(n, i, i + 1) for n, each in finite.items() for i in range(each[0].shape[1])]
    free = [w for w in free if (w.column, w.first) not in used and not joints(w.name(finite))]
    _gripper(found, facts, finite, free, rate)
    return {**found, "facts": facts}


def _finite(columns: Columns) -> Columns:
    """The columns that are all numbers in most episodes, of episodes where they are: a NaN would decide."""
    finite = {
        name: np.array([np.isfinite(v).all() for v in each]) for name, each in columns.items()
    }
    kept = [name for name in columns if finite[name].mean() > 0.5]
    good = np.logical_and.reduce([finite[name] for name in kept])
    if not np.any(good):
        raise SpearError(
            "no good episode: in each of them a column holds NaN: leave these columns out"
        )
    return {name: list(itertools.compress(columns[name], good)) for name in kept}


def _is_image(values: Sequence[Any]) -> bool:
    first = values[0] if values else b""
    return first.startswith(IMAGE_MAGIC_BYTES) and not is_depth_png(first)


def _cameras(read: RawEpisodes, facts: dict[str, str], rate: float) -> dict[str, str]:
    """Our camera name -> column; at the wrist is one whose name or motion says so."""
    changes: dict[str, list[float]] = {}
    for source, steps in itertools.islice(read, VIEWED):
        for name, values in walk_columns(steps) if not isinstance(steps, SpearError) else ():
            if isinstance(values, list) and _is_image(values):
                all_count = np.arange(3 * len(values)).reshape(
                    -1, 3
                )  # as if the arm moved at every step
                view = look(values, all_count, rate, f"{source} column {name!r}")
                changes.setdefault(name, []).extend([] if view.blank else [view.change])
    shown = {name: float(np.nanmedian(each)) for name, each in changes.items() if each}
    parts = [f"{name}: {part:.0%} of it change in a step" for name, part in shown.items()]
    facts["images"] = "; ".join(
        [*parts, *(f"{name} is blank" for name in changes if name not in shown)]
    )
    if not shown:
        return {}
    wrist = max(shown, key=lambda name: (any(word in name for word in AT_WRIST), shown[name]))
    others = [name for name in shown if name != wrist]
    moves = others and shown[wrist] > TWICE * max(shown[name] for name in others)
    if moves or any(word in wrist for word in AT_WRIST):
        return {"external": others[0], "wrist": wrist} if others else {"wrist": wrist}
    return {"external": next(iter(shown))}


class _Way(NamedTuple):
    """Columns that may be positions, rotations, and the actions that lead from one to the next. left: parts
    of the motions that are not explained, of translations and rotations together; 1 where none are sought."""

    left: float
    place: Window
    move: Window
    turn: Window | None
    act: Window | None = None


def _motion(
    found: dict[str, Any], facts: dict[str, str], columns: Columns, rate: float, joints: Joints
) -> list[Window]:
    """Position and rotation, and the logged actions that lead from one to the next; the numbers they take."""
    found |= dict.fromkeys(("position", "rotation", "rotation_format", "gripper", "gripper_range"))
    windows = [
        Window(n, i, i + 3) for n, each in columns.items() for i in range(each[0].shape[1] - 2)
    ]
    windows = [window for window in windows if not joints(window.name(columns))]
    moves = [window for window in windows if "action" in window.column]
    places = [window for window in windows if window not in moves]
    few = {name: each[:FEW] for name, each in columns.items()}
    ways: list[_Way] = []
    for place, move in itertools.product(places, moves):
        turns: Sequence[Window | None] = _beside(place, columns, joints) or [None]
        fits = [(turn, _best("translation", place, turn, move, few, rate)) for turn in turns]
        ways += [
            _Way(round(equal[0].relative, 2) + 1, place, move, turn)
            for turn, equal in fits
            if equal
        ]
    if not ways:
        facts["position"] = (
            "no column but joints leads to the next state by any action: name it yourself"
        )
        return []
    for way in sorted(ways, key=lambda way: way.left)[:WAYS]:
        for turned in _beside(way.move, columns, joints) if way.turn is not None else ():
            if equal := _best("rotation", way.place, way.turn, turned, few, rate):
                ways.append(way._replace(left=way.left - 1 + equal[0].relative, act=turned))
    least = min(way.left for way in ways) + MARGIN
    near = sorted((w for w in ways if w.left <= least), key=lambda w: (w.place.first, w.move.first))
    # Numbers of length 1 are an orientation, which other numbers are only perhaps.
    near = [
        way for way in near if way.turn is not None and way.turn.end > way.turn.first + 3
    ] or near
    _, place, move, turn, act = near[0]
    fit = _best("translation", place, turn, move, columns, rate)[0]
    far = float(np.quantile(np.linalg.norm(np.concatenate(place.of(columns)), axis=1), 0.95))
    found |= {"position": place.name(columns), "logged_translation": move.name(columns)}
    found["length_unit"] = next(
        (u for u, factor in LENGTH_UNITS.items() if far * factor <= FARTHEST), "m"
    )
    found["logged_kind"] = fit.reading.kind
    facts["position"] = _why(move.name(columns), fit)
    if rivals := {way.place.name(columns) for way in near} - {place.name(columns)}:
        facts["position"] += f"; others do as well: {' or '.join(sorted(rivals))}: ask which it is"
    if turn is None or act is None:
        facts["rotation"] = "no numbers beside them lead from one to the next: name them yourself"
        return [place, move]
    equal = _best("rotation", place, turn, act, columns, rate)
    written, values = equal[0], turn.of(columns)
    form, (_, unit) = written.reading.state, hypotheses.state_quaternions(np.concatenate(values))
    found |= {"rotation": turn.name(columns), "rotation_format": form}
    read = unit if form in ANGLE_FORMATS else written.reading.unit
    found["angle_unit"] = "deg" if read.startswith("deg") else "rad"
    found |= {"logged_rotation": act.name(columns), "logged_rotation_format": written.reading.form}
    facts["rotation"] = _why(act.name(columns), written)
    same = (written.reading.frame == "ee") == (fit.reading.frame == "ee")
    forms = {f.reading.state for f in equal}
    if others := hypotheses.turning_otherwise(values, form, forms, fit.reading, written.reading):
        found["rotation_format"] = None
        facts["rotation_format"] = (
            f"{' or '.join([form, *others])}: no action tells: ask who recorded it"
        )
    found["logged_frame"] = fit.reading.frame if same or written.relative > UNEXPLAINED else None
    if found["logged_frame"] is None:
        facts["logged_frame"] = "translations and rotations are in two frames: no layout says both"
    return [place, move, turn, act]


def _why(name: str, fit: hypotheses.Fit) -> str:
    reading, unsure = fit.reading, ": too much to rely on" if fit.relative > UNEXPLAINED else ""
    how = f"{reading.kind}, {reading.frame} frame, {reading.unit}, {reading.signs}, {reading.shift} late"
    return f"{name} leads from one to the next but for {fit.relative:.0%} of the motion{unsure} ({how})"


def _beside(window: Window, columns: Columns, joints: Joints) -> list[Window]:
    """Where orientations may be, if positions are there, perhaps in the pose: axes of length 1 that are
    perpendicular, or else unit quaternions, or else three numbers."""
    ends = {name: each[0].shape[1] for name, each in columns.items()}
    kind = [name for name in ends if ("action" in name) == ("action" in window.column)]
    for size in (16, 6, 4, 3):
        spans = [
            (window.column, first) for first in (window.end, window.first - size, window.end - 15)
        ]
        spans += [(name, 0) for name in kind if name != window.column]
        found = [Window(n, i, i + size) for n, i in spans if 0 <= i <= ends[n] - size]
        found = [w for w in found if not joints(w.name(columns))]
        if found := [w for w in found if size == 3 or _is_unit(np.concatenate(w.of(columns)))]:
            return found
    return []


def _is_unit(values: Array) -> bool:
    """Whether numbers [N, 4] are of length 1, or [N, 6] and poses [N, 16] perpendicular triples of it."""
    if (
        values.shape[1] == 4
        and ((np.abs(values) == 1).all(0) & (np.ptp(values, axis=0) == 2)).any()
    ):
        return False  # a gripper's -1 and 1 beside small turns
    poses = values.reshape(-1, 4, 4)[:, :3, :3] if values.shape[1] == 16 else values
    axes = poses.reshape(len(values), -1, 4 if values.shape[1] == 4 else 3)
    return bool(np.abs(axes @ axes.swapaxes(1, 2) - np.eye(axes.shape[1])).max() < 1e-2)


def _best(
    name: str, where: Window, turn: Window | None, logged: Window, columns: Columns, rate: float
) -> list[hypotheses.Fit]:
    """The readings of logged values that fit best, of equals the plainest first; none where nothing moves."""
    places, acts = where.of(columns), logged.of(columns)
    turns = turn.of(columns) if turn else [np.tile([1.0, 0, 0, 0], (len(p), 1)) for p in places]
    parts = zip(places, turns, acts, strict=True)
    recordings = [
        hypotheses.Recording("", p, r, a, a, np.ones(len(p), bool), rate) for p, r, a in parts
    ]
    stretches = hypotheses.Stretches(recordings)
    if not stretches.count:
        return []
    fit_all = hypotheses.translation_fits if name == "translation" else hypotheses.rotation_fits
    fits = fit_all(recordings, stretches)
    likely = lambda fit: sum(str(answer) in PLAIN for answer in fit.reading)  # noqa: E731
    best = min(fits, key=lambda fit: (round(fit.relative, 2), -likely(fit)))
    near = [fit for fit in fits if fit is not best and fit.relative <= best.relative + MARGIN]
    return [best, *near] if best.moved.sum() > 0 else []


def _gripper(
    found: dict[str, Any],
    facts: dict[str, str],
    columns: Columns,
    free: Sequence[Window],
    rate: float,
) -> None:
    """The free number that follows a command best, and which end of it is open."""
    values = {w: [v[:, 0] for v in w.of(columns)] for w in free}
    moving = [w for w, each in values.items() if np.ptp(np.concatenate(each)) > 0]
    pairs = []
    for state, act in itertools.product(moving, moving):
        if "action" in act.column and "action" not in state.column:
            both = [(o, c, rate) for o, c in zip(values[state], values[act], strict=True)]
            pairs.append((max((strength for _, strength in follows(both)), key=abs), state, act))
    if not pairs:
        facts["gripper"] = "no number is left that moves as an action does: name it yourself"
        return
    strength, state, act = max(pairs, key=lambda pair: abs(pair[0]))
    low, high = ends = _ends(values[state])
    openings = [(v - low) / (high - low) for v in values[state] if np.ptp(v) > MOVES * (high - low)]
    verdict, words = (
        sense(openings) if len(openings) >= FEWEST else ("cannot tell", "it hardly moves")
    )
    flipped = verdict == "wrong"
    found |= {"gripper": state.name(columns), "gripper_range": ends[::-1] if flipped else ends}
    told = {"agrees": "", "wrong": "; so the ends are exchanged"}.get(
        verdict, ": check which end is open"
    )
    facts["gripper_range"] = f"as far as it went: {words.partition(': exchange')[0]}{told}"
    facts["gripper"] = (
        f"of the free numbers it follows {act.name(columns)} best, correlation {strength:.2f}"
    )
    if abs(strength) >= FOLLOWS:
        command = _ends(values[act])
        same = (strength > 0) != flipped
        found |= {"command": act.name(columns), "command_range": command if same else command[::-1]}


def _ends(values: Sequence[Array]) -> list[float]:
    """The smallest and largest reading; 0 and 1 where these are meant."""
    low, high = (float(f"{end(np.concatenate(values)):.4g}") for end in (np.min, np.max))
    return [0.0, 1.0] if low >= -0.05 and 0.9 <= high <= 1.05 else [low, high]
