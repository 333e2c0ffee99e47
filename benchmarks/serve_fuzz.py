"""Malformed frames and observations against a running server: always an error that names the key, never a crash.

Frames: random bytes, truncated, with bytes changed, deeply nested, with lying lengths. Observations: keys missing,
unknown or of a wrong type, shape, size or value. After every hundred, a good observation must be answered as at the
start. The server is a process of its own, whose memory is watched (Linux).

    python benchmarks/serve_fuzz.py [FRAMES] [CHECKPOINT] [--quick]

--quick sends 300 frames only.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import numpy as np
import tyro
from tyro.conf import Positional
from websockets.sync.client import connect

from serve_process import server
from spear import embodiments
from spear.serve import wire

ROBOT = embodiments.load("generic")
WRONG: list[Any] = [
    None, True, -1, 2**63, 0.5, float("nan"), "", "x", "x" * 5000, b"", b"\0" * 99, [], [[1], [2, 3]], {},
    {"a": {"b": []}}, np.zeros(0, np.float32), np.zeros((0, 0, 3), np.uint8), np.zeros((5, 3, 3), np.uint8),
    np.zeros((300, 20, 3), np.uint8), np.zeros((112, 112), np.uint8), np.zeros((112, 112, 4), np.uint8),
    np.zeros((112, 112, 3), np.float32), np.zeros((3, 112, 112), np.uint8), np.full(8, np.nan), np.full(8, np.inf),
    np.full(8, 1e30), np.zeros(7), np.zeros(8), np.zeros(8, np.int64), np.zeros((1, 8)), np.zeros((1,) * 8),
    np.bool_(True), np.float16(0), np.uint8(3),
]  # fmt: skip


def example() -> dict[str, Any]:
    """A good observation whose answer is fixed."""
    return {**ROBOT.example(), "seed": 1}


def frame(rng: np.random.Generator) -> tuple[str, bytes | str, str | None]:
    """A malformed message: its kind, itself, and what the error must name (None: anything goes)."""
    kind = ("bytes", "cut", "changed", "nested", "length", "text", "missing", "unknown", "value", "array")[
        rng.integers(10)
    ]
    small = {**example(), "observation/image": np.zeros((16, 16, 3), np.uint8)}
    small["observation/wrist_image"] = small["observation/image"]
    keys = list(ROBOT.required)
    key = str(rng.choice([*keys, *ROBOT.optional]))
    if kind == "bytes":
        return kind, rng.bytes(int(rng.integers(0, 300))), None
    if kind == "text":
        return kind, "x" * int(rng.integers(0, 300)), "message"
    if kind == "nested":
        return kind, b"\x81\xa1a" * int(rng.integers(1, 3000)) + b"\xc0", None
    if kind == "length":
        return (
            kind,
            bytes([int(rng.choice([0xC6, 0xC9, 0xDB, 0xDD, 0xDF]))]) + rng.bytes(4 + int(rng.integers(9))),
            None,
        )
    if kind == "missing":
        key = str(rng.choice(keys))
        return kind, wire.encode({k: v for k, v in small.items() if k != key}), key
    if kind == "unknown":
        return kind, wire.encode({**small, f"key {rng.integers(1 << 30)}": 1}), "key "
    if kind == "value":
        value = WRONG[rng.integers(len(WRONG))]
        if key == "seed":
            value = rng.choice(["x", "-"]) if rng.random() < 0.5 else np.zeros(3)
        elif key == "prompt":
            value = ["", 5, None, "x" * 2000, np.zeros(3)][rng.integers(5)]
        return kind, wire.encode({**small, key: value}), key
    data = bytearray(wire.encode(small))
    if kind == "cut":
        return kind, bytes(data[: rng.integers(len(data))]), None
    if kind == "array":
        array: dict[bytes, Any] = {
            b"__ndarray__": True,
            b"data": b"\0" * int(rng.integers(64)),
            b"dtype": "<f8",
            b"shape": [8],
        }
        part = (b"data", b"dtype", b"shape")[rng.integers(3)]
        array[part] = [None, "|O", -1, [2**62, 4], [-1], "<f9", b"", [[]]][rng.integers(8)]
        return kind, wire.encode({**small, "observation/state": array}), "observation/state"
    for _ in range(int(rng.integers(1, 6))):
        data[rng.integers(len(data))] = rng.integers(256)
    return kind, bytes(data), None


def main(
    frames: Positional[int] = 100_000, checkpoint: Positional[str] = "nano", quick: bool = False
) -> None:
    """Sends so many frames; ends with an error at the first that is not answered as it must be."""
    frames = min(frames, 300) if quick else frames
    rng = np.random.default_rng(0)
    counts: Counter[str] = Counter()
    started, first = time.perf_counter(), 0.0
    with server(checkpoint) as served, connect(served.url, compression=None, proxy=None) as connection:
        connection.recv()
        connection.send(wire.encode(example()))
        right = wire.decode(connection.recv())["actions"]
        for index in range(frames):
            kind, message, named = frame(rng)
            connection.send(message)
            reply = connection.recv()
            if isinstance(reply, bytes):
                if kind != "changed":  # which may be another pixel or word
                    raise SystemExit(f"frame {index} ({kind}) was taken for an observation")
                counts["changed, harmless"] += 1
            elif "\n" in reply or len(reply) > 500 or (named and named not in reply):
                raise SystemExit(f"frame {index} ({kind}): the error does not name {named!r}: {reply!r}")
            else:
                counts[kind] += 1
            if index % 100 == 99 or index == frames - 1:
                connection.send(wire.encode(example()))
                if not np.allclose(wire.decode(connection.recv())["actions"], right, atol=1e-6):
                    raise SystemExit(f"after frame {index} a good observation is answered otherwise")
            if index == min(frames // 10, 2000):
                first = served.memory()
        last = served.memory()
    for kind, count in sorted(counts.items()):
        print(f"{kind:18} {count}")
    print(
        f"{frames} malformed frames in {time.perf_counter() - started:.0f} s, each answered; good ones in between too"
    )
    print(f"server memory: {first:.0f} MiB after the first tenth (at most 2000), {last:.0f} MiB at the end")


if __name__ == "__main__":
    tyro.cli(main)
