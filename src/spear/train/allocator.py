"""Memory that a training step frees, kept for the next one."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""As in glibc's malloc.h."""
MAPPED = 2**25
"""Bytes from which memory is mapped anew nevertheless, and given back: the largest bound that glibc takes."""


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for good, but for tensors of 32 MB and more.

    Returns whether it can: on Linux with glibc.

    Without it glibc gives most large tensors' memory back to the system, which in every step hands out
    cleared pages again, one by one. On a CPU that is a tenth of a nano training step
    (`benchmarks/train/allocator.py`); on a GPU, where PyTorch has a cache of its own, nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, MAPPED) and mallopt(M_TRIM_THRESHOLD, -1))
