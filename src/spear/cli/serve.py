"""`spear serve`: a policy for robots to connect to."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from spear.cli.arguments import Name
from spear.errors import SpearError

if TYPE_CHECKING:
    from spear.policy import Spear1Policy

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")],
    /,
    port: int = 8000,
    host: str = "127.0.0.1",
    embodiment: str = "generic",
    control: Annotated[str | None, arg(metavar="NAME")] = None,
    token: Annotated[str | None, arg(metavar="TEXT")] = None,
    device: str = "auto",
    steps: int = 10,
    max_batch: int = 16,
    wait_ms: float = 5.0,
    queue: int = 64,
    dtype: Literal["float32", "bfloat16"] = "float32",
    dataset: Name = None,
    ui: bool = False,
) -> None:
    """Serve a policy to robots, over a websocket that openpi-client connects to.

    Several robots may connect; what they ask at the same time is answered together. GET /healthz says whether
    the server is up, GET /metrics counts for Prometheus. Ctrl+C or SIGTERM answers what is under way, then
    stops.

    Examples:
        spear serve nano
        spear serve nano --ui
        spear serve runs/my_policy --embodiment droid --host 0.0.0.0 --token SECRET

    Args:
        checkpoint: nano (comes with this package) or a folder with a trained policy.
        port: Where to listen; 0 takes a free port.
        host: Address to listen on. The default lets only this machine in; 0.0.0.0 lets in every machine.
        embodiment: The robot: generic, sim, droid, widowx, simpler_widowx, or a Python file that describes
            yours (see docs/robots.md).
        control: How the robot is commanded, where it has several ways (droid: joint_velocity, joint_position,
            cartesian_position). Without it, the robot's usual one.
        token: What clients must send (openpi-client: api_key). Also read from SPEAR_TOKEN, where other users
            of this machine do not see it.
        device: cpu, cuda, cuda:1 …; auto takes a GPU when there is one.
        steps: Euler steps of the flow: fewer are faster and coarser.
        max_batch: At most so many observations are answered together.
        wait_ms: For so long, at most, a batch waits for more observations.
        queue: So many observations may wait; further ones are told that the server is busy.
        dtype: Precision of the weights: bfloat16 takes half the memory (see docs/memory.md).
        dataset: Of a policy whose training datasets were normalised each by itself: the one whose units to
            use.
        ui: Also serve a page for people, at the address that is printed: watch and steer the policy in the
            built-in simulator, ask SPEAR-VLM about a scene or a photo (see docs/robots.md).
    """
    import asyncio

    from spear import embodiments
    from spear.serve.server import PolicyServer, Settings
    from spear.serve.service import Service

    check_numbers(wait_ms, max_batch=max_batch, queue=queue, steps=steps)
    token = os.environ.get("SPEAR_TOKEN") if token is None else token
    check_token(token)
    robot = embodiments.load(embodiment)
    robot.control(control)
    policy = load_policy(checkpoint, device, steps, dtype, dataset)
    service = Service(policy, robot, checkpoint, embodiment, control)
    service.warm_up()
    policy.reset()

    def ready(server: PolicyServer) -> None:
        shown = f"[{host}]" if ":" in host else host
        print(
            f"serving {checkpoint} for {embodiment} ({service.metadata['control']}) at ws://{shown}:{server.port}",
            flush=True,
        )
        if page:
            print(f"page at http://{shown}:{server.port}/", flush=True)
        if host not in LOOPBACK and not token:
            print("warning: other machines may connect and there is no --token", file=sys.stderr, flush=True)

    settings = Settings(host, port, token, max_batch, wait_ms, queue)
    page = None
    if ui:
        from spear.ui.page import Page

        page = Page(policy, checkpoint, token, settings.max_bytes)
    asyncio.run(PolicyServer(service, settings, page).run(ready))


def check_numbers(wait_ms: float, **counts: int) -> None:
    """Raises `SpearError` for options of a server that make no sense; `counts` are named as their options
    are."""
    for name, value in counts.items():
        if value < 1:
            raise SpearError(f"--{name.replace('_', '-')} {value}: give at least 1")
    if not 0 <= wait_ms <= 10_000:
        raise SpearError(f"--wait-ms {wait_ms:g}: give 0 to 10000")


def check_token(token: str | None) -> None:
    """Raises `SpearError` for a token that no client could send in an HTTP header, an empty one above all: it
    would leave a server open that was meant to be closed. None: no token."""
    if token is not None and not (token.strip() == token != "" and token.isascii() and token.isprintable()):
        raise SpearError(
            "--token (or SPEAR_TOKEN): empty, or with spaces at its ends or characters beyond ASCII: give another one, "
            "or leave it out"
        )


def load_policy(
    checkpoint: str, device: str, steps: int, dtype: str = "float32", dataset: str | None = None
) -> Spear1Policy:
    """A policy on a device; "auto" takes a GPU when there is one. Raises `SpearError` when either is not
    there.

    dataset: whose units it uses, see `Spear1Policy.load`.
    """
    import torch

    from spear.policy import Spear1Policy
    from spear.train.devices import choose_device

    return Spear1Policy.load(
        checkpoint, choose_device(device), steps, dataset=dataset, dtype=getattr(torch, dtype)
    )
