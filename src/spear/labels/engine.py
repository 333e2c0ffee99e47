"""The local engine: networks in batches in this process, everything else in worker processes.

Batches come out in the order in which they went in, whatever the number of workers, and only a few are on
their way at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from spear.labels.inputs import Item, read
from spear.labels.models.protocols import Detector, PointMap, Segmenter
from spear.labels.objects import BoxSettings
from spear.labels.pipeline import Work, detect, lift, locate, segment
from spear.labels.store import to_table
from spear.util import processes


@dataclass(frozen=True)
class Graph:
    """What is done with an image.

    detector, segmenter, pointmap  each makes its component; can be sent to another process.
    boxes         how boxes are fitted.
    longest       photos are made smaller until their longer side has so many pixels; None keeps them. 840 is
                  what the paper labelled at.
    need_objects  skip images in which nothing is found.
    """

    detector: Callable[[], Detector]
    segmenter: Callable[[], Segmenter]
    pointmap: Callable[[], PointMap]
    boxes: BoxSettings = field(default_factory=BoxSettings)
    longest: int | None = 840
    need_objects: bool = True


class SkippedImage(NamedTuple):
    """A skipped image, and why; empty: nothing was found in it; retryable: the reason may pass."""

    source: str
    reason: str
    empty: bool = False
    retryable: bool = False


class Done(NamedTuple):
    """A labelled batch: its labels as rows of `store.SCHEMA`, and what was skipped."""

    labels: pa.Table
    skipped: list[SkippedImage]


Engine = Callable[[Iterable[Sequence[Item]]], Iterator[Done]]
"""Batches of items → the labels of each, in order."""


def run_local(graph: Graph, workers: int, batches: Iterable[Sequence[Item]]) -> Iterator[Done]:
    """Label batches on this computer.

    Args:
        graph: what is done with an image; its components are made here, when the first batch has been read.
        workers: processes that read images, fit boxes and encode; 0 does all that in this process.
        batches: items that go through the networks together.

    Raises:
        SpearError: a component cannot be made, or a worker was killed.
    """
    advice = "use fewer --workers or a smaller --batch-size, and run the same command again"
    with processes.pool(workers, __name__, advice) as pool:
        ahead = workers + 1
        read_batches = processes.in_order(pool, partial(read, longest=graph.longest), batches, ahead)
        yield from processes.in_order(
            pool, partial(finish, graph.boxes), _through_networks(graph, read_batches), ahead
        )


def _through_networks(graph: Graph, batches: Iterable[list[Work]]) -> Iterator[list[Work]]:
    networks: tuple[Detector, Segmenter, PointMap] | None = None
    for works in batches:
        if networks is None:
            networks = graph.detector(), graph.segmenter(), graph.pointmap()
        detect(works, networks[0], graph.need_objects)
        segment(works, networks[1])
        locate_and_pack(works, networks[2])
        yield works


def locate_and_pack(works: list[Work], pointmap: PointMap) -> None:
    """`locate`; then keep only what `finish` needs, for the way to another process: no pixels (they are
    encoded already), no truth, and masks eight pixels to a byte."""
    locate(works, pointmap)
    works[:] = map(_pack, works)


def _pack(work: Work) -> Work:
    if work.reason is not None or work.frame is None or work.masks is None:
        return replace(work, frame=None, masks=None, geometry=None)
    frame = replace(work.frame, image=work.frame.image[..., :0], depth=None, instances=None, boxes=None)
    return replace(work, frame=frame, masks=np.packbits(work.masks, axis=-1))


def _unpack(work: Work) -> Work:
    assert work.frame is not None and work.masks is not None
    width = work.frame.image.shape[1]
    return replace(work, masks=np.unpackbits(work.masks, axis=-1, count=width).view(bool))


def finish(boxes: BoxSettings, works: Sequence[Work]) -> Done:
    """Fit the boxes of a batch that `locate_and_pack` has left, and make rows of its labels.

    An image at which this breaks down is skipped like any other: among millions there is always one.
    """
    labels, skipped = [], []
    for work in works:
        if work.reason is not None:
            skipped.append(SkippedImage(work.source, work.reason, work.empty, work.retryable))
            continue
        try:
            labels.append(lift(_unpack(work), boxes))
        except Exception as error:
            skipped.append(SkippedImage(work.source, f"fitting boxes: {type(error).__name__}: {error}"))
    return Done(to_table(labels), skipped)
