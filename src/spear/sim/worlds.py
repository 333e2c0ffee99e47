"""Worlds: the surroundings in which the scenes of the simulator stand.

    default  the table, camera and light that `spear.sim.scene` draws.
    lab:N    laboratory number N: all scenes have the same camera, table, wall and light, which are
             drawn at random from N.
    labs:K   each scene stands in one of the laboratories 0 … K - 1.
    wild     each scene has other surroundings: a camera anywhere around the table, any colors and
             textures, several lights, tables and floors of other sizes and heights, and clutter,
             which consists of objects that no task uses.
    varied   as wild, but the camera is near the one of the default world in many scenes and far
             from it in few, and the light changes more.
    colorful the table and floor of the default world, with any colors and often other textures,
             another light, a camera moved by up to 30°, and clutter.
    colorful-lab:N, colorful-labs:K
             laboratories that look like colorful scenes, without clutter.

A world changes only the surroundings. The objects of the task, their places and the instruction
stay the ones of the scene's seed, so that two worlds can be compared on the same tasks.

All ranges from which surroundings are drawn are our choice.
"""

import dataclasses
import math
import re
from dataclasses import dataclass

import numpy as np

from spear.errors import SpearError
from spear.sim.objects import OBJECT_KINDS, TASK_FREE_KINDS, Color, Vec3
from spear.sim.scene import (
    EXTERNAL_CAMERA_FOV_Y_DEG,
    SURFACES,
    SceneAppearance,
    SceneObject,
    SceneSpec,
    sample_clutter_scene,
)
from spear.sim.textures import WILD_TEXTURES

DEFAULT_WORLD = "default"
WILD = "wild"
VARIED = "varied"
COLORFUL = "colorful"
_WORLDS_OF_SCENES = (DEFAULT_WORLD, WILD, VARIED, COLORFUL)
"""The worlds whose surroundings are drawn for each scene. Laboratories are the other worlds."""
_LAB = re.compile(r"(colorful-)?lab:(\d{1,6})")  # "lab:7", one laboratory
_LABS = re.compile(r"(colorful-)?labs:([1-9]\d{0,6})")  # "labs:20", each scene in one of 20

_WILD_STREAM = 101
_LAB_STREAM = 102
_VARIED_STREAM = 104  # like `spear.evaluate.noise`, but its seeds have fewer numbers
_COLORFUL_STREAM = 105
_COLORFUL_LAB_STREAM = 106
"""First numbers of the random generators' seeds in this file. Other files use other first numbers,
so that no two draw the same random numbers."""

CLUTTER_AREA_M = ((0.22, 0.80), (-0.40, 0.40))
"""Where clutter may lie: x and y ranges on the table, m, base frame. This area is larger than
the workspace of `spear.sim.scene`, where the objects of tasks lie."""
CLUTTER_GAP_M = 0.015
"""The smallest gap between clutter and other objects, m."""


@dataclass(frozen=True)
class CameraOrbit:
    """A camera's position in spherical coordinates around the target, the point it looks at.

    target         the point that the camera looks at, m, base frame.
    azimuth_deg    angle of the camera's direction from the target about the vertical axis. At 0 the
                   camera is in front of the robot and looks along −x; at a positive azimuth it is
                   to the robot's left.
    elevation_deg  angle of the camera above the horizontal plane through the target.
    distance_m     distance from the target to the camera.
    """

    target: Vec3
    azimuth_deg: float
    elevation_deg: float
    distance_m: float

    @staticmethod
    def of(appearance: SceneAppearance) -> "CameraOrbit":
        """The orbit of the external camera of a scene."""
        return CameraOrbit.around(appearance.target, appearance.camera)

    @staticmethod
    def around(target: Vec3, position: Vec3) -> "CameraOrbit":
        """The orbit of a camera at `position` that looks at `target`."""
        x, y, z = np.subtract(position, target)
        return CameraOrbit(
            target=target,
            azimuth_deg=math.degrees(math.atan2(y, x)),
            elevation_deg=math.degrees(math.atan2(z, math.hypot(x, y))),
            distance_m=math.sqrt(x * x + y * y + z * z),
        )

    def compute_position(self) -> Vec3:
        """The camera's position, m, base frame."""
        azimuth = math.radians(self.azimuth_deg)
        elevation = math.radians(self.elevation_deg)
        horizontal = self.distance_m * math.cos(elevation)
        return (
            self.target[0] + horizontal * math.cos(azimuth),
            self.target[1] + horizontal * math.sin(azimuth),
            self.target[2] + self.distance_m * math.sin(elevation),
        )


def validate_world(name: str) -> str:
    """Return `name` if there is such a world. Raises `SpearError` otherwise."""
    if name in _WORLDS_OF_SCENES or _LAB.fullmatch(name) or _LABS.fullmatch(name):
        return name
    raise SpearError(
        f"There is no world {name!r}. Choose default, wild, varied, colorful, lab:N (laboratory"
        " number N), labs:K (K laboratories), colorful-lab:N or colorful-labs:K."
    )


def get_lab_of_scene(seed: int, num_labs: int) -> str:
    """The name of the laboratory, one of `num_labs`, in which the scene of a seed stands.

    >>> get_lab_of_scene(10_005, 4)
    'lab:1'
    """
    return f"lab:{seed % num_labs}"


def place_in_world(scene: SceneSpec, name: str) -> SceneSpec:
    """Return the same task in the surroundings of a world.

    Args:
        scene: a scene of `spear.sim.scene.sample_scene` or `sample_clutter_scene`.
        name: "default", "wild", "varied", "colorful", "lab:N", "labs:K", "colorful-lab:N" or
            "colorful-labs:K".

    Returns:
        The scene with other surroundings. The same scene and name always give the same result.

    Raises:
        SpearError: there is no such world.
    """
    validate_world(name)
    if name == DEFAULT_WORLD:
        return scene

    labs = _LABS.fullmatch(name)
    if labs:
        kind = labs[1] or ""  # "" or "colorful-"
        name = kind + get_lab_of_scene(scene.seed, int(labs[2]))
    lab = _LAB.fullmatch(name)
    if lab:
        number = int(lab[2])
        is_colorful = lab[1] is not None
        if is_colorful:
            appearance = _sample_colorful_lab_look(number)
        else:
            rng = np.random.default_rng([_LAB_STREAM, number])
            appearance = _sample_lab_look(scene.appearance, rng)
        return dataclasses.replace(scene, appearance=appearance)

    if name == VARIED:
        rng = np.random.default_rng([_VARIED_STREAM, *scene.family.encode(), scene.seed])
        appearance = _sample_varied_look(scene.appearance, rng)
        num_clutter = int(rng.integers(0, 10))
    elif name == COLORFUL:
        rng = np.random.default_rng([_COLORFUL_STREAM, *scene.family.encode(), scene.seed])
        appearance = _sample_colorful_look(scene.appearance, rng)
        num_clutter = int(rng.integers(0, 7))
    else:
        rng = np.random.default_rng([_WILD_STREAM, *scene.family.encode(), scene.seed])
        appearance = _sample_wild_look(scene.appearance, rng)
        num_clutter = int(rng.integers(0, 5))
    objects = with_clutter(scene.objects, TASK_FREE_KINDS, num_clutter, rng)
    return dataclasses.replace(scene, appearance=appearance, objects=objects)


def with_invisible_robot(scene: SceneSpec) -> SceneSpec:
    """Return a copy of the scene, whose robot images do not show."""
    return dataclasses.replace(
        scene, appearance=dataclasses.replace(scene.appearance, is_robot_visible=False)
    )


def with_clutter(
    objects: tuple[SceneObject, ...],
    kinds: tuple[str, ...],
    max_added: int,
    rng: np.random.Generator,
) -> tuple[SceneObject, ...]:
    """Return the objects and up to `max_added` further ones, placed on the table with gaps.

    Each further object is of one of `kinds`, and is left out if there is no room for it.
    """
    result = list(objects)
    for _ in range(max_added):
        name = str(rng.choice(kinds))
        scene_object = _place_freely(name, result, rng)
        if scene_object is not None:
            result.append(scene_object)
    return tuple(result)


def sample_any_color(rng: np.random.Generator) -> Color:
    """Draw any color, with red, green and blue uniform from 0.05 to 0.95."""
    red, green, blue = rng.uniform(0.05, 0.95, 3)
    return float(red), float(green), float(blue)


def sample_color_near(color: Color, distance: float, rng: np.random.Generator) -> Color:
    """Draw a color whose red, green and blue each differ from `color`'s by at most `distance`."""
    red, green, blue = np.clip(color + rng.uniform(-distance, distance, 3), 0, 1)
    return float(red), float(green), float(blue)


def sample_downward_light_direction(rng: np.random.Generator) -> Vec3:
    """Draw the direction [3] in which light shines, a unit vector.

    The light comes from a point that is uniform on the sphere at least 15° above the horizon.
    """
    azimuth = rng.uniform(-math.pi, math.pi)
    height = rng.uniform(math.sin(math.radians(15)), 1)  # uniform height: uniform on the sphere
    horizontal = math.sqrt(1 - height * height)
    return -horizontal * math.cos(azimuth), -horizontal * math.sin(azimuth), -height


def _sample_wild_look(appearance: SceneAppearance, rng: np.random.Generator) -> SceneAppearance:
    """Draw the appearance of a wild world, with a camera around the one of `appearance`."""
    orbit = CameraOrbit.of(appearance)
    # The target is moved by up to 6 cm along x and y, and by up to 3 cm along z.
    center = np.array(appearance.target) + rng.uniform(-0.06, 0.06, 3) * (1, 1, 0.5)
    camera = CameraOrbit(
        target=(float(center[0]), float(center[1]), float(center[2])),
        azimuth_deg=orbit.azimuth_deg + rng.uniform(-60, 60),
        elevation_deg=rng.uniform(15, 70),
        distance_m=orbit.distance_m * math.exp(rng.uniform(math.log(0.6), math.log(1.6))),
    )
    textures = (*WILD_TEXTURES, "plain", "wood", "planks", "cloth", "tiles")
    warmth = rng.uniform(-0.12, 0.12)
    brightness = rng.uniform(0.3, 0.8)
    fill_lights = []
    for _ in range(int(rng.integers(0, 3))):
        color = sample_color_near((0.2, 0.2, 0.2), distance=0.1, rng=rng)
        fill_lights.append((sample_downward_light_direction(rng), color))
    return dataclasses.replace(
        appearance,
        camera=camera.compute_position(),
        target=camera.target,
        fovy_deg=float(rng.uniform(30, 65)),
        surfaces={name: (str(rng.choice(textures)), sample_any_color(rng)) for name in SURFACES},
        light=sample_downward_light_direction(rng),
        diffuse=sample_color_near(
            (brightness + warmth, brightness, brightness - warmth), 0.02, rng
        ),
        ambient=sample_color_near((0.4, 0.4, 0.4), 0.12, rng),
        fill_lights=tuple(fill_lights),
        table_half_size_m=(float(rng.uniform(0.5, 0.9)), float(rng.uniform(0.5, 1.1))),
        table_height_m=float(rng.uniform(0.4, 1.1)),
        has_four_walls=True,
    )


def _sample_varied_look(appearance: SceneAppearance, rng: np.random.Generator) -> SceneAppearance:
    """Draw the appearance of a varied world.

    The camera is moved in the same ways as in a wild world, but all its changes are multiplied by
    one factor, uniform from 0 to 1: half of the scenes have less than half of the largest change.
    """
    wild = _sample_wild_look(appearance, rng)
    orbit = CameraOrbit.of(appearance)
    share = rng.uniform(0, 1)  # of the largest change of the camera
    elevation_deg = orbit.elevation_deg + share * rng.uniform(-30, 30)
    log_factor = share * math.log(1.6)
    camera = CameraOrbit(
        target=appearance.target,
        azimuth_deg=orbit.azimuth_deg + share * rng.uniform(-60, 60),
        elevation_deg=float(np.clip(elevation_deg, 12, 78)),
        distance_m=orbit.distance_m * math.exp(rng.uniform(-log_factor, log_factor)),
    )
    brightness = math.exp(rng.uniform(-math.log(2.5), math.log(2.5)))
    warmth = rng.uniform(-0.4, 0.4)
    return dataclasses.replace(
        wild,
        camera=camera.compute_position(),
        target=camera.target,
        fovy_deg=EXTERNAL_CAMERA_FOV_Y_DEG + float(share * rng.uniform(-15, 15)),
        diffuse=_tint(appearance.diffuse, brightness, warmth),
        ambient=_tint(appearance.ambient, brightness, warmth),
        fill_lights=(),
    )


def _sample_colorful_look(appearance: SceneAppearance, rng: np.random.Generator) -> SceneAppearance:
    """Draw the appearance of a colorful world: that of the default world, changed moderately.

    The camera's changes are multiplied by one factor, uniform from 0 to 1, as in a varied world.
    """
    orbit = CameraOrbit.of(appearance)
    share = rng.uniform(0, 1)  # of the largest change of the camera
    log_factor = share * math.log(1.3)
    camera = CameraOrbit(
        target=orbit.target,
        azimuth_deg=orbit.azimuth_deg + share * rng.uniform(-30, 30),
        elevation_deg=orbit.elevation_deg + share * rng.uniform(-20, 20),
        distance_m=orbit.distance_m * math.exp(rng.uniform(-log_factor, log_factor)),
    )

    surfaces = {}
    for name in SURFACES:
        texture, _ = appearance.surfaces[name]
        if rng.random() < 0.5:
            texture = str(rng.choice(tuple(WILD_TEXTURES)))
        surfaces[name] = (texture, sample_any_color(rng))

    brightness = math.exp(rng.uniform(-math.log(2), math.log(2)))
    warmth = rng.uniform(-0.3, 0.3)
    return dataclasses.replace(
        appearance,
        camera=camera.compute_position(),
        fovy_deg=EXTERNAL_CAMERA_FOV_Y_DEG + float(share * rng.uniform(-8, 8)),
        surfaces=surfaces,
        light=sample_downward_light_direction(rng),
        diffuse=_tint(appearance.diffuse, brightness, warmth),
        ambient=_tint(appearance.ambient, brightness, warmth),
        has_four_walls=True,
    )


def _sample_colorful_lab_look(number: int) -> SceneAppearance:
    """The appearance of a colorful laboratory: a scene of the default world, changed moderately."""
    rng = np.random.default_rng([_COLORFUL_LAB_STREAM, number])
    return _sample_colorful_look(sample_clutter_scene(number).appearance, rng)


def _tint(color: Color, brightness: float, warmth: float) -> Color:
    """Multiply a light's color by `brightness`, with more red and less blue if warmth > 0."""
    tint = brightness * np.array([1 + warmth, 1.0, 1 - warmth])
    red, green, blue = np.clip(np.array(color) * tint, 0, 1)
    return float(red), float(green), float(blue)


def _sample_lab_look(appearance: SceneAppearance, rng: np.random.Generator) -> SceneAppearance:
    """Draw the appearance of a laboratory: a wild world, with the camera where a person mounts it.

    The result is the same for every scene, because `rng` is seeded with the laboratory's number
    alone, and nothing of the scene's own camera remains. `_sample_wild_look` uses that camera's
    target, azimuth and distance, but this function replaces all three.
    """
    wild = _sample_wild_look(appearance, rng)
    wild_orbit = CameraOrbit.of(wild)
    target_m = (0.48, 0.01, 0.09)  # middle of the targets of the default world's cameras
    camera = CameraOrbit(
        target=target_m,
        azimuth_deg=float(rng.uniform(-34, 86)),  # ±60° around the default world's camera, at 26°
        elevation_deg=float(np.clip(wild_orbit.elevation_deg, 20, 60)),
        distance_m=float(rng.uniform(0.75, 1.2)),  # 0.89 m in the default world
    )
    return dataclasses.replace(
        wild,
        camera=camera.compute_position(),
        target=target_m,
        fovy_deg=float(rng.uniform(EXTERNAL_CAMERA_FOV_Y_DEG, 50)),
    )


def _place_freely(
    name: str, neighbors: list[SceneObject], rng: np.random.Generator
) -> SceneObject | None:
    """Place an object with gaps to its neighbors; return None after 30 attempts without room."""
    kind = OBJECT_KINDS[name]
    (min_x, max_x), (min_y, max_y) = CLUTTER_AREA_M
    for _ in range(30):
        x = float(rng.uniform(min_x, max_x))
        y = float(rng.uniform(min_y, max_y))
        is_free = True
        for neighbor in neighbors:
            distance = math.hypot(x - neighbor.position[0], y - neighbor.position[1])
            if distance < kind.radius + OBJECT_KINDS[neighbor.kind].radius + CLUTTER_GAP_M:
                is_free = False
        if is_free:
            yaw = float(rng.uniform(-math.pi, math.pi))
            rotation = (math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2))
            color = sample_color_near(kind.colors[int(rng.integers(len(kind.colors)))], 0.15, rng)
            return SceneObject(name, (x, y, kind.height), rotation, color)
    return None
