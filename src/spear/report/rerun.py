"""Labels for the Rerun viewer: per image the picture, the boxes, the key points and the point cloud, in one
file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spear.errors import SpearError
from spear.labels.fit.box3d import EDGES
from spear.labels.models.protocols import PointMapResult
from spear.report.draw import colors
from spear.types import LabeledImage
from spear.util.images import decode_image

MOST_POINTS = 60_000
"""Points of a cloud that are kept."""


def write_rerun(labels: Sequence[LabeledImage], clouds: Sequence[PointMapResult | None], out: Path) -> None:
    """Write `out` (.rrd), with one step of the timeline "image" per label.

    Args:
        labels: what to show.
        clouds: the point map of each, or None where it is not at hand.

    Raises:
        SpearError: rerun-sdk is not installed, or the file cannot be written.
    """
    try:
        import rerun as rr
    except ImportError as error:
        raise SpearError('the Rerun viewer needs rerun-sdk: pip install "spear-vla[view]"') from error
    stream = rr.RecordingStream("spear labels")
    try:
        stream.save(out)
    except (OSError, RuntimeError) as error:
        raise SpearError(f"{out}: cannot be written ({error}): choose another file") from error
    stream.log("camera", rr.ViewCoordinates.RDF, static=True)
    for number, (label, cloud) in enumerate(zip(labels, clouds, strict=True)):
        stream.set_time("image", sequence=number)
        image = decode_image(label.image)
        size = [label.width, label.height]
        stream.log("camera/image", rr.Pinhole(image_from_camera=label.intrinsics, resolution=size))
        stream.log("camera/image", rr.EncodedImage(contents=label.image, media_type="image/jpeg"))
        stream.log("source", rr.TextDocument(label.source))
        palette = colors(len(label.objects))
        boxed = [(o, c) for o, c in zip(label.objects, palette, strict=True) if o.box3d is not None]
        edges = [o.box3d.vertices[list(pair)] for o, _ in boxed if o.box3d for pair in EDGES]
        names = [o.name for o, _ in boxed for _ in EDGES]
        tints = [c for _, c in boxed for _ in EDGES]
        stream.log("camera/boxes", rr.LineStrips3D(edges, colors=tints, labels=names, show_labels=False))
        points = [(p, f"{o.name}: {kind}", c) for o, c in boxed for kind, p in o.keypoints.items()]
        places, kinds, colours = zip(*points, strict=True) if points else ((), (), ())
        named = rr.Points3D(
            places, labels=kinds, colors=colours, radii=rr.Radius.ui_points(4), show_labels=False
        )
        stream.log("camera/keypoints", named)
        if cloud is None:
            stream.log("camera/points", rr.Clear(recursive=False))
        else:
            every = max(1, np.count_nonzero(cloud.mask) // MOST_POINTS)
            kept = cloud.points[cloud.mask][::every], image[cloud.mask][::every]
            stream.log("camera/points", rr.Points3D(kept[0], colors=kept[1]))
    stream.flush()
    stream.disconnect()
