"""Clients that mean harm: what each limit stops, while an honest client beside it is answered."""

import signal
import socket
import time
import tracemalloc
from collections import Counter
from contextlib import closing

import numpy as np
import pytest
from benchmarks.serve.structures import Maker, check_message, check_observation
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from refusals import refuses
from serve_here import Loud, get, process, serving
from spear.embodiments import load
from spear.serve import server, wire
from spear.serve.client import RemotePolicy

GENERIC = load("generic")
MANY = 2**20
HELLO = (
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
PING = b"\x89\xfdmask" + bytes(125)


@pytest.mark.parametrize(
    "bomb",
    [
        b"\xdd" + MANY.to_bytes(4, "big") + MANY * b"\x90",
        b"\x81\xa1a\xdd" + MANY.to_bytes(4, "big") + MANY * b"\x80",
        b"\x81\xa1a" + 900 * b"\xdc\x03\xe8" + MANY * b"\xc0",
        b"\x81\xa1a\xdc\x03\xe7" + 999 * (b"\xdc\x03\xe7" + 999 * b"\x90"),
        b"\xdf" + MANY.to_bytes(4, "big") + MANY * b"\xa1a\xc0",
        b"\x8a" + b"\xa1a\x91" * MANY,
    ],
)
def test_bombs_are_refused_before_they_are_anything(bomb: bytes) -> None:
    tracemalloc.start()
    try:
        refuses(r"^message: ", wire.decode, bomb)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_messages_of_every_shape_are_refused_or_understood() -> None:
    maker = Maker(np.random.default_rng(0))
    counts = Counter(check_message(maker) for _ in range(3000))
    good = {k: v[:16, :16] if np.ndim(v) == 3 else v for k, v in GENERIC.example().items()}
    counts.update(check_observation(maker, GENERIC, good) for _ in range(500))
    assert counts.keys() == {"refused", "accepted"} and min(counts.values()) > 300


def deaf(port: int) -> socket.socket:
    """A client that is welcome and reads nothing more."""
    made = socket.create_connection(("127.0.0.1", port), 60)
    made.sendall(HELLO)
    assert b" 101 " in made.recv(20)
    return made


@pytest.mark.parametrize(
    ("attack", "limits"),
    [
        (500 * PING, {}),
        (b"\x02\x81maskx" + 500 * b"\x00\x81maskx", {}),
        (b"\x82\xff" + (2**23).to_bytes(8, "big") + b"mask" + bytes(2**16), {"HELD": 2**20}),
        (500 * PING, {"MOST_SMALL": 10**9}),
    ],
    ids=["pings", "pieces", "never whole", "never read"],
)
def test_a_client_beyond_a_limit_is_cut_off_alone(
    attack: bytes, limits: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(server, name, value)
    with serving() as running, closing(RemotePolicy(f"ws://127.0.0.1:{running.port}")) as honest:
        other = deaf(running.port)
        with pytest.raises(ConnectionError):
            other.sendall(attack)
            while True:
                other.sendall(500 * (PING if "MOST_SMALL" in limits else b"\0"))
        assert np.isfinite(honest.infer(GENERIC.example())["actions"]).all()


def test_a_client_that_reads_slowly_gets_all_of_a_large_answer() -> None:
    with serving(Loud(), bounds={"SEND_S": 0.1}) as running, deaf(running.port) as slow:
        message, left = wire.encode(GENERIC.example()), 2**26
        slow.sendall(b"\x82\xff" + len(message).to_bytes(8, "big") + bytes(4) + message)
        while left > 0:
            read = len(slow.recv(2**20))
            assert read, f"cut off, {left} bytes before the end"
            left -= read
            slow.sendall(PING)
            time.sleep(0.02)


def test_those_who_never_say_what_they_want_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "OPENING", 3)
    with serving() as running:
        silent = [socket.create_connection(("127.0.0.1", running.port), 60) for _ in range(5)]
        assert [s.recv(1) for s in silent[:2]] == [b"", b""]
        RemotePolicy(f"ws://127.0.0.1:{running.port}").close()
        for s in silent:
            s.close()


def test_sigterm_ends_the_server_whatever_clients_do() -> None:
    wedged = "Policy, server.DRAIN_S, server.SEND_S = Loud, 0.5, 1e6"
    with process(wedged) as (server, port, _), deaf(port) as loud:
        stuck = socket.create_connection(("127.0.0.1", port))  # has not said what it wants
        message = wire.encode(GENERIC.example())
        loud.sendall(4 * (b"\x82\xff" + len(message).to_bytes(8, "big") + bytes(4) + message))
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        stuck.close()


@pytest.mark.parametrize("path", ["/healthz", "/metrics", "/", "/anything"])
def test_pages_of_others_get_nothing(path: str) -> None:
    with serving() as running:
        port = running.port
        found = 404 if path in ("/", "/anything") else 200
        both = {"Host": "evil.example", "Origin": "http://evil.example"}
        origins = ("http://evil.example", "null", f"http://127.0.0.1:{port + 1}")
        for wrong in (*({"Origin": o} for o in origins), {"Host": f"evil.example:{port}"}, both):
            assert get(running, path, **wrong)[0] == 403
        hosts = (f"localhost:{port}", "[::1]", "gpu-box:8000", "host.docker.internal:8000")
        for right in ({"Origin": f"http://127.0.0.1:{port}"}, *({"Host": host} for host in hosts)):
            assert get(running, path, **right)[0] == found
        for headers in (
            {"origin": "http://evil.example"},
            {"additional_headers": {"Host": "evil.example"}},
        ):
            with pytest.raises(InvalidStatus, match=r"40[03]"):
                connect(f"ws://127.0.0.1:{port}{path}", proxy=None, **headers)


def test_an_address_for_others_is_one_that_answers() -> None:
    assert server.reachable("::1") == "[::1]" and server.reachable("10.0.0.5") == "10.0.0.5"
    address = server.reachable("0.0.0.0")
    assert address not in ("", "0.0.0.0")
    assert server.reachable("::").startswith("[")  # who listens there answers on IPv6 alone
    with serving(host="0.0.0.0") as running:
        RemotePolicy(f"ws://{address}:{running.port}").close()
