"""The device that a process computes on, its threads, and what happens to freed memory."""

import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from spear.errors import SpearError, format_count, unknown_name_error
from spear.models.fast.linear import CPU_INFO, HAS_BFLOAT16

# Parameters of `mallopt`, as in glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
MAX_MMAP_THRESHOLD_BYTES = 2**25  # the largest that glibc takes
NEVER_TRIM = -1

# A thread per so many parameters times inputs of a batch: see `limit_threads`.
PARAMETERS_PER_THREAD = 100_000_000

P = ParamSpec("P")
T = TypeVar("T")

_num_parameters: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def ignore_default_device(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that makes tensors on the CPU, whatever PyTorch's default device is.

    A host program may have changed that default (`torch.set_default_device`), for its own tensors.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.get_default_device().type == "cpu":
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return run


def choose_device(name: str = "auto") -> torch.device:
    """The device that a name stands for; a GPU becomes the current one.

    If there are several processes (`torchrun`), each takes the GPU with its number on its machine,
    LOCAL_RANK.

    Args:
        name: "auto" (a GPU if there is one), "cpu", "cuda", or "cuda:N".

    Raises:
        SpearError: For a device that does not exist, or for cuda:N with several processes.
    """
    has_several_processes = int(os.environ.get("WORLD_SIZE", "1")) > 1
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind, colon, number = name.partition(":")
    if name == "auto":
        kind = "cuda" if num_gpus else "cpu"
    if kind == "cpu" and not colon:
        return torch.device("cpu")
    if kind != "cuda" or (colon and not number.isdecimal()):
        raise unknown_name_error("device", name, ("auto", "cpu", "cuda", "cuda:0"))
    if colon and has_several_processes:
        raise SpearError(
            f"device {name}: several processes cannot share a GPU. Use cuda, and each process takes"
            " its own."
        )

    if colon:
        index = int(number)
    elif has_several_processes:
        index = int(os.environ.get("LOCAL_RANK", "0"))
    else:
        index = 0
    if index >= num_gpus:
        gpus = format_count(num_gpus, "GPUs") if num_gpus else "no GPU"
        advice = (
            "Start as many processes as there are GPUs" if has_several_processes else "Use another"
        )
        raise SpearError(
            f"no device cuda:{index}: PyTorch {torch.__version__} finds {gpus} here. {advice}, or"
            " use cpu."
        )

    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    # By default, float32 convolutions round to 10 bits: nano's actions were 3e-3 from a CPU's, now
    # 8e-6.
    torch.backends.cudnn.allow_tf32 = False
    return device


def is_bfloat16_fast(device: torch.device) -> bool:
    """Whether training takes less time in bfloat16 than in float32.

    It does on GPUs, with AMX, and with AMD's AVX-512.

    With Intel's AVX-512 it takes longer, because everything around the matrix products has to be
    converted. On AMD's Zen 5 a nano step takes 0.4 to 0.5 of float32's time
    (`benchmarks/train/step.py`; Zen 4 was not measured).
    """
    if device.type != "cpu":
        return True
    if not HAS_BFLOAT16:
        return False

    # oneDNN uses no instructions above this limit.
    max_isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if max_isa in ("", "ALL", "DEFAULT"):
        max_isa = "AMX"
    if "AMX" in max_isa and torch.cpu._is_amx_tile_supported():
        return True
    allows_avx512_bf16 = any(isa in max_isa for isa in ("AMX", "FP16", "BF16"))
    has_avx512_bf16 = allows_avx512_bf16 and torch.cpu._is_avx512_bf16_supported()
    return has_avx512_bf16 and "AuthenticAMD" in CPU_INFO


@contextmanager
def limit_threads(model: nn.Module, batch_size: int) -> Iterator[None]:
    """Within it, PyTorch uses no more threads than a model's inference on a CPU surely gains from.

    These are one per 100 million parameters times inputs. An action of nano takes as long on two
    cores as on one if they are idle, and twice as long if they are busy (docs/results/serving.md).
    """
    if model not in _num_parameters:
        _num_parameters[model] = sum(parameter.numel() for parameter in model.parameters())
    num_threads_before = torch.get_num_threads()
    num_useful = _num_parameters[model] * batch_size // PARAMETERS_PER_THREAD
    torch.set_num_threads(max(1, min(num_threads_before, num_useful)))
    try:
        yield
    finally:
        torch.set_num_threads(num_threads_before)


def keep_freed_memory() -> bool:
    """From now on, let this process keep freed memory, except for tensors of 32 MB and more.

    Without it, glibc gives the memory of most large tensors back to the system, which hands out
    cleared pages again in every step, one by one. On a CPU that is up to a twelfth of a nano
    training step (`python -m experiments.memory_allocator`). On a GPU, PyTorch has a cache of its
    own.

    Returns:
        Whether the process can do so: on Linux with glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    if not mallopt(M_MMAP_THRESHOLD, MAX_MMAP_THRESHOLD_BYTES):
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, NEVER_TRIM))
