"""The device that a process computes on: which one, and how its memory is kept."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

from spear.errors import SpearError, format_count, unknown_name_error
from spear.models.fast.linear import CPU_INFO, HAS_BFLOAT16

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as in glibc's malloc.h
MAX_MMAP_THRESHOLD_BYTES = 2**25
"""Bytes from which glibc still maps memory anew and gives it back: the largest bound that it takes."""
_PARAMETERS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def choose_device(name: str = "auto") -> torch.device:
    """The device called auto (a GPU if there is one), cpu, cuda or cuda:N; a GPU becomes the current one.

    Several processes (`torchrun`) take a GPU each: the one of their number on their machine, LOCAL_RANK.
    Raises `SpearError` for a device that is not there, or cuda:N with several processes.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind, colon, number = name.partition(":")
    if kind == "auto" and not colon:
        kind = "cuda" if count else "cpu"
    if kind == "cpu" and not colon:
        return torch.device("cpu")
    if kind != "cuda" or (colon and not number.isdecimal()):
        raise unknown_name_error("device", name, ("auto", "cpu", "cuda", "cuda:0"))
    if colon and several:
        why = "several processes cannot share a GPU"
        raise SpearError(f"device {name}: {why}: give cuda, and each takes its own")
    index = int(number) if colon else int(os.environ.get("LOCAL_RANK", "0")) if several else 0
    if index >= count:
        cure = "start as many processes as there are GPUs" if several else "give another"
        found = f"PyTorch {torch.__version__} finds {format_count(count, 'GPUs') if count else 'no GPU'} here"
        raise SpearError(f"no device cuda:{index}: {found}: {cure}, or give cpu")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    # By default convolutions in float32 round to 10 bits: actions of nano were 3e-3 off a CPU's, now 8e-6.
    torch.backends.cudnn.allow_tf32 = False
    return device


def is_bfloat16_fast(device: torch.device) -> bool:
    """Whether training takes less time in bfloat16 than in float32: on GPUs, with AMX, with AMD's AVX-512.

    With Intel's AVX-512 it takes longer, since everything beside the matrix products has to convert. On AMD's
    Zen 5 a nano step takes 0.4 to 0.5 of float32's time (`benchmarks/train/step.py`; Zen 4 was not measured).
    """
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    limit = "AMX" if limit in ("", "ALL", "DEFAULT") else limit  # none: the most that there is
    tiles = "AMX" in limit and torch.cpu._is_amx_tile_supported()
    pairs = (
        any(part in limit for part in ("AMX", "FP16", "BF16"))
        and torch.cpu._is_avx512_bf16_supported()
    )
    return device.type != "cpu" or (
        HAS_BFLOAT16 and (tiles or (pairs and "AuthenticAMD" in CPU_INFO))
    )


@contextmanager
def limit_threads(model: nn.Module, inputs: int) -> Iterator[None]:
    """Within it, PyTorch has as many threads as a model's inference on a CPU surely gains from, if so many.

    One for every 100 million parameters × inputs (our choice). An action of nano takes as long by two as by
    one on quiet cores, twice as long beside other work (docs/robots.md).
    """
    if model not in _PARAMETERS:
        _PARAMETERS[model] = sum(parameter.numel() for parameter in model.parameters())
    had = torch.get_num_threads()
    torch.set_num_threads(max(1, min(had, _PARAMETERS[model] * inputs // 100_000_000)))
    try:
        yield
    finally:
        torch.set_num_threads(had)


def keep_freed_memory() -> bool:
    """Let this process keep memory that it frees, for good, but for tensors of 32 MB and more.

    Returns whether it can: on Linux with glibc. Without it glibc gives most large tensors' memory back to the
    system, which in every step hands out cleared pages again, one by one. On a CPU that is up to a twelfth of
    a nano training step (`experiments/memory_allocator`); on a GPU PyTorch has a cache of its own.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(
        mallopt(M_MMAP_THRESHOLD, MAX_MMAP_THRESHOLD_BYTES) and mallopt(M_TRIM_THRESHOLD, -1)
    )
