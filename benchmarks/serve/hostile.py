"""The server under attack: eight honest clients beside each kind of hostile ones, on this machine.

    python benchmarks/serve/hostile.py [SECONDS] [POLICY] [--only ATTACK …] [--quick]

Honest clients ask for their next chunk as soon as they have one. Attackers run in a process of
their own, at the lowest priority, because those of a real server bring their own processors. Goals:
the honest clients' p99 stays within 3 times its undisturbed value (the slower of two measurements,
before and after), each of their requests is answered, memory after all attacks is within 10 % of
that after the first half of them, and SIGTERM during an attack ends the server within the drain
time plus 2 s. --quick tries the script; its numbers say little.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
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
MAX_MEMORY_GROWTH = 0.10
MAX_STOP_S = LIMITS.drain_timeout_s + 2
MAX_ATTACK_S = 600
ATTACK_START_S = 3.0
RECOVERY_S = 2.0
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
Attack = Callable[[str], Awaitable[None]]


def encode_observation(**changes: Any) -> bytes:
    """Encode a legal observation."""
    return wire.encode({**embodiments.load("generic").example(), **changes})


def make_frame_head(num_bytes: int) -> bytes:
    """Make the head of a binary frame of this size, masked with zeros."""
    return b"\x82\xff" + num_bytes.to_bytes(8, "big") + bytes(4)


async def run_together(coroutines: Iterable[Awaitable[None]]) -> None:
    await asyncio.gather(*coroutines)


async def repeat_job(url: str, job: Job, path: str = "") -> None:
    """Do a job over and over on a connection with the token; connect again when cut off."""
    while True:
        with contextlib.suppress(Exception):
            async with connect(
                url + path,
                additional_headers={"Authorization": AUTHORIZATION},
                **CONNECT_OPTIONS,
            ) as connection:
                await connection.recv()
                while True:
                    await job(connection)
                    await asyncio.sleep(0)
        await asyncio.sleep(0.01)


async def repeat_message(url: str, message: bytes) -> None:
    """Send a message and wait for the reply, over and over."""

    async def send_and_receive(connection: ClientConnection) -> None:
        await connection.send(message)
        await connection.recv()

    await repeat_job(url, send_and_receive)


async def send_without_reading(url: str, first: bytes, repeated: bytes) -> None:
    """Send bytes as they are, then others over and over, and never read."""
    host, port = url.removeprefix("ws://").split(":")
    request = UPGRADE_REQUEST + f"Authorization: {AUTHORIZATION}\r\n\r\n".encode()
    while True:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(host, int(port), limit=1)
            cast(asyncio.Transport, writer.transport).pause_reading()
            writer.write(request + first)
            while not writer.transport.is_closing():
                writer.write(repeated)
                await writer.drain()
                await asyncio.sleep(0 if repeated else 1)
        await asyncio.sleep(0.01)


async def floods(url: str) -> None:
    """Texts, nonsense and pings without end, from clients that never read."""
    frames = [TEXT_FRAME, BINARY_FRAME, PING_FRAME] * 4
    await run_together([send_without_reading(url, b"", 1000 * frame) for frame in frames])


async def bombs(url: str) -> None:
    """Legal msgpack of 16 MiB that is millions of lists and maps."""
    count = BOMB_BYTES.to_bytes(4, "big")
    messages = [
        b"\xdd" + count + BOMB_BYTES * b"\x90",
        b"\x81\xa1a\xdd" + count + BOMB_BYTES * b"\x80",
        b"\x81\xa1a" + 1000 * b"\xdc\x03\xe8" + BOMB_BYTES * b"\xc0",
        b"\x91" * BOMB_BYTES,
    ]
    await run_together([repeat_message(url, message) for message in messages])


async def slow_handshakes(url: str) -> None:
    """Four hundred connections that send a letter of their request per second."""
    host, port = url.removeprefix("ws://").split(":")

    async def send_letters() -> None:
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(host, int(port))
                for letter in UPGRADE_REQUEST:
                    writer.write(bytes([letter]))
                    await writer.drain()
                    await asyncio.sleep(1)
            await asyncio.sleep(0.5)

    await run_together([send_letters() for _ in range(400)])


async def silent_readers(url: str) -> None:
    """Good observations without end, from clients that never read an answer."""
    message = encode_observation()
    frame = make_frame_head(len(message)) + message
    await run_together([send_without_reading(url, b"", frame) for _ in range(2)])


async def huge_images(url: str) -> None:
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
            repeat_message(url, promised),
            repeat_message(url, promised),
            repeat_job(url, send_to_page, "/ui"),
            send_without_reading(url, make_frame_head(300_000_000), bytes(MIB)),
        ]
    )


async def wrong_tokens(url: str) -> None:
    """Guesses, sixteen at a time."""

    async def guess_tokens(index: int) -> None:
        for guess in range(1_000_000):
            with contextlib.suppress(Exception):
                headers = {"Authorization": f"Api-Key {index} {guess}"}
                async with connect(url, additional_headers=headers, **CONNECT_OPTIONS):
                    raise SystemExit("a wrong token was let in")

    await run_together([guess_tokens(index) for index in range(16)])


async def large_messages(url: str) -> None:
    """The largest legal observation, 16 MB of image, over and over."""
    message = encode_observation(**{"observation/image": np.zeros((1300, 4096, 3), np.uint8)})
    await run_together([repeat_message(url, message) for _ in range(2)])


async def half_messages(url: str) -> None:
    """Sixty-four clients that send 15 of 16 MiB and stop."""
    unfinished = make_frame_head(BOMB_BYTES) + bytes(15 * MIB)
    await run_together([send_without_reading(url, unfinished, b"") for _ in range(64)])


ATTACKS: dict[str, Attack] = {
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
        await asyncio.wait_for(ATTACKS[name](url), MAX_ATTACK_S)


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
    """Of the honest clients under one attack, and of the server after it."""

    p99_ms: float
    memory_mib: float


def measure_attack(
    server: ServerProcess, name: str | None, seconds: float, undisturbed_p99_ms: float | None
) -> Measurement:
    """Measure one attack, and print it as a row of the table."""
    with attack_in_background(name, server.url):
        result = run_honest_clients(server.url, seconds)
        memory_during_mib = server.measure_memory_mib()
    time.sleep(RECOVERY_S)
    memory_after_mib = server.measure_memory_mib()

    slowdown = "" if undisturbed_p99_ms is None else f"{result['p99'] / undisturbed_p99_ms:.2f}"
    print(
        f"| {name or 'none'} | {result['p50']:.0f} | {result['p99']:.0f} | {slowdown} | "
        f"{result['requests']} | {memory_during_mib:.0f} | {memory_after_mib:.0f} |",
        flush=True,
    )
    return Measurement(result["p99"], memory_after_mib)


def stop_under_attack(server: ServerProcess, attack: str) -> float:
    """Send SIGTERM during an attack; returns the seconds until the server has ended."""
    with attack_in_background(attack, server.url):
        started = time.monotonic()
        os.kill(server.pid, 15)
        status_file = Path(f"/proc/{server.pid}/status")
        with contextlib.suppress(FileNotFoundError):
            while "\nState:\tZ" not in status_file.read_text():
                time.sleep(0.05)
        return time.monotonic() - started


def main(
    seconds: Positional[float] = 15.0,
    policy: Positional[str] = "nano",
    only: tuple[str, ...] = tuple(ATTACKS),
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
        load_before = measure_attack(server, None, seconds, None)
        attacked = [measure_attack(server, name, seconds, load_before.p99_ms) for name in only]
        load_after = measure_attack(server, None, seconds, load_before.p99_ms)
        stop_s = stop_under_attack(server, only[0])

    undisturbed_p99_ms = max(load_before.p99_ms, load_after.p99_ms)
    slowdown = max(measured.p99_ms for measured in attacked) / undisturbed_p99_ms
    memory_mib = [measured.memory_mib for measured in attacked]
    first_half_mib = memory_mib[: len(memory_mib) // 2 + 1]
    growth = memory_mib[-1] / max(first_half_mib) - 1
    print(
        f"\nworst p99: {slowdown:.2f} × undisturbed (goal <= {MAX_SLOWDOWN:g}); "
        "no honest request was lost"
    )
    print(f"memory: {growth:+.1%} in the second half (goal <= {MAX_MEMORY_GROWTH:.0%})")
    print(f"ended {stop_s:.1f} s after SIGTERM under {only[0]} (goal <= {MAX_STOP_S:g})")
    is_missed = slowdown > MAX_SLOWDOWN or growth > MAX_MEMORY_GROWTH or stop_s > MAX_STOP_S
    if is_missed and not quick:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
