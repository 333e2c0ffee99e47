"""Procedural gray textures for surfaces, made of a few waves, patches and grains.

A texture is a function of a pixel grid and a random generator. It returns gray values around 0.9,
which MuJoCo multiplies with the surface's color. x and y are pixel coordinates in [0, 1), so `(x *
8) % 1` is the position within one of eight periods. `WILD_TEXTURES` appear in wild worlds, in which
models may be trained. `UNSEEN_TEXTURES` appear only in the hardest shift of the background, so that
no model has seen them in training.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

TEXTURE_SIZE_PX = 128  # width and height

Gray = NDArray[np.floating[Any]]
"""[h, w] gray values, 0 … 1."""
TextureFunction = Callable[[Gray, Gray, np.random.Generator], Gray]
"""(x, y, random generator) → gray values; x and y are [h, w] in [0, 1). Regular patterns draw no
random numbers."""


def _checkerboard(x: Gray, y: Gray, _rng: np.random.Generator) -> Gray:
    squares = ((x * 8).astype(int) + (y * 8).astype(int)) % 2
    return 0.95 - 0.3 * squares


def _stripes(x: Gray, y: Gray, _rng: np.random.Generator) -> Gray:
    return 0.95 - 0.25 * ((x * 10) % 1 < 0.4)


def _dots(x: Gray, y: Gray, _rng: np.random.Generator) -> Gray:
    distance = np.hypot((x * 6) % 1 - 0.5, (y * 6) % 1 - 0.5)
    return 0.95 - 0.35 * (distance < 0.25)


def _bricks(x: Gray, y: Gray, _rng: np.random.Generator) -> Gray:
    # Every second row of bricks is shifted by half a brick.
    row = (y * 8).astype(int)
    shifted = (x * 4 + 0.5 * (row % 2)) % 1
    mortar = (shifted < 0.06) | ((y * 8) % 1 < 0.12)
    return 0.92 - 0.3 * mortar


def _marble(x: Gray, y: Gray, rng: np.random.Generator) -> Gray:
    # Dark veins lie where a wave along x, bent by noise, crosses zero.
    bend = _smooth_noise(x, y, rng)
    distance_to_vein = np.abs(np.sin(2 * math.pi * (2 * x + 1.5 * bend)))  # 0 in a vein, at most 1
    return 0.95 - 0.35 * (1 - distance_to_vein) ** 4


def _clouds(x: Gray, y: Gray, rng: np.random.Generator) -> Gray:
    return 0.8 + 0.2 * _smooth_noise(x, y, rng)


def _make_pixel_noise(x: Gray, y: Gray, rng: np.random.Generator) -> Gray:
    return 0.88 + rng.normal(0, 0.08, x.shape)


def _granite(x: Gray, y: Gray, rng: np.random.Generator) -> Gray:
    speckles = rng.random(x.shape)
    return 0.9 - 0.5 * (speckles < 0.04) + 0.1 * (speckles > 0.94)


def _weave(x: Gray, y: Gray, _rng: np.random.Generator) -> Gray:
    # Threads along both axes; where they cross, one is above the other in turns.
    warp = np.sin(2 * math.pi * 16 * x)
    weft = np.sin(2 * math.pi * 16 * y)
    return 0.88 + 0.08 * np.where(np.sign(warp) == np.sign(weft), warp, weft)


def _plaid(x: Gray, y: Gray, _rng: np.random.Generator) -> Gray:
    return 0.95 - 0.15 * ((x * 4) % 1 < 0.3) - 0.15 * ((y * 4) % 1 < 0.3)


def _hexagons(x: Gray, y: Gray, _rng: np.random.Generator) -> Gray:
    # Three waves, 60° apart, add up to a hexagonal grid.
    directions = (0.0, math.pi / 3, 2 * math.pi / 3)
    waves = [np.cos(2 * math.pi * 6 * (math.cos(a) * x + math.sin(a) * y)) for a in directions]
    return 0.85 + 0.06 * np.sum(waves, axis=0)


def _rings(x: Gray, y: Gray, _rng: np.random.Generator) -> Gray:
    radius = np.hypot(x - 0.5, y - 0.5)
    return 0.9 - 0.2 * ((radius * 12) % 1 < 0.4)


def _zigzag(x: Gray, y: Gray, _rng: np.random.Generator) -> Gray:
    teeth = np.abs((x * 8) % 1 - 0.5)
    return 0.92 - 0.3 * ((y * 8 + teeth) % 1 < 0.35)


def _camouflage(x: Gray, y: Gray, rng: np.random.Generator) -> Gray:
    levels = np.floor(2 * (1 + _smooth_noise(x, y, rng)))
    return 0.6 + 0.12 * levels


def _diamonds(x: Gray, y: Gray, _rng: np.random.Generator) -> Gray:
    distance = np.abs((x * 5) % 1 - 0.5) + np.abs((y * 5) % 1 - 0.5)
    return 0.92 - 0.3 * (distance < 0.25)


def _smooth_noise(x: Gray, y: Gray, rng: np.random.Generator) -> Gray:
    """Periodic noise in -1 … 1: a sum of 12 waves in random directions; finer waves are weaker."""
    noise = np.zeros_like(x)
    for _ in range(12):
        cycles_x, cycles_y = rng.integers(-5, 6, 2)
        phase = rng.uniform(0, 2 * math.pi)
        weight = 1 / (1 + math.hypot(cycles_x, cycles_y))
        noise += weight * np.sin(2 * math.pi * (cycles_x * x + cycles_y * y) + phase)
    return noise / np.abs(noise).max()


WILD_TEXTURES: dict[str, TextureFunction] = {
    "checkerboard": _checkerboard,
    "stripes": _stripes,
    "dots": _dots,
    "bricks": _bricks,
    "marble": _marble,
    "clouds": _clouds,
    "grain": _make_pixel_noise,
    "granite": _granite,
    "weave": _weave,
    "plaid": _plaid,
}
UNSEEN_TEXTURES: dict[str, TextureFunction] = {
    "hexagons": _hexagons,
    "rings": _rings,
    "zigzag": _zigzag,
    "camouflage": _camouflage,
    "diamonds": _diamonds,
}


def draw_texture(name: str) -> NDArray[np.uint8]:
    """Draw the texture `name` of `WILD_TEXTURES` or `UNSEEN_TEXTURES`: [128, 128] gray pixels.

    The same name always gives the same pixels.
    """
    functions = WILD_TEXTURES | UNSEEN_TEXTURES
    rng = np.random.default_rng([3, list(functions).index(name)])
    axis = np.arange(TEXTURE_SIZE_PX) / TEXTURE_SIZE_PX
    x, y = np.meshgrid(axis, axis)
    gray = functions[name](x, y, rng)
    return (np.clip(gray, 0, 1) * 255).astype(np.uint8)
