"""Which device a process trains on, and in which precision."""

from __future__ import annotations

import dataclasses
import os

import torch

from spear.errors import SpearError, unknown_name
from spear.models.fast.linear import HAS_BFLOAT16
from spear.train.optimize import Optimization


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16."""
    return device.type != "cpu" or HAS_BFLOAT16


def for_device(opt: Optimization, device: torch.device) -> Optimization:
    """What is asked for, in float32 on a device without bfloat16."""
    if opt.precision == "fp32" or has_bfloat16(device):
        return opt
    return dataclasses.replace(opt, precision="fp32", frozen_precision="fp32")


def choose_device(name: str = "auto") -> torch.device:
    """The device called auto (a GPU if there is one), cpu, cuda or cuda:N; a GPU becomes the process's
    current one.

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
        raise unknown_name("device", name, ("auto", "cpu", "cuda", "cuda:0"))
    if colon and several:
        raise SpearError(
            f"device {name}: several processes cannot share a GPU: give cuda, and each takes its own"
        )
    index = int(number) if colon else int(os.environ.get("LOCAL_RANK", "0")) if several else 0
    if index >= count:
        there = f"{count} GPU{'s' if count > 1 else ''}" if count else "no GPU"
        raise SpearError(
            f"no device cuda:{index}: PyTorch {torch.__version__} finds {there} here: "
            + (
                "start as many processes as there are GPUs, or give cpu"
                if several
                else "give another, or cpu"
            )
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device
