"""Hostile clients: what each limit stops, while an honest client beside them is answered."""

import signal
import socket
import tempfile
import time
import tracemalloc
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from benchmarks.serve.structures import MessageMaker, check_message, check_observation
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from refusals import refuses
from serve_here import LargeAnswerPolicy, http_get, run_server, run_server_process
from spear.embodiments import load
from spear.serve import wire
from spear.serve.access import get_reachable_host
from spear.serve.client import RemotePolicy
from spear.serve.connection import ConnectionLimits

GENERIC = load("generic")
NUM_ENTRIES = 2**20  # of the lists and maps that are sent
# The bytes below are an HTTP request that opens a websocket, and websocket frames: a byte with the
# frame's type, a length, a mask of four bytes, and the content.
UPGRADE_HEADERS = (
    b"Upgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)
UPGRADE_REQUEST = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + UPGRADE_HEADERS + b"\r\n"
PING_FRAME = b"\x89\xfdmask" + bytes(125)
EMPTY_CONTINUATION_FRAME = b"\x00\x81maskx"
FIRST_TEXT_FRAME = b"\x02\x81maskx"
UNFINISHED_LARGE_FRAME = b"\x82\xff" + (2**23).to_bytes(8, "big") + b"mask" + bytes(2**16)


def make_frame(message: bytes) -> bytes:
    """The bytes of a binary websocket frame, masked with zeros."""
    return b"\x82\xff" + len(message).to_bytes(8, "big") + bytes(4) + message


# Messages in msgpack that are short, but would take much memory or time to unpack. A list begins
# with dc or dd and its length, or is short (90 is empty, 91 has one element). A map begins with df
# and its length, or is short (80 is empty, 81 has one key, 8a ten). "\xa1a" is the text "a", and c0
# is None.
@pytest.mark.parametrize(
    "bomb",
    [
        b"\xdd" + NUM_ENTRIES.to_bytes(4, "big") + NUM_ENTRIES * b"\x90",
        b"\x81\xa1a\xdd" + NUM_ENTRIES.to_bytes(4, "big") + NUM_ENTRIES * b"\x80",
        b"\x81\xa1a" + 900 * b"\xdc\x03\xe8" + NUM_ENTRIES * b"\xc0",
        b"\x81\xa1a\xdc\x03\xe7" + 999 * (b"\xdc\x03\xe7" + 999 * b"\x90"),
        b"\xdf" + NUM_ENTRIES.to_bytes(4, "big") + NUM_ENTRIES * b"\xa1a\xc0",
        b"\x8a" + b"\xa1a\x91" * NUM_ENTRIES,
    ],
    ids=["lists", "maps", "deep lists", "lists of lists", "one large map", "nested maps"],
)
def test_a_bomb_is_refused_before_it_takes_memory(bomb: bytes) -> None:
    tracemalloc.start()
    try:
        refuses(r"^the message ", wire.decode, bomb)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak_bytes < 2**24  # 16 MiB


def test_messages_of_every_shape_are_refused_or_understood() -> None:
    maker = MessageMaker(np.random.default_rng(0))
    example = {}
    for key, value in GENERIC.example().items():
        example[key] = value[:16, :16] if np.ndim(value) == 3 else value

    outcomes = Counter(check_message(maker) for _ in range(3000))
    outcomes.update(check_observation(maker, GENERIC, example) for _ in range(500))

    assert outcomes.keys() == {"refused", "accepted"}
    assert min(outcomes.values()) > 300  # both are tested often


def connect_without_reading(port: int) -> socket.socket:
    """Open a websocket as a client that then reads nothing more."""
    client = socket.create_connection(("127.0.0.1", port), 60)
    client.sendall(UPGRADE_REQUEST)
    assert b" 101 " in client.recv(20)
    return client


# What the hostile client sends first, what it repeats until it is cut off, and the server's limits.
@pytest.mark.parametrize(
    ("attack", "repeated", "limits"),
    [
        pytest.param(500 * PING_FRAME, b"\0", ConnectionLimits(), id="pings"),
        pytest.param(
            FIRST_TEXT_FRAME + 500 * EMPTY_CONTINUATION_FRAME,
            b"\0",
            ConnectionLimits(),
            id="small pieces",
        ),
        pytest.param(
            UNFINISHED_LARGE_FRAME,
            b"\0",
            ConnectionLimits(max_unanswered_bytes=2**20),
            id="never whole",
        ),
        pytest.param(
            500 * PING_FRAME,
            PING_FRAME,
            ConnectionLimits(max_small_frames_per_s=10**9),
            id="never read",
        ),
    ],
)
def test_a_client_beyond_a_limit_is_cut_off_alone(
    attack: bytes, repeated: bytes, limits: ConnectionLimits
) -> None:
    with (
        run_server(limits=limits) as server,
        closing(RemotePolicy(f"ws://127.0.0.1:{server.port}")) as honest,
    ):
        hostile = connect_without_reading(server.port)
        with pytest.raises(ConnectionError):
            hostile.sendall(attack)
            while True:
                hostile.sendall(500 * repeated)

        assert np.isfinite(honest.infer(GENERIC.example())["actions"]).all()


def measure_memory_mib(pid: int) -> float:
    """The memory that is a process's own."""
    [anonymous] = [
        line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "RssAnon" in line
    ]
    return int(anonymous.split()[1]) / 1024


@pytest.mark.slow  # sends hundreds of megabytes
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory on Linux")
def test_memory_of_large_messages_is_given_back_while_clients_stay() -> None:
    message = wire.encode({"image": np.zeros((5, 2**20, 3), np.uint8)})
    with run_server_process("Policy = HomingPolicy") as (process, port, _):
        clients = [connect(f"ws://127.0.0.1:{port}", proxy=None, max_size=None) for _ in range(8)]
        for client in clients:
            client.recv()
            client.send(wire.encode({"image": np.zeros(1)}))
            client.recv()
        idle_mib = measure_memory_mib(process.pid)

        for client in clients:
            client.send(message)
        for client in clients:
            assert isinstance(client.recv(), str)  # it is no observation

        deadline = time.monotonic() + 20
        # The eight messages had 15 MiB each.
        while measure_memory_mib(process.pid) > idle_mib + 40:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        for client in clients:
            client.close()


def test_a_client_that_reads_slowly_gets_all_of_a_large_answer() -> None:
    num_bytes_left = 2**26  # the answers of `LargeAnswerPolicy` have 64 MiB of actions
    with (
        run_server(LargeAnswerPolicy(), limits=ConnectionLimits(send_timeout_s=0.1)) as server,
        connect_without_reading(server.port) as slow,
    ):
        slow.sendall(make_frame(wire.encode(GENERIC.example())))
        while num_bytes_left > 0:
            num_read = len(slow.recv(2**20))
            assert num_read, f"cut off, {num_bytes_left} bytes before the end"
            num_bytes_left -= num_read
            slow.sendall(PING_FRAME)
            time.sleep(0.02)


def test_connections_without_a_request_make_room_for_others() -> None:
    with run_server(limits=ConnectionLimits(max_opening=3)) as server:
        silent = [socket.create_connection(("127.0.0.1", server.port), 60) for _ in range(5)]

        # Of five connections three may stay open, so the server closes the two oldest ones.
        assert [connection.recv(1) for connection in silent[:2]] == [b"", b""]
        RemotePolicy(f"ws://127.0.0.1:{server.port}").close()

        for connection in silent:
            connection.close()


def test_sigterm_ends_the_server_whatever_clients_do() -> None:
    limits = "ConnectionLimits(drain_timeout_s=0.5, send_timeout_s=1e6)"
    frame = make_frame(wire.encode(GENERIC.example()))
    with (
        run_server_process("Policy = LargeAnswerPolicy", limits) as (process, port, _),
        connect_without_reading(port) as never_reads,
        socket.create_connection(("127.0.0.1", port)),  # sends no request
    ):
        never_reads.sendall(4 * frame)

        process.send_signal(signal.SIGTERM)

        assert process.wait(60) == 0


STATUS_BY_PATH = {"/healthz": 200, "/metrics": 200, "/": 404, "/anything": 404}


@pytest.mark.parametrize("path", STATUS_BY_PATH)
def test_web_pages_of_others_get_nothing(path: str) -> None:
    with run_server() as server:
        foreign_headers = [
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Origin": f"http://127.0.0.1:{server.port + 1}"},
            {"Host": f"evil.example:{server.port}"},
            {"Host": "evil.example", "Origin": "http://evil.example"},
        ]
        for headers in foreign_headers:
            assert http_get(server, path, **headers)[0] == 403


@pytest.mark.parametrize(("path", "status"), STATUS_BY_PATH.items())
def test_own_pages_and_local_names_are_answered(path: str, status: int) -> None:
    with run_server() as server:
        own_headers = [
            {"Origin": f"http://127.0.0.1:{server.port}"},
            {"Host": f"localhost:{server.port}"},
            {"Host": "[::1]"},
            {"Host": "gpu-box:8000"},
            {"Host": "host.docker.internal:8000"},
        ]
        for headers in own_headers:
            assert http_get(server, path, **headers)[0] == status


@pytest.mark.parametrize(
    "options",
    [
        {"origin": "http://evil.example"},
        {"additional_headers": {"Host": "evil.example"}},
    ],
)
def test_websockets_of_other_pages_are_refused(options: dict[str, str]) -> None:
    with run_server() as server:
        with pytest.raises(InvalidStatus, match=r"40[03]"):
            connect(f"ws://127.0.0.1:{server.port}/", proxy=None, **options)


def send_raw_request(port: int, request: bytes) -> int:
    """Send bytes to a server and return the status of its answer."""
    with socket.create_connection(("127.0.0.1", port), 60) as client:
        client.sendall(request)
        status_line = client.makefile("rb").readline()
    return int(status_line.split()[1])


@pytest.mark.parametrize(
    "headers",
    [
        b"Host: [",
        b"Host: [::1",
        b"Host: 127.0.0.1:port",
        b"Host: 127.0.0.1:99999",
        b"Host: 127.0.0.1\r\nHost: 127.0.0.1",
        b"Host: 127.0.0.1\r\nOrigin: http://[",
        b"Host: 127.0.0.1\r\nOrigin: http://127.0.0.1:port",
        b"Host: 127.0.0.1\r\nOrigin: http://127.0.0.1\r\nOrigin: http://127.0.0.1",
    ],
)
@pytest.mark.parametrize("more_headers", [b"", UPGRADE_HEADERS], ids=["page", "websocket"])
def test_headers_that_are_no_address_are_a_bad_request(headers: bytes, more_headers: bytes) -> None:
    request = b"GET / HTTP/1.1\r\n" + headers + b"\r\n" + more_headers + b"\r\n"

    with run_server() as server:
        assert send_raw_request(server.port, request) == 400


def test_a_path_that_is_no_address_is_a_bad_request() -> None:
    with run_server() as server:
        request = b"GET //[ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"

        assert send_raw_request(server.port, request) == 400


@pytest.mark.parametrize("header", [b"Host: \xff\xfe.example", b"Host: 127.0.0.1\r\nOrigin: \xff"])
def test_headers_beyond_ascii_are_forbidden_or_bad(header: bytes) -> None:
    request = b"GET / HTTP/1.1\r\n" + header + b"\r\n\r\n"

    with run_server() as server:
        assert send_raw_request(server.port, request) in (400, 403)


# Code of a server's process that may open 70 files, connections included.
FEW_FILES_CODE = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (70, 70))
Policy = HomingPolicy
"""


@pytest.mark.slow
def test_a_server_without_free_file_handles_logs_it_once_and_answers_open_connections() -> None:
    with (
        tempfile.TemporaryFile() as stderr,
        run_server_process(FEW_FILES_CODE, stderr=stderr) as (_, port, _),
    ):
        url = f"ws://127.0.0.1:{port}"
        with closing(RemotePolicy(url)) as connected_before:
            connected_before.infer(GENERIC.example())
            idle = [socket.create_connection(("127.0.0.1", port), 60) for _ in range(100)]
            time.sleep(2.5)  # the server tries again after each second

            assert np.isfinite(connected_before.infer(GENERIC.example())["actions"]).all()

        for connection in idle:
            connection.close()
        RemotePolicy(url).close()
        stderr.seek(0)
        lines = stderr.read().decode().splitlines()

    # Python itself may warn about the encodings of files that other packages open.
    lines_of_server = [line for line in lines if "Too many open files" in line]
    assert len(lines_of_server) == 1
    assert "Traceback" not in "\n".join(lines)


def test_a_single_address_is_the_one_that_others_use() -> None:
    assert get_reachable_host("::1") == "[::1]"
    assert get_reachable_host("10.0.0.5") == "10.0.0.5"


def test_a_server_on_all_addresses_names_one_that_answers() -> None:
    host = get_reachable_host("0.0.0.0")

    assert host not in ("", "0.0.0.0")
    with run_server(host="0.0.0.0") as server:
        RemotePolicy(f"ws://{host}:{server.port}").close()


def test_a_server_on_all_ipv6_addresses_names_an_ipv6_address() -> None:
    assert get_reachable_host("::").startswith("[")
