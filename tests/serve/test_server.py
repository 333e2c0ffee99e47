"""The server over real sockets: what clients get, what broken ones cannot do, busy, drained, counted."""

import asyncio
import dataclasses
import math
import re
import signal
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, ConnectionClosedOK
from websockets.sync.client import ClientConnection, connect
from websockets.sync.server import ServerConnection, serve

from refusals import no_warning, refuses
from serve_here import Homing, get, homing, process, serving
from spear.chunks import Pilot
from spear.embodiments import Control, load
from spear.errors import Notice, SpearError
from spear.serve import wire
from spear.serve.client import RemotePolicy
from spear.serve.options import ServeOptions
from spear.serve.server import PolicyServer
from spear.serve.service import Batcher, Service

GENERIC = load("generic")


def url(server: PolicyServer) -> str:
    return f"ws://127.0.0.1:{server.port}"


def seen(x: float = 0.4, **changes: Any) -> dict[str, Any]:
    """The example with the arm at x, which `Homing`'s answer shows."""
    observation = GENERIC.example()
    observation["observation/state"][0] = x
    return {**observation, **changes}


def test_metadata_then_actions_with_timings_and_counts() -> None:
    with (
        serving() as server,
        serving(),
        closing(RemotePolicy(url(server))) as policy,
    ):  # each counts its own
        assert get(server, "/healthz")[2] == "ok\n"
        assert policy.metadata["embodiment"] == "generic" and policy.metadata["rate_hz"] == 5.0
        assert set(policy.metadata["observation"]) == set(GENERIC.required)
        first, second = policy.infer(seen()), policy.infer(seen())
        np.testing.assert_array_equal(first["actions"], homing(seen()["observation/state"]))
        assert first["server_timing"]["infer_ms"] >= first["policy_timing"]["infer_ms"] >= 0
        assert second["server_timing"]["prev_total_ms"] >= first["server_timing"]["infer_ms"]
        refuses("prompt", policy.infer, seen(prompt=""))
        lines = [
            line for line in get(server, "/metrics")[2].splitlines() if not line.startswith("#")
        ]
        counts = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
        assert counts['spear_requests_total{outcome="ok"}'] == 2
        assert counts['spear_requests_total{outcome="refused"}'] == 1
        assert (
            counts["spear_request_seconds_count"]
            == counts['spear_batch_size_bucket{le="1.0"}']
            == 3
        )
        assert (
            counts["spear_inference_seconds_count"] == 3 and counts["spear_gpu_memory_bytes"] >= 0
        )
        assert (counts["spear_clients"], counts["spear_queue"]) == (1, 0)


@pytest.mark.parametrize(
    "greeting", ["hello", b"\xff", *map(wire.encode, ({"image_sizes": [1]}, {"committed": "x"}))]
)
def test_what_is_no_policy_server_is_left(greeting: bytes | str) -> None:
    left = threading.Event()

    def other(client: ServerConnection) -> None:
        client.send(greeting)
        with pytest.raises(ConnectionClosed):
            client.recv()
        left.set()

    with serve(other, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        refuses(
            "no policy server", RemotePolicy, f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        )
        assert left.wait(60)


@pytest.mark.parametrize("answer", [{"action": np.zeros(7)}, {}, None])
def test_an_answer_without_actions_or_none_is_refused(
    answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(client: ServerConnection) -> None:
        client.send(wire.encode({}))
        for _ in client:
            if answer is not None:
                client.send(wire.encode(answer))

    with serve(other, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        policy = RemotePolicy(f"ws://127.0.0.1:{server.socket.getsockname()[1]}")
        if answer is None:
            monkeypatch.setattr("spear.serve.client.STUCK", 0.1)
        refuses("has gone" if answer is None else "without actions", policy.infer, seen())
        policy.close()


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:9", "ws://127.0.0.1:99999", "ws://[::1", "ws://a..b"]
)
def test_an_address_of_no_server_is_named(address: str) -> None:
    refuses(re.escape(address), RemotePolicy, address, "two\nlines")


def test_bad_messages_name_the_key_and_the_next_good_request_works() -> None:
    rng, good = np.random.default_rng(0), wire.encode(seen())
    bad: list[tuple[bytes | str, str]] = [
        ("text", "message"),
        (good[:1000], "message"),
        (wire.encode({"x": 1}), "'x'"),
        (wire.encode(seen(**{"observation/state": np.full(8, np.nan)})), "observation/state"),
        (
            wire.encode(seen(**{"observation/image": np.zeros((9, 9), np.uint8)})),
            "observation/image",
        ),
        (wire.encode(seen(prompt="explode")), "explode"),
        (wire.encode(seen(prompt="bug")), "ZeroDivisionError"),
        (wire.encode(seen(prompt="stop")), "RuntimeError"),
    ]
    bad += [(rng.bytes(int(n)), "message") for n in rng.integers(0, 400, 20)]
    for place in rng.integers(0, 700, 40):
        broken = bytearray(good)
        broken[place] = rng.integers(256)
        bad.append((bytes(broken), ""))
    with serving() as server, connect(url(server), compression=None) as raw:
        raw.recv()
        for message, said in bad:
            raw.send(message)
            reply = raw.recv()
            if said:
                assert isinstance(reply, str) and said in reply and "\n" not in reply
        raw.send(good)
        np.testing.assert_array_equal(
            wire.decode(raw.recv())["actions"], homing(seen()["observation/state"])
        )


@pytest.mark.parametrize("where", ["observe", "convert"])
def test_a_mistake_in_a_robots_file_fails_one(where: str, caplog: pytest.LogCaptureFixture) -> None:
    def mistaken(*given: Any) -> Any:
        if given[-1]["prompt"] == "odd":
            raise ZeroDivisionError
        return given[0]

    control = Control("", 5.0, mistaken) if where == "convert" else Control("", 5.0)
    observe = mistaken if where == "observe" else GENERIC.observe
    robot = dataclasses.replace(GENERIC, observe=observe, controls={"pose": control})
    answers = Service(Homing(), robot).answer([seen(0.1), seen(prompt="odd"), seen(0.3)])
    assert isinstance(answers[1], SpearError) and "ZeroDivisionError" in str(answers[1])
    for answer, x in zip(answers[::2], (0.1, 0.3), strict=True):
        np.testing.assert_allclose(answer["actions"][0, 0], -0.1 * x, rtol=1e-5)
    (record,) = caplog.records
    assert record.exc_info


@pytest.mark.parametrize(
    "rows", [np.full((5, 7), np.nan), np.full((5, 7), "fast"), np.ones(7), None]
)
def test_commands_that_are_no_rows_of_numbers_reach_no_robot(rows: Any) -> None:
    robot = dataclasses.replace(GENERIC, controls={"pose": Control("", 5.0, lambda *_: rows)})
    (answer,) = Service(Homing(), robot).answer([seen()])
    assert isinstance(answer, SpearError) and "robot's file" in str(answer)


def test_actions_that_are_decided_reach_a_policy_that_has_learned_it() -> None:
    class Learned(Homing):
        committed = 2

        def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
            return [{"actions": np.repeat(o["committed"], 5, axis=0)} for o in observations]

    rows = homing(np.ones(8))[:1]
    for robot, most in (("generic", 2), ("droid", 0)):
        with (
            serving(Learned(), robot=robot) as server,
            closing(RemotePolicy(url(server))) as remote,
        ):
            assert remote.committed == most
            asked = {**load(robot).example(), "committed": rows}
            if most:
                np.testing.assert_array_equal(
                    remote.infer(asked)["actions"], np.repeat(rows, 5, axis=0)
                )
            else:
                refuses("committed", remote.infer, asked)


def test_clients_and_messages_are_bounded() -> None:
    with serving(bounds={"LARGEST_MESSAGE": 300_000, "MOST_CLIENTS": 2}) as server:
        with (
            connect(url(server), compression=None) as other,
            connect(url(server), compression=None) as raw,
        ):
            raw.recv()
            other.recv()
            refuses("503", RemotePolicy, url(server))
            assert get(server, "/healthz")[2] == "ok\n"
            raw.send(b"\0" * 300_001)
            with pytest.raises(ConnectionClosedError, match="1009"):
                raw.recv()
            other.send(wire.encode(seen()))
            assert isinstance(other.recv(), bytes)
        remote, large = RemotePolicy(url(server)), np.zeros((400, 400, 3), np.uint8)
        refuses("observation", remote.infer, {**seen(), "observation/image": large})
        remote.infer(seen())


def test_the_token_is_asked_for() -> None:
    with serving(token="secret") as server:
        assert get(server, "/healthz")[2] == "ok\n"
        for wrong in (None, "Secret"):
            refuses("401", RemotePolicy, url(server), token=wrong)
        for headers, path, status in (
            ({}, "/metrics", 401),
            ({"Authorization": "Api-Key s\xe9cret"}, "/metrics", 401),
            ({"Authorization": "Api-Key secret"}, "/nowhere", 404),
        ):
            assert get(server, path, **headers)[0] == status
        assert "spear_clients" in get(server, "/metrics", Authorization="Api-Key secret")[2]
        RemotePolicy(url(server), token="secret").infer(seen())


def test_many_clients_are_answered_together_each_with_its_own() -> None:
    policy = Homing(seconds=0.02)
    with serving(policy, max_batch=8, wait_ms=1000.0) as server:
        clients = [RemotePolicy(url(server)) for _ in range(8)]

        def ask(index: int) -> None:
            for k in range(4):
                x = 0.1 + 0.01 * index + 0.1 * k
                answer = clients[index].infer(seen(x))["actions"]
                np.testing.assert_allclose(answer[0, 0], -0.1 * x, rtol=1e-5)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, range(8)))
        assert max(policy.batches) == 8 and sum(policy.batches) == 32 and len(policy.batches) < 20
        refuses(
            "explode",
            clients[0].infer_batch,
            [seen(0.1), seen(prompt="explode"), seen(0.3), seen(0.4)],
        )
        # a bad observation spoils its own answer only, and leaves nothing behind for the next call
        answers = clients[0].infer_batch([seen(0.1), seen(0.2), seen(0.3), seen(0.4)])
        found = [a["actions"][0, 0] for a in answers]
        np.testing.assert_allclose(found, [-0.01, -0.02, -0.03, -0.04], rtol=1e-5)
    found = Service(policy := Homing(), GENERIC).answer([*[seen(0.1)] * 15, seen(prompt="explode")])
    assert [isinstance(a, SpearError) for a in found] == [False] * 15 + [True] and len(
        policy.batches
    ) <= 9


@pytest.mark.parametrize(("rate_hz", "rows_of_one"), [(15.0, 3), (5.0, 1), (15.0, 1), (5.0, 3)])
def test_rows_that_move_an_arm_at_another_pace_are_said(rate_hz: float, rows_of_one: int) -> None:
    control = Control("", rate_hz, lambda actions, *_: np.repeat(actions, rows_of_one, axis=0))
    service = Service(Homing(), dataclasses.replace(GENERIC, controls={"mine": control}))
    with pytest.warns(Notice, match="rate_hz") if rows_of_one * 5 != rate_hz else no_warning():
        assert service.warm_up() == 5 * rows_of_one


def test_threads_may_share_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spear.chunks.CONTROL_RATE_HZ", math.inf)
    with serving(Homing(seconds=0.02)) as server:
        policy = RemotePolicy(url(server))
        places = [0.1 + 0.05 * i for i in range(8)]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda x: policy.infer(seen(x))["actions"][0, 0], places))
        np.testing.assert_allclose(found, -0.1 * np.array(places), rtol=1e-5)
        for (
            x
        ) in places:  # as an episode ends while its last chunk is computed, and the next one begins
            with closing(Pilot(policy, "async", replan_interval=3)) as pilot:
                np.testing.assert_allclose(
                    [pilot.step(seen(x))[0] for _ in range(3)], -0.1 * x, rtol=1e-5
                )


@pytest.mark.parametrize("at", ["an answer", "a greeting", "hanging up"])
def test_an_interrupted_call_leaves_no_answer_to_the_next(
    at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as server:
        policy = RemotePolicy(url(server))
        for batch in ([seen(0.1)], [seen(0.1), seen(0.2)], [seen(0.1)] * 3):
            if at == "a greeting":
                policy.close()
            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr(ClientConnection, "recv", Mock(side_effect=KeyboardInterrupt))
                if at == "hanging up":  # a second Ctrl-C
                    patched.setattr(ClientConnection, "close", Mock(side_effect=KeyboardInterrupt))
                policy.infer_batch(batch)
            np.testing.assert_allclose(policy.infer(seen(0.3))["actions"][0, 0], -0.03, rtol=1e-5)
            policy.infer_batch([seen(), seen()])


@pytest.mark.parametrize("converted", [False, True])
def test_a_pilot_takes_no_commands_for_steps(
    converted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A robot of its own whose rows, [5, 8] with unit quaternions, are SPEAR-1's actions, or poses."""
    poses = (
        {"convert": lambda actions, state, observation: np.tile(state, (5, 1))} if converted else {}
    )
    robot = dataclasses.replace(GENERIC, controls={"mine": Control("x", 5.0, **poses)})
    monkeypatch.setattr("spear.embodiments.load", lambda name: robot)
    with serving(robot="arm.py") as server:
        policy = RemotePolicy(url(server))
        if converted:
            refuses("arm.py", Pilot, policy)
        else:
            np.testing.assert_allclose(Pilot(policy).step(seen())[0], -0.04, rtol=1e-5)


@pytest.mark.parametrize("other", ["policy", "control"])
def test_a_server_that_comes_back_as_another_one_moves_no_robot(other: str) -> None:
    policy, droid, port, controls = Homing(), load("droid").example(), 0, ["joint_velocity"] * 2
    with serving(policy, "droid", control=controls[0]) as server:
        port, robot = server.port, RemotePolicy(url(server))
        before = robot.infer(droid)["actions"]
    refuses("has gone", robot.infer, droid)
    with serving(policy, "droid", port=port, control=controls[0]):  # the same one again
        np.testing.assert_array_equal(robot.infer(droid)["actions"], before)
    refuses("has gone", robot.infer, droid)
    if other == "policy":
        policy.identity = "fine-tuned"
    else:
        controls[1] = "joint_position"
    with serving(policy, "droid", port=port, control=controls[1]) as server:
        for _ in range(2):
            refuses("before", robot.infer, droid)
        assert RemotePolicy(url(server)).infer(droid)["actions"].shape == before.shape


def test_a_server_that_can_answer_no_more_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batcher, "_collect", lambda self: asyncio.sleep(0, [None]))
    with pytest.raises(AttributeError):
        asyncio.run(PolicyServer(Service(Homing(), GENERIC), ServeOptions("test", port=0)).run())


def test_a_full_queue_says_busy_at_once() -> None:
    with serving(Homing(seconds=0.2), max_batch=1, queue=2) as server:
        clients = [connect(url(server), compression=None) for _ in range(6)]
        for client in clients:
            client.recv()
        for client in clients:
            client.send(wire.encode(seen()))
        replies = [client.recv() for client in clients]
        busy = [r for r in replies if isinstance(r, str)]
        assert (
            busy and all(r.startswith("busy: 2 ") for r in busy) and len(replies) - len(busy) >= 2
        )
        for client in clients:
            client.close()
        assert len(RemotePolicy(url(server)).infer_batch([seen()] * 4)) == 4


SLOW = """
class Policy(Homing):
    def infer_batch(self, observations):
        print("asked", flush=True)
        time.sleep(0.3)
        return super().infer_batch(observations)
"""


def test_sigterm_answers_what_is_under_way_and_ends_well() -> None:
    with process(SLOW) as (server, port, said):
        url = f"ws://127.0.0.1:{port}"
        with connect(url, compression=None) as raw, connect(url, compression=None) as other:
            raw.recv()
            other.recv()
            raw.send(wire.encode(seen()))
            assert said.readline() == "asked\n"
            server.send_signal(signal.SIGTERM)
            reply = wire.decode(raw.recv())
            np.testing.assert_array_equal(reply["actions"], homing(seen()["observation/state"]))
            for left in (raw, other):
                with pytest.raises(ConnectionClosedOK, match="1001"):
                    left.recv()
        assert server.wait(60) == 0
