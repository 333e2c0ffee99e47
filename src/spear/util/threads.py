"""PyTorch's threads on a CPU, where one thread of ours prepares and another one computes."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

SOFT = 1
"""OpenMP's `omp_pause_soft`: what is given back comes again when it is needed."""


def release_workers() -> None:
    """Give back the worker threads that PyTorch keeps for the calling thread; when it computes again it gets
    new ones.

    To be called by a thread that has computed and now leaves that to another one. Each has workers of its
    own, and GNU's OpenMP lets all of them sleep between two products once there are more than cores. Waking
    them costs more than a small network's products: nano's inference took 81 ms then, 29 ms without (two
    cores). Nothing happens where PyTorch comes with another OpenMP.
    """
    for pause in _pauses():
        pause(SOFT)


@functools.cache
def _pauses() -> list[Callable[[int], int]]:
    """OpenMP's `omp_pause_resource_all`, as PyTorch's copy of GNU's library has it."""
    import torch

    libraries = map(str, Path(torch.__file__).with_name("lib").glob("libgomp*"))
    found = (getattr(ctypes.CDLL(library), "omp_pause_resource_all", None) for library in libraries)
    return [pause for pause in found if pause is not None]
