"""The Ray engine: the stages of the local one as a streaming Ray Data pipeline, on one machine or a cluster.

read → detect → segment → locate → finish. The three networks are actors that keep their component; reading
and finishing are tasks. Batches come back in order, and this process writes them. On a cluster, inputs must
be at the same paths on every node.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from spear.errors import SpearError
from spear.labels.engine import Done, Graph, finish, locate_and_pack
from spear.labels.inputs import Item, read
from spear.labels.options import WorkOptions
from spear.labels.pipeline import Work, detect, segment

Row = dict[str, Any]
"""A batch on its way through Ray: {"data": the pickled batch}. Ray knows no types of ours."""
MOST_BLOCKS = 10_000
"""Pieces that Ray splits the input into at most; more would burden its scheduler."""


def run_ray(graph: Graph, work: WorkOptions, batches: Iterable[Sequence[Item]]) -> Iterator[Done]:
    """Label batches with Ray: the cluster of RAY_ADDRESS, the one running here, or a new one on this machine.

    Args:
        graph: what is done with an image.
        work: its `copies` and `gpus`, of detector, segmenter and point map.
        batches: items that go through the networks together.

    Raises:
        SpearError: Ray is not installed, or a component cannot be made.
    """
    try:
        import ray
    except ImportError as error:
        raise SpearError('the ray engine needs Ray Data: pip install "spear-vla[ray]"') from error
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
        data: Any = ray.data.from_items(rows, override_num_blocks=min(len(rows), MOST_BLOCKS))
        data = data.map(partial(_apply, partial(read, longest=graph.longest)))
        for make, stage, copies, gpus in zip(
            (graph.detector, graph.segmenter, graph.pointmap),
            (partial(detect, need_objects=graph.need_objects), segment, locate_and_pack),
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
        return _apply(self._call, row)

    def _call(self, works: list[Work]) -> list[Work] | SpearError:
        try:
            self.component = self.component or self.make()
        except SpearError as error:
            return error
        self.stage(works, self.component)
        return works
