"""`torchrun` on the nodes of a Ray cluster: python -m spear.train.on_ray --nodes 4 --gpus 8 -- COMMAND …

The driver of the job that `spear train … --launch ray` submits. Ray chooses the nodes; on each, one actor
starts `torchrun` with a process per GPU. When a process fails or a node is lost, all are stopped and started
again, on the nodes that there are then; the command is expected to continue where it was.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from spear.errors import SpearError

PATIENCE = 30.0
"""Seconds that processes have to end by themselves (our choice)."""


def run(command: Sequence[str], nodes: int, gpus: int, restarts: int = 10, folder: str | None = None) -> int:
    """Run a command on nodes × gpus processes (gpus 0: one per node); returns its last exit code, 0 for
    success.

    restarts  how often it is started again after a failure.
    folder    where it runs, on every node; this process's when None.
    Raises SpearError when Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise SpearError('launching on Ray needs Ray: pip install "spear-vla[ray]"') from error
    begun = not ray.is_initialized()
    if begun:
        ray.init(log_to_driver=True)
    code = 1
    try:
        for attempt in range(restarts + 1):
            code = _attempt(ray, command, nodes, gpus, folder or os.getcwd())
            if code == 0:
                break
            print(f"attempt {attempt + 1} of {restarts + 1} ended with {code}", file=sys.stderr, flush=True)
    finally:
        if begun:
            ray.shutdown()
    return code


class _Node:
    """What runs on one node."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def address(self) -> str:
        """host:port at which the processes find each other."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def run(self, words: Sequence[str], folder: str) -> int:
        """The exit code of `torchrun` with these words."""
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
        launcher = [sys.executable, "-m", "torch.distributed.run", *words]
        self.process = subprocess.Popen(launcher, cwd=folder, env={**os.environ, "PATH": path})
        return self.process.wait()

    def stop(self) -> None:
        """End `torchrun`, which ends its processes."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()


def _attempt(ray: Any, command: Sequence[str], nodes: int, gpus: int, folder: str) -> int:
    """The first exit code that is not 0, 1 for a node that was lost, or 0."""
    from ray.util import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    needs = {"CPU": 1, **({"GPU": gpus} if gpus else {})}
    group = placement_group([needs] * nodes, strategy="STRICT_SPREAD" if nodes > 1 else "PACK")
    ray.get(group.ready())
    where = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i) for i in range(nodes)]
    # Two calls at once: one waits for the processes, the other may stop them.
    options = {"num_cpus": 1, "num_gpus": gpus, "max_concurrency": 2}
    actors = [ray.remote(_Node).options(**options, scheduling_strategy=place).remote() for place in where]
    try:
        endpoint = ray.get(actors[0].address.remote())
        words = [
            f"--nnodes={nodes}",
            f"--nproc-per-node={max(gpus, 1)}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={endpoint}",
            "--rdzv-id=spear",
        ]
        # torchrun would guess who holds the meeting place, from names and addresses that it does not always
        # know.
        holds = [f"--rdzv-conf=is_host={str(i == 0).lower()}" for i in range(nodes)]
        waiting = [
            each.run.remote([*words, hold, "--no-python", *command], folder)
            for each, hold in zip(actors, holds, strict=True)
        ]
        while waiting:
            done, waiting = ray.wait(waiting)
            code = ray.get(done[0])
            if code:
                return int(code)
        return 0
    except ray.exceptions.RayActorError as error:
        print(f"a node was lost: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        return 1
    finally:
        for each in actors:
            try:
                ray.get(each.stop.remote(), timeout=2 * PATIENCE)
            except ray.exceptions.RayError:  # it went with its node
                continue
        remove_placement_group(group)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m spear.train.on_ray", description=__doc__)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--restarts", type=int, default=10)
    parser.add_argument("--folder")
    parser.add_argument("command", nargs="+")
    chosen = parser.parse_args(arguments)
    try:
        return run(chosen.command, chosen.nodes, chosen.gpus, chosen.restarts, chosen.folder)
    except SpearError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
