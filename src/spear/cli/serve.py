"""`spear serve`: a policy for robots, or a benchmark, to connect to."""

import asyncio
import dataclasses
import os
import sys
from typing import TYPE_CHECKING

from spear.serve.options import ServeOptions

if TYPE_CHECKING:
    from spear.policy import Spear1Policy
    from spear.serve.exchange import Recorder
    from spear.serve.service import Service
    from spear.ui.episodes import EpisodeFolder

GIB = 2**30
LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")


def serve(options: ServeOptions) -> None:
    """Serve a policy to robots or benchmarks, over a websocket.

    Robots connect with openpi-client. Several may connect, and what they request at the same time
    is answered together. GET /healthz says whether the server is up, GET /metrics counts for
    Prometheus. Press Ctrl+C or send SIGTERM to stop after the current requests are answered.

    With --protocol vla-eval, AllenAI's vla-eval harness connects and evaluates the policy in its
    benchmarks: vla-eval run -c BENCHMARK.yaml, with server.url ws://HOST:PORT (see
    docs/howto/vla-eval.md).

    Examples:
        spear serve --policy nano
        spear serve --policy nano --ui --episodes runs/my_evaluation
        spear serve --policy runs/my_policy --embodiment droid --host 0.0.0.0 --token SECRET
        spear serve --policy runs/my_policy --embodiment widowx --record recordings
        spear serve --policy runs/my_policy --protocol vla-eval
    """
    if options.protocol == "vla-eval":
        _serve_harness(options)
    else:
        _serve_robots(options)


def _serve_robots(options: ServeOptions) -> None:
    """Serve to openpi-client until the server is stopped."""
    if options.token is None:
        options = dataclasses.replace(options, token=os.environ.get("SPEAR_TOKEN"))
    episode_folder = None
    if options.episodes:  # a wrong folder is refused before the weights are read
        from spear.ui.episodes import EpisodeFolder

        episode_folder = EpisodeFolder(options.episodes)
    if options.record is None:
        policy, service = _load_and_warm_up(options)
        _run_server(options, policy, service, episode_folder)
        return

    from spear.serve.recorder import claim_folder, open_recorder

    max_bytes = int(options.max_record_gib * GIB)
    with claim_folder(options.record):  # a wrong folder is refused before the weights are read
        policy, service = _load_and_warm_up(options)
        with open_recorder(options.record, service, max_bytes) as recorder:
            print(f"recording into {options.record}", file=sys.stderr, flush=True)
            _run_server(options, policy, service, episode_folder, recorder)


def _run_server(
    options: ServeOptions,
    policy: "Spear1Policy",
    service: "Service",
    episode_folder: "EpisodeFolder | None",
    recorder: "Recorder | None" = None,
) -> None:
    """Run a server until it is stopped, and print its addresses.

    Args:
        options: the options of the command.
        policy: the policy, for the page.
        service: the policy behind the robot's embodiment.
        episode_folder: recorded episodes that the page replays.
        recorder: records what is observed and answered.
    """
    from spear.serve.access import get_reachable_host
    from spear.serve.connection import MIB, ConnectionLimits
    from spear.serve.server import PolicyServer

    limits = ConnectionLimits(max_message_bytes=options.max_message_mib * MIB)
    page = None
    if options.ui:
        from spear.ui.page import Page

        page = Page(policy, options.policy, options.token, limits.max_message_bytes, episode_folder)

    def announce(server: PolicyServer) -> None:
        """Print the addresses of the running server."""
        address = f"{get_reachable_host(options.host)}:{server.port}"
        control = service.metadata["control"]
        served = f"{options.policy} for {options.embodiment_or_default} ({control})"
        print(f"serving {served} at ws://{address}", flush=True)
        if page:
            print(f"page at http://{address}/", flush=True)
        if not options.token:
            _warn_if_reachable_by_others(options, "there is no --token")

    asyncio.run(PolicyServer(service, options, page, limits, recorder).run(announce))


def _serve_harness(options: ServeOptions) -> None:
    """Serve to the vla-eval harness until the server is stopped."""
    from vla_eval.model_servers.serve import serve as serve_harness

    from spear.serve.access import get_reachable_host, make_listen_error
    from spear.serve.harness import HarnessServer

    _, service = _load_and_warm_up(options)
    address = f"ws://{get_reachable_host(options.host)}:{options.port}"
    print(
        f"serving {options.policy} for {options.embodiment_or_default} to vla-eval at {address}",
        flush=True,
    )
    _warn_if_reachable_by_others(options, "the harness's protocol has no token")
    try:
        serve_harness(HarnessServer(service, options), options.host, options.port)
    except* OSError as group:
        first_error = group.exceptions[0]
        raise make_listen_error(options.host, options.port, first_error) from group


def _load_and_warm_up(options: ServeOptions) -> "tuple[Spear1Policy, Service]":
    """Load a policy, make its service, and let the service answer once to warm up.

    Raises:
        SpearError: a name is unknown or the address cannot be used. Both are checked before the
            weights are read.
    """
    from spear.serve.access import check_can_listen

    # Check the address before the imports, which take seconds.
    check_can_listen(options.host, options.port)

    from spear import embodiments
    from spear.chunks import check_replan_interval
    from spear.models.devices import prepare_device
    from spear.monitor.distribution import TrainingDistribution
    from spear.policy import Spear1Policy, locate_checkpoint
    from spear.serve.service import Service, check_has_cameras

    robot = embodiments.load(options.embodiment_or_default)
    robot.select_control(options.control)
    folder = locate_checkpoint(options.policy)
    if not options.allow_missing_cameras:
        distribution = TrainingDistribution.load(folder / "seen.json")
        # The cameras that nearly all training steps had, so that the policy relies on them.
        usual_cameras = distribution.usual_cameras if distribution else []
        check_has_cameras(robot, usual_cameras, options.embodiment_or_default)
    device = prepare_device(options.device)
    print(f"loading {options.policy} on {device} …", file=sys.stderr, flush=True)
    policy = Spear1Policy.load(
        folder,
        device,
        options.flow_steps,
        dataset=options.norm_stats,
        dtype=options.dtype,
        quantize=options.quantize,
    )
    service = Service(policy, robot, options.policy, options.embodiment_or_default, options.control)
    num_rows = service.warm_up_and_count_rows()  # returns the number of commands in one answer
    if options.protocol == "vla-eval":
        check_replan_interval(options.replan_steps, num_rows)
    policy.reset()
    return policy, service


def _warn_if_reachable_by_others(options: ServeOptions, reason: str) -> None:
    """Warn if other machines can connect, with the reason why that is a risk."""
    if options.host not in LOOPBACK_HOSTS:
        print(f"warning: other machines may connect and {reason}", file=sys.stderr, flush=True)
