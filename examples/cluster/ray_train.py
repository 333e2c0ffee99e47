"""Trains with Ray Train, a worker per GPU:

    python examples/cluster/ray_train.py --workers 16 --gpus spear train vla-pretrain --init runs/vlm-stage2 …

Every worker runs the command in its own process; Ray gives it what torchrun would (rank, world size, where
to meet). When a worker fails or its node is preempted, all are started again and continue from the last
checkpoint. All nodes must see the current folder. Needs pip install "ray[train]".
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def work(config: dict[str, Any]) -> None:
    """What each worker does."""
    from spear.cli import main

    os.chdir(config["folder"])
    # Ray Train has joined the processes; `spear train` uses that group.
    code = main(config["command"])
    if code:
        raise RuntimeError(f"spear ended with exit code {code}: its error is in the worker's log")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, over all nodes")
    parser.add_argument("--gpus", action="store_true", help="one GPU for each")
    parser.add_argument(
        "--restarts", type=int, default=10, help="how often to start again after a failure"
    )
    parser.add_argument("--storage", help="folder for Ray's own files, which all nodes see")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="spear train …")
    given = parser.parse_args()
    if given.command[:2] != ["spear", "train"]:
        parser.error("the command must begin with: spear train")
    trainer = TorchTrainer(
        work,
        train_loop_config={"command": given.command[1:], "folder": os.getcwd()},
        # On GPUs gradients go through NCCL; checkpoints and barriers, which are on the CPU, through gloo.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if given.gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=given.gpus),
        run_config=RunConfig(
            storage_path=given.storage, failure_config=FailureConfig(max_failures=given.restarts)
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
