"""The two engines, which do the same: read → detect → segment → locate → finish.

The local one runs the networks in this process, and all else in worker processes; only a few batches are on
their way at any time. The other is a streaming Ray Data pipeline, on one machine or a cluster: the networks
are actors that keep their component, reading and finishing are tasks, and inputs must be at the same paths
on every node. Batches come out in the order in which they went in.
"""

import logging
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from spear.errors import SpearError, need
from spear.labels.inputs import Item, read
from spear.labels.models.protocols import Detector, PointMap, Segmenter
from spear.labels.objects import BoxSettings
from spear.labels.options import WorkOptions
from spear.labels.pipeline import Work, detect, lift, locate, segment
from spear.labels.store import to_table
from spear.util import processes


@dataclass(frozen=True)
class Graph:
    """What is done with an image. Images in which nothing is found are skipped.

    detector, segmenter, pointmap  each makes its component; can be sent to another process.
    boxes    how boxes are fitted.
    longest  photos are made smaller until their longer side has so many pixels; None keeps them. 840 is what
             the paper labelled at.
    """

    detector: Callable[[], Detector]
    segmenter: Callable[[], Segmenter]
    pointmap: Callable[[], PointMap]
    boxes: BoxSettings = field(default_factory=BoxSettings)
    longest: int | None = 840


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

    The components of `graph` are made here, before a worker begins.

    workers  processes that read images, fit boxes and encode; 0 does all that in this process.
    batches  items that go through the networks together.

    Raises `SpearError`: a component cannot be made, or a worker was killed.
    """
    advice = "use fewer --workers or a smaller --batch-size, and run the same command again"
    batches = iter(batches)
    if (first := next(batches, None)) is None:
        return
    networks = graph.detector(), graph.segmenter(), graph.pointmap()
    with processes.pool(workers, __name__, advice) as pool:
        reader = partial(read, longest=graph.longest)
        works = processes.in_order(pool, reader, chain([first], batches), workers + 1)
        located = (_through(networks, some) for some in works)
        yield from processes.in_order(pool, partial(finish, graph.boxes), located, workers + 1)


def _through(networks: tuple[Detector, Segmenter, PointMap], works: list[Work]) -> list[Work]:
    detect(works, networks[0], need_objects=True)
    segment(works, networks[1])
    locate_and_pack(works, networks[2])
    return works


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
            assert work.frame is not None and work.masks is not None
            masks = np.unpackbits(work.masks, axis=-1, count=work.frame.image.shape[1]).view(bool)
            labels.append(lift(replace(work, masks=masks), boxes))
        except Exception as error:
            skipped.append(SkippedImage(work.source, f"fitting boxes: {type(error).__name__}: {error}"))
    return Done(to_table(labels), skipped)


def run_ray(graph: Graph, work: WorkOptions, batches: Iterable[Sequence[Item]]) -> Iterator[Done]:
    """Label batches with Ray: the cluster of RAY_ADDRESS, the one running here, or a new one on this machine.

    work: its `copies` and `gpus`, of detector, segmenter and point map, count. Raises `SpearError`: Ray is
    not installed, or a component cannot be made.
    """
    ray = need("ray", "ray", "the ray engine")
    rows = [{"data": pickle.dumps(list(batch))} for batch in batches]
    if not rows:
        return
    begun = not ray.is_initialized()
    if begun:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    try:
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        # More blocks would burden Ray's scheduler.
        data: Any = ray.data.from_items(rows, override_num_blocks=min(len(rows), 10_000))
        data = data.map(partial(_apply, partial(read, longest=graph.longest)))
        for make, stage, copies, gpus in zip(
            (graph.detector, graph.segmenter, graph.pointmap),
            (partial(detect, need_objects=True), segment, locate_and_pack),
            work.copies,
            work.gpus,
            strict=True,
        ):
            made = {"fn_constructor_args": (make, stage), "concurrency": copies, "num_gpus": gpus}
            # No CPUs are reserved for networks: three would leave none for the rest on a small machine.
            data = data.map(_Network, **made, num_cpus=0)
        data = data.map(partial(_apply, partial(finish, graph.boxes)))
        for row in data.iter_rows():
            done = pickle.loads(row["data"])
            if isinstance(done, SpearError):
                raise done
            yield done
    finally:
        if begun:
            ray.shutdown()


Row = dict[str, bytes]
"""A batch on its way through Ray, which knows no types of ours: {"data": the pickled batch}."""


def _apply(call: Callable[[Any], Any], row: Row) -> Row:
    """Send a batch through a stage; an error that a stage has met goes to the end, where it is raised."""
    batch = pickle.loads(row["data"])
    return row if isinstance(batch, SpearError) else {"data": pickle.dumps(call(batch))}


class _Network:
    """An actor with a component, made when the first batch comes, through which batches go."""

    def __init__(self, make: Callable[[], Any], stage: Callable[[list[Work], Any], None]) -> None:
        self.make, self.stage = make, stage
        self.component: Any = None

    def __call__(self, row: Row) -> Row:
        def call(works: list[Work]) -> list[Work] | SpearError:
            try:
                self.component = self.component or self.make()
            except SpearError as error:
                return error
            self.stage(works, self.component)
            return works

        return _apply(call, row)
