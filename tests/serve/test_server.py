"""The server over real sockets: answers, errors, batches, busy servers, stopping, metrics.

Most tests serve `HomingPolicy`, whose actions move the arm by -0.1 times its position. So the first
action of an answer shows which observation the policy got (`make_observation`, `get_first_x`).
"""

import asyncio
import dataclasses
import math
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import Mock

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, ConnectionClosedOK
from websockets.sync.client import ClientConnection, connect
from websockets.sync.server import ServerConnection, serve

from refusals import no_warning, refuses
from serve_here import HomingPolicy, http_get, make_homing_chunk, run_server, run_server_process
from spear.chunks import Pilot
from spear.embodiments import Control, load
from spear.errors import Notice, SpearError
from spear.serve import wire
from spear.serve.batcher import Batcher
from spear.serve.client import RemotePolicy
from spear.serve.connection import ConnectionLimits
from spear.serve.options import ServeOptions
from spear.serve.server import PolicyServer
from spear.serve.service import Service

GENERIC = load("generic")


def get_url(server: PolicyServer) -> str:
    """Return the address of a server's websocket."""
    return f"ws://127.0.0.1:{server.port}"


def make_observation(x: float = 0.4, **changes: Any) -> dict[str, Any]:
    """An observation with the arm at `x` (m, base frame); `changes` replace other entries."""
    observation = GENERIC.example()
    observation["observation/state"][0] = x
    return {**observation, **changes}


def connect_raw(server: PolicyServer) -> ClientConnection:
    """A websocket connection to a server, after the greeting was read."""
    connection = connect(get_url(server), compression=None)
    connection.recv()
    return connection


def get_first_x(result: Mapping[str, Any]) -> float:
    """The x translation of an answer's first action: -0.1 times the arm's x (`HomingPolicy`)."""
    return float(result["actions"][0, 0])


@contextmanager
def run_other_server(handle: Callable[[ServerConnection], None]) -> Iterator[str]:
    """Run a websocket server that is no policy server; yields its address."""
    with serve(handle, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"


def read_metrics(server: PolicyServer) -> dict[str, float]:
    """The numbers at GET /metrics, by Prometheus's name with labels."""
    _, _, body = http_get(server, "/metrics")
    counts = {}
    for line in body.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            counts[name] = float(value)
    return counts


def test_a_healthy_server_says_ok() -> None:
    with run_server() as server:
        assert http_get(server, "/healthz")[2] == "ok\n"


def test_the_metadata_describe_the_robot() -> None:
    with run_server() as server, closing(RemotePolicy(get_url(server))) as policy:
        assert policy.metadata["embodiment"] == "generic"
        assert policy.metadata["rate_hz"] == 5.0
        assert set(policy.metadata["observation"]) == set(GENERIC.required)


def test_an_observation_is_answered_with_actions_and_timings() -> None:
    with run_server() as server, closing(RemotePolicy(get_url(server))) as policy:
        first = policy.infer(make_observation())
        second = policy.infer(make_observation())

    expected = make_homing_chunk(make_observation()["observation/state"])
    np.testing.assert_array_equal(first["actions"], expected)
    # The server's time includes the policy's. The second answer tells how long the first one took
    # altogether.
    infer_ms = first["server_timing"]["infer_ms"]
    assert infer_ms >= first["policy_timing"]["infer_ms"] >= 0
    assert second["server_timing"]["prev_total_ms"] >= infer_ms


def test_the_server_lists_only_cameras_that_the_training_had() -> None:
    class PolicyTrainedWithoutWrist(HomingPolicy):
        image_sizes: ClassVar = {"external": (32, 24), "wrist": (16, 16)}
        training_distribution = SimpleNamespace(red_minus_blue={"external": 0.0})

    service = Service(PolicyTrainedWithoutWrist(), load("generic"))

    assert service.metadata["image_sizes"] == {"external": [32, 24]}


def test_each_server_counts_its_own_requests() -> None:
    with (
        run_server() as server,
        run_server(),
        closing(RemotePolicy(get_url(server))) as policy,
    ):
        policy.infer(make_observation())
        policy.infer(make_observation())
        refuses("prompt", policy.infer, make_observation(prompt=""))

        counts = read_metrics(server)

    # The other server has counted nothing here. All three requests were batches of one.
    assert counts['spear_requests_total{outcome="ok"}'] == 2
    assert counts['spear_requests_total{outcome="refused"}'] == 1
    assert counts["spear_request_seconds_count"] == 3
    assert counts['spear_batch_size_bucket{le="1.0"}'] == 3
    assert counts["spear_inference_seconds_count"] == 3
    assert counts["spear_gpu_memory_bytes"] >= 0
    assert counts["spear_clients"] == 1
    assert counts["spear_queue"] == 0


@pytest.mark.parametrize(
    "greeting",
    [
        "hello",
        b"\xff",
        wire.encode({"image_sizes": [1]}),
        wire.encode({"committed": "x"}),
    ],
)
def test_a_client_leaves_a_server_that_greets_as_no_policy_server_does(
    greeting: bytes | str,
) -> None:
    """The client refuses the server, and closes the connection, which the server notices."""
    has_left = threading.Event()

    def greet(client: ServerConnection) -> None:
        client.send(greeting)
        with pytest.raises(ConnectionClosed):
            client.recv()
        has_left.set()

    with run_other_server(greet) as address:
        refuses("no policy server", RemotePolicy, address)
        assert has_left.wait(60)


# The key of an answer is "actions".
@pytest.mark.parametrize("answer", [{"action": np.zeros(7)}, {}])
def test_an_answer_without_actions_is_refused(answer: dict[str, Any]) -> None:
    def answer_each(client: ServerConnection) -> None:
        client.send(wire.encode({}))
        for _ in client:
            client.send(wire.encode(answer))

    with run_other_server(answer_each) as address, closing(RemotePolicy(address)) as policy:
        refuses("without actions", policy.infer, make_observation())


def test_a_silent_server_counts_as_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def stay_silent(client: ServerConnection) -> None:
        client.send(wire.encode({}))
        for _ in client:
            pass

    monkeypatch.setattr("spear.serve.client.ANSWER_TIMEOUT_S", 0.1)
    with run_other_server(stay_silent) as address, closing(RemotePolicy(address)) as policy:
        refuses("has gone", policy.infer, make_observation())


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:9", "ws://127.0.0.1:99999", "ws://[::1", "ws://a..b"]
)
def test_the_error_names_an_address_without_a_server(address: str) -> None:
    refuses(re.escape(address), RemotePolicy, address, token="two\nlines")


GOOD_MESSAGE = wire.encode(make_observation())


# A message, and what the error names. The prompts "explode", "bug" and "stop" make `HomingPolicy`
# raise a `SpearError`, a `ZeroDivisionError` and a `StopIteration`.
@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("text", "message"),
        (GOOD_MESSAGE[:1000], "message"),
        (wire.encode({"x": 1}), "'x'"),
        (
            wire.encode(make_observation(**{"observation/state": np.full(8, np.nan)})),
            "observation/state",
        ),
        (
            wire.encode(make_observation(**{"observation/image": np.zeros((9, 9), np.uint8)})),
            "observation/image",
        ),
        (wire.encode(make_observation(prompt="explode")), "explode"),
        (wire.encode(make_observation(prompt="bug")), "ZeroDivisionError"),
        (wire.encode(make_observation(prompt="stop")), "RuntimeError"),
    ],
    ids=["text", "cut off", "key", "state", "image", "refused", "bug", "stop"],
)
def test_an_error_names_what_is_wrong_and_the_next_request_works(
    message: bytes | str, words: str
) -> None:
    with run_server() as server, connect_raw(server) as connection:
        connection.send(message)
        error = connection.recv()
        connection.send(GOOD_MESSAGE)
        answer = connection.recv()

    assert isinstance(error, str)
    assert words in error
    assert "\n" not in error
    expected = make_homing_chunk(make_observation()["observation/state"])
    np.testing.assert_array_equal(wire.decode(answer)["actions"], expected)


def test_random_and_damaged_messages_leave_the_connection_usable() -> None:
    rng = np.random.default_rng(0)
    noise = [rng.bytes(int(size)) for size in rng.integers(0, 400, 20)]
    # 40 good messages with one byte changed; the server may or may not understand them.
    damaged = []
    for offset in rng.integers(0, 700, 40):
        message = bytearray(GOOD_MESSAGE)
        message[offset] = rng.integers(256)
        damaged.append(bytes(message))

    with run_server() as server, connect_raw(server) as connection:
        for message in noise:
            connection.send(message)
            error = connection.recv()
            assert isinstance(error, str)
            assert "message" in error
            assert "\n" not in error
        for message in damaged:
            connection.send(message)
            connection.recv()
        connection.send(GOOD_MESSAGE)
        answer = connection.recv()

    expected = make_homing_chunk(make_observation()["observation/state"])
    np.testing.assert_array_equal(wire.decode(answer)["actions"], expected)


@pytest.mark.parametrize("function", ["observe", "convert"])
def test_a_mistake_in_a_robots_file_fails_one_observation(
    function: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Of three observations together, the one with the prompt "odd" makes the file fail."""

    def fail_for_odd(*arguments: Any) -> Any:
        if arguments[-1]["prompt"] == "odd":
            raise ZeroDivisionError
        return arguments[0]

    control = Control(description="", rate_hz=5.0)
    observe = GENERIC.observe
    if function == "convert":
        control = dataclasses.replace(control, convert=fail_for_odd)
    else:
        observe = fail_for_odd
    robot = dataclasses.replace(GENERIC, observe=observe, controls={"pose": control})

    first, odd, last = Service(HomingPolicy(), robot).answer(
        [make_observation(0.1), make_observation(prompt="odd"), make_observation(0.3)]
    )

    assert isinstance(odd, SpearError)
    assert "ZeroDivisionError" in str(odd)
    assert get_first_x(first) == pytest.approx(-0.01, rel=1e-5)
    assert get_first_x(last) == pytest.approx(-0.03, rel=1e-5)
    [record] = caplog.records
    assert record.exc_info


# What the robot's file returns as commands, instead of an array [n, m] of finite numbers.
@pytest.mark.parametrize(
    "rows", [np.full((5, 7), np.nan), np.full((5, 7), "fast"), np.ones(7), None]
)
def test_commands_that_are_no_rows_of_numbers_reach_no_robot(rows: Any) -> None:
    control = Control(description="", rate_hz=5.0, convert=lambda *_: rows)
    robot = dataclasses.replace(GENERIC, controls={"pose": control})

    [answer] = Service(HomingPolicy(), robot).answer([make_observation()])

    assert isinstance(answer, SpearError)
    assert "robot's file" in str(answer)


class CommittedPolicy(HomingPolicy):
    """A policy that takes up to two committed actions, and answers with them, five times each."""

    committed = 2

    def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [
            {"actions": np.repeat(observation["committed"], 5, axis=0)}
            for observation in observations
        ]


def test_committed_actions_reach_a_policy_that_has_learned_them() -> None:
    committed = make_homing_chunk(np.ones(8))[:1]

    with (
        run_server(CommittedPolicy()) as server,
        closing(RemotePolicy(get_url(server))) as policy,
    ):
        result = policy.infer(make_observation(committed=committed))

        assert policy.committed == 2
        np.testing.assert_array_equal(result["actions"], np.repeat(committed, 5, axis=0))


def test_a_robot_with_actions_of_its_own_takes_no_committed_actions() -> None:
    """DROID's commands are joint velocities, which cannot be committed actions."""
    committed = make_homing_chunk(np.ones(8))[:1]

    with (
        run_server(CommittedPolicy(), robot="droid") as server,
        closing(RemotePolicy(get_url(server))) as policy,
    ):
        assert policy.committed == 0
        observation = {**load("droid").example(), "committed": committed}
        refuses("committed", policy.infer, observation)


def test_clients_beyond_the_limit_are_refused() -> None:
    with (
        run_server(limits=ConnectionLimits(max_clients=2)) as server,
        connect_raw(server),
        connect_raw(server),
    ):
        refuses("503", RemotePolicy, get_url(server))
        assert http_get(server, "/healthz")[2] == "ok\n"


def test_a_message_beyond_the_limit_ends_its_own_connection() -> None:
    limits = ConnectionLimits(max_message_bytes=300_000)
    with (
        run_server(limits=limits) as server,
        connect_raw(server) as second_socket,
        connect_raw(server) as sender,
    ):
        sender.send(b"\0" * 300_001)
        with pytest.raises(ConnectionClosedError, match="1009"):
            sender.recv()

        second_socket.send(GOOD_MESSAGE)
        assert isinstance(second_socket.recv(), bytes)


def test_a_remote_policy_names_an_observation_beyond_the_limit_and_works_again() -> None:
    limits = ConnectionLimits(max_message_bytes=300_000)
    with run_server(limits=limits) as server, closing(RemotePolicy(get_url(server))) as policy:
        large_image = np.zeros((400, 400, 3), np.uint8)
        observation = make_observation(**{"observation/image": large_image})
        message = "observation .*at most 300000 bytes.*--max-message-mib"
        refuses(message, policy.infer, observation)

        policy.infer(make_observation())


@pytest.mark.parametrize("token", [None, "Secret"])
def test_a_client_without_the_token_is_refused(token: str | None) -> None:
    with run_server(token="secret") as server:
        refuses("401", RemotePolicy, get_url(server), token=token)


# Headers of a request, its path, and the status of the response.
@pytest.mark.parametrize(
    ("headers", "path", "status"),
    [
        ({}, "/healthz", 200),
        ({}, "/metrics", 401),
        ({"Authorization": "Api-Key s\xe9cret"}, "/metrics", 401),
        ({"Authorization": "Api-Key secret"}, "/metrics", 200),
        ({"Authorization": "Api-Key secret"}, "/nowhere", 404),
    ],
)
def test_all_but_health_needs_the_token(headers: dict[str, str], path: str, status: int) -> None:
    with run_server(token="secret") as server:
        assert http_get(server, path, **headers)[0] == status


def test_a_client_with_the_token_is_answered() -> None:
    with (
        run_server(token="secret") as server,
        closing(RemotePolicy(get_url(server), token="secret")) as policy,
    ):
        policy.infer(make_observation())


def test_many_clients_are_answered_together_and_each_gets_its_own_answer() -> None:
    policy = HomingPolicy(inference_s=0.02)
    with run_server(policy, max_batch_size=8, batch_timeout_ms=1000.0) as server:
        clients = [RemotePolicy(get_url(server)) for _ in range(8)]

        def ask_four_times(index: int) -> None:
            # No two of the 32 requests have the same x.
            for number in range(4):
                x = 0.1 + 0.01 * index + 0.1 * number
                result = clients[index].infer(make_observation(x))
                assert get_first_x(result) == pytest.approx(-0.1 * x, rel=1e-5)

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(ask_four_times, range(8)))

    assert max(policy.batch_sizes) == 8
    assert sum(policy.batch_sizes) == 32
    assert len(policy.batch_sizes) < 20  # 4 batches would do if all clients were always in time


def test_a_refused_observation_leaves_nothing_behind_for_the_next_call() -> None:
    with run_server(max_batch_size=8) as server, closing(RemotePolicy(get_url(server))) as policy:
        refused = make_observation(prompt="explode")
        refuses(
            "explode",
            policy.infer_batch,
            [make_observation(0.1), refused, make_observation(0.3), make_observation(0.4)],
        )

        results = policy.infer_batch([make_observation(0.1 * k) for k in range(1, 5)])

    xs = [get_first_x(result) for result in results]
    np.testing.assert_allclose(xs, [-0.01, -0.02, -0.03, -0.04], rtol=1e-5)


def test_a_refused_observation_is_found_by_halving_the_batch() -> None:
    policy = HomingPolicy()
    observations = [make_observation(0.1)] * 15 + [make_observation(prompt="explode")]

    answers = Service(policy, GENERIC).answer(observations)

    assert [isinstance(answer, SpearError) for answer in answers] == [False] * 15 + [True]
    # One batch of 16, and two batches after each of four halvings.
    assert len(policy.batch_sizes) <= 9


# An action lasts 0.2 s: three rows at 15 Hz, or one row at 5 Hz.
@pytest.mark.parametrize(
    ("rate_hz", "rows_per_action", "is_right"),
    [(15.0, 3, True), (5.0, 1, True), (15.0, 1, False), (5.0, 3, False)],
)
def test_rows_that_take_another_time_than_their_actions_bring_a_notice(
    rate_hz: float, rows_per_action: int, is_right: bool
) -> None:
    def repeat_actions(actions: np.ndarray, *_: Any) -> np.ndarray:
        return np.repeat(actions, rows_per_action, axis=0)

    control = Control(description="", rate_hz=rate_hz, convert=repeat_actions)
    service = Service(HomingPolicy(), dataclasses.replace(GENERIC, controls={"mine": control}))

    with no_warning() if is_right else pytest.warns(Notice, match="rate_hz"):
        num_rows = service.warm_up_and_count_rows()

    assert num_rows == 5 * rows_per_action


def test_threads_may_share_a_client() -> None:
    xs = [0.1 + 0.05 * index for index in range(8)]
    with (
        run_server(HomingPolicy(inference_s=0.02)) as server,
        closing(RemotePolicy(get_url(server))) as policy,
    ):
        with ThreadPoolExecutor(4) as threads:
            answered_xs = list(
                threads.map(lambda x: get_first_x(policy.infer(make_observation(x))), xs)
            )

    np.testing.assert_allclose(answered_xs, -0.1 * np.array(xs), rtol=1e-5)


def test_an_episode_may_begin_while_the_last_chunk_of_another_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eight episodes, each with its own pilot, share a client. Each answers its own observation.

    A pilot in the mode "async" is closed while its last inference still runs.
    """
    monkeypatch.setattr("spear.chunks.CONTROL_RATE_HZ", math.inf)  # the pilot does not wait
    with (
        run_server(HomingPolicy(inference_s=0.02)) as server,
        closing(RemotePolicy(get_url(server))) as policy,
    ):
        for x in [0.1 + 0.05 * index for index in range(8)]:
            with closing(Pilot(policy, "async", replan_interval=3)) as pilot:
                executed_xs = [pilot.step(make_observation(x))[0] for _ in range(3)]

            np.testing.assert_allclose(executed_xs, -0.1 * x, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("moment", ["answer", "greeting", "closing"])
def test_an_interrupted_call_leaves_no_answer_to_the_next(
    moment: str, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C may come while the client waits for an answer or for the greeting, or while it closes.

    The next call has to get its own answer, not that of the interrupted call.
    """
    interrupt = Mock(side_effect=KeyboardInterrupt)
    with run_server() as server:
        policy = RemotePolicy(get_url(server))
        if moment == "greeting":
            policy.close()  # the next call connects again, and waits for the greeting

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(ClientConnection, "recv", interrupt)
            if moment == "closing":  # a second Ctrl-C
                patched.setattr(ClientConnection, "close", interrupt)
            policy.infer_batch([make_observation(0.1)] * batch_size)

        assert get_first_x(policy.infer(make_observation(0.3))) == pytest.approx(-0.03, rel=1e-5)
        policy.infer_batch([make_observation(), make_observation()])


def test_a_pilot_executes_the_rows_of_a_robot_that_takes_actions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The robot's file "arm.py" has a control that passes actions on unchanged."""
    control = Control(description="actions", rate_hz=5.0)
    robot = dataclasses.replace(GENERIC, controls={"mine": control})
    monkeypatch.setattr("spear.embodiments.load", lambda name: robot)

    with run_server(robot="arm.py") as server:
        action = Pilot(RemotePolicy(get_url(server))).step(make_observation())

    assert action[0] == pytest.approx(-0.04, rel=1e-5)  # the arm is at 0.4 m


def test_a_pilot_does_not_take_commands_for_actions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands are poses, [5, 8] with unit quaternions, and so look like actions."""

    def convert_to_poses(actions: Any, state: np.ndarray, observation: Any) -> np.ndarray:
        return np.tile(state, (5, 1))

    control = Control(description="poses", rate_hz=5.0, convert=convert_to_poses)
    robot = dataclasses.replace(GENERIC, controls={"mine": control})
    monkeypatch.setattr("spear.embodiments.load", lambda name: robot)

    with run_server(robot="arm.py") as server:
        refuses("arm.py", Pilot, RemotePolicy(get_url(server)))


def test_a_client_goes_on_with_the_same_server_after_a_restart() -> None:
    policy = HomingPolicy()
    observation = load("droid").example()
    with run_server(policy, "droid") as server:
        port = server.port
        client = RemotePolicy(get_url(server))
        actions_before = client.infer(observation)["actions"]
    refuses("has gone", client.infer, observation)

    with run_server(policy, "droid", port=port):
        actions_after = client.infer(observation)["actions"]

    np.testing.assert_array_equal(actions_after, actions_before)


@pytest.mark.parametrize("changed", ["policy", "control"])
def test_a_client_refuses_another_server_at_the_same_address(changed: str) -> None:
    policy = HomingPolicy()
    observation = load("droid").example()
    with run_server(policy, "droid", control="joint_velocity") as server:
        port = server.port
        client = RemotePolicy(get_url(server))
        client.infer(observation)
    refuses("has gone", client.infer, observation)

    if changed == "policy":
        policy.identity = "fine-tuned"
    control = "joint_position" if changed == "control" else "joint_velocity"
    with run_server(policy, "droid", port=port, control=control) as server:
        for _ in range(2):
            refuses("than before", client.infer, observation)
        new_client = RemotePolicy(get_url(server))
        # Five actions at 5 Hz become 15 rows at DROID's 15 Hz.
        assert new_client.infer(observation)["actions"].shape == (15, 8)


def test_a_server_whose_batcher_fails_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch with None instead of a request makes the batcher fail."""
    # The sleep makes a coroutine whose result is the list.
    monkeypatch.setattr(Batcher, "_wait_for_batch", lambda self: asyncio.sleep(0, result=[None]))
    server = PolicyServer(Service(HomingPolicy(), GENERIC), ServeOptions("test", port=0))

    with pytest.raises(AttributeError):
        asyncio.run(server.run())


def test_a_full_queue_refuses_at_once() -> None:
    with run_server(HomingPolicy(inference_s=0.2), max_batch_size=1, max_queue_size=2) as server:
        connections = [connect_raw(server) for _ in range(6)]
        for connection in connections:
            connection.send(GOOD_MESSAGE)
        replies = [connection.recv() for connection in connections]
        for connection in connections:
            connection.close()

    # Of six requests one is computed, two wait, and the others are refused.
    errors = [reply for reply in replies if isinstance(reply, str)]
    assert errors
    assert all(error.startswith("busy: 2 ") for error in errors)
    assert len(replies) - len(errors) >= 2


def test_a_remote_policy_asks_a_busy_server_again() -> None:
    with run_server(HomingPolicy(inference_s=0.2), max_batch_size=1, max_queue_size=2) as server:
        results = RemotePolicy(get_url(server)).infer_batch([make_observation()] * 4)

    assert len(results) == 4


# Code of a policy that prints a line when its inference begins, and takes 0.3 s.
SLOW_POLICY = """
class Policy(HomingPolicy):
    def infer_batch(self, observations):
        print("asked", flush=True)
        time.sleep(0.3)
        return super().infer_batch(observations)
"""


def test_sigterm_answers_what_is_under_way_and_ends_well() -> None:
    with run_server_process(SLOW_POLICY) as (process, port, output):
        url = f"ws://127.0.0.1:{port}"
        with connect(url, compression=None) as asking, connect(url, compression=None) as idle:
            asking.recv()
            idle.recv()
            asking.send(GOOD_MESSAGE)
            assert output.readline() == "asked\n"

            # Inference has begun. The answer still comes, and then both connections are closed.
            process.send_signal(signal.SIGTERM)
            answer = wire.decode(asking.recv())

            expected = make_homing_chunk(make_observation()["observation/state"])
            np.testing.assert_array_equal(answer["actions"], expected)
            for connection in (asking, idle):
                with pytest.raises(ConnectionClosedOK, match="1001"):
                    connection.recv()
        assert process.wait(60) == 0
