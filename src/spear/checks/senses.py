"""Do states, gripper and cameras mean what the layout says? Part of the audit; thresholds are our choice.

The gripper's sense shows in two ways. A gripper that closes on objects comes to rest at different openings,
one that opens always at the same; and demonstrations begin with an open gripper. Only where both speak
against the layout is it called wrong. A wrist camera sees almost all change with the arm, others little.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from spear.checks.recording import Recording, are_degrees
from spear.errors import SpearError, format_count
from spear.gripper import CLOSED_BELOW, OPEN_ABOVE, binarize_commands
from spear.types import CONTROL_RATE_HZ, MAX_EE_SPEED_M_S, Array, Episode
from spear.util.images import decode_image
from spear.util.units import LENGTH_UNITS

Verdict = Literal["agrees", "wrong", "cannot tell", "not said"]
MOVES, RESTS = 0.1, 0.02
"""Change of opening in an episode that counts as moving, and from step to step that counts as rest."""
FOLLOWS, LATE = 0.6, 0.8
"""Correlation of command and opening from which one follows the other, and how late it may (s)."""
FEWEST, FEWEST_VIEWS = 3, 5
"""Episodes in which the gripper moves, or two cameras can be compared: with fewer nothing is said."""
SPREAD, CLEARLY, MOST = 3.0, 1.5, 0.8
"""How many times as different as on the other side resting openings must be, how many times as much of a
wrist view must change as of an external one, and in which share of the episodes."""
FAST, CHANGED, SIZE, FROZEN_M = 0.05, 4, (32, 24), 0.05
"""Metres per second at which an arm moves; grey levels by which a pixel of an image so small changes. Frozen
is a camera whose picture stays the very same while the arm goes so far."""
NEAREST, FARTHEST, SLOW, QUICK = 0.03, 3.0, 0.03, 1.0
"""Metres from its base that an arm can be believed to reach: it goes further than the first. Metres per
second between which the quickest hundredth of demonstrated motions begins."""


@dataclass(frozen=True)
class Check:
    """What was found of one thing: `words` say why, and what to change where it is wrong."""

    name: str
    verdict: Verdict
    words: str


@dataclass(frozen=True)
class View:
    """A camera in one episode: whether its images are blank or all one (`is_frozen`), and the share of pixels
    [0 … 1] that change within a step at 5 Hz while the arm moves (NaN where it does not)."""

    blank: bool
    change: float


def doubts(recordings: Sequence[Recording | Episode]) -> list[str]:
    """What is wrong with the recorded states by themselves."""
    remarks = []
    far = float(
        np.quantile(np.linalg.norm(np.concatenate([r.position for r in recordings]), axis=1), 0.95)
    )
    if far > FARTHEST:
        unit = next((u for u, f in LENGTH_UNITS.items() if far * f <= FARTHEST), "another unit")
        remarks.append(
            f"positions are up to {far:.4g} from the base: not metres, but {unit} (length_unit)"
        )
    elif far < NEAREST:
        remarks.append(
            f"positions are up to {far:.2g} m from the base: steps, or another unit (length_unit)"
        )
    rotation = np.concatenate([r.rotation for r in recordings])
    if are_degrees(rotation):
        most = f"orientations go up to {np.abs(rotation).max():.4g}"
        remarks.append(f"{most}: degrees, where the layout has radians (angle_unit)")
    return remarks


def check_rate(recordings: Sequence[Recording]) -> list[Check]:
    """Whether the arm moves about as fast as arms do: a rate that is only a few times off shows nowhere."""
    steps = np.concatenate([np.diff(r.position, axis=0) * r.rate_hz for r in recordings])
    fast = float(np.quantile(np.linalg.norm(steps, axis=1), 0.99))
    if SLOW <= fast <= QUICK:
        return []
    words = f"by it the arm moves at {fast:.2g} m/s when it is quickest, as few arms do"
    return [Check("rate_hz", "wrong" if fast > MAX_EE_SPEED_M_S else "cannot tell", words)]


def check_gripper(recordings: Sequence[Recording]) -> list[Check]:
    """Whether openings and commands are what the layout says, as far as the gripper moves at all."""
    moving = [r for r in recordings if r.opening is not None and np.ptp(r.opening) > MOVES]
    openings = [np.asarray(r.opening) for r in moving]
    if len(moving) < FEWEST:
        words = f"the gripper moves in {len(moving)} of {format_count(len(recordings), 'episodes')}"
        return [Check("gripper", "cannot tell", words)]
    verdict, words = sense(openings)
    commanded = [
        (np.asarray(r.opening), r.command, r.rate_hz) for r in moving if r.command is not None
    ]
    wrong = span(openings, [command for _, command, _ in commanded])
    if not commanded:
        return [wrong or Check("gripper", verdict, words)]
    late, strength = max(follows(commanded), key=lambda found: abs(found[1]))
    said = f"the correlation of command and opening, {format_count(late, 'steps')} later, is {strength:.2f}"
    if strength >= FOLLOWS:
        wrong = wrong or comes_late(
            [(seen, binarize_commands(told, rate)) for seen, told, rate in commanded]
        )
        checks = [
            Check("gripper", verdict, words),
            wrong or Check("gripper command", "agrees", said),
        ]
        if (least := min(map(np.min, openings))) >= 0.5:
            words = (
                f"it never closes further than to {least:.2f}: around large objects, or it is wrong"
            )
            checks.append(Check("gripper_range", "cannot tell", words))
        return checks
    if strength <= -FOLLOWS:
        keys = {"wrong": "gripper_range", "agrees": "command_range"}
        key = keys.get(verdict, "command_range, or in gripper_range")
        return [Check("gripper command", "wrong", f"{said}: exchange the two readings in {key}")]
    other = Check("gripper command", "wrong", f"{said} at best: command names another column")
    return [
        wrong if wrong and not strength else other
    ]  # a command that never changes follows nothing


def span(openings: Sequence[Array], commands: Sequence[Array]) -> Check | None:
    """What is wrong where a gripper that moves is never open, or never told to open and to close."""
    seen = np.concatenate(openings)
    told = np.concatenate(commands) if commands and seen.max() > OPEN_ABOVE else seen
    if told.min() < CLOSED_BELOW and told.max() > OPEN_ABOVE:
        return None
    told = seen if seen.min() >= CLOSED_BELOW else told
    name, key = (
        ("gripper", "gripper_range") if told is seen else ("gripper command", "command_range")
    )
    words = (
        f"it runs from {told.min():.2f} to {told.max():.2f} of 0 (closed) … 1 (open): correct {key}"
    )
    return Check(name, "wrong", words)


def comes_late(told: Sequence[tuple[Array, Array]]) -> Check | None:
    """What is wrong where openings [T] are mostly there already when their commands [T], 0 or 1, change."""
    changes = [np.abs(opening - command)[1:][np.diff(command) != 0] for opening, command in told]
    there = np.concatenate(changes) < 0.5
    if len(there) < FEWEST or there.mean() < MOST:
        return None
    words = (
        f"{there.mean():.0%} of {format_count(len(there), 'changes')} come when the gripper has "
        "moved already"
    )
    return Check(
        "gripper command", "wrong", f"{words}: leave command out, the opening tells it better"
    )


def follows(episodes: Sequence[tuple[Array, Array, float]]) -> list[tuple[int, float]]:
    """(steps, correlation of commands and the openings so many steps later)."""
    found = []
    for late in range(1 + round(LATE * episodes[0][2])):
        pairs = [np.stack([c[: len(o) - late], o[late:]]) for o, c, _ in episodes if len(o) > late]
        if not pairs:
            break
        x, y = np.concatenate(pairs, axis=1)
        found.append((late, float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else 0.0))
    return found


def sense(openings: Sequence[Array]) -> tuple[Verdict, str]:
    """Whether what is called open is open: (verdict, words)."""
    middles = [(o.min() + o.max()) / 2 for o in openings]
    started = float(np.mean([o[0] > middle for o, middle in zip(openings, middles, strict=True)]))
    rests: dict[bool, list[float]] = {False: [], True: []}
    for opening, middle in zip(openings, middles, strict=True):
        still = opening[1:][np.abs(np.diff(opening)) < RESTS]
        for side, values in ((True, still[still > middle]), (False, still[still <= middle])):
            rests[side] += [float(np.median(values))] if len(values) else []
    apart = {
        side: float(np.ptp(found)) if len(found) >= FEWEST else 0.0 for side, found in rests.items()
    }
    contact = [apart[side] > SPREAD * max(apart[not side], RESTS) for side in (False, True)]
    signs = int(contact[0]) - int(contact[1]), int(started >= MOST) - int(started <= 1 - MOST)
    words = f"{started:.0%} of {len(openings)} episodes begin open; it rests at openings that differ by "
    words += f"{apart[False]:.2f} when closed, {apart[True]:.2f} when open"
    if max(signs) < 0:
        return "wrong", f"{words}: exchange the two readings in gripper_range"
    return "agrees" if max(signs) > 0 and min(signs) >= 0 else "cannot tell", words


def look(images: Sequence[bytes], position: Array, rate_hz: float, where: str) -> View:
    """A camera's encoded images [T] of an episode, beside the arm's positions [T, 3] (m). Raises SpearError,
    which begins with `where`, for a broken image, and for another number of images."""
    if len(images) != len(position):
        raise SpearError(
            f"{where}: not one for each step (images: {len(images)}, steps: {len(position)})"
        )
    decoded = (decode_image(encoded, f"{where} step {step}") for step, encoded in enumerate(images))
    small = (Image.fromarray(p).convert("L").resize(SIZE, Image.Resampling.BOX) for p in decoded)
    frames = np.array([np.asarray(each, np.float32) for each in small])
    apart = max(
        1, round(rate_hz / CONTROL_RATE_HZ)
    )  # a camera may have fewer images than there are steps
    moved = np.linalg.norm(position[apart:] - position[:-apart], axis=1) * rate_hz > FAST * apart
    share = (np.abs(frames[apart:] - frames[:-apart]) > CHANGED).mean((1, 2))[moved]
    blank = bool(np.ptp(frames) == 0) or is_frozen(images, position)
    return View(blank, float(np.median(share)) if len(share) else float("nan"))


def is_frozen(images: Sequence[bytes], position: Array) -> bool:
    """Whether encoded images are all the same while the arm, at positions [T, 3] (m), goes somewhere."""
    return np.ptp(position, axis=0).max() > FROZEN_M and len({*images}) == 1


def check_cameras(views: Mapping[str, Sequence[View | None]]) -> list[Check]:
    """Cameras that show nothing, or are exchanged; views: camera -> what each episode shows (None: none)."""
    found = []
    for camera, each in views.items():
        absent, blank = sum(v is None for v in each), sum(v is not None and v.blank for v in each)
        if absent + blank == len(each):
            why = (
                "its column is absent, or holds no images,"
                if absent
                else "its images are blank or all one"
            )
            words = (
                f"{why} in all of {format_count(len(each), 'episodes')}: name another one in images"
            )
            found.append(Check(f"camera {camera}", "wrong", words))
    pairs = np.array([
        (a.change, b.change)
        for a, b in zip(views.get("external", ()), views.get("wrist", ()), strict=False)
        if a is not None and b is not None and not (a.blank or b.blank) and np.isfinite(a.change + b.change)
    ]).reshape(-1, 2)  # fmt: skip
    if len(pairs) >= FEWEST_VIEWS:
        external, wrist = np.median(pairs, axis=0)
        words = f"when the arm moves, {external:.0%} of the external view change, {wrist:.0%} of the wrist's"
        ratio = pairs[:, 1] / np.maximum(pairs[:, 0], 1e-3)
        if np.mean(ratio < 1 / CLEARLY) >= MOST:
            found.append(
                Check("cameras", "wrong", f"{words}: exchange wrist and external in images")
            )
        elif np.mean(ratio > CLEARLY) >= MOST:
            found.append(Check("cameras", "agrees", words))
    return found
