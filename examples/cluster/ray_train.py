"""Train with Ray Train, with one worker per GPU:

    python examples/cluster/ray_train.py --workers 16 --gpus spear train vla-pretrain …

Every worker runs the command in its own process, and Ray gives it what torchrun would: rank, number
of processes, and address. When a worker fails or its node is preempted, Ray starts all workers
again, and they continue from the last checkpoint. All nodes must see the current folder. Install
Ray with `pip install "ray[train]"`.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def run_command(config: dict[str, Any]) -> None:
    """Run the command, in each worker."""
    from spear.cli import main

    os.chdir(config["folder"])
    # Ray Train has made the process group, and `spear train` uses it.
    exit_code = main(config["command"])
    if exit_code:
        raise RuntimeError(
            f"spear ended with exit code {exit_code}. Its message is in the worker's log."
        )


def main() -> None:
    """Read the options and start the workers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, over all nodes")
    parser.add_argument("--gpus", action="store_true", help="give each worker a GPU")
    parser.add_argument(
        "--restarts", type=int, default=10, help="how often to start again after a failure"
    )
    parser.add_argument("--storage", help="folder for Ray's own files, which all nodes see")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="spear train …")
    options = parser.parse_args()
    if options.command[:2] != ["spear", "train"]:
        parser.error("the command must begin with: spear train")

    # On GPUs, gradients go through NCCL; checkpoints and barriers, on the CPU, go through gloo.
    backend = "cpu:gloo,cuda:nccl" if options.gpus else "gloo"
    trainer = TorchTrainer(
        run_command,
        train_loop_config={"command": options.command[1:], "folder": os.getcwd()},
        torch_config=TorchConfig(backend=backend),
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=options.gpus),
        run_config=RunConfig(
            storage_path=options.storage,
            failure_config=FailureConfig(max_failures=options.restarts),
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
