"""MoGe behind the labeller's protocol `PointMap`: images in, the 3D point of every pixel out."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from spear.errors import SpearError
from spear.labels.models.protocols import PointMapResult
from spear.models.devices import choose_device
from spear.models.moge.checkpoint import load_moge
from spear.models.moge.infer import Geometry, infer_geometry
from spear.models.moge.networks import MogeV1, MogeV2
from spear.types import Frame


class MogePointMapModel:
    """The point map of a MoGe v1 (unit "relative") or MoGe-2 (unit "metre").

    Images of equal size go through the network as one batch, so the batch size is that of `predict`'s caller.
    The model is moved to the device (`choose_device`). name: of its weights, for the label's provenance.
    """

    def __init__(
        self, model: MogeV1 | MogeV2, name: str = "random weights", device: str = "auto"
    ) -> None:
        chosen = choose_device(device)
        # mixed precision, as MoGe does
        self.dtype = torch.float16 if chosen.type == "cuda" else torch.float32
        self.model = model.to(chosen).eval()
        self.name = f"{'moge-v1' if isinstance(model, MogeV1) else 'moge-2'} {name}"

    def predict(self, frames: Sequence[Frame]) -> list[PointMapResult]:
        """The point map of each frame. Points that are not known are 0.

        Raises `SpearError` for an image that the network cannot take, or to which no camera fits, as when
        it knows no point (its weights may be broken).
        """
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, frame in enumerate(frames):
            groups[frame.image.shape].append(index)
        results: dict[int, PointMapResult] = {}
        for members in groups.values():
            images = torch.from_numpy(np.stack([frames[i].image for i in members])).permute(
                0, 3, 1, 2
            )
            found = infer_geometry(self.model, images, dtype=self.dtype)
            results |= {
                i: self._result(found, row, frames[i].source) for row, i in enumerate(members)
            }
        return [results[index] for index in range(len(frames))]

    def _result(self, found: Geometry, row: int, source: str) -> PointMapResult:
        mask = found.mask[row] & found.points[row].isfinite().all(dim=-1)
        camera = found.intrinsics[row].double().cpu().numpy()
        if not (mask.any() and np.isfinite(camera).all() and camera[0, 0] > 0):
            raise SpearError(
                f"{source or 'image'}: no camera fits its {mask.sum()} points: leave it out"
            )
        points = found.points[row].masked_fill(~mask[..., None], 0)
        return PointMapResult(points.cpu().numpy(), mask.cpu().numpy(), camera, self.model.unit)


def load_point_map_model(model: Path | str, device: str = "auto") -> MogePointMapModel:
    """With the weights of a published checkpoint; model as for `spear.models.moge.checkpoint.load_moge`."""
    name = Path(model).name if Path(model).is_file() else str(model)
    return MogePointMapModel(load_moge(model), name, device)
