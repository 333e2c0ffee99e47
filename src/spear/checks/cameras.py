"""Do cameras show something, and is the wrist camera on the wrist? All thresholds are our choice.

When the arm moves, almost all of a wrist camera's image changes, and little of an external one's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from spear.checks.result import Check
from spear.errors import SpearError, format_count
from spear.types import CONTROL_RATE_HZ, Array
from spear.util.images import decode_image

MIN_ARM_SPEED_M_S = 0.05  # from which an arm counts as moving
MIN_PIXEL_CHANGE = 4  # gray levels by which a pixel counts as changed
COMPARED_SIZE_PX = (32, 24)  # width and height to which images are reduced
MIN_FROZEN_MOTION_M = 0.05  # a camera that shows the very same image over this is frozen
MIN_EPISODES = 5  # in which both cameras can be compared; with fewer nothing is said
MIN_CHANGE_RATIO = 1.5  # how much more of a wrist view changes than of an external one
MIN_SHARE = 0.8  # of the episodes that must say so


@dataclass(frozen=True)
class View:
    """What one camera shows in one episode.

    is_blank        the images are of one color, or all the same while the arm moves.
    changing_share  share of the pixels [0 … 1] that change within 0.2 s while the arm moves; NaN if
                    it does not move.
    """

    is_blank: bool
    changing_share: float


def summarize_view(images: Sequence[bytes], position: Array, rate_hz: float, context: str) -> View:
    """Summarize what a camera shows in an episode.

    Args:
        images: [T] encoded images.
        position: [T, 3] positions of the arm, m.
        rate_hz: steps per second.
        context: names episode and camera in errors.

    Raises:
        SpearError: an image is broken, or there is not one for each step.
    """
    if len(images) != len(position):
        raise SpearError(
            f"{context}: not one for each step (images: {len(images)}, steps: {len(position)})"
        )
    frames = np.array(
        [_reduce_image(encoded, f"{context} step {step}") for step, encoded in enumerate(images)]
    )
    interval = max(1, round(rate_hz / CONTROL_RATE_HZ))  # a camera may be slower than the arm
    distance_m = np.linalg.norm(position[interval:] - position[:-interval], axis=1)
    is_moving = distance_m * rate_hz > MIN_ARM_SPEED_M_S * interval
    has_changed = np.abs(frames[interval:] - frames[:-interval]) > MIN_PIXEL_CHANGE
    shares = has_changed.mean((1, 2))[is_moving]
    is_blank = bool(np.ptp(frames) == 0) or is_frozen(images, position)
    return View(is_blank, float(np.median(shares)) if len(shares) else float("nan"))


def _reduce_image(encoded: bytes, context: str) -> Array:
    """A small gray version of an encoded image, float32."""
    image = Image.fromarray(decode_image(encoded, context)).convert("L")
    return np.asarray(image.resize(COMPARED_SIZE_PX, Image.Resampling.BOX), np.float32)


def is_frozen(images: Sequence[bytes], position: Array) -> bool:
    """Whether encoded images are all the same while the arm, at positions [T, 3] (m), moves."""
    has_moved = np.ptp(position, axis=0).max() > MIN_FROZEN_MOTION_M
    return bool(has_moved) and len(set(images)) == 1


def check_cameras(views: Mapping[str, Sequence[View | None]]) -> list[Check]:
    """Find cameras that show nothing, and cameras that are exchanged.

    Args:
        views: camera name → what it shows in each episode, None where it is absent.
    """
    checks = []
    for camera, episodes in views.items():
        check = _check_blank(camera, episodes)
        if check is not None:
            checks.append(check)
    exchange = _check_exchange(views.get("external", ()), views.get("wrist", ()))
    if exchange is not None:
        checks.append(exchange)
    return checks


def _check_blank(camera: str, episodes: Sequence[View | None]) -> Check | None:
    """Report a camera that shows nothing in any episode."""
    num_absent = sum(view is None for view in episodes)
    num_blank = sum(view is not None and view.is_blank for view in episodes)
    if num_absent + num_blank < len(episodes):
        return None
    reason = "its images are blank or all one"
    if num_absent:
        reason = "its column is absent, or holds no images,"
    num_episodes = format_count(len(episodes), "episodes")
    words = f"{reason} in all of {num_episodes}: name another one in images"
    return Check(f"camera {camera}", "wrong", words)


def _check_exchange(
    external_views: Sequence[View | None], wrist_views: Sequence[View | None]
) -> Check | None:
    """Whether external and wrist camera are what they are called, if that can be told."""
    external_shares = []
    wrist_shares = []
    for external, wrist in zip(external_views, wrist_views, strict=False):
        if external is None or wrist is None or external.is_blank or wrist.is_blank:
            continue
        if np.isfinite(external.changing_share + wrist.changing_share):
            external_shares.append(external.changing_share)
            wrist_shares.append(wrist.changing_share)
    if len(external_shares) < MIN_EPISODES:
        return None

    words = (
        f"when the arm moves, {np.median(external_shares):.0%} of the external view change, "
        f"{np.median(wrist_shares):.0%} of the wrist's"
    )
    ratio = np.array(wrist_shares) / np.maximum(external_shares, 1e-3)
    if np.mean(ratio < 1 / MIN_CHANGE_RATIO) >= MIN_SHARE:
        return Check("cameras", "wrong", f"{words}: exchange wrist and external in images")
    if np.mean(ratio > MIN_CHANGE_RATIO) >= MIN_SHARE:
        return Check("cameras", "agrees", words)
    return None
