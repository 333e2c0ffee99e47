"""What a robot did to its camera's pictures, undone before the SPEAR-VLM looks at them.

A camera that is exchanged, mirrored, turned or of another exposure is named by a check of its own.
The SPEAR-VLM would hardly recognize anything in such pictures, so that nothing could be said about
the scene. A crop, a stretch or a small turn is not undone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeGuard

import numpy as np

from spear.checks.rollout.bars import MAX_BAR_LEVEL, find_extra_bars
from spear.checks.rollout.camera_checks import MIN_CONFIDENCE_LOG_ODDS, find_unrefuted_shape_version
from spear.checks.rollout.case import Case
from spear.checks.rollout.odds import VersionOdds
from spear.checks.rollout.picture_versions import EXCHANGED, EXPOSURE_FACTORS, scale_brightness
from spear.types import Array

CAMERA = "external"  # trust in what a model sees is measured with this camera

PictureChange = Callable[[Array], Array]
"""A change of a picture [h, w, 3] uint8."""


def _undo_exposure(picture: Array, factor: float) -> Array:
    """Undo an exposure that has made a picture [h, w, 3] uint8 brighter by a factor."""
    return scale_brightness(picture.astype(np.float32), 1 / factor).astype(np.uint8)


_UNDOING: dict[str, PictureChange] = {
    "mirrored left to right": lambda picture: picture[:, ::-1],
    "mirrored upside down": lambda picture: picture[::-1],
    "turned by 180°": lambda picture: picture[::-1, ::-1],
    "turned by 90° to the left": lambda picture: np.rot90(picture, 3),
    "turned by 90° to the right": lambda picture: np.rot90(picture, 1),
    "turned by 90° to the left, with bars": lambda picture: np.rot90(_cut_bars(picture), 3),
    "turned by 90° to the right, with bars": lambda picture: np.rot90(_cut_bars(picture), 1),
    "with red and blue exchanged": lambda picture: picture[..., ::-1],
}
"""Version of pictures (`SHAPE_VERSIONS` and `COLOR_VERSIONS`) → what makes them plain again."""
for _version, _factor in EXPOSURE_FACTORS.items():
    _UNDOING[_version] = partial(_undo_exposure, factor=_factor)


@dataclass(frozen=True)
class PictureRepair:
    """Where the external camera's pictures are, and what is undone in them.

    camera   the name under which the robot sends the external camera's pictures.
    changes  what is done to each picture, in this order.
    """

    camera: str = CAMERA
    changes: Sequence[PictureChange] = ()

    def apply(self, picture: Array) -> Array:
        """Return a picture [h, w, 3] uint8 as training would show it."""
        for change in self.changes:
            picture = change(picture)
        return np.ascontiguousarray(picture)

    def with_red_and_blue_exchanged(self) -> "PictureRepair":
        """Return a repair that exchanges red and blue, too."""
        return replace(self, changes=[*self.changes, _UNDOING["with red and blue exchanged"]])


NO_REPAIR = PictureRepair()


def choose_repair_of_external_pictures(case: Case) -> PictureRepair:
    """Find what has to be undone in the external camera's pictures of a rollout."""
    exchanged_camera = _find_exchanged_camera(case)
    if exchanged_camera is not None:
        return PictureRepair(exchanged_camera)
    best_shape = find_unrefuted_shape_version(case, CAMERA)
    best_color = case.comparison.find_best_color_version(CAMERA)
    changes: list[PictureChange] = []
    if _is_sure(best_shape) and best_shape.version in _UNDOING:
        changes.append(_UNDOING[best_shape.version])
    has_bars = find_extra_bars(case, CAMERA) is not None
    if has_bars and not changes:
        changes.append(_cut_bars)
    # Bars darken the mean of a picture, so that nothing is known about the exposure.
    if not has_bars and _is_sure(best_color) and best_color.version in _UNDOING:
        changes.append(_UNDOING[best_color.version])
    return PictureRepair(CAMERA, changes)


def _find_exchanged_camera(case: Case) -> str | None:
    """Return the camera whose name the external camera's pictures have; None if not exchanged.

    An exchange may show in the pictures of one of the two cameras only.
    """
    for camera in case.rollout_cameras:
        if camera == CAMERA or any(camera not in episode.pictures for episode in case.rollout):
            continue
        for first, second in ((CAMERA, camera), (camera, CAMERA)):
            best = find_unrefuted_shape_version(case, first)
            if _is_sure(best) and best.version == f"{EXCHANGED}{second}":
                return camera
    return None


def _is_sure(best: VersionOdds | None) -> TypeGuard[VersionOdds]:
    """Return whether a version is so likely that the check of its fault names it."""
    return best is not None and best.log_odds >= MIN_CONFIDENCE_LOG_ODDS


def _cut_bars(picture: Array) -> Array:
    """Cut black bars off the borders of a picture [h, w, 3]."""
    is_lit = picture.max(axis=2) > MAX_BAR_LEVEL  # [h, w]
    lit_rows = np.flatnonzero(is_lit.any(axis=1))
    lit_columns = np.flatnonzero(is_lit.any(axis=0))
    if not lit_rows.size:
        return picture
    rows = slice(lit_rows[0], lit_rows[-1] + 1)
    columns = slice(lit_columns[0], lit_columns[-1] + 1)
    return picture[rows, columns]
