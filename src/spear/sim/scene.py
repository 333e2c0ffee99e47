"""What a scene contains, as pure data, and how scenes are drawn at random from a seed.

The same seed always gives the same scene. Seeds below `FIRST_TRAIN_SEED` are held out for evaluation.
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
TARGET_INDEX, SOURCE_INDEX = 0, 1
"""Of the objects in a scene with a task: where the source, which is to be moved, goes."""
WORKSPACE = ((0.37, 0.63), (-0.23, 0.23))
"""Where objects lie: x and y ranges on the table, m, base frame."""
EXTERNAL_CAMERA_FOV_Y_DEG = 36.5
"""The external camera's vertical view angle, degrees. One camera, as on a real robot: a degree more or less
would hide 13 mm of depth, and no picture tells."""
NOMINAL_START_POSITION_M = np.array([0.45, 0.0, 0.23])
"""Middle of the gripper's start positions, m, base frame."""

COMPACT = (*CUBES, "tomato", "lemon")
PUT_ON: dict[str, Sequence[str]] = {
    "plate": GRASPABLE,
    "towel": tuple(name for name in GRASPABLE if name != "spoon"),
    "bowl": COMPACT,
}
"""put_on: what may be put on each target. A spoon on a towel is a family of its own."""
IN_BASKET = ("eggplant", "carrot", "banana", "cucumber", "sponge", "can", *COMPACT)
DISTRACTORS = (*GRASPABLE, "bottle")

_DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
TEMPLATES: dict[str, Sequence[str]] = _DATA["templates"]
"""Task family → its instructions, with {source} and {target}."""
SYNONYMS: dict[str, Sequence[str]] = _DATA["synonyms"]
"""What some objects are called, the usual word first."""
SURFACES = {
    "table": (("wood", "planks", "cloth", "plain"), 0.06),
    "floor": (("tiles", "planks", "plain"), 0.08),
    "wall": (("plain", "cloth", "tiles"), 0.08),
}
"""Surface → the materials that it may have, and how far its colours are spread."""

Quat = tuple[float, float, float, float]


@dataclass(frozen=True)
class SceneObject:
    """An object in a scene: its kind, pose (m, quaternion w x y z, base frame) and colour."""

    kind: str
    position: Vec3
    rotation: Quat
    color: Color


@dataclass(frozen=True)
class SceneAppearance:
    """How a scene looks: the external camera and what it looks at (m, base frame), the material and color of
    each of the `SURFACES`, and the light.

    fovy_deg           the external camera's vertical view angle, degrees.
    fill_lights        further lights, each with its direction and color.
    table_half_size_m  half the table's extent along x and y, m; None is the usual table.
    table_height_m     of the table above the floor, m; None is the usual height.
    has_four_walls     whether the room is closed, so that a camera may look anywhere.
    is_robot_visible   whether pictures show the robot. It is there in any case.
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

    things     the objects; where there is a task, `TARGET_INDEX` and `SOURCE_INDEX` are indices into it.
    ee_position, ee_rotation   the gripper's pose at the start (m, quaternion w x y z, base frame).
    opening    the gripper's opening at the start, 0 closed … 1 open.
    held       index of an object that is between the fingers at the start, or None.
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


def held_out_seeds(first: int, count: int) -> range:
    """`count` seeds from `first` on. Raises `SpearError` where training uses one, or there is none."""
    if count < 1 or first < 0 or first + count > FIRST_TRAIN_SEED:
        which = f"scenes {first} … {first + count - 1}" if count > 0 else f"{count} scenes"
        known = f"held-out seeds are 0 … {FIRST_TRAIN_SEED - 1}"
        raise SpearError(f"{which}: {known}: choose scenes among them")
    return range(first, first + count)


def sample_scene(family: str, seed: int) -> SceneSpec:
    """The scene of a task `family` (see `FAMILIES`) and `seed`: one source, one target, 0–3 distractors."""
    check_known("task family", FAMILIES, family)
    rng = np.random.default_rng([FAMILIES.index(family), seed])
    source, target, pool = _cast(family, rng)
    wanted = [target, source, *_choose(rng, pool, int(rng.integers(0, 4)))]
    return SceneSpec(
        family=family,
        seed=seed,
        # drawn in this order
        objects=_place(wanted, rng),
        ee_position=_vec(NOMINAL_START_POSITION_M + rng.uniform(-0.08, 0.08, 3)),
        ee_rotation=_tilted(rng, math.radians(18), math.radians(30)),
        instruction=_instruct(family, source, target, rng),
        appearance=_sample_appearance(rng),
    )


def clutter_scene(seed: int) -> SceneSpec:
    """A scene without a task, for labelling: 2–7 objects, the arm anywhere plausible, perhaps holding one.

    Its images cover what the policy sees on the way: the gripper over, beside or low between the objects.
    """
    rng = np.random.default_rng([len(FAMILIES), seed])
    names = _choose(rng, DISTRACTORS, int(rng.integers(2, 6)), repeats=0.15)
    supports = _choose(rng, SUPPORTS, int(rng.choice([0, 1, 2], p=[0.15, 0.7, 0.15])))
    things = _place([*supports, *names], rng)
    opening = float(rng.choice([1.0, rng.uniform(0.0, 1.0)]))
    graspable = [i for i, thing in enumerate(things) if OBJECT_KINDS[thing.kind].grasp]
    xy = np.array([rng.uniform(*WORKSPACE[0]), rng.uniform(*WORKSPACE[1])])
    if graspable and rng.random() < 0.7:
        xy = np.array(things[int(rng.choice(graspable))].position[:2]) + rng.normal(0, 0.03, 2)
    held = int(rng.choice(graspable)) if graspable and rng.random() < 0.25 else None
    height = float(rng.choice([rng.uniform(0.02, 0.12), rng.uniform(0.06, 0.32)]))
    tilt = float(rng.choice([3.0, 20.0]))
    return SceneSpec(
        family="clutter",
        seed=seed,
        objects=things,
        ee_position=_vec([*xy, height]),
        ee_rotation=_tilted(rng, math.radians(tilt), math.radians(90)),
        opening=opening,
        held_object=held,
        appearance=_sample_appearance(rng),
    )


def _sample_appearance(rng: np.random.Generator) -> SceneAppearance:
    """Camera, surfaces and light at random around one nominal view from the front left (our choice)."""
    camera = np.array([1.12, 0.32, 0.62]) + rng.uniform(-0.04, 0.04, 3)
    target = np.array([0.48, 0.01, 0.09]) + rng.uniform(-0.02, 0.02, 3)
    light = np.array([rng.uniform(-0.7, 0.7), rng.uniform(-0.7, 0.7), -1.0])
    warm = rng.uniform(-0.05, 0.05)
    bright = rng.uniform(0.45, 0.70)
    return SceneAppearance(
        camera=_vec(camera),
        target=_vec(target),
        surfaces={
            name: (str(rng.choice(materials)), _pick(rng, _DATA["colors"][name], spread))
            for name, (materials, spread) in SURFACES.items()
        },
        light=_vec(light / math.hypot(*light)),
        diffuse=_vec(np.clip([bright + warm, bright, bright - warm], 0, 1)),
        ambient=_vec(np.full(3, rng.uniform(0.38, 0.55))),
    )


def _cast(family: str, rng: np.random.Generator) -> tuple[str, str, Sequence[str]]:
    """Who plays: the source, the target, and who may be a distractor."""
    if family == "put_on":
        target = str(rng.choice(list(PUT_ON)))
        source = str(rng.choice(PUT_ON[target]))
    elif family == "put_in_basket":
        target = "basket"
        source = str(rng.choice(IN_BASKET))
    elif family == "spoon_on_towel":
        source, target = "spoon", "towel"
    else:
        source, target = (str(name) for name in rng.choice(CUBES, 2, replace=False))
    return source, target, [name for name in DISTRACTORS if name not in (source, target)]


def _instruct(family: str, source: str, target: str, rng: np.random.Generator) -> str:
    """One wording at random of "`source` to `target`"."""

    def one_of(words: Sequence[str]) -> str:
        return words[int(rng.integers(len(words)))]

    template = one_of(
        TEMPLATES["put_in_bowl" if family == "put_on" and target == "bowl" else family]
    )
    source, target = (one_of(SYNONYMS.get(name, (name,))) for name in (source, target))
    return template.format(source=source, target=target)


def _choose(
    rng: np.random.Generator, pool: Sequence[str], count: int, repeats: float = 0.0
) -> list[str]:
    names = [str(name) for name in rng.choice(pool, min(count, len(pool)), replace=False)]
    if repeats and len(names) > 1 and rng.random() < repeats:
        names[-1] = names[0]
    return names


def _place(names: Sequence[str], rng: np.random.Generator) -> tuple[SceneObject, ...]:
    """Lay the objects apart from each other; those after the first two are left out when room is short."""
    while True:
        things: list[SceneObject] = []
        for i, name in enumerate(names):
            thing = _find_room(name, things, rng, gap=0.03 if i < 2 else 0.02)
            if thing is not None:
                things.append(thing)
            elif i < 2:
                break
        else:
            return tuple(things)


def _find_room(
    name: str, others: Sequence[SceneObject], rng: np.random.Generator, gap: float
) -> SceneObject | None:
    kind = OBJECT_KINDS[name]
    # large things keep their middle further inside
    inset = max(0.0, kind.radius - 0.08)
    for _ in range(40):
        x = rng.uniform(WORKSPACE[0][0] + inset, WORKSPACE[0][1] - inset)
        y = rng.uniform(WORKSPACE[1][0] + inset, WORKSPACE[1][1] - inset)
        if all(
            math.hypot(x - o.position[0], y - o.position[1])
            > kind.radius + OBJECT_KINDS[o.kind].radius + gap
            for o in others
        ):
            yaw = rng.uniform(-math.pi, math.pi) * (0.12 if name in ("basket", "towel") else 1)
            turn = (math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2))
            return SceneObject(name, _vec([x, y, kind.height]), turn, _pick(rng, kind.colors, 0.04))
    return None


def _tilted(rng: np.random.Generator, tilt: float, yaw: float) -> Quat:
    """A gripper orientation: straight down, turned by up to ±`yaw` and leaning by up to `tilt` (rad)."""
    turn = rng.uniform(-yaw, yaw)
    lean = tilt * math.sqrt(rng.random())
    way = rng.uniform(-math.pi, math.pi)
    # yaw first, then a turn about a horizontal axis of the turned frame
    c, s = math.cos(lean / 2), math.sin(lean / 2)
    ct, st = math.cos(turn / 2), math.sin(turn / 2)
    ax, ay = math.cos(way), math.sin(way)
    return ct * c, s * (ct * ax - st * ay), s * (ct * ay + st * ax), st * c


def _pick(rng: np.random.Generator, colors: Sequence[Color], spread: float) -> Color:
    color = np.array(colors[int(rng.integers(len(colors)))])
    color = color * (1 + rng.uniform(-spread, spread)) + rng.uniform(-spread, spread, 3) / 2
    return _vec(np.clip(color, 0, 1))


def _vec(values: Sequence[float] | np.ndarray) -> Vec3:
    return float(values[0]), float(values[1]), float(values[2])
