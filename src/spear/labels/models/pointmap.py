"""MoGe behind the labeller's protocol `PointMap`: images in, the 3D point of every pixel out.

spear.labels.pipeline.label(frames, detector, segmenter, MogePointMap.load("Ruicheng/moge-vitl"))
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from spear.errors import SpearError, unknown_name
from spear.labels.models.protocols import PointMapResult
from spear.models.moge.checkpoint import load_moge
from spear.models.moge.infer import FINEST, Geometry, infer
from spear.models.moge.v1 import MogeV1
from spear.models.moge.v2 import MogeV2
from spear.types import Array, Frame

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class MogePointMap:
    """The point map of a MoGe v1 (unit "relative") or MoGe-2 (unit "metre").

    Images of equal size go through the network as one batch, so the batch size is that of `predict`'s caller.
    """

    def __init__(
        self,
        model: MogeV1 | MogeV2,
        name: str = "random weights",
        device: str | torch.device | None = None,
        dtype: str | None = None,
        num_tokens: int | None = None,
        resolution_level: int = FINEST,
        known_intrinsics: bool = False,
    ) -> None:
        """
        Args:
            model: the network; it is moved to the device.
            name: where its weights come from, for the label's provenance.
            device: None takes the GPU if there is one.
            dtype: one of `DTYPES`; float16 and bfloat16 mean automatic mixed precision. None takes float16 on
                a GPU, as MoGe does, else float32.
            num_tokens, resolution_level: see `spear.models.moge.infer.infer`.
            known_intrinsics: use `frame.intrinsics` where a frame has them.

        Raises:
            SpearError: a device that is not there, or an unknown dtype.
        """
        self.device = _device(device)
        if dtype is not None and dtype not in DTYPES:
            raise unknown_name("dtype", dtype, DTYPES)
        self.dtype = DTYPES[dtype or ("float16" if self.device.type == "cuda" else "float32")]
        self.model = model.to(self.device).eval()
        self.num_tokens, self.resolution_level = num_tokens, resolution_level
        self.known_intrinsics = known_intrinsics
        kind = "moge-v1" if isinstance(model, MogeV1) else "moge-2"
        self.name = f"{kind} {name}" + (" with known intrinsics" if known_intrinsics else "")

    @classmethod
    def load(
        cls,
        name: Path | str,
        device: str | torch.device | None = None,
        dtype: str | None = None,
        num_tokens: int | None = None,
        resolution_level: int = FINEST,
        known_intrinsics: bool = False,
    ) -> MogePointMap:
        """With the weights of a published checkpoint; name as for
        `spear.models.moge.checkpoint.load_moge`."""
        source = Path(name).name if Path(name).is_file() else str(name)
        model = load_moge(name)
        return cls(model, source, device, dtype, num_tokens, resolution_level, known_intrinsics)

    def predict(self, frames: Sequence[Frame]) -> list[PointMapResult]:
        """The point map of each frame. Points that are not known are 0.

        Raises `SpearError` for an image that the network cannot take, or to which no camera fits.
        """
        groups: dict[tuple[int, int, bool], list[int]] = defaultdict(list)
        for index, frame in enumerate(frames):
            if frame.image.ndim != 3 or frame.image.shape[2] != 3 or frame.image.dtype != np.uint8:
                raise SpearError(
                    f"{frame.source or 'image'}: {frame.image.dtype} {frame.image.shape}: "
                    "convert it to [h, w, 3] uint8 RGB"
                )
            height, width = frame.image.shape[:2]
            groups[height, width, self.known_intrinsics and frame.intrinsics is not None].append(index)
        results: dict[int, PointMapResult] = {}
        for (_, _, known), members in groups.items():
            images = np.stack([frames[i].image for i in members])
            cameras = [_camera(frames[i]) for i in members] if known else None
            found = infer(
                self.model,
                torch.from_numpy(images).permute(0, 3, 1, 2),
                self.num_tokens,
                self.resolution_level,
                None if cameras is None else torch.from_numpy(np.stack(cameras)),
                apply_mask=False,
                dtype=self.dtype,
            )
            for row, index in enumerate(members):
                camera = None if cameras is None else cameras[row]
                results[index] = self._result(found, row, camera, frames[index].source)
        return [results[index] for index in range(len(frames))]

    def _result(self, found: Geometry, row: int, camera: Array | None, source: str) -> PointMapResult:
        points, mask = found.points[row], found.mask[row]
        mask = mask & points.isfinite().all(dim=-1)
        if camera is None:
            camera = found.intrinsics[row].double().cpu().numpy()
        if not (np.isfinite(camera).all() and camera[0, 0] > 0):
            raise SpearError(
                f"{source or 'image'}: no camera fits the predicted points: give its intrinsics, or leave it out"
            )
        points = points.masked_fill(~mask[..., None], 0)
        return PointMapResult(points.cpu().numpy(), mask.cpu().numpy(), camera, self.model.unit)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # PyTorch asserts when it was built without CUDA
        raise SpearError(f"no device {device}: {str(error).splitlines()[0]}: use cpu, or cuda") from error
    return chosen


def _camera(frame: Frame) -> Array:
    """The frame's intrinsics [3, 3] float64; `SpearError` when they are no pinhole camera's."""
    camera = np.asarray(frame.intrinsics, np.float64)
    if camera.shape != (3, 3) or not np.isfinite(camera).all() or min(camera[0, 0], camera[1, 1]) <= 0:
        raise SpearError(
            f"{frame.source or 'image'}: intrinsics are no camera's: give [3, 3] pixels with positive focal lengths"
        )
    return camera
