"""The two engines, which do the same: read → detect → segment → locate → finish.

The local one runs the networks in this process, and all else in worker processes; only a few batches are on
their way at any time. The other is Ray's, on one machine or a cluster: the networks are actors that keep
their component, reading and finishing are tasks, and inputs must be at the same paths on every node. Batches
come out in the order in which they went in; images in which nothing is found are skipped.
"""

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple
from warnings import catch_warnings

import numpy as np
import pyarrow as pa

from spear.errors import Notice, RetryableError, import_optional
from spear.labels.inputs import Item, read_images
from spear.labels.models.protocols import Detector, PointMapModel, Segmenter
from spear.labels.options import WorkOptions
from spear.labels.pipeline import (
    PendingImage,
    detect_objects,
    fit_boxes,
    predict_point_maps,
    segment_objects,
)
from spear.labels.store import to_table
from spear.util import processes

ModelFactories = tuple[Callable[[], Detector], Callable[[], Segmenter], Callable[[], PointMapModel]]
"""Of detector, segmenter and point map: each makes its component, and can be sent to another process."""


class SkippedImage(NamedTuple):
    """A skipped image, and why; retryable: the reason may pass."""

    source: str
    reason: str
    retryable: bool


class LabeledBatch(NamedTuple):
    """A labelled batch: rows of `store.SCHEMA`, what was skipped, `Work.digest` of all, and its notices."""

    labels: pa.Table
    skipped: list[SkippedImage]
    digests: list[str]
    notes: Sequence[str] = ()


Engine = Callable[[Iterable[Sequence[Item]]], Generator[LabeledBatch, None, None]]
"""Batches of items → the labels of each, in order."""


def locate_and_pack(works: list[PendingImage], pointmap: PointMapModel) -> None:
    """`locate`; then keep only what `finish` needs, for the way to another process: no pixels (they are
    encoded already), no truth, and masks eight pixels to a byte."""
    predict_point_maps(works, pointmap)
    for work in works:
        if work.error is not None or work.frame is None or work.masks is None:
            work.frame = work.masks = work.geometry = None
        else:
            image = work.frame.image[..., :0]
            work.frame = replace(work.frame, image=image, depth=None, instances=None, boxes=None)
            work.masks = np.packbits(work.masks, axis=-1)


def finish_batch(works: Sequence[PendingImage]) -> LabeledBatch:
    """Fit the boxes of a batch that `locate_and_pack` has left, and make rows of its labels.

    An image at which this breaks down is skipped like any other: among millions there is always one.
    """
    labels, skipped, notes = [], [], set[str]()
    for work in works:
        if work.error is not None:
            skipped.append(
                SkippedImage(work.source, str(work.error), isinstance(work.error, RetryableError))
            )
            continue
        try:
            assert work.frame is not None and work.masks is not None
            masks = np.unpackbits(work.masks, axis=-1, count=work.frame.image.shape[1]).view(bool)
            with catch_warnings(action="always", category=Notice, record=True) as said:
                labels.append(fit_boxes(replace(work, masks=masks)))
            notes |= {str(one.message) for one in said}
        except Exception as error:
            reason = f"fitting boxes: {type(error).__name__}: {error}"
            skipped.append(SkippedImage(work.source, reason, False))
    return LabeledBatch(to_table(labels), skipped, [work.digest for work in works], sorted(notes))


Stage = Callable[[list[PendingImage], Any], None]
STAGES: Sequence[Stage] = (
    partial(detect_objects, need_objects=True),
    segment_objects,
    locate_and_pack,
)
"""What is done with a batch by each of the three components, in order."""


def run_local(
    makers: ModelFactories,
    workers: int,
    batches: Iterable[Sequence[Item]],
    longest: int | None = 840,
) -> Generator[LabeledBatch, None, None]:
    """Label batches on this computer. The components are made here, before a worker begins. However the work
    ends, what a component has to be paid for is printed.

    workers  processes that read images, fit boxes and encode; 0 does all that in this process.
    batches  items that go through the networks together.
    longest  as for `read` (the paper: 840 pixels).

    Raises `SpearError`: a component cannot be made, or a worker was killed.
    """
    advice = "use fewer --workers or a smaller --batch-size, and run the same command again"
    components = [make() for make in makers]
    try:
        with processes.open_worker_pool(workers, __name__, advice) as pool:
            works = processes.map_in_order(
                pool, partial(read_images, longest=longest), batches, workers + 1
            )
            for stage, component in zip(STAGES, components, strict=True):
                works = map(partial(_through, stage, component), works)
            yield from processes.map_in_order(pool, finish_batch, works, workers + 1)
    finally:
        for component in components:
            if hasattr(component, "bill") and (bill := component.bill()):
                print(bill, flush=True)


def _through(stage: Stage, component: Any, works: list[PendingImage]) -> list[PendingImage]:
    stage(works, component)
    return works


class _Network:
    """An actor with a component, made when the first batch comes, through which batches go."""

    def __init__(self, make: Callable[[], Any], stage: Stage) -> None:
        self.make, self.stage = make, stage
        self.component: Any = None

    def call(self, works: list[PendingImage]) -> list[PendingImage]:
        self.component = self.component or self.make()
        return _through(self.stage, self.component, works)


def run_ray(
    makers: ModelFactories,
    work: WorkOptions,
    batches: Iterable[Sequence[Item]],
    longest: int | None = 840,
) -> Generator[LabeledBatch, None, None]:
    """Label batches with Ray: the cluster of RAY_ADDRESS, the one running here, or a new one on this machine.

    work: its `copies` and `gpus`, of detector, segmenter and point map, count. longest: as for `read`. Raises
    `SpearError`: Ray is not installed, or a component cannot be made.
    """
    ray = import_optional("ray", "ray", "the ray engine")
    begun = not ray.is_initialized()
    if begun:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    try:
        networks = []
        for make, stage, copies, gpus in zip(makers, STAGES, work.copies, work.gpus, strict=True):
            # No CPUs are reserved for networks: three would leave none for the rest on a small machine.
            actor = ray.remote(num_cpus=0, num_gpus=gpus, max_restarts=-1, max_task_retries=-1)(
                _Network
            )
            networks.append(cycle([actor.remote(make, stage) for _ in range(copies)]))
        reader, finisher = ray.remote(read_images), ray.remote(finish_batch)
        ahead = int(ray.cluster_resources().get("CPU", 1)) + 2 * sum(work.copies)
        waiting: deque[Any] = deque()
        for batch in batches:
            works = reader.remote(list(batch), longest)
            for network in networks:
                works = next(network).call.remote(works)
            waiting.append(finisher.remote(works))
            if len(waiting) > ahead:
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    finally:
        if begun:
            ray.shutdown()
