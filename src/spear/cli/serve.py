"""`spear serve` and `spear vla-eval`: a policy for robots, or a benchmark, to connect to."""

import asyncio
import dataclasses
import os
import sys
from typing import TYPE_CHECKING

from spear.serve.options import ServeOptions, ServiceOptions, VlaEvalOptions

if TYPE_CHECKING:
    from spear.policy import Spear1Policy
    from spear.serve.service import Service

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(options: ServeOptions) -> None:
    """Serve a policy to robots, over a websocket that openpi-client connects to.

    Several robots may connect; what they ask at the same time is answered together. GET /healthz says whether
    the server is up, GET /metrics counts for Prometheus. Ctrl+C or SIGTERM answers what is under way, then
    stops.

    Examples:
        spear serve nano
        spear serve nano --ui
        spear serve nano --ui --episodes runs/my_evaluation
        spear serve runs/my_policy --embodiment droid --host 0.0.0.0 --token SECRET
    """
    from spear.serve.access import find_reachable_host
    from spear.serve.connection import ConnectionLimits
    from spear.serve.server import PolicyServer

    if options.token is None:
        options = dataclasses.replace(options, token=os.environ.get("SPEAR_TOKEN"))
    episode_folder = None
    if options.episodes:  # before the weights are read
        from spear.ui.episodes import EpisodeFolder

        episode_folder = EpisodeFolder(options.episodes)
    policy, service = _warm(options)
    page = None
    if options.ui:
        from spear.ui.page import Page

        page = Page(
            policy,
            options.policy,
            options.token,
            ConnectionLimits().max_message_bytes,
            episode_folder,
        )

    def ready(server: PolicyServer) -> None:
        address = f"{find_reachable_host(options.host)}:{server.port}"
        what = f"{options.policy} for {options.embodiment} ({service.metadata['control']})"
        print(f"serving {what} at ws://{address}", flush=True)
        if page:
            print(f"page at http://{address}/", flush=True)
        if not options.token:
            _warn_of_others(options, "there is no --token")

    asyncio.run(PolicyServer(service, options, page).run(ready))


def vla_eval(options: VlaEvalOptions) -> None:
    """Serve a policy to AllenAI's vla-eval harness, which evaluates it in its benchmarks.

    Then, where the harness is: vla-eval run -c BENCHMARK.yaml, with server.url ws://HOST:PORT (see
    docs/simpler.md).

    Examples:
        spear vla-eval runs/my_policy
        spear vla-eval nano --embodiment my_benchmark.py --host 0.0.0.0 --port 8001
    """
    from vla_eval.model_servers.serve import serve

    from spear.serve.access import find_reachable_host, listen_error
    from spear.serve.harness import HarnessServer

    _, service = _warm(options)
    address = f"ws://{find_reachable_host(options.host)}:{options.port}"
    print(f"serving {options.policy} for {options.embodiment} to vla-eval at {address}", flush=True)
    _warn_of_others(options, "the harness's protocol has no token")
    try:
        serve(HarnessServer(service, options), options.host, options.port)
    except* OSError as group:
        raise listen_error(options.host, options.port, group.exceptions[0]) from group


def _warm(options: ServiceOptions) -> "tuple[Spear1Policy, Service]":
    """The policy and its service, which has answered once. Raises `SpearError` for a bad name of anything
    and an address that cannot be had, before the weights are read."""
    from spear.serve.access import check_can_listen

    check_can_listen(options.host, options.port)

    from spear import embodiments
    from spear.chunks import check_replan_interval
    from spear.models.devices import choose_device
    from spear.policy import Spear1Policy, locate
    from spear.serve.service import Service

    robot = embodiments.load(options.embodiment)
    robot.select_control(options.control)
    folder, device = locate(options.policy), choose_device(options.device)
    print(f"loading {options.policy} on {device} …", file=sys.stderr, flush=True)
    o = options
    policy = Spear1Policy.load(folder, device, o.flow_steps, dataset=o.dataset, dtype=o.dtype)
    service = Service(policy, robot, options.policy, options.embodiment, options.control)
    rows = service.warm_up()
    if isinstance(options, VlaEvalOptions):
        check_replan_interval(options.replan, rows)
    policy.reset()
    return policy, service


def _warn_of_others(options: ServiceOptions, why: str) -> None:
    if options.host not in LOOPBACK:
        print(f"warning: other machines may connect and {why}", file=sys.stderr, flush=True)
