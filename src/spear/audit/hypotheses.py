"""How well every plausible reading of logged actions leads from state to state: the numbers of the audit.

A reading says what the logged numbers mean: a change per step, a velocity or a target; about which axes; in
which unit, with which signs; how an orientation is written; how many steps later the robot does it. Each
episode is cut into stretches of at most 20 steps. A reading is integrated from the first recorded state of a
stretch, and its error is the mean distance to the recorded states, divided by the mean distance that the
robot moved from there: 0 is perfect, 1 is as bad as predicting that it stands still. Ours throughout.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from spear.checks.recording import Recording, are_degrees
from spear.data.readers.dataset_layout import RECORDED_ONLY
from spear.data.readers.rotation_formats import ROTATION_FORMATS
from spear.geometry import quat_conjugate, quat_multiply, quat_normalize, quat_rotate
from spear.types import Array
from spear.util.units import ANGLE_UNITS, LENGTH_UNITS

SHIFTS = (-1, 0, 1, 2)
"""Steps by which the robot may be late: 0 when action t leads from state t to state t + 1."""
STRETCH = 20
"""Steps over which actions are integrated: over more, small errors that add up would hide the large ones."""
SIGNS = {
    "".join(s): np.array([float(f"{sign}1") for sign in s])
    for s in itertools.product("+-", repeat=3)
}
"""Signs of the x, y and z components -> what they are multiplied by."""
FLIPS = np.stack(list(SIGNS.values()))  # [8, 3]
APART = 0.1
"""Part of its turns by which a gripper turns otherwise, where orientations are read in two forms."""
Scale = tuple[str, str, float]
"""Kind, unit, and the factor to metres or radians per step."""
UNSCALED = "unit quaternion"
JUDGED = tuple(form for form in ROTATION_FORMATS if form not in RECORDED_ONLY)
"""Ways to write an orientation that are tried."""


class Reading(NamedTuple):
    """What logged numbers mean.

    frame   "base", "ee", or "angles": added to the angles (or the rotation vector) themselves.
    shift   see `SHIFTS`.
    state   how recorded orientations are written; "-" where that plays no part.
    form    how a logged rotation is written; "-" for translations.
    """

    kind: str
    frame: str
    unit: str
    signs: str
    shift: int
    state: str
    form: str


@dataclass(frozen=True)
class Fit:
    """A reading's summed errors and the distances moved, one entry per unit of resampling (see `Stretches`).

    Metres and radians; `steps`: how many states were compared; `factor`: from logged translations to metres.
    """

    reading: Reading
    error: Array
    moved: Array
    steps: int
    factor: float = 1.0

    @cached_property
    def relative(self) -> float:
        """Error as part of the motion."""
        return float(self.error.sum() / max(self.moved.sum(), 1e-12))

    @property
    def mean(self) -> float:
        """Mean distance between integrated and recorded states, m or rad."""
        return float(self.error.sum() / self.steps)


class Stretches:
    """Runs of at most `STRETCH` steps of some recordings, all their rows one after the other.

    rows    [n, L + 1] the row of each state of each stretch (padded with its last one).
    inside  [n, L] which steps are real.
    unit    [n] what is resampled for intervals: the episode (`of_episodes`), or the stretch if they are few.

    Every action that any shift would use is valid. `count` is 0 when no episode is long enough.
    """

    def __init__(self, recordings: Sequence[Recording]) -> None:
        rows, inside, episode, start = [], [], [], 0
        for number, recording in enumerate(recordings):
            for first, end in _runs(recording.valid):
                for low in range(first, end, STRETCH):
                    steps = low + np.arange(STRETCH + 1)
                    rows.append(start + np.minimum(steps, end))
                    inside.append(steps[:-1] < end)
                    episode.append(number)
            start += len(recording.position)
        self.count = len(rows)
        self.rows = np.array(rows, int).reshape(-1, STRETCH + 1)
        self.inside = np.array(inside, bool).reshape(-1, STRETCH)
        self.of_episodes = len(set(episode)) >= 8
        self.unit = (
            np.unique(episode, return_inverse=True)[1]
            if self.of_episodes
            else np.arange(self.count)
        )
        self._members = self.unit[:, None] == np.arange(self.unit.max(initial=-1) + 1)

    def acted(self, shift: int) -> Array:
        """[n, L] the row of the action that is thought to lead to each next state."""
        return self.rows[:, :-1] - shift

    def sums(self, distances: Array) -> Array:
        """[..., n, L] distances, real steps only, summed per unit: [..., U]."""
        return np.where(self.inside, distances, 0).sum(-1) @ self._members


def _runs(valid: Array) -> Iterator[tuple[int, int]]:
    """(first, end) such that for every state first ≤ t < end the actions of all shifts are valid."""
    early, late = max(SHIFTS), -min(SHIFTS)
    good = [int(valid[t - early : t + late + 1].all()) for t in range(early, len(valid) - late - 1)]
    edges = np.flatnonzero(np.diff([0, *good, 0]))
    for first, end in zip(edges[::2], edges[1::2], strict=True):
        yield early + int(first), early + int(end)


def _vector(values: Array) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values, np.float64))


def _quaternions(form: str, values: torch.Tensor) -> torch.Tensor:
    return quat_normalize(ROTATION_FORMATS[form][1](values))


def _forms(values: Array) -> list[str]:
    """The ways in which numbers [N, d] may be meant as rotations."""
    return [name for name in JUDGED if ROTATION_FORMATS[name][0] == values.shape[1]]


def state_forms(values: Array) -> list[str]:
    """The ways in which recorded numbers [N, d] may be meant as orientations.

    Not yaw, pitch, roll: states and actions written so, with frames exchanged, are the mirror image of roll,
    pitch, yaw. Rotations alone cannot tell the two (see `turning_otherwise`); where only one is written so,
    it is said of the actions.
    """
    return [name for name in _forms(values) if name != "euler_ZYX"]


def state_quaternions(rotation: Array) -> tuple[dict[str, Array], str]:
    """Form -> quaternions [N, 4] of recorded orientations, by all formats, and the unit of their angles.

    Angles beyond a whole turn are degrees, others radians: changes alone could not tell.
    """
    unit = UNSCALED
    if rotation.shape[1] == 3:
        unit = "deg" if are_degrees(rotation) else "rad"
    values = _vector(rotation * ANGLE_UNITS.get(unit, 1.0))
    return {name: _quaternions(name, values).numpy() for name in _forms(rotation)}, unit


def tells_order(moved: Reading | None, turned: Reading | None) -> bool:
    """Whether actions tell roll, pitch, yaw from yaw, pitch, roll: not where they are targets, and only if
    translations and rotations would else be in two frames."""
    if not moved or not turned or turned.kind == "absolute":
        return False
    return (moved.frame == "ee") == (turned.frame == "ee")


def turning_otherwise(
    rotations: Sequence[Array],
    said: str,
    forms: Iterable[str],
    moved: Reading | None,
    turned: Reading | None,
) -> list[str]:
    """Those forms of recorded orientations (each episode's [T, d]) by which the gripper turns otherwise.

    forms fit as well as the one that is said; moved, turned: the best readings of translations and rotations,
    None where they tell nothing.
    """
    others = sorted({*forms} - {said})
    if "euler_xyz" in {said, *others} and not tells_order(moved, turned):
        others.append("euler_ZYX")
    read, _ = state_quaternions(np.concatenate(rotations))
    ends = np.cumsum([len(values) for values in rotations])[:-1]

    def turns(form: str) -> Array:
        at = _vector(read[form])
        return np.delete(quat_multiply(quat_conjugate(at[:-1]), at[1:]).numpy(), ends - 1, axis=0)

    steps = turns(said)
    least = APART * _angle(steps[:, 0]).mean() + 1e-6
    return [form for form in others if _angle((steps * turns(form)).sum(-1)).mean() > least]


def _scales(logged: Array, moved: float, units: Mapping[str, float], dt: float) -> list[Scale]:
    """(kind, unit, factor) for changes and velocities, and a fitted unit where none of those is near.

    moved  the size of a recorded step, to be compared with the size of a logged one.
    """
    found = [("delta", name, factor) for name, factor in units.items()]
    found += [("velocity", f"{name}/s", factor * dt) for name, factor in units.items()]
    size = float(np.sqrt((logged**2).sum(-1).mean()))
    factor = moved / size if size > 0 else 0.0
    if factor > 0 and all(abs(np.log2(factor / known)) > 0.5 for _, _, known in found):
        found.append(("delta", f"{factor:.3g} {next(iter(units))}", factor))
    return found


def translation_fits(recordings: Sequence[Recording], stretches: Stretches) -> list[Fit]:
    """The fit of every reading of the logged translations."""
    position = np.concatenate([r.position for r in recordings]).astype(np.float64)
    logged = np.concatenate(
        [r.translation for r in recordings if r.translation is not None]
    ).astype(float)
    rotation = np.concatenate([r.rotation for r in recordings])
    turns, _ = state_quaternions(rotation)
    rows, inside = stretches.rows, stretches.inside
    start = position[rows[:, :1]]
    recorded = position[rows[:, 1:]] - start
    moved = stretches.sums(np.linalg.norm(recorded, axis=-1))
    steps = int(inside.sum())
    step = float(np.sqrt((np.diff(position[rows], axis=1)[inside] ** 2).sum(-1).mean()))
    scales = _scales(
        logged[stretches.acted(0)][inside], step, LENGTH_UNITS, 1 / recordings[0].rate_hz
    )
    fits: list[Fit] = []

    def judge(parts: Array, offset: Array, names: Sequence[Scale], frame: str, state: str) -> None:
        """parts [n, L, 3, 3]: what each logged component adds to the displacement."""
        by = np.concatenate([FLIPS * factor for _, _, factor in names])
        distances = np.linalg.norm(
            parts @ by.T - (offset + recorded)[..., None], axis=-2
        )  # [n, L, K · 8]
        errors = stretches.sums(np.moveaxis(distances, -1, 0))
        for ((kind, unit, scale), signs), error in zip(
            itertools.product(names, SIGNS), errors, strict=True
        ):
            fits.append(
                Fit(
                    Reading(kind, frame, unit, signs, shift, state, "-"), error, moved, steps, scale
                )
            )

    for shift in SHIFTS:
        acted = logged[stretches.acted(shift)] * inside[..., None]
        diagonal = acted[..., None] * np.eye(3)
        judge(diagonal.cumsum(1), np.zeros(3), scales, "base", "-")
        judge(diagonal, start, [("absolute", u, f) for u, f in LENGTH_UNITS.items()], "base", "-")
        for state in state_forms(rotation):
            axes = quat_rotate(_vector(turns[state][rows[:, :-1], None]), _vector(diagonal)).numpy()
            judge(axes.swapaxes(-1, -2).cumsum(1), np.zeros(3), scales, "ee", state)
    return fits


def integrate_translations(recording: Recording, fit: Fit) -> Array:
    """[T, 3] where the logged translations of a whole episode lead from its first state, by a reading, m."""
    reading = fit.reading
    assert recording.translation is not None
    rows = np.arange(len(recording.position) - 1) - reading.shift
    known = (rows >= 0) & (rows < len(recording.position))
    logged = recording.translation[np.where(known, rows, 0)] * SIGNS[reading.signs] * fit.factor
    path = np.array(recording.position, np.float64)
    if reading.kind == "absolute":
        path[1:] = np.where(known[:, None], logged, path[1:])
        return path
    if reading.frame == "ee":
        turns, _ = state_quaternions(recording.rotation)
        logged = quat_rotate(_vector(turns[reading.state][:-1]), _vector(logged)).numpy()
    path[1:] = path[0] + (logged * known[:, None]).cumsum(0)
    return path


def rotation_fits(recordings: Sequence[Recording], stretches: Stretches) -> list[Fit]:
    """The fit of every reading of the logged rotations."""
    rotation = np.concatenate([r.rotation for r in recordings]).astype(np.float64)
    logged = np.concatenate([r.turn for r in recordings if r.turn is not None]).astype(np.float64)
    states, state_unit = state_quaternions(rotation)
    rows, inside, steps = stretches.rows, stretches.inside, int(stretches.inside.sum())
    names = state_forms(rotation)
    at = torch.stack([_vector(states[name][rows]) for name in names])  # [S, n, L + 1, 4]
    first = quat_conjugate(at[:, :, :1])
    seen = {  # the motion since the start of the stretch, about the axes of either frame
        "ee": quat_multiply(first, at[:, :, 1:]),
        "base": quat_multiply(at[:, :, 1:], first),
    }
    moved = stretches.sums(_angle(seen["ee"][..., 0].numpy()))
    one = quat_multiply(quat_conjugate(at[:, :, :-1]), at[:, :, 1:])[..., 0].numpy()
    # Where forms disagree on how far the robot turned, the smallest is the smoothest.
    turned = float(min(np.sqrt((_angle(w)[inside] ** 2).mean()) for w in one))
    if logged.shape[1] == 3:
        used = logged[stretches.acted(0)][inside]
        scales = _scales(used, turned, ANGLE_UNITS, 1 / recordings[0].rate_hz)
        scales += [("absolute", unit, factor) for unit, factor in ANGLE_UNITS.items()]
    else:
        scales = [("delta", UNSCALED, 1.0), ("absolute", UNSCALED, 1.0)]
    readings, forms = _logged_forms(logged, scales)
    fits: list[Fit] = []

    def judge(
        predicted: torch.Tensor, recorded: torch.Tensor, frame: str, chosen: list[int]
    ) -> None:
        """predicted [K, n, L, 4] by form, recorded [S, n, L, 4] by form of the state."""
        cosine = torch.einsum("knlc,snlc->sknl", predicted, recorded).numpy()
        sums = stretches.sums(_angle(cosine))
        for s, state in enumerate(names):
            for k, index in enumerate(chosen):
                reading = readings[index]._replace(frame=frame, shift=shift, state=state)
                fits.append(Fit(reading, sums[s, k], moved[s], steps))

    changes = [i for i, r in enumerate(readings) if r.kind != "absolute"]
    targets = [i for i, r in enumerate(readings) if r.kind == "absolute"]
    change, target = forms[changes], forms[targets]
    for shift in SHIFTS:
        acted = stretches.acted(shift)
        delta = change[:, acted]
        inner, outer = [delta[:, :, 0]], [delta[:, :, 0]]
        for k in range(1, STRETCH):
            inner.append(quat_multiply(inner[-1], delta[:, :, k]))
            outer.append(quat_multiply(delta[:, :, k], outer[-1]))
        judge(torch.stack(inner, 2), seen["ee"], "ee", changes)
        judge(torch.stack(outer, 2), seen["base"], "base", changes)
        judge(target[:, acted], at[:, :, 1:], "base", targets)
        if rotation.shape[1] == logged.shape[1] == 3:
            angles = rotation * ANGLE_UNITS[state_unit]
            for reading, error in _added(angles, logged, at, scales, stretches, shift):
                fits.append(Fit(reading, error, moved[names.index(reading.state)], steps))
    return fits


def _angle(cosine: Array) -> Array:
    """Angle between two orientations, rad, of the scalar product of their quaternions."""
    return 2 * np.arccos(np.minimum(np.abs(cosine), 1))


def _logged_forms(logged: Array, scales: Sequence[Scale]) -> tuple[list[Reading], torch.Tensor]:
    """Every way to read logged rotations, [K], and the quaternions [K, N, 4] that it gives."""
    readings, quaternions = [], []
    for (kind, unit, factor), form in itertools.product(scales, _forms(logged)):
        if logged.shape[1] == 3:
            turns = _quaternions(form, _vector(logged * factor * FLIPS[:, None]))
        else:
            turns = _quaternions(form, _vector(logged)) * _vector(
                np.insert(FLIPS, 0, 1, axis=1)[:, None]
            )
        readings += [Reading(kind, "base", unit, signs, 0, "-", form) for signs in SIGNS]
        quaternions.append(turns)
    return readings, torch.cat(quaternions)


def _added(
    angles: Array,
    logged: Array,
    at: torch.Tensor,
    scales: Sequence[Scale],
    stretches: Stretches,
    shift: int,
) -> Iterator[tuple[Reading, Array]]:
    """Readings by which logged angles are added to the recorded ones, which is no composition."""
    start = angles[stretches.rows[:, :1]]
    total = (logged[stretches.acted(shift)] * stretches.inside[..., None]).cumsum(1)
    tried = [scale for scale in scales if scale[0] != "absolute"]
    by = FLIPS * np.array([factor for _, _, factor in tried])[:, None, None]  # [K, 8, 3]
    reached = _vector(start + total * by[:, :, None, None])  # [K, 8, n, L, 3]
    names = state_forms(angles)
    cosines = [
        (_quaternions(name, reached) * q[:, 1:]).sum(-1) for name, q in zip(names, at, strict=True)
    ]
    errors = stretches.sums(
        _angle(torch.stack(cosines, 1).flatten(end_dim=2).numpy())
    )  # [K · S · 8, U]
    read = itertools.product(tried, names, SIGNS)
    for ((kind, unit, _), state, signs), error in zip(read, errors, strict=True):
        yield Reading(kind, "angles", unit, signs, shift, state, state), error
