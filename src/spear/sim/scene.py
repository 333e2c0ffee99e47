"""What a scene contains, as pure data, and how scenes are drawn at random from a seed.

A scene with a task has a *source*, the object that is to be moved, a *target*, the object on or in
which the source goes, and further objects, the *distractors*. The same task family and seed always
give the same scene. Seeds below `FIRST_TRAIN_SEED` are held out for evaluation.
"""

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spear.errors import SpearError, check_known
from spear.sim.objects import CUBES, GRASPABLE, OBJECT_KINDS, SUPPORTS, Color, Vec3
from spear.util.held_out import FIRST_TRAIN_SEED

FAMILIES = ("put_on", "put_in_basket", "spoon_on_towel", "stack_cube")
TARGET_INDEX = 0  # index of the target in the objects of a scene with a task
SOURCE_INDEX = 1  # index of the source
WORKSPACE_X_M = (0.37, 0.63)  # range of x on the table where objects lie, base frame
WORKSPACE_Y_M = (-0.23, 0.23)  # the same for y
EXTERNAL_CAMERA_FOV_Y_DEG = 36.5
"""The external camera's vertical view angle. It is the same in all scenes, as a real robot has one
camera. If the angle varied by a degree, distances would be ambiguous by 13 mm, because a wider view
looks like a camera that is farther away."""
NOMINAL_START_POSITION_M = np.array([0.45, 0.0, 0.23])
"""Middle of the gripper's start positions, base frame."""

COMPACT = (*CUBES, "tomato", "lemon")  # kinds of objects that are about as long as wide
PUT_ON: dict[str, Sequence[str]] = {
    "plate": GRASPABLE,
    "towel": tuple(name for name in GRASPABLE if name != "spoon"),
    "bowl": COMPACT,
}
"""Task family put_on: the kinds of sources for each kind of target. The spoon on the towel is left
out, because it is a task family of its own."""
IN_BASKET = ("eggplant", "carrot", "banana", "cucumber", "sponge", "can", *COMPACT)
"""Task family put_in_basket: the kinds of sources."""
DISTRACTORS = (*GRASPABLE, "bottle")  # kinds of distractors
MAX_DISTRACTORS = 3  # in a scene with a task

_DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
TEMPLATES: dict[str, Sequence[str]] = _DATA["templates"]
"""Task family -> its instructions, with the placeholders {source} and {target}."""
SYNONYMS: dict[str, Sequence[str]] = _DATA["synonyms"]
"""Kind of object -> its names in instructions, the usual name first. Other kinds have one name."""
SURFACES = {
    "table": (("wood", "planks", "cloth", "plain"), 0.06),
    "floor": (("tiles", "planks", "plain"), 0.08),
    "wall": (("plain", "cloth", "tiles"), 0.08),
}
"""Surface -> the materials that it may have, and the `spread` of its colors (`_sample_color`)."""

MAX_START_OFFSET_M = 0.08  # of the gripper's start from the nominal one along each axis
MAX_START_TILT_RAD = math.radians(18)  # of the gripper's start from straight down
MAX_START_YAW_RAD = math.radians(30)  # of the gripper's start, to either side

NUM_PLACING_ATTEMPTS = 40  # places that are tried for an object
MAX_OVERHANG_M = 0.08  # how far an object reaches beyond the border of the workspace
TASK_OBJECT_GAP_M = 0.03  # smallest gap between source and target
OBJECT_GAP_M = 0.02  # smallest gap between a distractor and other objects
OBJECT_COLOR_SPREAD = 0.04  # the `spread` of an object's color, see `_sample_color`

Quat = tuple[float, float, float, float]


@dataclass(frozen=True)
class SceneObject:
    """An object in a scene: its kind, pose (m, quaternion w x y z, base frame) and color."""

    kind: str
    position: Vec3
    rotation: Quat
    color: Color


@dataclass(frozen=True)
class SceneAppearance:
    """How a scene looks. Positions are in meters, base frame.

    camera             the external camera's position.
    target             the point at which the external camera looks.
    surfaces           surface (one of `SURFACES`) -> its material and color.
    light              direction of the main light, a unit vector.
    diffuse, ambient   colors of the main light, and of the light from everywhere.
    fovy_deg           the external camera's vertical view angle, degrees.
    fill_lights        further lights, each with its direction and color.
    table_half_size_m  half the table's extent along x and y, m; None is the usual table.
    table_height_m     the table's height above the floor, m; None is the usual height.
    has_four_walls     whether the room is closed, so that the camera sees a wall in any direction.
    is_robot_visible   whether images show the robot. Without being visible it still moves objects.
    """

    camera: Vec3
    target: Vec3
    surfaces: Mapping[str, tuple[str, Color]]
    light: Vec3
    diffuse: Color
    ambient: Color
    fovy_deg: float = EXTERNAL_CAMERA_FOV_Y_DEG
    fill_lights: tuple[tuple[Vec3, Color], ...] = ()
    table_half_size_m: tuple[float, float] | None = None
    table_height_m: float | None = None
    has_four_walls: bool = False
    is_robot_visible: bool = True


@dataclass(frozen=True)
class SceneSpec:
    """A scene: the objects, where the gripper starts, what to do, how it looks.

    family       the task family, or "clutter" for a scene without a task.
    seed         the seed from which the scene was drawn.
    objects      the objects. In a scene with a task `TARGET_INDEX` and `SOURCE_INDEX` are the
                 indices of the target and the source.
    ee_position  the gripper's position at the start, m, base frame.
    ee_rotation  the gripper's orientation at the start, quaternion (w, x, y, z), base frame.
    appearance   how the scene looks.
    instruction  the instruction of the task; empty without a task.
    opening      the gripper's opening at the start, 0 closed … 1 open.
    held_object  index of an object that is between the fingers at the start, or None.
    """

    family: str
    seed: int
    objects: tuple[SceneObject, ...]
    ee_position: Vec3
    ee_rotation: Quat
    appearance: SceneAppearance
    instruction: str = ""
    opening: float = 1.0
    held_object: int | None = None


def list_held_out_seeds(first_seed: int, count: int) -> range:
    """Return `count` seeds from `first_seed` on.

    Raises `SpearError` if training uses one of these seeds, or if `count` is less than 1.
    """
    if count < 1 or first_seed < 0 or first_seed + count > FIRST_TRAIN_SEED:
        scenes = f"{count} scenes"
        if count > 0:
            scenes = f"scenes {first_seed} … {first_seed + count - 1}"
        raise SpearError(
            f"{scenes} are not all held out. Choose scenes among the held-out seeds "
            f"0 … {FIRST_TRAIN_SEED - 1}."
        )
    return range(first_seed, first_seed + count)


def sample_scene(family: str, seed: int) -> SceneSpec:
    """Draw the scene of a task: one source, one target, and up to three distractors.

    Args:
        family: the task family, one of `FAMILIES`.
        seed: the same family and seed give the same scene.
    """
    check_known("task family", FAMILIES, family)
    # The random numbers are drawn in this order in all versions, so that a seed keeps its scene.
    rng = np.random.default_rng([FAMILIES.index(family), seed])
    source, target = _sample_roles(family, rng)
    distractor_pool = [name for name in DISTRACTORS if name not in (source, target)]
    num_distractors = int(rng.integers(0, MAX_DISTRACTORS + 1))
    distractors = _sample_names(rng, distractor_pool, num_distractors)
    objects = _place_objects([target, source, *distractors], rng)
    offset = rng.uniform(-MAX_START_OFFSET_M, MAX_START_OFFSET_M, 3)
    ee_position = NOMINAL_START_POSITION_M + offset
    ee_rotation = _sample_ee_rotation(rng, MAX_START_TILT_RAD, MAX_START_YAW_RAD)
    instruction = _sample_instruction(family, source, target, rng)
    appearance = _sample_appearance(rng)
    return SceneSpec(
        family=family,
        seed=seed,
        objects=objects,
        ee_position=_to_vec3(ee_position),
        ee_rotation=ee_rotation,
        instruction=instruction,
        appearance=appearance,
    )


def sample_clutter_scene(seed: int) -> SceneSpec:
    """Draw a scene without a task, for labeling.

    It has 2 to 7 objects, and the arm is at a random plausible pose, perhaps holding one of them.
    `spear.sim.world.World` lifts the gripper until it touches nothing. All numbers are our choice.
    """
    # The random numbers are drawn in this order in all versions, so that a seed keeps its scene.
    rng = np.random.default_rng([len(FAMILIES), seed])
    num_objects = int(rng.integers(2, 6))
    names = _sample_names(rng, DISTRACTORS, num_objects, repeat_probability=0.15)
    num_supports = int(rng.choice([0, 1, 2], p=[0.15, 0.7, 0.15]))
    supports = _sample_names(rng, SUPPORTS, num_supports)
    objects = _place_objects([*supports, *names], rng)

    # The gripper: in half of the scenes fully open; in most over an object that it could grasp.
    opening = float(rng.choice([1.0, rng.uniform(0.0, 1.0)]))
    graspable_indices = [
        index
        for index, scene_object in enumerate(objects)
        if OBJECT_KINDS[scene_object.kind].grasp is not None
    ]
    xy = np.array([rng.uniform(*WORKSPACE_X_M), rng.uniform(*WORKSPACE_Y_M)])
    if graspable_indices and rng.random() < 0.7:
        approached_object = objects[int(rng.choice(graspable_indices))]
        xy = np.array(approached_object.position[:2]) + rng.normal(0, 0.03, 2)
    held_object = None
    if graspable_indices and rng.random() < 0.25:
        held_object = int(rng.choice(graspable_indices))
    # In half of the scenes low over the table, and in half nearly straight down
    height = float(rng.choice([rng.uniform(0.02, 0.12), rng.uniform(0.06, 0.32)]))
    max_tilt_deg = float(rng.choice([3.0, 20.0]))
    ee_rotation = _sample_ee_rotation(
        rng, max_tilt_rad=math.radians(max_tilt_deg), max_yaw_rad=math.radians(90)
    )
    appearance = _sample_appearance(rng)
    return SceneSpec(
        family="clutter",
        seed=seed,
        objects=objects,
        ee_position=_to_vec3([*xy, height]),
        ee_rotation=ee_rotation,
        opening=opening,
        held_object=held_object,
        appearance=appearance,
    )


# --- How a scene looks ---


def _sample_appearance(rng: np.random.Generator) -> SceneAppearance:
    """Draw camera, surfaces and light; all cameras are near one view from the front left."""
    # Positions in meters, base frame
    camera = np.array([1.12, 0.32, 0.62]) + rng.uniform(-0.04, 0.04, 3)
    target = np.array([0.48, 0.01, 0.09]) + rng.uniform(-0.02, 0.02, 3)
    light = np.array([rng.uniform(-0.7, 0.7), rng.uniform(-0.7, 0.7), -1.0])  # down
    warmth = rng.uniform(-0.05, 0.05)
    brightness = rng.uniform(0.45, 0.70)
    diffuse = np.clip([brightness + warmth, brightness, brightness - warmth], 0, 1)
    surfaces = {}
    for name, (materials, color_spread) in SURFACES.items():
        material = str(rng.choice(materials))
        surfaces[name] = (material, _sample_color(rng, _DATA["colors"][name], color_spread))
    ambient = np.full(3, rng.uniform(0.38, 0.55))
    return SceneAppearance(
        camera=_to_vec3(camera),
        target=_to_vec3(target),
        surfaces=surfaces,
        light=_to_vec3(light / math.hypot(*light)),
        diffuse=_to_vec3(diffuse),
        ambient=_to_vec3(ambient),
    )


def _sample_color(rng: np.random.Generator, colors: Sequence[Color], spread: float) -> Color:
    """Draw one of the colors, and vary it.

    Its brightness changes by a factor of up to 1 ± `spread`, and then each of red, green and blue
    by up to half of `spread`.
    """
    color = np.array(colors[int(rng.integers(len(colors)))])
    color = color * (1 + rng.uniform(-spread, spread)) + rng.uniform(-spread, spread, 3) / 2
    return _to_vec3(np.clip(color, 0, 1))


# --- What is in a scene, and what to do ---


def _sample_roles(family: str, rng: np.random.Generator) -> tuple[str, str]:
    """Draw the kind of the source and the kind of the target."""
    if family == "put_on":
        target = str(rng.choice(list(PUT_ON)))
        return str(rng.choice(PUT_ON[target])), target
    if family == "put_in_basket":
        return str(rng.choice(IN_BASKET)), "basket"
    if family == "spoon_on_towel":
        return "spoon", "towel"
    source, target = rng.choice(CUBES, 2, replace=False)
    return str(source), str(target)


def _sample_instruction(family: str, source: str, target: str, rng: np.random.Generator) -> str:
    """Draw an instruction of the task family, and names for the kinds of source and target."""
    is_in_bowl = family == "put_on" and target == "bowl"
    template = _sample_word(TEMPLATES["put_in_bowl" if is_in_bowl else family], rng)
    source_word = _sample_word(SYNONYMS.get(source, (source,)), rng)
    target_word = _sample_word(SYNONYMS.get(target, (target,)), rng)
    return template.format(source=source_word, target=target_word)


def _sample_word(words: Sequence[str], rng: np.random.Generator) -> str:
    return words[int(rng.integers(len(words)))]


def _sample_names(
    rng: np.random.Generator, pool: Sequence[str], count: int, repeat_probability: float = 0.0
) -> list[str]:
    """Draw `count` different names of `pool`, or all if there are fewer.

    With probability `repeat_probability` the last name is replaced by the first one.
    """
    names = [str(name) for name in rng.choice(pool, min(count, len(pool)), replace=False)]
    can_repeat = repeat_probability > 0 and len(names) > 1
    if can_repeat and rng.random() < repeat_probability:
        names[-1] = names[0]
    return names


# --- Where things are ---


def _place_objects(names: Sequence[str], rng: np.random.Generator) -> tuple[SceneObject, ...]:
    """Place objects of these kinds on the table, with gaps between them.

    The first two are always placed. Others are left out if there is no room for them.
    """
    while True:
        objects = _try_to_place(names, rng)
        if objects is not None:
            return tuple(objects)


def _try_to_place(names: Sequence[str], rng: np.random.Generator) -> list[SceneObject] | None:
    """Place objects one after the other; return None if one of the first two has no room."""
    objects: list[SceneObject] = []
    for index, name in enumerate(names):
        is_of_task = index in (TARGET_INDEX, SOURCE_INDEX)
        gap_m = TASK_OBJECT_GAP_M if is_of_task else OBJECT_GAP_M
        scene_object = _try_to_place_one(name, objects, rng, gap_m)
        if scene_object is not None:
            objects.append(scene_object)
        elif is_of_task:
            return None
    return objects


def _try_to_place_one(
    name: str, neighbors: Sequence[SceneObject], rng: np.random.Generator, gap_m: float
) -> SceneObject | None:
    """Place an object of the kind `name` at random, at least `gap_m` away from its neighbors.

    Returns None if `NUM_PLACING_ATTEMPTS` places were too near to the neighbors.
    """
    kind = OBJECT_KINDS[name]
    min_x, max_x = WORKSPACE_X_M
    min_y, max_y = WORKSPACE_Y_M
    # An object reaches at most 8 cm beyond the border of the workspace (our choice). So the middle
    # of a larger object stays away from the border.
    inset = max(0.0, kind.radius - MAX_OVERHANG_M)
    for _ in range(NUM_PLACING_ATTEMPTS):
        x = rng.uniform(min_x + inset, max_x - inset)
        y = rng.uniform(min_y + inset, max_y - inset)
        if not all(_is_apart(x, y, kind.radius, neighbor, gap_m) for neighbor in neighbors):
            continue
        # Baskets and towels turn by at most 12% of half a turn, others by any angle.
        yaw_factor = 0.12 if name in ("basket", "towel") else 1
        yaw = rng.uniform(-math.pi, math.pi) * yaw_factor
        rotation = (math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2))
        color = _sample_color(rng, kind.colors, OBJECT_COLOR_SPREAD)
        return SceneObject(name, _to_vec3([x, y, kind.height]), rotation, color)
    return None


def _is_apart(x: float, y: float, radius: float, neighbor: SceneObject, gap_m: float) -> bool:
    """Return whether a disc at (x, y) has a gap of more than `gap_m` to the neighbor's disc."""
    distance_m = math.hypot(x - neighbor.position[0], y - neighbor.position[1])
    return distance_m > radius + OBJECT_KINDS[neighbor.kind].radius + gap_m


def _sample_ee_rotation(rng: np.random.Generator, max_tilt_rad: float, max_yaw_rad: float) -> Quat:
    """Draw an orientation of the gripper near straight down.

    The gripper is turned about the vertical axis by up to ±`max_yaw_rad`, and tilted by up to
    `max_tilt_rad` in any direction.
    """
    yaw = rng.uniform(-max_yaw_rad, max_yaw_rad)
    tilt = max_tilt_rad * math.sqrt(rng.random())  # the root makes tilts uniform over a disc
    direction = rng.uniform(-math.pi, math.pi)
    # The product of two quaternions: first the yaw, (cos_yaw, 0, 0, sin_yaw), then the tilt about
    # a horizontal axis (a, b) of the turned frame, (cos_tilt, sin_tilt a, sin_tilt b, 0).
    cos_tilt, sin_tilt = math.cos(tilt / 2), math.sin(tilt / 2)
    cos_yaw, sin_yaw = math.cos(yaw / 2), math.sin(yaw / 2)
    a, b = math.cos(direction), math.sin(direction)
    x = sin_tilt * (cos_yaw * a - sin_yaw * b)
    y = sin_tilt * (cos_yaw * b + sin_yaw * a)
    return cos_yaw * cos_tilt, x, y, sin_yaw * cos_tilt


def _to_vec3(values: Sequence[float] | np.ndarray) -> Vec3:
    """Return the three values as a tuple of floats."""
    return float(values[0]), float(values[1]), float(values[2])
