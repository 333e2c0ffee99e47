"""Shifts: scenes that differ from those of training along one axis, by one of three levels.

The axes are those of LIBERO-Plus (arXiv 2510.13626); their levels here are our choice. This file
has the six axes that change the scene: camera, light, background, layout (of the objects), robot
(where the gripper starts) and language (of the instruction). The seventh axis, noise, is in
`spear.evaluate.noise`; it changes the policy's images and the delay of its answers.

`shift_scene` shifts scenes of the embedded simulator. The functions that draw an orbit, a tint or
an instruction also serve SIMPLER (`spear.evaluate.simpler.shifts`).

The same scene, axis and level always give the same result. A shift changes its axis and nothing
else.
"""

import dataclasses
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spear.errors import SpearError, check_known
from spear.sim.objects import GRASPABLE, TASK_FREE_KINDS
from spear.sim.scene import (
    DISTRACTORS,
    EXTERNAL_CAMERA_FOV_Y_DEG,
    NOMINAL_START_POSITION_M,
    SOURCE_INDEX,
    SURFACES,
    SYNONYMS,
    TARGET_INDEX,
    Quat,
    SceneAppearance,
    SceneSpec,
)
from spear.sim.textures import UNSEEN_TEXTURES
from spear.sim.worlds import (
    CameraOrbit,
    sample_any_color,
    sample_color_near,
    sample_downward_light_direction,
    with_clutter,
)

SCENE_AXES = ("camera", "light", "background", "layout", "robot", "language")
AXES = (*SCENE_AXES, "noise")
LEVELS = (1, 2, 3)

_STREAM = 103
"""First number of the random generators' seeds in this file. Other files use other first numbers,
so that no two draw the same random numbers."""

MIN_CAMERA_ELEVATION_DEG = 12.0  # a lower camera would see the table only from the side
MAX_CAMERA_ELEVATION_DEG = 78.0  # near 90° "up" in the image would be undefined
TRAINING_START_RANGE_M = 0.08
"""The largest distance, along each axis, of the gripper's start in training from
`NOMINAL_START_POSITION_M`, m."""
TRAINING_YAW_DEG = 30.0
"""The largest angle by which the gripper is turned at the start in training, degrees."""
MIN_LATERAL_GAP_M = 0.03
"""An object is left or right of another one if it is by more than this in the camera's image, m."""
MIN_START_HEIGHT_M = 0.12
"""The gripper never starts lower than this, because it would touch objects."""

_WORDS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
UNSEEN_TEMPLATES: dict[str, Sequence[str]] = _WORDS["unseen_templates"]
"""Task family -> instructions that training does not have, with {source} and {target}."""
UNSEEN_SYNONYMS: dict[str, Sequence[str]] = _WORDS["unseen_synonyms"]
"""Kind of object -> names that training does not have."""
POLITE_PREFIXES: Sequence[str] = _WORDS["politeness"]["prefixes"]
POLITE_SUFFIXES: Sequence[str] = _WORDS["politeness"]["suffixes"]


@dataclass(frozen=True)
class CameraLevel:
    """How far the external camera is moved at most.

    Azimuth, elevation and distance are those of `CameraOrbit`.

    azimuth_deg      largest change of the azimuth, to either side.
    elevation_deg    largest change of the elevation, up or down.
    distance_factor  the distance is multiplied or divided by at most this.
    fovy_deg         largest change of the vertical view angle, up or down.
    """

    azimuth_deg: float
    elevation_deg: float
    distance_factor: float
    fovy_deg: float


@dataclass(frozen=True)
class LightLevel:
    """How far the light changes at most. At every level the light comes from any direction above.

    brightness_factor  the brightness is multiplied or divided by at most this.
    warmth             the largest fraction by which red grows and blue shrinks, or the reverse.
    """

    brightness_factor: float
    warmth: float


CAMERA_LEVELS = {
    1: CameraLevel(azimuth_deg=15, elevation_deg=10, distance_factor=1.15, fovy_deg=3),
    2: CameraLevel(azimuth_deg=30, elevation_deg=20, distance_factor=1.3, fovy_deg=8),
    3: CameraLevel(azimuth_deg=60, elevation_deg=30, distance_factor=1.6, fovy_deg=15),
}
LIGHT_LEVELS = {
    1: LightLevel(brightness_factor=1.3, warmth=0.10),
    2: LightLevel(brightness_factor=1.8, warmth=0.25),
    3: LightLevel(brightness_factor=2.5, warmth=0.40),
}
BACKGROUND_COLOR_DISTANCE = 0.25
"""At level 1, the largest change of a surface's red, green and blue. Levels 2 and 3 take any color.
"""
NUM_CLUTTER = {1: 3, 2: 6, 3: 9}
"""Level -> number of objects that the layout shift adds."""
START_DISTANCE_M = {1: 0.04, 2: 0.08, 3: 0.12}
"""Level -> how far outside of training's range the gripper may start, m."""
START_TURN_DEG = {1: 15.0, 2: 30.0, 3: 45.0}
"""Level -> how far beyond training's range the gripper may be turned at the start, degrees."""


@dataclass(frozen=True)
class ObjectNames:
    """What an instruction may call an object.

    seen    names that training has.
    unseen  names for the levels 2 and 3, which training does not have where there are such names.
    """

    seen: Sequence[str]
    unseen: Sequence[str]

    @staticmethod
    def of(kind: str) -> "ObjectNames":
        """The names of a kind of object. A kind without synonyms has only its own name."""
        return ObjectNames(SYNONYMS.get(kind, (kind,)), UNSEEN_SYNONYMS.get(kind, (kind,)))


@dataclass(frozen=True)
class Shift:
    """One axis at one level.

    >>> Shift.parse("camera:2")
    Shift(axis='camera', level=2)
    """

    axis: str
    level: int

    def __str__(self) -> str:
        return f"{self.axis}:{self.level}"

    @staticmethod
    def parse(text: str) -> "Shift":
        """Read "AXIS:LEVEL", or "AXIS", which is level 2. Raises `SpearError` for anything else."""
        axis, colon, level_text = text.partition(":")
        check_known("shift", AXES, axis)
        if not colon:
            return Shift(axis, 2)
        if level_text not in [str(level) for level in LEVELS]:
            raise SpearError(
                f"Shift {text!r} has no level {level_text!r}. Write {axis}:1, {axis}:2 or {axis}:3."
            )
        return Shift(axis, int(level_text))

    @staticmethod
    def parse_possible(text: str, axes: Sequence[str], reason: str) -> "Shift":
        """Read a shift as `parse`, where only some axes are possible.

        Args:
            text: "AXIS:LEVEL" or "AXIS".
            axes: the possible axes, at least two.
            reason: why another axis is not possible, as the end of a sentence about it.

        Raises:
            SpearError: it is no shift, or of another axis.
        """
        shift = Shift.parse(text)
        if shift.axis not in axes:
            raise SpearError(
                f"--shift {shift.axis} {reason}. Give {', '.join(axes[:-1])} or {axes[-1]}."
            )
        return shift


def shift_scene(scene: SceneSpec, shift: Shift) -> SceneSpec:
    """Return the same task in a shifted scene.

    Args:
        scene: a scene of `spear.sim.scene.sample_scene`, perhaps placed in another world.
        shift: which axis changes and how much. The axis "noise" leaves the scene unchanged.

    Returns:
        The scene with the shift's axis changed and nothing else.
    """
    rng = np.random.default_rng(
        [_STREAM, AXES.index(shift.axis), shift.level, *scene.family.encode(), scene.seed]
    )
    if shift.axis == "camera":
        return _replace_appearance(
            scene, _shift_camera(scene.appearance, CAMERA_LEVELS[shift.level], rng)
        )
    if shift.axis == "light":
        return _replace_appearance(
            scene, _shift_light(scene.appearance, LIGHT_LEVELS[shift.level], rng)
        )
    if shift.axis == "background":
        return _replace_appearance(scene, _shift_background(scene.appearance, shift.level, rng))
    if shift.axis == "layout":
        kinds = DISTRACTORS if shift.level == 1 else TASK_FREE_KINDS
        kinds = _exclude_task_objects(scene, kinds)
        objects = with_clutter(scene.objects, kinds, NUM_CLUTTER[shift.level], rng)
        return dataclasses.replace(scene, objects=objects)
    if shift.axis == "robot":
        return dataclasses.replace(
            scene,
            ee_position=_sample_start_position_outside_training(shift.level, rng),
            ee_rotation=_sample_start_rotation_outside_training(shift.level, rng),
        )
    if shift.axis == "language":
        return dataclasses.replace(
            scene, instruction=_sample_unseen_instruction_for_scene(scene, shift.level, rng)
        )
    return scene


def _replace_appearance(scene: SceneSpec, appearance: SceneAppearance) -> SceneSpec:
    """Return the scene with another appearance."""
    return dataclasses.replace(scene, appearance=appearance)


def _shift_camera(
    appearance: SceneAppearance, level: CameraLevel, rng: np.random.Generator
) -> SceneAppearance:
    """Move the external camera around the point that it looks at, and change its view angle."""
    moved_orbit = sample_orbit_near(CameraOrbit.of(appearance), level, rng)
    return dataclasses.replace(
        appearance,
        camera=moved_orbit.compute_position(),
        fovy_deg=EXTERNAL_CAMERA_FOV_Y_DEG + float(rng.uniform(-level.fovy_deg, level.fovy_deg)),
        has_four_walls=True,
    )


def sample_orbit_near(
    orbit: CameraOrbit, level: CameraLevel, rng: np.random.Generator
) -> CameraOrbit:
    """Draw another azimuth, elevation and distance around the same target."""
    elevation_deg = orbit.elevation_deg + rng.uniform(-level.elevation_deg, level.elevation_deg)
    log_factor = math.log(level.distance_factor)
    return CameraOrbit(
        target=orbit.target,
        azimuth_deg=orbit.azimuth_deg + rng.uniform(-level.azimuth_deg, level.azimuth_deg),
        elevation_deg=float(
            np.clip(elevation_deg, MIN_CAMERA_ELEVATION_DEG, MAX_CAMERA_ELEVATION_DEG)
        ),
        distance_m=orbit.distance_m * math.exp(rng.uniform(-log_factor, log_factor)),
    )


def _shift_light(
    appearance: SceneAppearance, level: LightLevel, rng: np.random.Generator
) -> SceneAppearance:
    """Change the light's direction, brightness and color."""
    factor, tint = sample_brightness_and_tint(level, rng)
    diffuse = np.clip(np.array(appearance.diffuse) * factor * tint, 0, 1)
    ambient = np.clip(np.array(appearance.ambient) * factor * tint, 0, 1)
    return dataclasses.replace(
        appearance,
        light=sample_downward_light_direction(rng),
        diffuse=(float(diffuse[0]), float(diffuse[1]), float(diffuse[2])),
        ambient=(float(ambient[0]), float(ambient[1]), float(ambient[2])),
    )


def sample_brightness_and_tint(
    level: LightLevel, rng: np.random.Generator
) -> tuple[float, NDArray[np.float64]]:
    """Draw how the light changes.

    Returns:
        The factor on its brightness, and the factors [3] on its red, green and blue.
    """
    log_factor = math.log(level.brightness_factor)
    factor = math.exp(rng.uniform(-log_factor, log_factor))
    warmth = rng.uniform(-level.warmth, level.warmth)
    return factor, np.array([1 + warmth, 1.0, 1 - warmth])


def _shift_background(
    appearance: SceneAppearance, level: int, rng: np.random.Generator
) -> SceneAppearance:
    """Change the colors of table, floor and wall; at level 3 their textures, too."""
    surfaces = {}
    for name in SURFACES:
        material, color = appearance.surfaces[name]
        if level == 1:
            color = sample_color_near(color, BACKGROUND_COLOR_DISTANCE, rng)
        else:
            color = sample_any_color(rng)
        if level == 3:
            material = str(rng.choice(tuple(UNSEEN_TEXTURES)))
        surfaces[name] = (material, color)
    return dataclasses.replace(appearance, surfaces=surfaces)


def _exclude_task_objects(scene: SceneSpec, kinds: Sequence[str]) -> tuple[str, ...]:
    """Return those of `kinds` that are neither the source's nor the target's kind."""
    task_kinds = {scene.objects[SOURCE_INDEX].kind, scene.objects[TARGET_INDEX].kind}
    return tuple(kind for kind in kinds if kind not in task_kinds)


def _sample_start_position_outside_training(
    level: int, rng: np.random.Generator
) -> tuple[float, float, float]:
    """Draw a start position (m) outside of the box in which training's start positions are.

    An outer box is larger than training's box by the level's distance on each side. The position is
    anywhere in the outer box, but along one axis, which is drawn, it is outside of training's box.
    """
    inner_half_m = TRAINING_START_RANGE_M  # half a side of training's box
    outer_half_m = inner_half_m + START_DISTANCE_M[level]
    offset = rng.uniform(-outer_half_m, outer_half_m, 3)
    axis = int(rng.integers(0, 3))
    # Along z the position is above training's box, because there is no room below.
    sign = 1.0 if axis == 2 else float(rng.choice([-1.0, 1.0]))
    offset[axis] = sign * rng.uniform(inner_half_m, outer_half_m)
    x, y, z = NOMINAL_START_POSITION_M + offset
    return float(x), float(y), max(float(z), MIN_START_HEIGHT_M)


def _sample_start_rotation_outside_training(level: int, rng: np.random.Generator) -> Quat:
    """Draw a start orientation: pointing down, with a larger yaw than in training."""
    extra_deg = rng.uniform(0, START_TURN_DEG[level])
    yaw = math.radians(TRAINING_YAW_DEG + extra_deg) * float(rng.choice([-1.0, 1.0]))
    return math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)


def _sample_unseen_instruction_for_scene(
    scene: SceneSpec, level: int, rng: np.random.Generator
) -> str:
    """Draw an instruction for a scene with words that training does not have."""
    source = scene.objects[SOURCE_INDEX]
    target = scene.objects[TARGET_INDEX]
    is_in_bowl = scene.family == "put_on" and target.kind == "bowl"
    template_family = "put_in_bowl" if is_in_bowl else scene.family
    return sample_unseen_instruction(
        UNSEEN_TEMPLATES[template_family],
        ObjectNames.of(source.kind),
        ObjectNames.of(target.kind),
        describe_by_relation(scene, SOURCE_INDEX),
        level,
        rng,
    )


def sample_unseen_instruction(
    templates: Sequence[str],
    source: ObjectNames,
    target: ObjectNames,
    relation: str | None,
    level: int,
    rng: np.random.Generator,
) -> str:
    """Draw an instruction with words that training does not have.

    Level 1 has unseen templates, level 2 also unseen synonyms and polite phrases. Level 3 also
    describes the source by where it lies instead of by name, if that is unambiguous.

    Args:
        templates: Unseen instructions, with {source} and {target}.
        source: Names of the object to move.
        target: Names of the object or place where it goes.
        relation: The source by where it lies (`describe_beside_anchor`); None if that is
            ambiguous. Then the source keeps its name at level 3.
        level: The level of the shift.
        rng: Generator of random numbers.
    """
    template = _sample_text(templates, rng)
    if level == 1:
        source_name = _sample_text(source.seen, rng)
        target_name = _sample_text(target.seen, rng)
        return template.format(source=source_name, target=target_name)

    source_name = _sample_text(source.unseen, rng)
    target_name = _sample_text(target.unseen, rng)
    if level == 3:
        source_name = relation or source_name
    sentence = template.format(source=source_name, target=target_name)
    return _sample_text(POLITE_PREFIXES, rng) + sentence + _sample_text(POLITE_SUFFIXES, rng)


def describe_by_relation(scene: SceneSpec, index: int) -> str | None:
    """Describe an object of a scene by `describe_beside_anchor`.

    Only graspable objects are "things".
    """
    kinds = [scene_object.kind for scene_object in scene.objects]
    thing_indices = [i for i, kind in enumerate(kinds) if kind in GRASPABLE]
    return describe_beside_anchor(index, kinds, thing_indices, _measure_lateral_offsets_m(scene))


def describe_beside_anchor(
    index: int, names: Sequence[str], thing_indices: Sequence[int], lateral_m: Sequence[float]
) -> str | None:
    """Describe an object as the thing left or right of another object, the anchor.

    Left and right are those of the external camera's image. A description is used only if the
    object `index` is the only thing that fits it.

    Args:
        index: Index of the object to describe.
        names: Names of all objects.
        thing_indices: Indices of the objects that "thing" may mean.
        lateral_m: How far to the right in the camera's image each object lies, m.

    Returns:
        For example "thing left of the plate"; None if every description fits several objects.
    """
    anchors = [i for i in range(len(names)) if i != index]
    for anchor in anchors:
        for word, sign in (("left", -1), ("right", 1)):
            matching_indices = []
            for candidate in thing_indices:
                gap_m = sign * (lateral_m[candidate] - lateral_m[anchor])  # the anchor's own is 0
                if gap_m > MIN_LATERAL_GAP_M:
                    matching_indices.append(candidate)
            if matching_indices == [index]:
                return f"thing {word} of the {names[anchor]}"
    return None


def _measure_lateral_offsets_m(scene: SceneSpec) -> list[float]:
    """How far to the right of the middle of the external camera's image each object lies, m."""
    backward = np.subtract(scene.appearance.camera, scene.appearance.target)
    # The horizontal unit vector to the camera's right: `backward` turned by a quarter turn.
    right = np.array([-backward[1], backward[0]]) / math.hypot(backward[0], backward[1])
    coordinates = []
    for scene_object in scene.objects:
        offset = np.subtract(scene_object.position, scene.appearance.target)
        coordinates.append(float(offset[0] * right[0] + offset[1] * right[1]))
    return coordinates


def _sample_text(texts: Sequence[str], rng: np.random.Generator) -> str:
    """Draw one of some words, phrases or templates."""
    return texts[int(rng.integers(len(texts)))]
