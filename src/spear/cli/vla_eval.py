"""`spear vla-eval`: a policy for AllenAI's evaluation harness to connect to."""

from __future__ import annotations

import sys
from typing import Annotated

from tyro.conf import Positional, arg

from spear.cli.arguments import Name
from spear.cli.serve import LOOPBACK, check_numbers, load_policy
from spear.errors import SpearError


def vla_eval(
    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")],
    /,
    port: int = 8000,
    host: str = "127.0.0.1",
    embodiment: str = "maniskill2_widowx",
    control: Annotated[str | None, arg(metavar="NAME")] = None,
    replan: Annotated[int | None, arg(metavar="INT")] = None,
    device: str = "auto",
    steps: int = 10,
    max_batch: int = 16,
    wait_ms: float = 5.0,
    dataset: Name = None,
) -> None:
    """Serve a policy to AllenAI's vla-eval harness, which evaluates it in its benchmarks.

    Then, where the harness is: vla-eval run -c BENCHMARK.yaml, with server.url ws://HOST:PORT (see
    docs/simpler.md).

    Examples:
        spear vla-eval runs/my_policy
        spear vla-eval nano --embodiment my_benchmark.py --host 0.0.0.0 --port 8001

    Args:
        checkpoint: nano (comes with this package) or a folder with a trained policy.
        port: Where to listen.
        host: Address to listen on. The default lets only this machine in; benchmarks in Docker need 0.0.0.0.
        embodiment: The benchmark's robot: maniskill2_widowx, or a Python file that describes another one
            (see docs/robots.md; its observations are those of the benchmark).
        control: How the robot is commanded, where it has several ways. Without it, the robot's usual one.
        replan: Of each predicted chunk, so many actions are executed before the next look; default: 1.
        device: cpu, cuda, cuda:1 …; auto takes a GPU when there is one.
        steps: Euler steps of the flow: fewer are faster and coarser.
        max_batch: At most so many observations are answered together.
        wait_ms: For so long, at most, a batch waits for more observations.
        dataset: Of a policy whose training datasets were normalised each by itself: the one whose units to
            use.
    """
    from vla_eval.model_servers.serve import serve

    from spear import embodiments
    from spear.chunks import REPLAN
    from spear.serve.harness import HarnessServer
    from spear.serve.service import Service

    replan = REPLAN if replan is None else replan
    check_numbers(wait_ms, max_batch=max_batch, replan=replan, steps=steps)
    robot = embodiments.load(embodiment)
    robot.control(control)
    policy = load_policy(checkpoint, device, steps, dataset=dataset)
    service = Service(policy, robot, checkpoint, embodiment, control)
    service.warm_up()
    print(f"serving {checkpoint} for {embodiment} to vla-eval at ws://{host}:{port}", flush=True)
    if host not in LOOPBACK:
        print(
            "warning: other machines may connect: the harness's protocol has no token",
            file=sys.stderr,
            flush=True,
        )
    try:
        serve(HarnessServer(service, replan, max_batch, wait_ms), host, port)
    except* (OSError, OverflowError) as group:
        error = group.exceptions[0]
        raise SpearError(
            f"cannot listen on {host}:{port}: {error}: choose another --port or --host"
        ) from error
