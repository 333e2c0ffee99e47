"""CUDA graphs: a computation is recorded once per set of shapes and then launched as a whole.

A pass through the layers consists of hundreds of short kernels. Launching them one by one from
Python takes longer than running them; launching a graph takes a few microseconds.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spear.errors import notice, summarize_error

MAX_GRAPHS = 8  # our choice: each graph keeps the memory of its intermediate results
NUM_WARM_UPS = 3  # runs before recording, in which compilers and autotuners do their work

_RECORDING_LOCK = threading.Lock()
"""A process records one graph at a time, while its other threads may use the GPU."""

Inputs = Mapping[str, Tensor]
"""The named tensors that a recorded function reads."""


@dataclass(frozen=True)
class RecordedGraph:
    """A graph, the buffers from which it reads its inputs, and the buffer of its result."""

    graph: torch.cuda.CUDAGraph
    input_buffers: Inputs
    result_buffer: Tensor


class CudaGraphCache:
    """Runs functions of named tensors on a GPU as CUDA graphs. Safe to use from several threads.

    If there are more than `MAX_GRAPHS` graphs, the least recently used one is deleted. A function
    must launch the same kernels for all values of its tensors, so it may not read the values in
    Python.
    """

    def __init__(self) -> None:
        # None for a function that could not be recorded.
        self._graphs: OrderedDict[Hashable, RecordedGraph | None] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(
        self, function: Callable[[Inputs], Tensor], inputs: Inputs, *options: Hashable
    ) -> Tensor:
        """Return function(inputs).

        A function that cannot be recorded, perhaps for lack of memory, runs without a graph, and a
        notice says so.

        Args:
            function: What is recorded on the first call.
            inputs: The argument of `function`.
            options: Everything else that the function's result depends on. There is one graph for
                each combination of options, names, shapes and types. Functions that differ need
                different options, or caches of their own.
        """
        shapes = tuple((name, tuple(t.shape), t.dtype) for name, t in inputs.items())
        key = (options, shapes)
        with self._lock:
            if key not in self._graphs:
                self._graphs[key] = _try_to_record(function, inputs)
            self._graphs.move_to_end(key)
            while len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)

            recorded_graph = self._graphs[key]
            if recorded_graph is None:
                return function(inputs)
            for name, tensor in inputs.items():
                recorded_graph.input_buffers[name].copy_(tensor)
            recorded_graph.graph.replay()
            return recorded_graph.result_buffer.clone()


def _try_to_record(function: Callable[[Inputs], Tensor], inputs: Inputs) -> RecordedGraph | None:
    """Record a graph, or give a notice and return None."""
    try:
        return _record(function, inputs)
    except Exception as error:  # whatever a compiler may raise
        notice(
            f"inference runs without CUDA graphs ({summarize_error(error)}). It is slower, with "
            "the same results."
        )
        return None


def _record(function: Callable[[Inputs], Tensor], inputs: Inputs) -> RecordedGraph:
    """Record a graph of what `function` does with copies of the inputs."""
    input_buffers = {name: tensor.clone() for name, tensor in inputs.items()}
    # We record on the GPU of the inputs. The thread's current GPU may be another one, on which the
    # function launches nothing, and the graph would be empty.
    device = next(iter(input_buffers.values())).device

    recording_stream = torch.cuda.Stream(device)
    current_stream = torch.cuda.current_stream(device)
    recording_stream.wait_stream(current_stream)
    with torch.cuda.stream(recording_stream):
        for _ in range(NUM_WARM_UPS):
            function(input_buffers)
    current_stream.wait_stream(recording_stream)

    graph = torch.cuda.CUDAGraph()
    with (
        _RECORDING_LOCK,
        torch.cuda.graph(graph, stream=recording_stream, capture_error_mode="thread_local"),
    ):
        result_buffer = function(input_buffers)
    return RecordedGraph(graph, input_buffers, result_buffer)
