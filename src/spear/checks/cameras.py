"""Do cameras show something, and is the wrist camera on the wrist? All thresholds are our choice.

When the arm moves, almost all of a wrist camera's image changes, but only a small part of an
external camera's image. That difference shows when the two cameras are exchanged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from spear.checks.frozen import mark_frozen_steps
from spear.checks.result import Check
from spear.errors import SpearError, format_count
from spear.types import CONTROL_RATE_HZ, Array
from spear.util.images import decode_image

MIN_ARM_SPEED_M_S = 0.05  # an arm that is faster counts as moving
MIN_PIXEL_CHANGE = 4  # a pixel that changes by more gray levels (of 255) than this has changed
COMPARED_SIZE_PX = (32, 24)  # width and height to which images are reduced
MAX_BLANK_CONTRAST = 8  # gray levels of 255; a picture of less contrast shows nothing
MIN_EPISODES = 5  # in which both cameras can be compared; with fewer, there is no verdict
MIN_CHANGE_RATIO = 1.5  # changed share of the wrist view divided by that of the external view
MIN_SHARE = 0.8  # share of the compared episodes that must agree for a verdict


@dataclass(frozen=True)
class View:
    """What one camera shows in one episode.

    is_blank        whether all images have one and the same color, or are all the same image while
                    the arm moves.
    changing_share  share of the pixels (0 … 1) that change within 0.2 s while the arm moves, median
                    over the steps; NaN if the arm does not move.
    """

    is_blank: bool
    changing_share: float


def summarize_view(images: Sequence[bytes], position: Array, rate_hz: float, context: str) -> View:
    """Summarize what a camera shows in an episode.

    Args:
        images: [T] encoded images.
        position: [T, 3] positions of the end effector, m.
        rate_hz: steps per second.
        context: names episode and camera in errors.

    Raises:
        SpearError: an image is broken, or there is not one for each step.
    """
    if len(images) != len(position):
        raise SpearError(
            f"{context} has {len(images)} images for {len(position)} steps. Give one image for "
            "each step."
        )
    frames = np.array(
        [_reduce_image(encoded, f"{context} step {step}") for step, encoded in enumerate(images)]
    )  # [T, h, w] gray levels

    # Images are compared over one control step (0.2 s), because a camera may be slower than the
    # arm's recording and repeat its image in neighboring steps.
    interval = max(1, round(rate_hz / CONTROL_RATE_HZ))  # in recorded steps
    distance_m = np.linalg.norm(position[interval:] - position[:-interval], axis=1)
    # The speed is distance_m * rate_hz / interval.
    is_moving = distance_m * rate_hz > MIN_ARM_SPEED_M_S * interval  # [T - interval]
    has_changed = np.abs(frames[interval:] - frames[:-interval]) > MIN_PIXEL_CHANGE
    shares_per_step = has_changed.mean((1, 2))  # [T - interval]
    shares_while_moving = shares_per_step[is_moving]

    changing_share = float("nan")
    if len(shares_while_moving):
        changing_share = float(np.median(shares_while_moving))
    # Stricter than `are_blank`: recorded data lose a blank camera, so a dark one has to count.
    is_one_color = bool(np.ptp(frames) == 0)
    return View(is_one_color or is_frozen(images, position), changing_share)


def _reduce_image(encoded: bytes, context: str) -> Array:
    """Return a small gray version of an encoded image, [h, w] float32."""
    image = Image.fromarray(decode_image(encoded, context)).convert("L")
    return np.asarray(image.resize(COMPARED_SIZE_PX, Image.Resampling.BOX), np.float32)


def are_blank(pictures: Array) -> Array:
    """Return whether pictures show nothing, such as those of a covered camera.

    Args:
        pictures: [N, h, w, channels], 0 … 255.

    Returns:
        [N] bool.
    """
    contrast = np.ptp(np.asarray(pictures, np.float32), axis=(1, 2)).max(-1)  # [N]
    return contrast < MAX_BLANK_CONTRAST


def is_frozen(images: Sequence[bytes], position: Array) -> bool:
    """Return whether encoded images are all the same although the arm moves.

    Args:
        images: [T] encoded images.
        position: [T, 3] positions of the end effector, m.
    """
    is_one_image = len(set(images)) == 1
    return is_one_image and bool(mark_frozen_steps(images, position).any())


def find_absent_or_blank_cameras(views: Mapping[str, Sequence[View | None]]) -> list[Check]:
    """Find cameras that show nothing in any episode: one check for each of them.

    Args:
        views: camera name → what that camera shows in each episode, None where it is absent.
    """
    checks = []
    for camera, episodes in views.items():
        check = _report_if_never_shown(camera, episodes)
        if check is not None:
            checks.append(check)
    return checks


def _report_if_never_shown(camera: str, episodes: Sequence[View | None]) -> Check | None:
    """Report a camera that is absent or blank in every episode; None if it shows something."""
    num_absent = sum(view is None for view in episodes)
    num_blank = sum(view is not None and view.is_blank for view in episodes)
    if num_absent + num_blank < len(episodes):
        return None
    if num_absent:
        reason = "its column is absent, or contains no images,"
    else:
        reason = "its images are blank, or the same at every step,"
    num_episodes = format_count(len(episodes), "episodes")
    words = f"{reason} in all of {num_episodes}; name another one in images"
    return Check(f"camera {camera}", "wrong", words)


def judge_camera_exchange(
    external_views: Sequence[View | None], wrist_views: Sequence[View | None]
) -> Check | None:
    """Judge whether the external and the wrist camera have each other's names.

    Args:
        external_views: what the external camera shows in each episode, None where it is absent.
        wrist_views: the same of the wrist camera.

    Returns:
        A check that says "wrong" if the cameras are exchanged, and "agrees" if they are not; None
        if too few episodes can be compared, or if these contradict each other.
    """
    external_shares = []
    wrist_shares = []
    for external, wrist in zip(external_views, wrist_views, strict=False):
        if external is None or wrist is None or external.is_blank or wrist.is_blank:
            continue
        if np.isfinite(external.changing_share) and np.isfinite(wrist.changing_share):
            external_shares.append(external.changing_share)
            wrist_shares.append(wrist.changing_share)
    if len(external_shares) < MIN_EPISODES:
        return None

    words = (
        f"when the arm moves, {np.median(external_shares):.0%} of the external view change, "
        f"{np.median(wrist_shares):.0%} of the wrist's"
    )
    wrist_to_external = np.array(wrist_shares) / np.maximum(external_shares, 1e-3)  # per episode
    share_exchanged = np.mean(wrist_to_external < 1 / MIN_CHANGE_RATIO)
    share_as_named = np.mean(wrist_to_external > MIN_CHANGE_RATIO)
    if share_exchanged >= MIN_SHARE:
        return Check("cameras", "wrong", f"{words}; exchange wrist and external in images")
    if share_as_named >= MIN_SHARE:
        return Check("cameras", "agrees", words)
    return None
