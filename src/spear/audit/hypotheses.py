"""How well every plausible meaning of logged actions leads from recorded state to recorded state.

A *hypothesis* says what the logged numbers mean: a change per step, a velocity or a target; about
which axes; in which unit and with which signs; how a rotation is written; how many steps later the
robot does it.

Episodes are cut into stretches of at most 20 steps. Under a hypothesis, the logged actions are
integrated from the first recorded state of a stretch. The error is the mean distance to the
recorded states, divided by the mean distance that the robot moved from the first state: 0 is
perfect, and 1 is as bad as predicting that the robot stands still. The method is our own.
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
from spear.util.units import ANGLE_UNITS, LENGTH_UNITS, name_unit

DELAYS = (-1, 0, 1, 2)  # steps; 0: action t leads from state t to state t + 1
MAX_STRETCH_STEPS = 20  # over longer stretches, small errors add up and hide the large ones
MIN_EPISODES_TO_RESAMPLE = 8  # with fewer, the bootstrap draws stretches instead of episodes
MAX_NEAR_UNIT_OCTAVES = 0.5  # a known unit within this factor of the fitted one explains it
MIN_TURN_DIFFERENCE = 0.1  # part of its turns by which a gripper turns otherwise in two formats

SIGNS: dict[str, Array] = {}
"""Signs of the x, y and z components, such as "+-+", and the factors that they stand for."""
for _signs in itertools.product("+-", repeat=3):
    SIGNS["".join(_signs)] = np.array([float(f"{sign}1") for sign in _signs])
SIGN_FACTORS = np.stack(list(SIGNS.values()))  # [8, 3]

UNIT_QUATERNION = "unit quaternion"
"""Unit of rotations that are written without angles."""
TESTED_FORMATS = tuple(name for name in ROTATION_FORMATS if name not in RECORDED_ONLY)
"""Rotation formats that hypotheses try."""


class Scale(NamedTuple):
    """One kind and unit of logged numbers, and the factor to meters or radians per step."""

    kind: str
    unit: str
    factor: float


class Hypothesis(NamedTuple):
    """What logged numbers mean.

    kind           "delta", "velocity" or "absolute".
    frame          "base", "ee", or "angles": added to the recorded angles themselves.
    unit           for example "m", "mm", "rad/s".
    signs          of the x, y and z components, for example "+-+".
    delay_steps    see `DELAYS`.
    state_format   how recorded orientations are written; "-" where that plays no part.
    action_format  how a logged rotation is written; "-" for translations.
    """

    kind: str
    frame: str
    unit: str
    signs: str
    delay_steps: int
    state_format: str
    action_format: str


@dataclass(frozen=True)
class Fit:
    """How well a hypothesis explains the data.

    error      [U] summed distance between integrated and recorded states, one entry per unit of
               resampling.
    motion     [U] summed distance that the robot moved, likewise; meters or radians.
    num_steps  how many states were compared.
    factor     from logged translations to meters.
    """

    hypothesis: Hypothesis
    error: Array
    motion: Array
    num_steps: int
    factor: float = 1.0

    @cached_property
    def relative_error(self) -> float:
        """Error as a fraction of the motion."""
        return float(self.error.sum() / max(self.motion.sum(), 1e-12))

    @property
    def mean_error(self) -> float:
        """Mean distance between integrated and recorded states, m or rad."""
        return float(self.error.sum() / self.num_steps)


class Stretches:
    """Stretches of at most `MAX_STRETCH_STEPS` steps, cut from recordings that are joined row after
    row.

    num            how many stretches there are; 0 if no episode is long enough.
    rows           [n, L + 1] the row of each state of each stretch, padded with its last one.
    is_step        [n, L] which of the steps are real and not padding.
    unit           [n] the unit of resampling to which a stretch belongs.
    are_units_episodes   whether these units are episodes; they are stretches if there are few
                         episodes.

    Every action that any delay would use is valid.
    """

    def __init__(self, recordings: Sequence[Recording]) -> None:
        rows: list[Array] = []
        is_step: list[Array] = []
        episodes: list[int] = []
        first_row = 0
        for number, recording in enumerate(recordings):
            for first, end in _valid_runs(recording.valid):
                for start in range(first, end, MAX_STRETCH_STEPS):
                    steps = start + np.arange(MAX_STRETCH_STEPS + 1)
                    rows.append(first_row + np.minimum(steps, end))
                    is_step.append(steps[:-1] < end)
                    episodes.append(number)
            first_row += len(recording.position)

        self.num = len(rows)
        self.rows = np.array(rows, int).reshape(-1, MAX_STRETCH_STEPS + 1)
        self.is_step = np.array(is_step, bool).reshape(-1, MAX_STRETCH_STEPS)
        self.are_units_episodes = len(set(episodes)) >= MIN_EPISODES_TO_RESAMPLE
        if self.are_units_episodes:
            self.unit = np.unique(episodes, return_inverse=True)[1]
        else:
            self.unit = np.arange(self.num)
        self._membership = self.unit[:, None] == np.arange(self.unit.max(initial=-1) + 1)

    def action_rows(self, delay: int) -> Array:
        """[n, L] the row of the action that leads to each next state, if the robot is late by
        `delay`."""
        return self.rows[:, :-1] - delay

    def select_steps(self, logged: Array) -> Array:
        """The rows of `logged` [N, d] that the real steps are recorded with, without any delay."""
        return logged[self.action_rows(0)][self.is_step]

    def sum_per_unit(self, distances: Array) -> Array:
        """Sum distances [..., n, L] of real steps per unit of resampling: [..., U]."""
        return np.where(self.is_step, distances, 0).sum(-1) @ self._membership


def _valid_runs(valid: Array) -> Iterator[tuple[int, int]]:
    """(first, end) such that for every state first ≤ t < end the actions of all delays are
    valid."""
    max_delay = max(DELAYS)
    max_lead = -min(DELAYS)
    is_good = []
    for t in range(max_delay, len(valid) - max_lead - 1):
        is_good.append(int(valid[t - max_delay : t + max_lead + 1].all()))
    edges = np.flatnonzero(np.diff([0, *is_good, 0]))
    for first, end in zip(edges[::2], edges[1::2], strict=True):
        yield max_delay + int(first), max_delay + int(end)


def _to_tensor(values: Array) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values, np.float64))


def _to_quaternions(rotation_format: str, values: torch.Tensor) -> torch.Tensor:
    return quat_normalize(ROTATION_FORMATS[rotation_format][1](values))


def _possible_formats(values: Array) -> list[str]:
    """The formats in which numbers [N, d] may be rotations."""
    return [name for name in TESTED_FORMATS if ROTATION_FORMATS[name][0] == values.shape[1]]


def state_formats(values: Array) -> list[str]:
    """The formats in which recorded numbers [N, d] may be orientations.

    Yaw, pitch, roll is not among them: states and actions written so, with their frames exchanged,
    are the mirror image of roll, pitch, yaw. Rotations alone cannot tell the two (see
    `formats_that_turn_otherwise`). Where only one of states and actions is written so, the format
    of the actions says it.
    """
    return [name for name in _possible_formats(values) if name != "euler_ZYX"]


def state_quaternions(rotation: Array) -> tuple[dict[str, Array], str]:
    """Recorded orientations [N, d] as quaternions [N, 4] in every possible format, and their
    angles' unit.

    Angles beyond a whole turn are degrees, others radians: changes alone could not tell.
    """
    unit = UNIT_QUATERNION
    if rotation.shape[1] == 3:
        unit = "deg" if are_degrees(rotation) else "rad"
    values = _to_tensor(rotation * ANGLE_UNITS.get(unit, 1.0))
    quaternions = {}
    for name in _possible_formats(rotation):
        quaternions[name] = _to_quaternions(name, values).numpy()
    return quaternions, unit


def can_tell_euler_order(translation: Hypothesis | None, rotation: Hypothesis | None) -> bool:
    """Whether actions tell roll, pitch, yaw from yaw, pitch, roll.

    They do not if they are targets, and only if translations and rotations would otherwise be in
    two frames.

    Args:
        translation, rotation: the best hypotheses; None where they tell nothing.
    """
    if translation is None or rotation is None:
        return False
    if rotation.kind == "absolute":
        return False
    return (translation.frame == "ee") == (rotation.frame == "ee")


def formats_that_turn_otherwise(
    rotations: Sequence[Array],
    layout_format: str,
    tied_formats: Iterable[str],
    translation: Hypothesis | None,
    rotation: Hypothesis | None,
) -> list[str]:
    """Formats that fit as well as the layout's, but by which the gripper turns otherwise.

    Args:
        rotations: each episode's recorded orientations [T, d].
        layout_format: the format that the layout names.
        tied_formats: formats that fit as well.
        translation, rotation: the best hypotheses; None where they tell nothing.
    """
    other_formats = sorted({*tied_formats} - {layout_format})
    is_euler_possible = "euler_xyz" in {layout_format, *other_formats}
    if is_euler_possible and not can_tell_euler_order(translation, rotation):
        other_formats.append("euler_ZYX")

    quaternions, _ = state_quaternions(np.concatenate(rotations))
    episode_ends = np.cumsum([len(values) for values in rotations])[:-1]
    layout_turns = _turns_between_steps(quaternions[layout_format], episode_ends)
    min_difference = MIN_TURN_DIFFERENCE * _angle(layout_turns[:, 0]).mean() + 1e-6

    differing_formats = []
    for name in other_formats:
        turns = _turns_between_steps(quaternions[name], episode_ends)
        if _angle((layout_turns * turns).sum(-1)).mean() > min_difference:
            differing_formats.append(name)
    return differing_formats


def _turns_between_steps(quaternions: Array, episode_ends: Array) -> Array:
    """[N, 4] rotations from step to step, without those from one episode to the next."""
    orientation = _to_tensor(quaternions)
    turns = quat_multiply(quat_conjugate(orientation[:-1]), orientation[1:]).numpy()
    return np.delete(turns, episode_ends - 1, axis=0)


def _possible_scales(
    logged: Array, rms_step: float, units: Mapping[str, float], step_s: float
) -> list[Scale]:
    """Known units of changes and velocities, and a fitted unit where none of them is near.

    Args:
        logged: [N, 3] logged numbers.
        rms_step: root mean square of a recorded step, m or rad; logged steps are compared with it.
        units: unit and its factor to meters or radians.
        step_s: duration of a step.
    """
    scales = [Scale("delta", name, factor) for name, factor in units.items()]
    scales += [Scale("velocity", f"{name}/s", factor * step_s) for name, factor in units.items()]
    logged_size = float(np.sqrt((logged**2).sum(-1).mean()))
    factor = rms_step / logged_size if logged_size > 0 else 0.0
    if factor <= 0:
        return scales
    octaves = [abs(np.log2(factor / scale.factor)) for scale in scales]
    if min(octaves) > MAX_NEAR_UNIT_OCTAVES:
        scales.append(Scale("delta", name_unit(factor, units), factor))
    return scales


def round_to_known_unit(factor: float, units: Mapping[str, float]) -> float:
    """Round a measured unit (meters or radians per 1) to a known one that explains it, if any."""
    for known_factor in units.values():
        if abs(np.log2(factor / known_factor)) <= MAX_NEAR_UNIT_OCTAVES:
            return known_factor
    return factor


def _concatenate_logged(values: Iterable[Array | None]) -> Array:
    """[N, d] float64: the logged numbers of all recordings that have them."""
    logged = [numbers for numbers in values if numbers is not None]
    return np.concatenate(logged).astype(np.float64)


def _measure_rms_step_m(position: Array, stretches: Stretches) -> float:
    """Root mean square of the recorded displacements from step to step."""
    squared_steps = np.diff(position[stretches.rows], axis=1)[stretches.is_step] ** 2
    return float(np.sqrt(squared_steps.sum(-1).mean()))


def fit_translations(
    recordings: Sequence[Recording],
    stretches: Stretches,
    units: Mapping[str, float] = LENGTH_UNITS,
) -> list[Fit]:
    """The fit of every hypothesis about the logged translations.

    Args:
        recordings: The episodes.
        stretches: The pieces of at most `MAX_STRETCH_STEPS` steps into which the episodes are cut.
        units: Units to try, with their factors to meters.
    """
    position = np.concatenate([r.position for r in recordings]).astype(np.float64)
    rotation = np.concatenate([r.rotation for r in recordings])
    quaternions, _ = state_quaternions(rotation)
    logged = _concatenate_logged(r.translation for r in recordings)

    rows = stretches.rows
    is_step = stretches.is_step
    start = position[rows[:, :1]]
    recorded = position[rows[:, 1:]] - start  # displacement since the start of the stretch
    motion = stretches.sum_per_unit(np.linalg.norm(recorded, axis=-1))
    num_steps = int(is_step.sum())

    rms_step_m = _measure_rms_step_m(position, stretches)
    step_s = 1 / recordings[0].rate_hz
    relative_scales = _possible_scales(stretches.select_steps(logged), rms_step_m, units, step_s)
    target_scales = [Scale("absolute", unit, factor) for unit, factor in units.items()]
    fits: list[Fit] = []

    def add_fits(
        components: Array,
        offset: Array,
        scales: Sequence[Scale],
        frame: str,
        state_format: str,
        delay: int,
    ) -> None:
        """components [n, L, 3, 3]: what each logged component adds to the displacement."""
        factors = np.concatenate([SIGN_FACTORS * scale.factor for scale in scales])
        difference = components @ factors.T - (offset + recorded)[..., None]
        distances = np.linalg.norm(difference, axis=-2)  # [n, L, K · 8]
        errors = stretches.sum_per_unit(np.moveaxis(distances, -1, 0))
        cases = itertools.product(scales, SIGNS)
        for (scale, signs), error in zip(cases, errors, strict=True):
            hypothesis = Hypothesis(
                kind=scale.kind,
                frame=frame,
                unit=scale.unit,
                signs=signs,
                delay_steps=delay,
                state_format=state_format,
                action_format="-",
            )
            fits.append(Fit(hypothesis, error, motion, num_steps, scale.factor))

    origin = np.zeros(3)
    for delay in DELAYS:
        actions = logged[stretches.action_rows(delay)] * is_step[..., None]
        diagonal = actions[..., None] * np.eye(3)
        add_fits(diagonal.cumsum(1), origin, relative_scales, "base", "-", delay)
        add_fits(diagonal, start, target_scales, "base", "-", delay)
        for state_format in state_formats(rotation):
            orientation = _to_tensor(quaternions[state_format][rows[:, :-1], None])
            axes = quat_rotate(orientation, _to_tensor(diagonal)).numpy()
            components = axes.swapaxes(-1, -2).cumsum(1)
            add_fits(components, origin, relative_scales, "ee", state_format, delay)
    return fits


def integrate_translations(recording: Recording, fit: Fit) -> Array:
    """Integrate the logged translations of a whole episode from its first state.

    Returns:
        [T, 3] positions, m. Where an action is not known, the recorded position is taken.
    """
    hypothesis = fit.hypothesis
    assert recording.translation is not None
    num_steps = len(recording.position)
    action_rows = np.arange(num_steps - 1) - hypothesis.delay_steps
    is_known = (action_rows >= 0) & (action_rows < num_steps)
    logged = recording.translation[np.where(is_known, action_rows, 0)]
    logged = logged * SIGNS[hypothesis.signs] * fit.factor

    path = np.array(recording.position, np.float64)
    if hypothesis.kind == "absolute":
        path[1:] = np.where(is_known[:, None], logged, path[1:])
        return path
    if hypothesis.frame == "ee":
        quaternions, _ = state_quaternions(recording.rotation)
        orientation = _to_tensor(quaternions[hypothesis.state_format][:-1])
        logged = quat_rotate(orientation, _to_tensor(logged)).numpy()
    path[1:] = path[0] + (logged * is_known[:, None]).cumsum(0)
    return path


class _RecordedRotations(NamedTuple):
    """Recorded orientations in every possible format of the states.

    formats      [S] names.
    orientation  [S, n, L + 1, 4] along each stretch.
    motion_ee    [S, n, L, 4] rotation since the start of the stretch, about the gripper's axes.
    motion_base  [S, n, L, 4] the same about the base's axes.
    motion_size  [S, U] summed angles, rad.
    rms_step_rad root mean square of a step's angle.
    """

    formats: list[str]
    orientation: torch.Tensor
    motion_ee: torch.Tensor
    motion_base: torch.Tensor
    motion_size: Array
    rms_step_rad: float


def _summarize_recorded_rotations(rotation: Array, stretches: Stretches) -> _RecordedRotations:
    """Read recorded orientations [N, d] in every format that they may have, along each stretch."""
    quaternions, _ = state_quaternions(rotation)
    formats = state_formats(rotation)
    orientation = torch.stack([_to_tensor(quaternions[name][stretches.rows]) for name in formats])
    inverse_start = quat_conjugate(orientation[:, :, :1])
    motion_ee = quat_multiply(inverse_start, orientation[:, :, 1:])
    motion_base = quat_multiply(orientation[:, :, 1:], inverse_start)
    motion_size = stretches.sum_per_unit(_angle(motion_ee[..., 0].numpy()))

    single_steps = quat_multiply(quat_conjugate(orientation[:, :, :-1]), orientation[:, :, 1:])
    sizes = []
    for cosine in single_steps[..., 0].numpy():
        sizes.append(np.sqrt((_angle(cosine)[stretches.is_step] ** 2).mean()))
    # Where formats disagree on how far the robot turned, the smallest turn is the smoothest.
    rms_step_rad = float(min(sizes))
    return _RecordedRotations(
        formats, orientation, motion_ee, motion_base, motion_size, rms_step_rad
    )


def fit_rotations(
    recordings: Sequence[Recording],
    stretches: Stretches,
    units: Mapping[str, float] = ANGLE_UNITS,
) -> list[Fit]:
    """The fit of every hypothesis about the logged rotations.

    Args:
        recordings: The episodes.
        stretches: The pieces of at most `MAX_STRETCH_STEPS` steps into which the episodes are cut.
        units: Units of angles to try, with their factors to radians.
    """
    rotation = np.concatenate([r.rotation for r in recordings]).astype(np.float64)
    logged = _concatenate_logged(r.turn for r in recordings)
    recorded = _summarize_recorded_rotations(rotation, stretches)
    num_steps = int(stretches.is_step.sum())
    step_s = 1 / recordings[0].rate_hz
    scales = _rotation_scales(logged, recorded.rms_step_rad, stretches, step_s, units)
    hypotheses, logged_quaternions = _logged_rotations(logged, scales)
    fits: list[Fit] = []

    def add_fits(
        predicted: torch.Tensor,
        observed: torch.Tensor,
        frame: str,
        indices: list[int],
        delay: int,
    ) -> None:
        """Add the fits of K hypotheses in every state format.

        `predicted` [K, n, L, 4] are the rotations that the hypotheses `indices` predict.
        `observed` [S, n, L, 4] are the recorded ones in each of the S state formats. There are n
        stretches, of L steps each.
        """
        cosine = torch.einsum("knlc,snlc->sknl", predicted, observed).numpy()
        # Summed angles (rad) per unit of resampling: an episode or a stretch (see `Stretches`)
        errors = stretches.sum_per_unit(_angle(cosine))
        for s, state_format in enumerate(recorded.formats):
            for k, index in enumerate(indices):
                hypothesis = hypotheses[index]._replace(
                    frame=frame, delay_steps=delay, state_format=state_format
                )
                fits.append(Fit(hypothesis, errors[s, k], recorded.motion_size[s], num_steps))

    changes = [i for i, h in enumerate(hypotheses) if h.kind != "absolute"]
    targets = [i for i, h in enumerate(hypotheses) if h.kind == "absolute"]
    for delay in DELAYS:
        action_rows = stretches.action_rows(delay)
        deltas = logged_quaternions[changes][:, action_rows]  # [K, n, L, 4]
        about_ee, about_base = _integrate_rotations(deltas)
        add_fits(about_ee, recorded.motion_ee, "ee", changes, delay)
        add_fits(about_base, recorded.motion_base, "base", changes, delay)
        target = logged_quaternions[targets][:, action_rows]
        add_fits(target, recorded.orientation[:, :, 1:], "base", targets, delay)
        if rotation.shape[1] == 3 and logged.shape[1] == 3:
            fits += _fit_added_angles(rotation, logged, recorded, scales, stretches, delay)
    return fits


def _rotation_scales(
    logged: Array,
    rms_step_rad: float,
    stretches: Stretches,
    step_s: float,
    units: Mapping[str, float],
) -> list[Scale]:
    """Kinds and units that logged rotations [N, d] may have."""
    if logged.shape[1] != 3:
        return [Scale("delta", UNIT_QUATERNION, 1.0), Scale("absolute", UNIT_QUATERNION, 1.0)]
    logged_in_steps = stretches.select_steps(logged)
    scales = _possible_scales(logged_in_steps, rms_step_rad, units, step_s)
    scales += [Scale("absolute", unit, factor) for unit, factor in units.items()]
    return scales


def _integrate_rotations(deltas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compose rotations [K, n, L, 4] along each stretch, about the gripper's and about the base's
    axes."""
    about_ee = [deltas[:, :, 0]]
    about_base = [deltas[:, :, 0]]
    for k in range(1, MAX_STRETCH_STEPS):
        about_ee.append(quat_multiply(about_ee[-1], deltas[:, :, k]))
        about_base.append(quat_multiply(deltas[:, :, k], about_base[-1]))
    return torch.stack(about_ee, 2), torch.stack(about_base, 2)


def _angle(cosine: Array) -> Array:
    """Angle between two orientations, rad, from the scalar product of their quaternions."""
    return 2 * np.arccos(np.minimum(np.abs(cosine), 1))


def _logged_rotations(
    logged: Array, scales: Sequence[Scale]
) -> tuple[list[Hypothesis], torch.Tensor]:
    """Every meaning [K] of logged rotations [N, d], and the quaternions [K, N, 4] that it gives."""
    hypotheses: list[Hypothesis] = []
    quaternions: list[torch.Tensor] = []
    for scale, action_format in itertools.product(scales, _possible_formats(logged)):
        if logged.shape[1] == 3:
            signed = logged * scale.factor * SIGN_FACTORS[:, None]
            rotations = _to_quaternions(action_format, _to_tensor(signed))
        else:
            signs_of_quaternion = np.insert(SIGN_FACTORS, 0, 1, axis=1)[:, None]
            rotations = _to_quaternions(action_format, _to_tensor(logged))
            rotations = rotations * _to_tensor(signs_of_quaternion)
        for signs in SIGNS:
            hypotheses.append(
                Hypothesis(scale.kind, "base", scale.unit, signs, 0, "-", action_format)
            )
        quaternions.append(rotations)
    return hypotheses, torch.cat(quaternions)


def _fit_added_angles(
    rotation: Array,
    logged: Array,
    recorded: _RecordedRotations,
    scales: Sequence[Scale],
    stretches: Stretches,
    delay: int,
) -> Iterator[Fit]:
    """Fits of hypotheses by which logged angles are added to the recorded ones, without
    composition."""
    _, state_unit = state_quaternions(rotation)
    angles = rotation * ANGLE_UNITS[state_unit]
    start = angles[stretches.rows[:, :1]]
    steps = logged[stretches.action_rows(delay)] * stretches.is_step[..., None]
    total = steps.cumsum(1)
    tested_scales = [scale for scale in scales if scale.kind != "absolute"]
    scale_factors = np.array([scale.factor for scale in tested_scales])
    factors = SIGN_FACTORS * scale_factors[:, None, None]  # [K, 8, 3]
    reached = _to_tensor(start + total * factors[:, :, None, None])  # [K, 8, n, L, 3]

    cosines = []
    for name, orientation in zip(recorded.formats, recorded.orientation, strict=True):
        cosines.append((_to_quaternions(name, reached) * orientation[:, 1:]).sum(-1))
    all_cosines = torch.stack(cosines, 1).flatten(end_dim=2).numpy()
    errors = stretches.sum_per_unit(_angle(all_cosines))  # [K · S · 8, U]

    num_steps = int(stretches.is_step.sum())
    cases = itertools.product(tested_scales, enumerate(recorded.formats), SIGNS)
    for (scale, (s, name), signs), error in zip(cases, errors, strict=True):
        hypothesis = Hypothesis(scale.kind, "angles", scale.unit, signs, delay, name, name)
        yield Fit(hypothesis, error, recorded.motion_size[s], num_steps)
