"""How many bytes the server reads from each address and from all, and who has to wait.

The first tests call the budgets with a time of their own. The last one runs a server.
"""

import math
import threading
import time
from contextlib import closing

import pytest
from websockets.sync.client import connect

from serve_here import run_server
from spear.embodiments import load
from spear.serve import wire
from spear.serve.admission import TokenBucket
from spear.serve.client import RemotePolicy
from spear.serve.connection import ConnectionLimits
from spear.serve.reading import TURN_BYTES, ReadingBudgets, ReadingLimits

GENERIC = load("generic")
ROBOT_ADDRESS = "192.0.2.1"
HEAVY_ADDRESSES = ("192.0.2.2", "192.0.2.3", "192.0.2.4")
# 10 bytes per second of an address and 20 bytes at once; twice as much of all addresses.
SMALL_LIMITS = ReadingLimits(
    bytes_per_s_and_address=10, burst_bytes_of_address=20, bytes_per_s=20, burst_bytes=40
)


def test_nobody_waits_during_a_burst() -> None:
    budget = TokenBucket(per_s=10, capacity=20)

    assert budget.spend(20, now_s=0.0) == 0


def test_after_the_burst_each_byte_takes_its_time() -> None:
    budget = TokenBucket(per_s=10, capacity=20)
    budget.spend(20, now_s=0.0)

    assert budget.spend(5, now_s=0.0) == pytest.approx(0.5)
    assert budget.spend(5, now_s=0.5) == pytest.approx(0.5)
    assert budget.spend(5, now_s=10.0) == 0


def test_a_budget_never_holds_more_than_its_burst() -> None:
    budget = TokenBucket(per_s=10, capacity=20)
    budget.spend(0, now_s=0.0)

    assert budget.spend(30, now_s=1000.0) == pytest.approx(1.0)


def test_an_address_does_not_pay_for_another() -> None:
    budgets = ReadingBudgets(SMALL_LIMITS)

    assert budgets.spend("heavy", HEAVY_ADDRESSES[0], 30, now_s=0.0) == pytest.approx(1.0)
    assert budgets.spend("robot", ROBOT_ADDRESS, 5, now_s=0.0) == 0


def test_when_all_read_too_much_only_connections_above_an_equal_share_wait() -> None:
    budgets = ReadingBudgets(SMALL_LIMITS)
    for address in HEAVY_ADDRESSES:
        last_wait_s = budgets.spend(address, address, 20, now_s=0.0)

    # Together they have sent 60 bytes, 20 more than all may send at once. An equal share of 20
    # bytes per second is 5 for each of four.
    assert last_wait_s == pytest.approx(1.0)
    assert budgets.spend("robot", ROBOT_ADDRESS, 5, now_s=0.0) == 0
    assert budgets.spend("robot", ROBOT_ADDRESS, 1, now_s=0.0) > 0


def test_connections_that_wait_are_let_in_one_after_the_other() -> None:
    limits = ReadingLimits(
        bytes_per_s_and_address=math.inf, bytes_per_s=TURN_BYTES, burst_bytes=TURN_BYTES
    )
    budgets = ReadingBudgets(limits)

    waits_s = [
        budgets.spend(f"client {number}", HEAVY_ADDRESSES[0], TURN_BYTES, now_s=0.0)
        for number in range(4)
    ]

    # A turn takes a second, and the burst pays for the first one. Each client that waits reserves
    # its next turn, so the waits are 1, 2 + 1 and 3 + 2 seconds: turns sent and turns reserved.
    assert waits_s == [0, pytest.approx(1), pytest.approx(3), pytest.approx(5)]


def test_a_connection_in_its_turn_has_paid_already() -> None:
    limits = ReadingLimits(
        bytes_per_s_and_address=math.inf, bytes_per_s=TURN_BYTES, burst_bytes=TURN_BYTES
    )
    budgets = ReadingBudgets(limits)
    budgets.spend("client", HEAVY_ADDRESSES[0], TURN_BYTES, now_s=0.0)

    waits_s = []
    now_s = 0.0
    for _ in range(5):
        waits_s.append(budgets.spend("client", HEAVY_ADDRESSES[0], TURN_BYTES, now_s))
        now_s += waits_s[-1]

    # One turn per second is just the rate of the shared budget.
    assert waits_s == pytest.approx([1, 1, 1, 1, 1])


def test_a_connection_that_ends_frees_the_turn_that_it_waited_for() -> None:
    limits = ReadingLimits(
        bytes_per_s_and_address=math.inf, bytes_per_s=TURN_BYTES, burst_bytes=TURN_BYTES
    )
    budgets = ReadingBudgets(limits)
    budgets.spend("gone", HEAVY_ADDRESSES[0], 2 * TURN_BYTES, now_s=0.0)

    budgets.forget("gone", now_s=0.0)

    # One turn over the burst is still to be paid, and the two of the new connection.
    assert budgets.spend("new", HEAVY_ADDRESSES[0], 2 * TURN_BYTES, now_s=0.0) == pytest.approx(3)


def send_without_end(
    url: str, message: bytes, stop: threading.Event, sent_bytes: list[int]
) -> None:
    """Send a message again and again, as another address of this machine.

    The size of each message that was answered is appended to `sent_bytes`.
    """
    with connect(url, proxy=None, max_size=None, source_address=("127.0.0.2", 0)) as client:
        client.recv()
        while not stop.is_set():
            client.send(message)
            client.recv()
            sent_bytes.append(len(message))


def test_a_client_that_sends_without_end_is_slowed_and_another_is_not() -> None:
    message = wire.encode({"image": bytes(2**20)})
    limits = ReadingLimits(bytes_per_s_and_address=2 * 2**20, burst_bytes_of_address=2**21)
    stop = threading.Event()
    sent_bytes: list[int] = []
    with run_server(limits=ConnectionLimits(reading=limits, error_pause_s=0)) as server:
        url = f"ws://127.0.0.1:{server.port}"
        heavy = threading.Thread(target=send_without_end, args=(url, message, stop, sent_bytes))
        with closing(RemotePolicy(url)) as robot:
            heavy.start()
            start_s = time.monotonic()
            num_answers = 0
            while time.monotonic() - start_s < 2:
                robot.infer(GENERIC.example())
                num_answers += 1
            stop.set()
            heavy.join()
            elapsed_s = time.monotonic() - start_s

    # A burst of 2 MiB, 2 MiB per second, and what was read before the pause began.
    assert sum(sent_bytes) <= (2 + 2 * elapsed_s + 2) * 2**20
    assert num_answers > 10
