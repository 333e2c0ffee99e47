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

from spear.errors import SpearError, format_count, make_unknown_name_error
from spear.models.fast.linear import CPU_INFO, HAS_BFLOAT16

# Parameters of glibc's `mallopt`, by their numbers in malloc.h, and the values for them.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
MAX_MMAP_THRESHOLD_BYTES = 2**25  # the largest that glibc takes
NEVER_TRIM = -1

PARAMETERS_PER_THREAD = 100_000_000
"""`limit_threads` allows one thread for each 100 million of (parameters times batch size)."""

P = ParamSpec("P")
T = TypeVar("T")

_num_parameters: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def make_tensors_on_cpu(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function, so that it makes its tensors on the CPU.

    Otherwise it would make them on PyTorch's default device, which a host program may have changed
    (`torch.set_default_device`) for its own tensors.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.get_default_device().type == "cpu":
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return run


def prepare_device(name: str = "auto") -> torch.device:
    """Return the device that a name stands for. A GPU becomes PyTorch's current one.

    With a GPU, float32 convolutions of this process compute in full precision from now on.
    If there are several processes (`torchrun`), each takes the GPU whose index is the environment
    variable LOCAL_RANK, the process's number on its machine.

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
    has_number = colon != ""
    if kind == "cpu" and not has_number:
        return torch.device("cpu")
    has_wrong_number = has_number and not number.isdecimal()
    if kind != "cuda" or has_wrong_number:
        raise make_unknown_name_error("device", name, ("auto", "cpu", "cuda", "cuda:0"))
    if has_number and has_several_processes:
        raise SpearError(
            f"device {name} is one GPU, which several processes cannot share. Use cuda, and "
            "each process takes its own."
        )

    if has_number:
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
            f"there is no device cuda:{index}, because PyTorch {torch.__version__} finds {gpus} "
            f"here. {advice}, or use cpu."
        )

    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    # By default, cuDNN's float32 convolutions round to 10 bits (TF32). With it nano's actions
    # differed from a CPU's by 3e-3; without it they differ by 8e-6.
    torch.backends.cudnn.allow_tf32 = False
    return device


def is_bfloat16_fast(device: torch.device) -> bool:
    """Whether training takes less time in bfloat16 than in float32.

    It takes less time on GPUs, and on CPUs with AMX or AMD's AVX-512. On AMD's Zen 5 a training
    step of nano takes 0.4 to 0.5 times as long as in float32 (`benchmarks/train/step.py`; Zen 4 was
    not measured). With Intel's AVX-512 training takes longer, because all numbers outside the
    matrix products have to be converted.
    """
    if device.type != "cpu":
        return True
    if not HAS_BFLOAT16:
        return False

    # The user may limit the instructions that oneDNN uses. Without a limit it uses AMX.
    max_isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if max_isa in ("", "ALL", "DEFAULT"):
        max_isa = "AMX"
    if "AMX" in max_isa and torch.cpu._is_amx_tile_supported():
        return True
    # The instructions that include AVX-512's for bfloat16.
    allows_avx512_bf16 = any(isa in max_isa for isa in ("AMX", "FP16", "BF16"))
    has_avx512_bf16 = allows_avx512_bf16 and torch.cpu._is_avx512_bf16_supported()
    return has_avx512_bf16 and "AuthenticAMD" in CPU_INFO


@contextmanager
def limit_threads(model: nn.Module, batch_size: int) -> Iterator[None]:
    """A context in which PyTorch uses only as many CPU threads as speed up a model's inference.

    The number of threads is the number of parameters times the batch size, divided by 100 million,
    and at least 1. More threads can harm: an action of nano takes as long with two threads as with
    one if the cores are idle, and twice as long if they are busy (docs/results/serving.md).
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

    By default glibc gives the memory of most large tensors back to the system, which clears the
    pages and hands them out again in every step, one by one. On a CPU this takes up to a twelfth of
    the time of nano's training step (`python -m experiments.memory_allocator`). On a GPU, PyTorch
    keeps freed memory itself.

    Returns:
        Whether the process can keep freed memory, which needs Linux with glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    if not mallopt(M_MMAP_THRESHOLD, MAX_MMAP_THRESHOLD_BYTES):
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, NEVER_TRIM))
