"""New connections: which ones the rates let in, in which order, and which have to wait.

The first tests call `AdmissionQueue` with text instead of connections and with a time of their own.
The others run a server with low rates. Addresses 127.0.0.1, 127.0.0.2, … are all this machine.
"""

import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from serve_here import HomingPolicy, http_get, run_server
from spear.embodiments import load
from spear.serve import wire
from spear.serve.admission import (
    AdmissionLimits,
    AdmissionQueue,
    TokenBucket,
    get_rate_limit_key,
)
from spear.serve.client import RemotePolicy
from spear.serve.connection import ConnectionLimits
from spear.serve.server import PolicyServer

GENERIC = load("generic")
# At once two connections of an address, and three of all addresses; then one per second.
ONE_PER_S_AFTER_BURST = AdmissionLimits(
    per_s_and_address=1.0, burst_of_address=2, per_s=1.0, burst=3
)
HEALTH_REQUEST = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


def take_all(queue: AdmissionQueue[str], now_s: float) -> list[str]:
    """All connections that are let in at the time `now_s`, in order."""
    connections = []
    while (connection := queue.take(now_s)) is not None:
        connections.append(connection)
    return connections


def test_a_bucket_allows_a_burst_and_then_the_rate() -> None:
    bucket = TokenBucket(per_s=2.0, capacity=3)
    num_allowed = 0

    for now_s in (0.0, 0.0, 0.0, 0.0, 0.4, 0.5, 0.6):
        if bucket.has_token(now_s):
            bucket.take_token()
            num_allowed += 1

    # Three at 0 s, and one at 0.5 s, when half a second has brought one new token.
    assert num_allowed == 4


def test_an_address_has_to_wait_when_its_burst_is_used_up() -> None:
    queue: AdmissionQueue[str] = AdmissionQueue(ONE_PER_S_AFTER_BURST)
    for name in ("first", "second", "third"):
        queue.add_and_pop_surplus("192.0.2.1", name)

    assert take_all(queue, 0.0) == ["first", "second"]
    assert take_all(queue, 0.5) == []
    assert take_all(queue, 1.0) == ["third"]


def test_addresses_take_turns() -> None:
    queue: AdmissionQueue[str] = AdmissionQueue(AdmissionLimits())
    for number in range(3):
        queue.add_and_pop_surplus("192.0.2.1", f"flood {number}")
    queue.add_and_pop_surplus("192.0.2.2", "robot")

    assert take_all(queue, 0.0) == ["flood 0", "robot", "flood 1", "flood 2"]


def test_all_addresses_share_one_rate() -> None:
    queue: AdmissionQueue[str] = AdmissionQueue(ONE_PER_S_AFTER_BURST)
    for number in range(5):
        queue.add_and_pop_surplus(f"192.0.2.{number}", str(number))

    assert take_all(queue, 0.0) == ["0", "1", "2"]
    assert take_all(queue, 1.0) == ["3"]


def test_an_address_with_too_many_waiting_loses_the_newest() -> None:
    queue: AdmissionQueue[str] = AdmissionQueue(AdmissionLimits(max_waiting_of_address=1))

    assert queue.add_and_pop_surplus("192.0.2.1", "first") is None
    assert queue.add_and_pop_surplus("192.0.2.1", "second") == "second"
    assert queue.add_and_pop_surplus("192.0.2.2", "other") is None


def test_a_full_queue_makes_room_for_other_addresses() -> None:
    queue: AdmissionQueue[str] = AdmissionQueue(AdmissionLimits(max_waiting=2))
    queue.add_and_pop_surplus("192.0.2.1", "flood 0")
    queue.add_and_pop_surplus("192.0.2.1", "flood 1")

    assert queue.add_and_pop_surplus("192.0.2.2", "robot") == "flood 1"
    assert take_all(queue, 0.0) == ["flood 0", "robot"]


def test_addresses_of_the_past_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 100 addresses connects once, one per second.

    At the next connection, the bucket of an earlier address is full again, so it can be forgotten.
    """
    monkeypatch.setattr("spear.serve.admission.MAX_BUCKETS", 10)
    unlimited_burst = 10**6
    queue: AdmissionQueue[str] = AdmissionQueue(AdmissionLimits(burst=unlimited_burst))

    for now_s in range(100):
        queue.add_and_pop_surplus(f"address {now_s}", "robot")
        queue.take(float(now_s))

    assert len(queue._bucket_by_address) <= 10


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::"),
        ("2001:db8::1", "2001:db8::"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("fe80::1%eth0", "fe80::"),
    ],
)
def test_an_ipv6_address_shares_the_rates_of_its_network(address: str, network: str) -> None:
    assert get_rate_limit_key(address) == network


@contextmanager
def run_slow_to_admit(**limits: float) -> Iterator[PolicyServer]:
    """Run a server with these fields of `AdmissionLimits`."""
    admission = AdmissionLimits(**limits)
    with run_server(limits=ConnectionLimits(admission=admission)) as server:
        yield server


def connect_from(address: str, port: int) -> socket.socket:
    """Connect to a server on this machine from one of the machine's addresses; sends nothing."""
    return socket.create_connection(("127.0.0.1", port), 60, source_address=(address, 0))


def test_a_flood_from_one_address_does_not_delay_another() -> None:
    with run_slow_to_admit(per_s_and_address=0.1, burst_of_address=1) as server:
        flood = [connect_from("127.0.0.2", server.port) for _ in range(50)]
        start_s = time.monotonic()

        RemotePolicy(f"ws://127.0.0.1:{server.port}").close()

        # At one connection in 10 s, the flood takes 500 s.
        assert time.monotonic() - start_s < 5
        for connection in flood:
            connection.close()


def test_a_robot_that_is_connected_is_answered_during_a_flood() -> None:
    with run_slow_to_admit(per_s=0.1, burst=1) as server:
        with closing(RemotePolicy(f"ws://127.0.0.1:{server.port}")) as robot:
            flood = [connect_from("127.0.0.2", server.port) for _ in range(50)]

            result = robot.infer(GENERIC.example())

            assert len(result["actions"]) == 5
            for connection in flood:
                connection.close()


def test_connections_that_have_to_wait_are_answered_later() -> None:
    with run_slow_to_admit(per_s=10.0, burst=1) as server:
        start_s = time.monotonic()

        statuses = [http_get(server, "/healthz")[0] for _ in range(6)]

    # The first is let in at once, and each of the other five after 0.1 s more.
    assert statuses == [200] * 6
    assert time.monotonic() - start_s > 0.45


def test_clients_that_left_while_they_waited_cost_no_connection() -> None:
    with run_slow_to_admit(per_s=5.0, burst=1) as server:
        for _ in range(50):
            connect_from("127.0.0.2", server.port).close()
        start_s = time.monotonic()

        RemotePolicy(f"ws://127.0.0.1:{server.port}").close()

        # At 5 connections per second, 50 would take 10 s.
        assert time.monotonic() - start_s < 5


def wait_and_read(request: bytes, token: str | None = None) -> bytes:
    """What a server answers to a request whose connection had to wait.

    When the connection is let in, the request's bytes have arrived already, so the server may
    answer without a websocket connection.
    """
    admission = AdmissionLimits(per_s=5.0, burst=1)
    with run_server(limits=ConnectionLimits(admission=admission), token=token) as server:
        with connect_from("127.0.0.1", server.port), connect_from("127.0.0.1", server.port) as late:
            late.sendall(request)
            return late.makefile("rb").read()


def test_health_is_answered_after_waiting() -> None:
    response = wait_and_read(HEALTH_REQUEST)

    assert response.startswith(b"HTTP/1.1 200 OK\r\n")
    assert response.endswith(b"\r\n\r\nok\n")


def test_metrics_are_answered_after_waiting() -> None:
    request = HEALTH_REQUEST.replace(b"healthz", b"metrics")

    assert b'spear_requests_total{outcome="ok"} 0.0' in wait_and_read(request)


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (HEALTH_REQUEST.replace(b"Host: 127.0.0.1", b"Host: evil.example"), b" 403 "),
        (HEALTH_REQUEST.replace(b"Host: 127.0.0.1", b"Host: ["), b" 400 "),
        (HEALTH_REQUEST.replace(b"Host:", b"Origin: http://evil.example\r\nHost:"), b" 403 "),
    ],
)
def test_waiting_opens_health_to_no_other_page(request_bytes: bytes, status: bytes) -> None:
    assert status in wait_and_read(request_bytes).splitlines()[0]


def test_waiting_opens_the_metrics_to_nobody_without_the_token() -> None:
    request = HEALTH_REQUEST.replace(b"healthz", b"metrics")

    assert b" 401 " in wait_and_read(request, token="secret").splitlines()[0]


def test_a_client_that_has_gone_keeps_no_place_in_the_queue() -> None:
    policy = HomingPolicy(inference_s=0.3)
    with run_server(policy, max_queue_size=1, max_batch_size=1) as server:
        url = f"ws://127.0.0.1:{server.port}"
        visitors = [RemotePolicy(url) for _ in range(2)]
        with closing(RemotePolicy(url)) as robot:
            message = wire.encode(GENERIC.example())
            for visitor in visitors:  # one is being answered, the other waits
                visitor._connections[0].send(message)
                time.sleep(0.1)
            visitors[1]._connections[0].socket.shutdown(socket.SHUT_RDWR)

            connection = robot._connections[0]
            connection.send(message)

            assert isinstance(connection.recv(timeout=60), bytes)
        visitors[0].close()
