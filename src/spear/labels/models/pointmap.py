"""MoGe as the point-map model of the labeling pipeline: it predicts the 3D point of every pixel."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from spear.errors import SpearError
from spear.labels.models.protocols import PointMapResult
from spear.models.devices import prepare_device
from spear.models.moge.checkpoint import load_moge
from spear.models.moge.infer import Geometry, infer_geometry
from spear.models.moge.networks import MogeV1, MogeV2
from spear.types import Frame


class MogePointMapModel:
    """Predicts point maps with MoGe v1 (unit "relative") or MoGe-2 (unit "metre").

    Images of equal size go through the network as one batch, so the caller of `predict` decides the
    batch size.

    Args:
        model: The network; it is moved to the device.
        name: Name of the network's weights, for the label's provenance.
        device: "auto", or a device name of PyTorch (`prepare_device`).
    """

    def __init__(
        self, model: MogeV1 | MogeV2, name: str = "random weights", device: str = "auto"
    ) -> None:
        torch_device = prepare_device(device)
        # Mixed precision, as in MoGe's own code
        self.dtype = torch.float16 if torch_device.type == "cuda" else torch.float32
        self.model = model.to(torch_device).eval()
        version = "moge-v1" if isinstance(model, MogeV1) else "moge-2"
        self.name = f"{version} {name}"

    def predict(self, frames: Sequence[Frame]) -> list[PointMapResult]:
        """Predict the point map of each frame. Unknown points are 0.

        Raises:
            SpearError: The network cannot take an image, or no camera fits the points of an image.
                The latter happens if no point is known, for example because of broken weights.
        """
        indices_by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, frame in enumerate(frames):
            indices_by_shape[frame.image.shape].append(index)

        results: dict[int, PointMapResult] = {}
        for indices in indices_by_shape.values():
            pixels = np.stack([frames[index].image for index in indices])  # [n, h, w, 3]
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # [n, 3, h, w]
            geometry = infer_geometry(self.model, images, dtype=self.dtype)
            for row, index in enumerate(indices):
                results[index] = self._to_result(geometry, row, frames[index].source)
        return [results[index] for index in range(len(frames))]

    def _to_result(self, geometry: Geometry, row: int, source: str) -> PointMapResult:
        """Convert image number `row` of a batch's geometry; `source` names the image in errors."""
        mask = geometry.mask[row] & geometry.points[row].isfinite().all(dim=-1)
        camera = geometry.intrinsics[row].double().cpu().numpy()
        if not (mask.any() and np.isfinite(camera).all() and camera[0, 0] > 0):
            raise SpearError(
                f"No camera fits the {mask.sum()} known points of {source or 'the image'}. Leave "
                "it out."
            )
        points = geometry.points[row].masked_fill(~mask[..., None], 0)
        return PointMapResult(points.cpu().numpy(), mask.cpu().numpy(), camera, self.model.unit)


def load_point_map_model(model: Path | str, device: str = "auto") -> MogePointMapModel:
    """Load MoGe with the weights of a checkpoint.

    Args:
        model: A file, or a name on the Hub (`spear.models.moge.checkpoint.load_moge`).
        device: "auto", or a device name of PyTorch.
    """
    name = Path(model).name if Path(model).is_file() else str(model)
    return MogePointMapModel(load_moge(model), name, device)
