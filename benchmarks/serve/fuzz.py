"""Malformed frames and observations against a running server: always an error that names the key,
no crash.

Frames: random bytes, texts, cut off, with bytes changed, deeply nested, with lying lengths or
    arrays.
Observations: keys missing, unknown or with a value of a wrong type, shape, size or content. Several
clients send at once, so that bad and good ones meet in a batch. After every hundred frames of a
client, and after a message beyond the size limit, which ends its connection, a good observation
must be answered; if it has a seed, with the same actions as at the start. The server is a process
of its own, whose memory and open files are watched (Linux).

Before that, structurally generated messages (structures.py) go to the decoder, and as values of an
otherwise good observation to the robot's checks, in this process: what is legal must be understood
as it was meant, everything else refused in one line.

    python benchmarks/serve/fuzz.py [FRAMES] [POLICY] [--structures N] [--embodiment NAME] [--seed
    N]

--quick: 320 frames and 1,000 structures only.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgpack
import numpy as np
import tyro
from tyro.conf import Positional
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from process import ServerProcess, run_server
from spear import embodiments
from spear.cli import run_reporting_errors
from spear.embodiments import Embodiment
from spear.errors import SpearError
from spear.serve import wire
from spear.serve.connection import ConnectionLimits
from spear.types import Array
from structures import MessageMaker, check_message, check_observation

NUM_CLIENTS = 64
FRAMES_PER_GOOD_OBSERVATION = 100
FRAMES_PER_HUGE_MESSAGE = 2000
MAX_ERROR_CHARS = 500
MAX_GROWTH_MIB = 25.0
"""Of the server's memory after the first tenth: less than 300 bytes per frame at 100,000 frames."""
MAX_NEW_FILES = 3  # that a server may open for itself while it runs
MESSAGE_TOO_BIG = 1009
CONNECT_OPTIONS: dict[str, Any] = {
    "compression": None,
    "max_size": None,
    "proxy": None,
    "open_timeout": 120,
}
WRONG_VALUES: list[Any] = [
    None, True, -1, 2**63, 0.5, float("nan"), "", "x", "x" * 5000, "x " * 450, b"", b"\0" * 99, [],
    [[1], [2, 3]], {}, {"a": {"b": []}}, np.zeros(0, np.float32), np.zeros((0, 0, 3), np.uint8),
    np.zeros((5, 3, 3), np.uint8), np.zeros((300, 20, 3), np.uint8),
    np.zeros((112, 112), np.uint8), np.zeros((112, 112, 4), np.uint8),
    np.zeros((112, 112, 3), np.float32), np.zeros((3, 112, 112), np.uint8), np.full(8, np.nan),
    np.full(8, np.inf), np.full(7, np.nan), np.full(8, 1e30), np.full(7, 1e30), np.zeros(7),
    np.zeros(8), np.zeros(8, np.int64), np.zeros((1, 8)), np.zeros((1,) * 8), np.bool_(True),
    np.float16(0), np.uint8(3), np.zeros((4200, 600, 3), np.uint8),
]  # fmt: skip
WRONG_ARRAY_PARTS: list[Any] = [None, "|O", -1, [2**62, 4], [-1], "<f9", b"", [[]]]
HEADS_WITH_LENGTH = [0xC6, 0xC9, 0xDB, 0xDD, 0xDF]


class Frame(NamedTuple):
    """A malformed message, and the words of which an error must contain one."""

    kind: str
    message: bytes | str
    error_words: tuple[str, ...]


def list_keys(message: bytes) -> list[str]:
    """List the keys of a message that is still a map, as an error shows them."""
    try:
        keys = [str(key) for key in msgpack.unpackb(message)]
    except (ValueError, TypeError):
        return []
    return [key[:80] if key.isprintable() else repr(key)[:80] for key in keys]


@dataclass
class Fuzz:
    """What is sent, and what came back.

    Attributes:
        robot: the embodiment that is served.
        expected_actions: the answer to the good observation, if a seed fixes it.
        counts: replies by the kind of their frame.
    """

    robot: Embodiment
    expected_actions: Array | None = None
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.has_seed = "seed" in self.robot.optional
        seed = {"seed": 1} if self.has_seed else {}
        observation = {**self.robot.example(), **seed}
        self.good_message = wire.encode(observation)
        self.small_observation: dict[str, Any] = {}
        for key, value in observation.items():
            is_image = np.ndim(value) == 3
            self.small_observation[key] = value[:16, :16] if is_image else value
        self._keys = [*self.robot.required, *self.robot.optional]
        self._any_error_words = ("message", *self._keys, "observation key")
        self._makers: dict[str, Callable[[np.random.Generator], Frame]] = {
            "bytes": self._make_random_bytes,
            "cut": self._make_cut_message,
            "changed": self._make_changed_message,
            "nested": self._make_nested_maps,
            "length": self._make_wrong_length,
            "text": self._make_text,
            "missing": self._make_missing_key,
            "unknown": self._make_unknown_key,
            "value": self._make_wrong_value,
            "array": self._make_wrong_array,
        }
        self.kinds = tuple(self._makers)

    def make_frame(self, rng: np.random.Generator) -> Frame:
        """Make a frame of any kind."""
        kind = self.kinds[rng.integers(len(self.kinds))]
        return self._makers[kind](rng)

    def _make_random_bytes(self, rng: np.random.Generator) -> Frame:
        return Frame("bytes", rng.bytes(int(rng.integers(0, 300))), self._any_error_words)

    def _make_text(self, rng: np.random.Generator) -> Frame:
        return Frame("text", "x" * int(rng.integers(0, 300)), ("message",))

    def _make_nested_maps(self, rng: np.random.Generator) -> Frame:
        message = b"\x81\xa1a" * int(rng.integers(1, 3000)) + b"\xc0"
        return Frame("nested", message, ("message", "a has ", "'a'"))

    def _make_wrong_length(self, rng: np.random.Generator) -> Frame:
        head = bytes([int(rng.choice(HEADS_WITH_LENGTH))])
        return Frame("length", head + rng.bytes(4 + int(rng.integers(9))), self._any_error_words)

    def _make_missing_key(self, rng: np.random.Generator) -> Frame:
        missing_key = str(rng.choice(list(self.robot.required)))
        observation = dict(self.small_observation)
        del observation[missing_key]
        return Frame("missing", wire.encode(observation), (missing_key,))

    def _make_unknown_key(self, rng: np.random.Generator) -> Frame:
        key = f"key {rng.integers(1 << 30)}"
        return Frame("unknown", wire.encode({**self.small_observation, key: 1}), (key,))

    def _make_wrong_value(self, rng: np.random.Generator) -> Frame:
        key = str(rng.choice(self._keys))
        value = WRONG_VALUES[rng.integers(len(WRONG_VALUES))]
        return Frame("value", wire.encode({**self.small_observation, key: value}), (key,))

    def _make_wrong_array(self, rng: np.random.Generator) -> Frame:
        keys = [key for key, value in self.small_observation.items() if np.ndim(value) == 1]
        key = keys[0]
        wrong_part = ("data", "dtype", "shape")[rng.integers(3)].encode()
        array: dict[bytes, Any] = {
            b"__ndarray__": True,
            b"data": b"\0" * int(rng.integers(64)),
            b"dtype": "<f8",
            b"shape": [8],
        }
        array[wrong_part] = WRONG_ARRAY_PARTS[rng.integers(len(WRONG_ARRAY_PARTS))]
        return Frame("array", wire.encode({**self.small_observation, key: array}), (key,))

    def _make_cut_message(self, rng: np.random.Generator) -> Frame:
        message = wire.encode(self.small_observation)
        return Frame("cut", message[: rng.integers(len(message))], self._any_error_words)

    def _make_changed_message(self, rng: np.random.Generator) -> Frame:
        message = bytearray(wire.encode(self.small_observation))
        nonzero_offsets = np.flatnonzero(np.frombuffer(message, np.uint8))
        for _ in range(int(rng.integers(1, 6))):
            message[rng.choice(nonzero_offsets)] = rng.integers(256)
        changed = bytes(message)
        return Frame("changed", changed, (*self._any_error_words, *list_keys(changed)))

    def check_reply(self, frame: Frame, reply: bytes | str) -> None:
        """Count what came back, and exit with an error if it is not what must come back."""
        if isinstance(reply, bytes):
            may_be_harmless = frame.kind in ("changed", "value")
            if not may_be_harmless or not self._is_good(frame.message):
                raise SystemExit(f"{frame.kind}: taken for an observation: {frame.message[:200]!r}")
            self.counts[f"{frame.kind}, harmless"] += 1
            return
        names_the_key = any(word in reply for word in frame.error_words)
        if "\n" in reply or len(reply) > MAX_ERROR_CHARS or not names_the_key:
            raise SystemExit(
                f"{frame.kind}: the error names none of {frame.error_words}: {reply!r}"
            )
        if "the server failed" in reply:
            raise SystemExit(f"{frame.kind}: {reply!r}")
        self.counts[frame.kind] += 1

    def check_good_reply(self, reply: bytes | str) -> None:
        """Check the answer to the good observation."""
        if isinstance(reply, str):
            raise SystemExit(f"a good observation is answered with {reply!r}")
        actions = wire.decode(reply)["actions"]
        if not np.isfinite(actions).all():
            raise SystemExit("a good observation is answered with actions that are not finite")
        expected = self.expected_actions
        if expected is not None and not np.allclose(actions, expected, atol=1e-5):
            raise SystemExit("a good observation is not answered with the actions of the start")
        self.counts["good ones between"] += 1

    def _is_good(self, message: bytes | str) -> bool:
        """Return whether a message is still a good one: with another pixel, word or number."""
        try:
            assert isinstance(message, bytes)
            self.robot.read(wire.decode(message))
        except SpearError:
            return False
        return True


async def ask(connection: ClientConnection, message: bytes | str) -> bytes | str:
    """Send one message and return its reply."""
    await connection.send(message)
    return await connection.recv()


async def run_client(url: str, fuzz: Fuzz, seed: int, index: int, num_frames: int) -> None:
    """Send so many frames, with good observations in between."""
    rng = np.random.default_rng([seed, index])
    num_sent = 0
    while num_sent < num_frames:
        async with connect(url, **CONNECT_OPTIONS) as connection:
            await connection.recv()
            fuzz.check_good_reply(await ask(connection, fuzz.good_message))
            while num_sent < num_frames:
                frame = fuzz.make_frame(rng)
                fuzz.check_reply(frame, await ask(connection, frame.message))
                num_sent += 1
                if num_sent % FRAMES_PER_GOOD_OBSERVATION == 0:
                    fuzz.check_good_reply(await ask(connection, fuzz.good_message))
                if num_sent % FRAMES_PER_HUGE_MESSAGE == 0:
                    await send_huge_message(connection)
                    fuzz.counts["huge"] += 1
                    break  # connect again


async def send_huge_message(connection: ClientConnection) -> None:
    """Send the head of a frame beyond the size limit, which must end the connection."""
    num_bytes = ConnectionLimits().max_message_bytes + 1
    connection.transport.write(b"\x82\xff" + num_bytes.to_bytes(8, "big") + b"mask")
    try:
        reply = await connection.recv()
    except ConnectionClosed as closed:
        if closed.rcvd is None or closed.rcvd.code != MESSAGE_TOO_BIG:
            raise SystemExit(
                f"a huge message ends with {closed}, not with code {MESSAGE_TOO_BIG}"
            ) from closed
        return
    raise SystemExit(f"a huge message is answered with {reply!r}")


async def watch_memory(
    server: ServerProcess, fuzz: Fuzz, num_frames: int, memory_mib: list[float]
) -> None:
    """Append the server's memory to `memory_mib` after every tenth of the frames."""
    started = time.perf_counter()
    while True:
        await asyncio.sleep(0.2)
        num_done = 0
        for kind, count in fuzz.counts.items():
            if kind.split(",")[0] in fuzz.kinds:
                num_done += count
        if 10 * num_done >= num_frames * (len(memory_mib) + 1):
            memory_mib.append(server.measure_memory_mib())
            elapsed_s = time.perf_counter() - started
            print(f"{num_done:7} frames, {elapsed_s:5.0f} s, {memory_mib[-1]:.0f} MiB", flush=True)


async def run_clients(server: ServerProcess, fuzz: Fuzz, seed: int, num_frames: int) -> list[float]:
    """Run all clients; returns the server's memory (MiB) after every tenth, and at the end."""
    async with connect(server.url, **CONNECT_OPTIONS) as connection:
        await connection.recv()
        reply = await ask(connection, fuzz.good_message)
        assert isinstance(reply, bytes), reply
        if fuzz.has_seed:
            fuzz.expected_actions = wire.decode(reply)["actions"]

    memory_mib: list[float] = []
    watching = asyncio.create_task(watch_memory(server, fuzz, num_frames, memory_mib))
    async with asyncio.TaskGroup() as clients:
        for index in range(NUM_CLIENTS):
            clients.create_task(
                run_client(server.url, fuzz, seed, index, num_frames // NUM_CLIENTS)
            )
    watching.cancel()
    return [*memory_mib, server.measure_memory_mib()]


def check_structures(fuzz: Fuzz, count: int, seed: int) -> None:
    """Send generated messages to the decoder, and a third as many values to the robot."""
    maker = MessageMaker(np.random.default_rng(seed))
    counts: Counter[str] = Counter()
    started = time.perf_counter()
    for index in range(count):
        counts[f"messages {check_message(maker)}"] += 1
        if index % 3 == 0:
            outcome = check_observation(maker, fuzz.robot, fuzz.small_observation)
            counts[f"observations {outcome}"] += 1
    summary = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()))
    elapsed_s = time.perf_counter() - started
    print(f"{summary} in {elapsed_s:.0f} s, each as it was meant", flush=True)


def main(
    frames: Positional[int] = 100_000,
    policy: Positional[str] = "nano",
    structures: int = 200_000,
    embodiment: str = "generic",
    seed: int = 0,
    quick: bool = False,
) -> None:
    """Send so many frames; exit with an error at the first that is not answered as it must be."""
    # Every client sends as many frames as the others.
    num_frames = 320 if quick else NUM_CLIENTS * math.ceil(frames / NUM_CLIENTS)
    fuzz = Fuzz(embodiments.load(embodiment))
    check_structures(fuzz, 1000 if quick else structures, seed)

    started = time.perf_counter()
    with run_server(policy, "--embodiment", embodiment) as server:
        num_files_before = server.count_open_files()
        memory_mib = asyncio.run(run_clients(server, fuzz, seed, num_frames))
        time.sleep(1)  # the last connections are closed by then
        num_files_after = server.count_open_files()

    for kind, count in sorted(fuzz.counts.items()):
        print(f"{kind:20} {count}")
    elapsed_s = time.perf_counter() - started
    print(f"{num_frames} malformed frames in {elapsed_s:.0f} s, each answered as it must be")
    print(
        f"server memory: {memory_mib[0]:.0f} MiB after the first tenth, {memory_mib[-1]:.0f} MiB "
        f"at the end; open files: {num_files_before} at the start, {num_files_after} at the end"
    )
    has_grown = memory_mib[-1] - memory_mib[0] > MAX_GROWTH_MIB
    has_open_files = num_files_after > num_files_before + MAX_NEW_FILES
    if not quick and (has_grown or has_open_files):
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
