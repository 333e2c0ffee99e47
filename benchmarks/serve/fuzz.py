"""Malformed frames and observations against a running server: always an error that names the key, never a
crash.

Frames: random bytes, texts, cut, with bytes changed, deeply nested, with lying lengths or arrays.
Observations: keys missing, unknown or of a wrong type, shape, size or value. Several clients send at once, so
that bad and good ones meet in a batch. After every hundred of a client, and after a message beyond the size
limit, which ends its connection, a good observation must be answered, where it has a seed as at the start.
The server is a process of its own, whose memory and open files are watched (Linux).

Before that, structurally generated messages (structures.py) against the decoder, and as values of an
otherwise good observation against the robot's checks, in this process: what is legal must be understood as it
was meant, everything else refused in one line.

    python benchmarks/serve/fuzz.py [FRAMES] [POLICY] [--structures N] [--embodiment NAME] [--seed N]

--quick: 320 frames and 1,000 structures only.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np
import tyro
from tyro.conf import Positional
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from process import Server, server
from spear import embodiments
from spear.cli import run_reporting_errors
from spear.embodiments import Embodiment
from spear.errors import SpearError
from spear.serve import wire
from spear.serve.connection import ConnectionLimits
from spear.types import Array
from structures import Maker, check_message, check_observation

CLIENTS = 64
GOOD_EVERY = 100
HUGE_EVERY = 2000
KINDS = (
    "bytes",
    "cut",
    "changed",
    "nested",
    "length",
    "text",
    "missing",
    "unknown",
    "value",
    "array",
)
PATIENT: dict[str, Any] = {
    "compression": None,
    "max_size": None,
    "proxy": None,
    "open_timeout": 120,
}
GROWTH_MIB = 25.0
"""How much a server's memory may grow after the first tenth: less than 300 bytes per frame at 100,000 (our
choice)."""
WRONG: list[Any] = [
    None, True, -1, 2**63, 0.5, float("nan"), "", "x", "x" * 5000, "x " * 450, b"", b"\0" * 99, [],
    [[1], [2, 3]], {}, {"a": {"b": []}}, np.zeros(0, np.float32), np.zeros((0, 0, 3), np.uint8),
    np.zeros((5, 3, 3), np.uint8), np.zeros((300, 20, 3), np.uint8), np.zeros((112, 112), np.uint8),
    np.zeros((112, 112, 4), np.uint8), np.zeros((112, 112, 3), np.float32),
    np.zeros((3, 112, 112), np.uint8), np.full(8, np.nan), np.full(8, np.inf), np.full(7, np.nan),
    np.full(8, 1e30), np.full(7, 1e30), np.zeros(7), np.zeros(8), np.zeros(8, np.int64), np.zeros((1, 8)),
    np.zeros((1,) * 8), np.bool_(True), np.float16(0), np.uint8(3), np.zeros((4200, 600, 3), np.uint8),
]  # fmt: skip


def keys(message: bytes) -> list[str]:
    """The keys of a message that is still a map, as an error shows them."""
    try:
        return [
            str(key)[:80] if str(key).isprintable() else repr(key)[:80]
            for key in msgpack.unpackb(message)
        ]
    except (ValueError, TypeError):
        return []


@dataclass
class Fuzz:
    """What is sent, and what was found.

    good   a good observation, packed. right: the answer to it, where the robot knows a seed, which fixes it.
    """

    robot: Embodiment
    right: Array | None = None
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        seeded = {"seed": 1} if "seed" in self.robot.optional else {}
        self._good = {**self.robot.example(), **seeded}
        self.good = wire.encode(self._good)

    def small(self) -> dict[str, Any]:
        """A good observation with small images."""
        return {
            key: value[:16, :16] if np.ndim(value) == 3 else value
            for key, value in self._good.items()
        }

    def frame(self, rng: np.random.Generator) -> tuple[str, bytes | str, tuple[str, ...]]:
        """A message: its kind, itself, and words of which an error must have one."""
        kind = KINDS[rng.integers(len(KINDS))]
        small = self.small()
        key = str(rng.choice([*self.robot.required, *self.robot.optional]))
        anything = ("message", *self.robot.required, *self.robot.optional, "observation key")
        if kind == "bytes":
            return kind, rng.bytes(int(rng.integers(0, 300))), anything
        if kind == "text":
            return kind, "x" * int(rng.integers(0, 300)), ("message",)
        if kind == "nested":
            return (
                kind,
                b"\x81\xa1a" * int(rng.integers(1, 3000)) + b"\xc0",
                ("message", "a: ", "'a'"),
            )
        if kind == "length":
            head = bytes([int(rng.choice([0xC6, 0xC9, 0xDB, 0xDD, 0xDF]))])
            return kind, head + rng.bytes(4 + int(rng.integers(9))), anything
        if kind == "missing":
            key = str(rng.choice(list(self.robot.required)))
            return kind, wire.encode({k: v for k, v in small.items() if k != key}), (key,)
        if kind == "unknown":
            unknown = f"key {rng.integers(1 << 30)}"
            return kind, wire.encode({**small, unknown: 1}), (unknown,)
        if kind == "value":
            return kind, wire.encode({**small, key: WRONG[rng.integers(len(WRONG))]}), (key,)
        if kind == "array":
            key = next(k for k, v in small.items() if np.ndim(v) == 1)
            part = ("data", "dtype", "shape")[rng.integers(3)].encode()
            lie: Any = [None, "|O", -1, [2**62, 4], [-1], "<f9", b"", [[]]][rng.integers(8)]
            array = {
                b"__ndarray__": True,
                b"data": b"\0" * int(rng.integers(64)),
                b"dtype": "<f8",
                b"shape": [8],
            }
            return kind, wire.encode({**small, key: {**array, part: lie}}), (key,)
        data = bytearray(wire.encode(small))
        if kind == "cut":
            return kind, bytes(data[: rng.integers(len(data))]), anything
        places = np.flatnonzero(np.frombuffer(data, np.uint8))
        for _ in range(int(rng.integers(1, 6))):
            data[rng.choice(places)] = rng.integers(256)
        return kind, bytes(data), (*anything, *keys(bytes(data)))

    def check(
        self, kind: str, message: bytes | str, words: tuple[str, ...], reply: bytes | str
    ) -> None:
        """Counts what came back; ends with an error where it is not what must come back."""
        if isinstance(reply, bytes):
            if kind not in ("changed", "value") or not self._understood(message):
                raise SystemExit(f"{kind}: taken for an observation: {message[:200]!r}")
            self.counts[f"{kind}, harmless"] += 1
        elif "\n" in reply or len(reply) > 500 or not any(word in reply for word in words):
            raise SystemExit(f"{kind}: the error names none of {words}: {reply!r}")
        elif "the server failed" in reply:
            raise SystemExit(f"{kind}: {reply!r}")
        else:
            self.counts[kind] += 1

    def check_good(self, reply: bytes | str) -> None:
        """The answer to the good observation."""
        if isinstance(reply, str):
            raise SystemExit(f"a good observation is answered with {reply!r}")
        actions = wire.decode(reply)["actions"]
        if not np.isfinite(actions).all():
            raise SystemExit("a good observation is answered with actions that are not finite")
        if self.right is not None and not np.allclose(actions, self.right, atol=1e-5):
            raise SystemExit("a good observation is answered otherwise than at the start")
        self.counts["good ones between"] += 1

    def _understood(self, message: bytes | str) -> bool:
        """Whether a message is a good observation after all: another pixel, word or number."""
        try:
            assert isinstance(message, bytes)
            self.robot.read(wire.decode(message))
        except SpearError:
            return False
        return True


async def ask(connection: ClientConnection, message: bytes | str) -> bytes | str:
    """One message and its answer."""
    await connection.send(message)
    return await connection.recv()


async def client(url: str, fuzz: Fuzz, seed: int, index: int, frames: int) -> None:
    """Sends so many frames, with good observations between."""
    rng, sent = np.random.default_rng([seed, index]), 0
    while sent < frames:
        async with connect(url, **PATIENT) as connection:
            await connection.recv()
            fuzz.check_good(await ask(connection, fuzz.good))
            while sent < frames:
                kind, message, words = fuzz.frame(rng)
                fuzz.check(kind, message, words, await ask(connection, message))
                sent += 1
                if sent % GOOD_EVERY == 0:
                    fuzz.check_good(await ask(connection, fuzz.good))
                if sent % HUGE_EVERY == 0:
                    await huge(connection)
                    fuzz.counts["huge"] += 1
                    break


async def huge(connection: ClientConnection) -> None:
    """The head of a frame that says it is larger than the limit: it must end the connection."""
    connection.transport.write(
        b"\x82\xff" + (ConnectionLimits().max_message_bytes + 1).to_bytes(8, "big") + b"mask"
    )
    try:
        raise SystemExit(f"a huge message is answered with {await connection.recv()!r}")
    except ConnectionClosed as closed:
        if closed.rcvd is None or closed.rcvd.code != 1009:
            raise SystemExit(f"a huge message ends with {closed}, not with code 1009") from closed


async def watch(served: Server, fuzz: Fuzz, frames: int, sizes: list[float]) -> None:
    """Notes the server's memory after every tenth."""
    started = time.perf_counter()
    while True:
        await asyncio.sleep(0.2)
        done = sum(count for kind, count in fuzz.counts.items() if kind.split(",")[0] in KINDS)
        if 10 * done >= frames * (len(sizes) + 1):
            sizes.append(served.memory())
            print(
                f"{done:7} frames, {time.perf_counter() - started:5.0f} s, {sizes[-1]:.0f} MiB",
                flush=True,
            )


async def run(served: Server, fuzz: Fuzz, seed: int, frames: int) -> list[float]:
    """All clients; the server's memory after every tenth, MiB."""
    async with connect(served.url, **PATIENT) as connection:
        await connection.recv()
        reply = await ask(connection, fuzz.good)
        assert isinstance(reply, bytes), reply
        fuzz.right = wire.decode(reply)["actions"] if "seed" in fuzz.robot.optional else None
    sizes: list[float] = []
    watching = asyncio.create_task(watch(served, fuzz, frames, sizes))
    async with asyncio.TaskGroup() as group:
        for index in range(CLIENTS):
            group.create_task(client(served.url, fuzz, seed, index, frames // CLIENTS))
    watching.cancel()
    return [*sizes, served.memory()]


def structured(fuzz: Fuzz, count: int, seed: int) -> None:
    """So many generated messages against the decoder, and a third as many values against the robot."""
    maker, found, started = Maker(np.random.default_rng(seed)), Counter[str](), time.perf_counter()
    for index in range(count):
        found["messages " + check_message(maker)] += 1
        if index % 3 == 0:
            found["observations " + check_observation(maker, fuzz.robot, fuzz.small())] += 1
    numbers = ", ".join(f"{number} {what}" for what, number in sorted(found.items()))
    print(f"{numbers} in {time.perf_counter() - started:.0f} s, each as it was meant", flush=True)


def main(
    frames: Positional[int] = 100_000,
    policy: Positional[str] = "nano",
    structures: int = 200_000,
    embodiment: str = "generic",
    seed: int = 0,
    quick: bool = False,
) -> None:
    """Sends so many frames; ends with an error at the first that is not answered as it must be."""
    frames = 320 if quick else CLIENTS * -(-frames // CLIENTS)
    fuzz = Fuzz(embodiments.load(embodiment))
    structured(fuzz, 1000 if quick else structures, seed)
    started = time.perf_counter()
    with server(policy, "--embodiment", embodiment) as served:
        files = served.files()
        sizes = asyncio.run(run(served, fuzz, seed, frames))
        time.sleep(1)  # the last connections are closed by then
        left = served.files()
    for kind, count in sorted(fuzz.counts.items()):
        print(f"{kind:20} {count}")
    print(
        f"{frames} malformed frames in {time.perf_counter() - started:.0f} s, each answered as it must be"
    )
    print(
        f"server memory: {sizes[0]:.0f} MiB after the first tenth, {sizes[-1]:.0f} MiB at the end; ",
        end="",
    )
    print(f"open files: {files} at the start, {left} at the end")
    if not quick and (sizes[-1] - sizes[0] > GROWTH_MIB or left > files + 3):
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
