"""CUDA graphs: a computation recorded once per set of shapes, then launched as a whole."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping

import torch

from spear.errors import first_line, notice

Inputs = Mapping[str, torch.Tensor]

MOST = 8
"""Graphs kept (our choice): each holds the memory of its results. The least recently used one goes."""
_WARM_UPS = 3


class CudaGraphCache:
    """Runs functions of named tensors on a GPU as CUDA graphs. Safe to use from several threads.

    A function must launch the same work whatever is in its tensors: it may not look at their values.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[Hashable, tuple[torch.cuda.CUDAGraph, Inputs, torch.Tensor]] = OrderedDict()
        self._lock = threading.Lock()
        self._works = True

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(
        self, function: Callable[[Inputs], torch.Tensor], inputs: Inputs, *options: Hashable
    ) -> torch.Tensor:
        """function(inputs). There is a graph per options, and per names, shapes and types of the inputs."""
        if not self._works:
            return function(inputs)
        key = (options, tuple((name, tuple(t.shape), t.dtype) for name, t in inputs.items()))
        with self._lock:
            if key not in self._graphs:
                try:
                    self._graphs[key] = _record(function, inputs)
                except RuntimeError as error:
                    self._works = False
                    notice(f"no CUDA graphs ({first_line(error)}): slower, same results")
                    return function(inputs)
            self._graphs.move_to_end(key)
            while len(self._graphs) > MOST:
                self._graphs.popitem(last=False)
            graph, places, result = self._graphs[key]
            for name, tensor in inputs.items():
                places[name].copy_(tensor)
            graph.replay()
            return result.clone()


def _record(
    function: Callable[[Inputs], torch.Tensor], inputs: Inputs
) -> tuple[torch.cuda.CUDAGraph, Inputs, torch.Tensor]:
    places = {name: tensor.clone() for name, tensor in inputs.items()}
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compilers, autotuners and lazy initialisations do their work here
        for _ in range(_WARM_UPS):
            function(places)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function(places)
    return graph, places, result
