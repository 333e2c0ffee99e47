"""What a policy saw of its robot in training, by which it notices a robot that sends or does something else.

Exchanged colours or cameras, a picture upside down, another frame, another quaternion or an inverted gripper
make valid observations, and a robot that moves smoothly to the wrong place. All thresholds are our choice.
"""

import zlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, TypeAdapter

from spear.checks.senses import FROZEN_M
from spear.data.mixture import TrainingSamples
from spear.errors import notice
from spear.geometry import quat_distance
from spear.types import Array
from spear.util.files import read_json_as, write_text

SAMPLES, LEVELS = 512, 3.0
"""Steps that are looked at, as training draws them; the least spread of colours that counts, of 255."""
BEYOND_M, TURNED_RAD = 0.1, np.pi / 4
"""So far beyond what was seen is noted; of positions, this further than the seen range is wide."""
GRID, LIKE, CLEARLY = 8, 0.6, 0.2
"""Pictures are compared by their brightness in so many rows and columns. One is shown otherwise that, turned
back, correlates so much with the mean picture, and gains so much more by it than any picture of training."""
TURNS = {
    "turned by 180°": (-1, -1),
    "flipped left to right": (1, -1),
    "flipped upside down": (-1, 1),
}
"""How a picture may be shown otherwise: steps through its rows and columns."""
LOOKED_AT, LATER = 64, 16
"""So many observations at the beginning are compared with those of training, then one of so many."""
OPPOSITE, MOSTLY = 0.75, 0.5
"""A gripper is inverted that is so far (of 0 … 1) from what it was told in more than this share of them; or,
at the first, so far from where training's episodes begin."""
FURTHER, REST_M = 1.5, 0.02
"""Who is so much further from where it was than it was told to go, and this, is another robot."""
MOVED_M, OTHER_AXES = 0.003, 0.4
"""An arm that moved so far goes along other axes where these explain so much more of it (mean cosine)."""
MOST_ROBOTS = 1024
"""Robots that are kept apart: of more, the one not heard for longest is met anew."""

_Triple = Annotated[tuple[float, ...], Field(min_length=3, max_length=3)]
_Four = Annotated[tuple[float, ...], Field(min_length=4, max_length=4)]
_Row = Annotated[list[float], Field(min_length=GRID, max_length=GRID)]
_Look = Annotated[list[_Row], Field(min_length=GRID, max_length=GRID)]


@dataclass(frozen=True)
class Seen:
    """Of the steps that training drew.

    low, high  the least and the largest position, m, base frame.
    facing     the mean orientation, unit quaternion; turned: the largest angle from it, rad.
    redder     camera → mean and standard deviation, over images, of the mean of red minus blue (0 … 255).
    looks      camera → the mean picture, coarse [8, 8].
    mistaken   camera → how it may be shown otherwise → the most by which a picture is more like that.
    opposite   the share of steps in which the gripper is the opposite of what it is told.
    begins     the mean opening with which the episodes of these steps begin.
    """

    low: _Triple
    high: _Triple
    facing: _Four
    turned: float
    redder: Mapping[str, tuple[float, float]]
    opposite: float = 0.0
    begins: float = 0.5
    looks: Mapping[str, _Look] = field(default_factory=dict)
    mistaken: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    @staticmethod
    def of(samples: TrainingSamples, batch_size: int) -> "Seen":
        """From the first batches of a training: what was read there can be read again."""
        plain = replace(samples, augment=0.0)
        numbers = range(-(-SAMPLES // batch_size))
        drawn = [sample for number in numbers for sample in plain.mixture.draw(number, batch_size)]
        begins = float(np.mean([plain.mixture.episode(sample).gripper[0] for sample in drawn]))
        return Seen.of_batches([plain.batch(number, batch_size) for number in numbers], begins)

    @staticmethod
    def of_batches(batches: Sequence[Mapping[str, Any]], begins: float) -> "Seen":
        """From batches as `TrainingSamples` makes them."""
        position, rotation = (
            np.concatenate([b[name] for b in batches]) for name in ("position", "rotation")
        )
        # The mean of orientations, whatever the signs of their quaternions (Markley et al. 2007).
        facing = np.linalg.eigh(rotation.T.astype(np.float64) @ rotation)[1][:, -1]
        shown = {
            view: np.concatenate([b["images"][view][b["views"][view]] for b in batches])
            for view in batches[0]["images"]
        }
        shown = {view: images for view, images in shown.items() if len(images)}
        redder = {}
        for view, images in shown.items():
            found = images[..., 0].mean((1, 2)) - images[..., 2].mean((1, 2))
            redder[view] = (float(found.mean()), float(found.std()))
        coarse = {
            view: _coarse(images.mean(-1, dtype=np.float32)) for view, images in shown.items()
        }
        looks = {view: small.mean(0, dtype=np.float64).round(3) for view, small in coarse.items()}
        mistaken = {
            view: {
                words: float((like - own).max())
                for words, like, own in _otherwise(small, view, looks)
            }
            for view, small in coarse.items()
        }
        low, high = (tuple(map(float, end)) for end in (position.min(0), position.max(0)))
        turned = float(quat_distance(torch.from_numpy(rotation), torch.tensor(facing)).max())
        opposite = np.concatenate(
            [np.abs(b["action"][:, 0, 7] - b["gripper"]) > OPPOSITE for b in batches]
        )
        told = (
            float(opposite.mean()),
            begins,
            {view: look.tolist() for view, look in looks.items()},
            mistaken,
        )
        return Seen(low, high, tuple(map(float, facing)), turned, redder, *told)

    def unlike_at_first(self, state: Array) -> str | None:
        """What of a robot's first state [8] is unlike the first ones of training's episodes, in words."""
        if abs(state[7] - self.begins) <= OPPOSITE:
            return None
        words = (
            f"the gripper begins at {state[7]:.2f}, in training at {self.begins:.2f} in the mean"
        )
        return f"{words}: inverted? 1 is open, 0 closed"

    def unlike(self, states: Array, images: Mapping[str, Array]) -> Iterator[tuple[str, str]]:
        """What of observations is unlike training, as (key, words).

        states [B, 8] as `spear.types.Policy` has them; images camera → [B, 3, h, w] as the model sees them.
        """
        ends = np.array([self.low, self.high])
        apart = np.abs(states[:, :3] - ends.mean(0))
        for axis in np.flatnonzero(apart.max(0) > 1.5 * np.ptp(ends, 0) + BEYOND_M):
            found = f"{'xyz'[axis]} is {states[apart[:, axis].argmax(), axis]:.2f} m"
            words = f"{found}, training had {ends[0, axis]:.2f} … {ends[1, axis]:.2f}"
            yield f"state {axis}", f"{words}: another base frame or unit?"
        angle = float(
            quat_distance(torch.from_numpy(states[:, 3:7]), torch.tensor(self.facing)).max()
        )
        if angle > self.turned + TURNED_RAD:
            here, there = np.degrees([angle, self.turned])
            seen = f"turned by {here:.0f}° from the mean orientation, in training by {there:.0f}° at most"
            yield "rotation", f"{seen}: another order of the quaternion, or another frame?"
        for view, pixels in images.items():
            mean, spread = self.redder.get(view, (0.0, 0.0))
            red, blue = (pixels[:, channel].mean(dtype=np.float64) for channel in (0, 2))
            spread = max(spread, LEVELS)
            if abs(red - blue - mean) > 4 * spread and abs(blue - red - mean) < 2 * spread:
                yield view, f"camera {view!r}: red and blue are as if exchanged: send RGB, not BGR"
            if np.ptp(pixels) < LEVELS:
                yield view, f"camera {view!r} shows nothing: is it covered, or off?"
            elif view in self.looks:
                small = _coarse(pixels.mean(1, dtype=np.float32))
                otherwise = [
                    (float(like.mean()), words)
                    for words, like, own in _otherwise(small, view, self.looks)
                    if (like - own).mean() > self.mistaken[view].get(words, 2.0) + CLEARLY
                ]
                if otherwise and max(otherwise)[0] > LIKE:
                    yield view, f"camera {view!r} is as if {max(otherwise)[1]}"

    def save(self, path: Path) -> None:
        """Write as JSON; complete or not at all."""
        write_text(path, TypeAdapter(Seen).dump_json(self, indent=1).decode())

    @staticmethod
    def load(path: Path) -> "Seen | None":
        """What `save` wrote; None where there is no such file. Raises `SpearError` for another one."""
        return (
            read_json_as(Seen, path, "copy the folder again, or remove it")
            if path.is_file()
            else None
        )


def _coarse(brightness: Array) -> Array:
    """Images' brightness [B, h, w] → [B, 8, 8], each with mean 0 and length 1."""
    small = F.adaptive_avg_pool2d(torch.from_numpy(brightness)[:, None], GRID)[:, 0]
    small = small - small.mean((1, 2), keepdim=True)
    return F.normalize(small.flatten(1)).view_as(small).numpy()


def _otherwise(
    small: Array, view: str, looks: Mapping[str, Any]
) -> Iterator[tuple[str, Array, Array]]:
    """How a camera's coarse pictures [B, 8, 8] may be shown otherwise: in words, their correlation [B] with
    the mean picture then, and as they are."""
    own = _like(small, looks[view])
    for words, (down, across) in TURNS.items():
        yield words, _like(small[:, ::down, ::across], looks[view]), own
    for other in looks.keys() - {view}:
        yield f"exchanged with camera {other!r}", _like(small, looks[other]), own


def _like(small: Array, look: Any) -> Array:
    mean = np.asarray(look, np.float64)
    return np.einsum("bij,ij->b", small, mean / max(float(np.linalg.norm(mean)), 1e-6))


class RobotCheck:
    """Whether a robot does what it is told: what follows shows an inverted gripper, or an arm that goes along
    other axes. looked: how many of its observations were compared with training; noted: what was said of it;
    name: how words about it begin, where it is not the first.
    """

    def __init__(self, number: int = 1) -> None:
        self.name = f"robot {number}: " if number > 1 else ""
        self.looked, self.noted = 0, set[str]()
        self._chunk: Array | None = None
        self._state, self._stuck = np.zeros(8), 0.0
        self._opposite: list[bool] = []
        self._ways: list[Array] = []
        self._shown: dict[str, tuple[int, Array]] = {}

    def frozen(self, state: Array, images: Mapping[str, Array]) -> Iterator[tuple[str, str]]:
        """Which cameras show a robot at `state` [8] what they showed elsewhere: (key, words)."""
        for view, pixels in images.items():
            picture = zlib.crc32(pixels.data)
            was, at = self._shown.get(view, (None, state))
            if picture != was:
                self._shown[view] = picture, state.copy()
            elif (went := float(np.linalg.norm(state[:3] - at[:3]))) > FROZEN_M:
                yield (
                    f"frozen {view}",
                    f"camera {view!r}: the very same picture {went:.2f} m later: frozen?",
                )

    def told(self, chunk: Array | None) -> None:
        """The actions [H, 8] that the robot now executes some of; None where nobody knows."""
        self._chunk = (
            None if chunk is None else chunk.copy()
        )  # whose program may turn its gripper round

    def otherwise(self, state: Array) -> Iterator[tuple[str, str]]:
        """What a robot that is at `state` [8] now mostly does otherwise, once that is known: (key, words)."""
        chunk, came, same = self._chunk, state[:3] - self._state[:3], (state == self._state).all()
        self._chunk, self._state = None, state.copy()
        if chunk is None:
            return
        before, self._stuck = self._stuck, (self._stuck + np.linalg.norm(chunk[0, :3])) * same
        if before <= FROZEN_M < self._stuck:
            words = (
                f"the very same state, though told to go {self._stuck:.2f} m: does it still come?"
            )
            yield "state", words
        ways = chunk[:, :3].cumsum(0, np.float64)  # of how many of the actions is unknown
        lengths = np.linalg.norm(ways, axis=1)
        if np.linalg.norm(came) > FURTHER * lengths.max() + REST_M:
            return
        one = np.ptp(chunk[:, 7]) < 0.5  # it does not matter which of them it executes
        if one and len(self._opposite) < LOOKED_AT:
            self._opposite.append(abs(chunk[:, 7].mean() - state[7]) > OPPOSITE)
            if len(self._opposite) == LOOKED_AT and sum(self._opposite) > MOSTLY * LOOKED_AT:
                words = "the gripper does the opposite of what it is told: 1 is open, 0 closed, told and read"
                yield "gripper", words
        if len(self._ways) < LOOKED_AT and (way := _way(ways, lengths, came)) is not None:
            self._ways.append(way)
            if len(self._ways) == LOOKED_AT and (goes := _other_axes(np.mean(self._ways, axis=0))):
                yield "arm", f"told to go along x y z, the arm goes along {goes}: another frame?"


def _way(ways: Array, lengths: Array, came: Array) -> Array | None:
    """The direction in which an arm came times the one in which it was told to go, [3, 3]; None where it
    hardly moved. Which of the ways [H, 3] it executed, the length of its own tells."""
    length = np.linalg.norm(came)
    nearest = np.abs(lengths - length).argmin()
    if min(length, lengths[nearest]) <= MOVED_M:
        return None
    return np.outer(came / length, ways[nearest] / lengths[nearest])


def _other_axes(mean: Array) -> str | None:
    """Along which other axes an arm goes that is told x, y and z, by the mean of its `_way`s, if it does."""
    left, gains, right = np.linalg.svd(mean)  # the best turn or mirroring: orthogonal Procrustes
    if gains.sum() - np.trace(mean) <= OTHER_AXES:
        return None
    best = left @ right
    return " ".join(
        ("-" if best[j, i] < 0 else "") + "xyz"[j] for i, j in enumerate(abs(best).argmax(0))
    )


class Watch:
    """What is noticed of the robots that a policy answers: once of each camera, and once of each robot."""

    def __init__(self) -> None:
        self._noted: set[str] = set()
        self._robots: dict[Hashable, RobotCheck] = {}

    def reset(self) -> None:
        """A run begins: what the robots were told before is over."""
        for robot in self._robots.values():
            robot.told(None)
            robot.looked = 0

    def look(
        self,
        known: Seen | None,
        observations: Sequence[Mapping[str, Any]],
        states: Array,
        pixels: Mapping[str, torch.Tensor],
        there: Mapping[str, Sequence[bool]],
    ) -> None:
        """Note what of observations is unlike training, and what robots do otherwise than told.

        known   what is known of that training.
        states  [B, 8] as `spear.types.Policy` has them.
        pixels  view → [B, 3, h, w] as the model sees them; there: view → which [B] came.
        """
        robots = _robots(observations)
        met = {
            robot: self._meet(known, robot, state)
            for robot, state in zip(robots, states, strict=True)
        }
        for robot, one in met.items():
            rows = [i for i, other in enumerate(robots) if other == robot]
            sent = (view for view in pixels if all(there[view][i] for i in rows))
            shown = {view: pixels[view][rows].numpy() for view in sent}
            for key, words in one.frozen(states[rows[0]], shown) if len(rows) == 1 else ():
                self.note(key, words, one)
            one.looked += len(rows)
            if known and (one.looked <= LOOKED_AT or one.looked % LATER < len(rows)):
                for key, words in known.unlike(states[rows], shown):
                    self.note(key, f"observations unlike those of training: {words}", one)

    def told(self, observations: Sequence[Mapping[str, Any]], chunks: Array) -> None:
        """The actions [B, H, 8] that answer the observations."""
        robots = _robots(observations)
        for robot, chunk in zip(robots, chunks, strict=True):
            if met := self._robots.get(robot):
                met.told(
                    chunk if robots.count(robot) == 1 else None
                )  # else who does what is unknown

    def note(self, key: str, words: str, robot: RobotCheck | None = None) -> None:
        """Say it, unless something was said of that key, or of that robot's, before."""
        noted, name = (self._noted, "") if robot is None else (robot.noted, robot.name)
        if key not in noted and notice(name + words):
            noted.add(key)

    def _meet(self, known: Seen | None, robot: Hashable, state: Array) -> RobotCheck:
        """Note what is unlike training in a robot's first state [8], and what it does otherwise than told."""
        new = robot not in self._robots
        self._robots[robot] = met = self._robots.pop(robot, None) or RobotCheck(
            len({*self._robots, None})
        )
        if new and known and (words := known.unlike_at_first(state)):
            self.note("gripper", f"observations unlike those of training: {words}", met)
        if len(self._robots) > MOST_ROBOTS:
            del self._robots[next(iter(self._robots))]
        for key, words in met.otherwise(state):
            if key != "gripper" or (known and known.opposite < MOSTLY / 2):
                notice(met.name + words)
        return met


def _robots(observations: Sequence[Mapping[str, Any]]) -> list[Hashable]:
    """Who sent each observation; None, which is not counted, where nobody says: a server's example."""
    return [getattr(observation, "robot", None) for observation in observations]
