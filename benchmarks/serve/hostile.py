"""The server under attack: eight honest clients beside each kind of hostile ones, on this machine.

    python benchmarks/serve/hostile.py [SECONDS] [POLICY] [--only ATTACK …] [--table FILE] [--quick]

Honest clients ask for their next chunk as soon as they have one, from 127.0.0.1. Attackers come
from 127.0.0.2 and on, and in one row from 127.0.0.1 too. They run in a process of their own, at the
lowest priority, because those of a real server bring their own processors; the row "CPU burner"
shows what such a process costs that sends nothing. Goals: the honest clients' p99 stays within 3
times its undisturbed value (the slower of two measurements, before and after), each of their
requests is answered, memory stays within 1 GiB above that of the idle server and returns to 100 MiB
above it, and SIGTERM during an attack ends the server within the drain time plus 2 s. --quick tries
the script; its numbers say little.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgpack
import numpy as np
import tyro
from PIL import Image
from tyro.conf import Positional
from websockets.asyncio.client import ClientConnection, connect

from process import ServerProcess, run_server
from spear import embodiments
from spear.cli import run_reporting_errors
from spear.serve import wire
from spear.serve.connection import ConnectionLimits

LIMITS = ConnectionLimits()
NUM_HONEST_CLIENTS = 8
MAX_SLOWDOWN = 3.0  # of the honest clients' p99
MAX_MEMORY_DURING_MIB = 1024  # above the idle server
MAX_MEMORY_AFTER_MIB = 100  # above the idle server
MEMORY_INTERVAL_S = 0.1
MAX_STOP_S = LIMITS.drain_timeout_s + 2
MAX_ATTACK_S = 600
ATTACK_START_S = 3.0
RECOVERY_S = 3.0
HONEST_ADDRESS = "127.0.0.1"
ATTACKER_ADDRESSES = tuple(f"127.0.0.{number}" for number in range(2, 10))
NUM_FLOODING_CLIENTS = 32
NUM_SMALL_BINARIES = 990
SMALL_BINARY_BYTES = 15 * 2**20 // NUM_SMALL_BINARIES
MIB = 2**20
TOKEN = "a-secret"
AUTHORIZATION = f"Api-Key {TOKEN}"
BOMB_BYTES = LIMITS.max_message_bytes - 2**16
CONNECT_OPTIONS: dict[str, Any] = {
    "compression": None,
    "max_size": None,
    "proxy": None,
    "ping_interval": None,
}
UPGRADE_REQUEST = (
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)
TEXT_FRAME = b"\x81\x81maskx"
BINARY_FRAME = b"\x82\x81maskx"
PING_FRAME = b"\x89\x80mask"

Job = Callable[[ClientConnection], Awaitable[None]]


class Target:
    """The server under attack, and the addresses from which attackers come in turn."""

    def __init__(self, url: str, addresses: Iterable[str] = ATTACKER_ADDRESSES) -> None:
        self.url = url
        host, port = url.removeprefix("ws://").split(":")
        self._host = host
        self._port = int(port)
        self._addresses = itertools.cycle(addresses)

    def connect(self, path: str = "", token: str = TOKEN) -> connect:
        """Open a websocket, for `async with`."""
        return connect(
            self.url + path,
            additional_headers={"Authorization": f"Api-Key {token}"},
            local_addr=(next(self._addresses), 0),
            **CONNECT_OPTIONS,
        )

    async def open_connection(
        self, limit: int = 2**16
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection for any bytes."""
        local_address = (next(self._addresses), 0)
        return await asyncio.open_connection(
            self._host, self._port, limit=limit, local_addr=local_address
        )


Attack = Callable[[Target], Awaitable[None]]


def encode_observation(**changes: Any) -> bytes:
    """Encode a legal observation."""
    return wire.encode({**embodiments.load("generic").example(), **changes})


def make_frame_head(num_bytes: int) -> bytes:
    """Make the head of a binary frame of this size, masked with zeros."""
    return b"\x82\xff" + num_bytes.to_bytes(8, "big") + bytes(4)


async def run_together(coroutines: Iterable[Awaitable[None]]) -> None:
    await asyncio.gather(*coroutines)


async def repeat_job(target: Target, job: Job, path: str = "") -> None:
    """Do a job over and over on a connection with the token; connect again when cut off."""
    while True:
        with contextlib.suppress(Exception):
            async with target.connect(path) as connection:
                await connection.recv()
                while True:
                    await job(connection)
                    await asyncio.sleep(0)
        await asyncio.sleep(0.01)


async def repeat_message(target: Target, message: bytes) -> None:
    """Send a message and wait for the reply, over and over."""

    async def send_and_receive(connection: ClientConnection) -> None:
        await connection.send(message)
        await connection.recv()

    await repeat_job(target, send_and_receive)


async def send_without_reading(target: Target, first: bytes, repeated: bytes) -> None:
    """Send bytes as they are, then others over and over, and never read."""
    request = UPGRADE_REQUEST + f"Authorization: {AUTHORIZATION}\r\n\r\n".encode()
    while True:
        with contextlib.suppress(OSError):
            _, writer = await target.open_connection(limit=1)
            cast(asyncio.Transport, writer.transport).pause_reading()
            writer.write(request + first)
            while not writer.transport.is_closing():
                writer.write(repeated)
                await writer.drain()
                await asyncio.sleep(0 if repeated else 1)
        await asyncio.sleep(0.01)


async def floods(target: Target) -> None:
    """Texts, nonsense and pings without end, from clients that never read."""
    frames = [TEXT_FRAME, BINARY_FRAME, PING_FRAME] * 4
    await run_together(
        [send_without_reading(target, first=b"", repeated=1000 * frame) for frame in frames]
    )


async def bombs(target: Target) -> None:
    """Legal msgpack of 16 MiB that is millions of lists and maps."""
    count = BOMB_BYTES.to_bytes(4, "big")
    messages = [
        b"\xdd" + count + BOMB_BYTES * b"\x90",
        b"\x81\xa1a\xdd" + count + BOMB_BYTES * b"\x80",
        b"\x81\xa1a" + 1000 * b"\xdc\x03\xe8" + BOMB_BYTES * b"\xc0",
        b"\x91" * BOMB_BYTES,
    ]
    await run_together([repeat_message(target, message) for message in messages])


async def slow_handshakes(target: Target) -> None:
    """Four hundred connections that send a letter of their request per second."""

    async def send_letters() -> None:
        while True:
            with contextlib.suppress(OSError):
                _, writer = await target.open_connection()
                for letter in UPGRADE_REQUEST:
                    writer.write(bytes([letter]))
                    await writer.drain()
                    await asyncio.sleep(1)
            await asyncio.sleep(0.5)

    await run_together([send_letters() for _ in range(400)])


async def silent_readers(target: Target) -> None:
    """Good observations without end, from clients that never read an answer."""
    message = encode_observation()
    frame = make_frame_head(len(message)) + message
    await run_together([send_without_reading(target, first=b"", repeated=frame) for _ in range(2)])


async def huge_images(target: Target) -> None:
    """Images of 10,000 x 10,000 pixels: promised, sent whole, and as a PNG to the page."""
    empty_array = {
        b"__ndarray__": True,
        b"data": b"",
        b"dtype": "|u1",
        b"shape": [10_000, 10_000, 3],
    }
    observation = {**embodiments.load("generic").example(), "observation/image": empty_array}
    promised = msgpack.packb(observation, default=wire._pack)
    png = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(png, "PNG")

    async def send_to_page(connection: ClientConnection) -> None:
        await connection.send(png.getvalue())
        while "problem" not in json.loads(await connection.recv()):
            pass

    await run_together(
        [
            repeat_message(target, promised),
            repeat_message(target, promised),
            repeat_job(target, send_to_page, "/ui"),
            send_without_reading(target, first=make_frame_head(300_000_000), repeated=bytes(MIB)),
        ]
    )


async def wrong_tokens(target: Target) -> None:
    """Guesses, sixteen at a time."""

    async def guess_tokens(index: int) -> None:
        for guess in range(1_000_000):
            with contextlib.suppress(Exception):
                async with target.connect(token=f"{index} {guess}"):
                    raise SystemExit("a wrong token was let in")

    await run_together([guess_tokens(index) for index in range(16)])


async def large_messages(target: Target) -> None:
    """The largest legal observation, 16 MB of image, over and over."""
    message = encode_observation(**{"observation/image": np.zeros((1300, 4096, 3), np.uint8)})
    await run_together([repeat_message(target, message) for _ in range(2)])


async def half_messages(target: Target) -> None:
    """Sixty-four clients that send 15 of 16 MiB and stop."""
    unfinished = make_frame_head(BOMB_BYTES) + bytes(15 * MIB)
    await run_together(
        [send_without_reading(target, first=unfinished, repeated=b"") for _ in range(64)]
    )


async def flood_with_requests(target: Target, request: bytes) -> None:
    """Plain requests without end, each on a connection of its own, as fast as they are answered."""

    async def send_requests() -> None:
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await target.open_connection()
                writer.write(request)
                await reader.read()
                writer.close()
            await asyncio.sleep(0)

    await run_together([send_requests() for _ in range(NUM_FLOODING_CLIENTS)])


async def health_flood(target: Target) -> None:
    """GET /healthz without a token."""
    await flood_with_requests(target, b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")


async def metrics_flood(target: Target) -> None:
    """GET /metrics with the token."""
    request = f"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: {AUTHORIZATION}\r\n\r\n"
    await flood_with_requests(target, request.encode())


async def repeat_visit(target: Target, job: Job) -> None:
    """Connect with the token, do a job and leave, over and over."""
    while True:
        with contextlib.suppress(Exception):
            async with target.connect() as connection:
                await job(connection)
        await asyncio.sleep(0)


async def hello_flood(target: Target) -> None:
    """Websockets that greet and leave."""

    async def greet(connection: ClientConnection) -> None:
        await connection.recv()

    await run_together([repeat_visit(target, greet) for _ in range(NUM_FLOODING_CLIENTS)])


async def visitors(target: Target) -> None:
    """Websockets that send an observation and leave before the answer."""
    message = encode_observation()

    async def send_and_leave(connection: ClientConnection) -> None:
        await connection.send(message)
        connection.transport.abort()

    await run_together([repeat_visit(target, send_and_leave) for _ in range(NUM_FLOODING_CLIENTS)])


async def neighbors(target: Target) -> None:
    """Websockets that greet and leave, from the honest clients' own address."""
    await hello_flood(Target(target.url, [HONEST_ADDRESS]))


async def send_small_binaries(target: Target, num_clients: int) -> None:
    """Legal messages of 15 MiB that are 990 small binaries."""
    binaries = [bytes(SMALL_BINARY_BYTES) for _ in range(NUM_SMALL_BINARIES)]
    message = msgpack.packb({"a": binaries})
    await run_together([repeat_message(target, message) for _ in range(num_clients)])


async def small_binaries_of_3(target: Target) -> None:
    """Three clients that send small binaries."""
    await send_small_binaries(target, 3)


async def small_binaries_of_12(target: Target) -> None:
    """Twelve clients that send small binaries."""
    await send_small_binaries(target, 12)


async def small_binaries_of_24(target: Target) -> None:
    """Twenty-four clients that send small binaries."""
    await send_small_binaries(target, 24)


async def burn_cpu(target: Target) -> None:
    """No attack: keep one core busy, as the attackers' process does."""
    while True:
        sum(range(10_000))


ATTACKS: dict[str, Attack] = {
    "CPU burner": burn_cpu,
    "health flood": health_flood,
    "metrics flood": metrics_flood,
    "hello flood": hello_flood,
    "visitors": visitors,
    "neighbors": neighbors,
    "small binaries, 3": small_binaries_of_3,
    "small binaries, 12": small_binaries_of_12,
    "small binaries, 24": small_binaries_of_24,
    "floods": floods,
    "bombs": bombs,
    "slow handshakes": slow_handshakes,
    "silent readers": silent_readers,
    "huge images": huge_images,
    "wrong tokens": wrong_tokens,
    "large messages": large_messages,
    "half messages": half_messages,
}


async def run_attack(name: str, url: str) -> None:
    """Attack until this process is killed, but not forever."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(ATTACKS[name](Target(url)), MAX_ATTACK_S)


@contextlib.contextmanager
def attack_in_background(name: str | None, url: str) -> Iterator[None]:
    """Attack from a process of its own; None for no attack."""
    if name is None:
        yield
        return
    command = ["nice", "-n", "19", sys.executable, __file__, "--attack", f"{name}|{url}"]
    process = subprocess.Popen(command)
    time.sleep(ATTACK_START_S)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def run_honest_clients(url: str, seconds: float) -> dict[str, Any]:
    """Return what the honest clients measure."""
    script = Path(__file__).with_name("client.py")
    command = [sys.executable, str(script), url, str(NUM_HONEST_CLIENTS), str(seconds)]
    environment = {**os.environ, "TOKEN": TOKEN}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        error_lines = done.stderr.splitlines() or ["no error message"]
        raise SystemExit(f"an honest client: {error_lines[-1]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


class Measurement(NamedTuple):
    """What the honest clients measured under one attack, and the server's memory."""

    attack: str
    p99_ms: float
    num_answered: int
    memory_during_mib: float
    memory_after_mib: float


@contextlib.contextmanager
def watch_memory(server: ServerProcess) -> Iterator[list[float]]:
    """Measure the server's memory (MiB) again and again; the list grows meanwhile."""
    memory_mib = [server.measure_memory_mib()]
    is_over = threading.Event()

    def measure() -> None:
        while not is_over.wait(MEMORY_INTERVAL_S):
            memory_mib.append(server.measure_memory_mib())

    thread = threading.Thread(target=measure)
    thread.start()
    try:
        yield memory_mib
    finally:
        is_over.set()
        thread.join()


def measure_attack(
    server: ServerProcess, name: str | None, seconds: float, undisturbed_p99_ms: float | None
) -> Measurement:
    """Measure one attack, or the undisturbed server (`name` None), and print a row of the table."""
    with watch_memory(server) as memory_mib, attack_in_background(name, server.url):
        result = run_honest_clients(server.url, seconds)
    time.sleep(RECOVERY_S)
    measured = Measurement(
        name or "none",
        result["p99"],
        result["requests"],
        max(memory_mib),
        server.measure_memory_mib(),
    )

    slowdown = "" if undisturbed_p99_ms is None else f"{result['p99'] / undisturbed_p99_ms:.2f}"
    print(
        f"| {measured.attack} | {result['p50']:.0f} | {result['p99']:.0f} | {slowdown} | "
        f"{result['requests']} | {measured.memory_during_mib:.0f} | "
        f"{measured.memory_after_mib:.0f} |",
        flush=True,
    )
    return measured


def write_csv(path: Path, rows: Sequence[Measurement], undisturbed_p99_ms: float) -> None:
    """Write the measurements as a table."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "attack",
                "p99 (ms)",
                "p99 / undisturbed",
                "answered",
                "memory during (MiB)",
                "memory after (MiB)",
            ]
        )
        for row in rows:
            description = (ATTACKS[row.attack].__doc__ or "") if row.attack in ATTACKS else "None."
            writer.writerow(
                [
                    description.rstrip("."),
                    f"{row.p99_ms:.0f}",
                    f"{row.p99_ms / undisturbed_p99_ms:.2f}",
                    row.num_answered,
                    f"{row.memory_during_mib:.0f}",
                    f"{row.memory_after_mib:.0f}",
                ]
            )


def stop_under_attack(server: ServerProcess, attack: str) -> float:
    """Send SIGTERM during an attack; returns the seconds until the server has ended."""
    with attack_in_background(attack, server.url):
        started = time.monotonic()
        os.kill(server.pid, signal.SIGTERM)
        status_file = Path(f"/proc/{server.pid}/status")
        with contextlib.suppress(FileNotFoundError):
            # An ended process is a zombie (Z) until its parent asks for the exit code.
            while "\nState:\tZ" not in status_file.read_text():
                time.sleep(0.05)
        return time.monotonic() - started


def main(
    seconds: Positional[float] = 15.0,
    policy: Positional[str] = "nano",
    only: tuple[str, ...] = tuple(ATTACKS),
    table: Path | None = None,
    quick: bool = False,
    attack: str | None = None,
) -> None:
    """Measure each attack, and exit with an error if a goal is missed. attack: for internal use."""
    if attack:
        name, _, url = attack.partition("|")
        asyncio.run(run_attack(name, url))
        return
    if quick:
        seconds = min(seconds, 1.0)

    print("| attack | p50 (ms) | p99 (ms) | × undisturbed | answered | MiB during | MiB after |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with run_server(policy, "--ui", "--token", TOKEN) as server:
        load_before = measure_attack(server, None, seconds, undisturbed_p99_ms=None)
        attacked = [measure_attack(server, name, seconds, load_before.p99_ms) for name in only]
        load_after = measure_attack(server, None, seconds, load_before.p99_ms)
        stop_s = stop_under_attack(server, only[0])

    undisturbed_p99_ms = max(load_before.p99_ms, load_after.p99_ms)
    if table:
        write_csv(table, [load_before, *attacked, load_after], undisturbed_p99_ms)
    slowdown = max(measured.p99_ms for measured in attacked) / undisturbed_p99_ms
    idle_mib = load_before.memory_after_mib
    during_mib = max(measured.memory_during_mib for measured in attacked) - idle_mib
    after_mib = max(measured.memory_after_mib for measured in attacked) - idle_mib
    print(
        f"\nworst p99: {slowdown:.2f} × undisturbed (goal <= {MAX_SLOWDOWN:g}); "
        "no honest request was lost"
    )
    print(
        f"memory: at most {during_mib:+.0f} MiB during an attack (goal <= {MAX_MEMORY_DURING_MIB}) "
        f"and {after_mib:+.0f} MiB after it (goal <= {MAX_MEMORY_AFTER_MIB})"
    )
    print(f"ended {stop_s:.1f} s after SIGTERM under {only[0]} (goal <= {MAX_STOP_S:g})")
    is_memory_missed = during_mib > MAX_MEMORY_DURING_MIB or after_mib > MAX_MEMORY_AFTER_MIB
    is_missed = slowdown > MAX_SLOWDOWN or is_memory_missed or stop_s > MAX_STOP_S
    if is_missed and not quick:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
