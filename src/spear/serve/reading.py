"""How fast a server reads: limits of bytes per second, per address and in all.

Reading is work, too: 16 MiB take the server some 40 ms, whatever is in them. So a few clients that
send large messages without end would delay all others. The server stops reading from an address
that has used up its bytes, until it has new ones. What it does not read waits in the client, so
nothing is lost, and a client that sends less than its share never waits.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass

from spear.serve.admission import TokenBucket, WaitSeconds

MIB = 2**20
MAX_ADDRESSES = 1024  # when this many addresses are remembered, those without a debt are forgotten
TURN_BYTES = 2**18  # what asyncio reads of a connection at once
# In a connection's rate, the weight of bytes falls with their age; at this age it is 1/e.
RATE_MEMORY_S = 1.0
ACTIVE_S = 1.0  # a connection that has sent something within this time takes part in sharing


@dataclass(frozen=True)
class ReadingLimits:
    """How many bytes a server reads. All numbers are our choice.

    A robot with two cameras of 640×480 pixels, sent uncompressed five times per second, sends
    9 MiB/s.
    """

    bytes_per_s_and_address: float = 32 * MIB
    """Bytes per second from one address, once its burst is used up."""
    burst_bytes_of_address: float = 64 * MIB
    """Bytes that one address may send at once."""
    bytes_per_s: float = 64 * MIB
    """Bytes per second from all addresses together, once the burst is used up. Then connections
    that send more than an equal share of them wait for their turn."""
    burst_bytes: float = 128 * MIB
    """Bytes that all addresses together may send at once."""


@dataclass
class _Sender:
    """What is known of one connection."""

    rate_bytes_per_s: float = 0.0  # its recent rate
    updated_s: float = -math.inf  # when it last sent something
    num_reserved_bytes: int = 0  # of its turn, which the shared budget has counted already


class ReadingBudgets:
    """The budgets of all addresses, and the one that they share; a token is a byte.

    When the shared budget is used up, connections take turns: one after the other may send
    `TURN_BYTES`, at the rate of the shared budget. If all were let in when the debt is paid, their
    messages would arrive, and have to be answered, at the same moment.
    """

    def __init__(self, limits: ReadingLimits) -> None:
        self._limits = limits
        self._shared = TokenBucket(limits.bytes_per_s, limits.burst_bytes)
        self._budget_by_address: dict[str, TokenBucket] = {}
        self._senders: dict[Hashable, _Sender] = {}

    def spend(
        self, connection: Hashable, address: str, num_bytes: int, now_s: float
    ) -> WaitSeconds:
        """Count bytes that were read from a connection.

        Args:
            connection: the connection.
            address: its address, or the network that counts as one.
            num_bytes: how many bytes were read.
            now_s: the time, from any fixed moment on.

        Returns:
            For how long to read nothing more from this connection, s.
        """
        sender = self._senders.setdefault(connection, _Sender())
        earlier_weight = math.exp((sender.updated_s - now_s) / RATE_MEMORY_S)
        earlier_rate = earlier_weight * sender.rate_bytes_per_s
        sender.rate_bytes_per_s = earlier_rate + num_bytes / RATE_MEMORY_S
        sender.updated_s = now_s

        address_wait_s = self._get_or_add_budget(address).spend(num_bytes, now_s)
        shared_wait_s = self._shared.spend(num_bytes - sender.num_reserved_bytes, now_s)
        sender.num_reserved_bytes = 0
        if shared_wait_s == 0 or sender.rate_bytes_per_s <= self._compute_equal_share_bytes_per_s(
            now_s
        ):
            return address_wait_s
        # Its turn comes when all is paid that was read or reserved before. Whoever waits next has
        # to wait for this turn, too.
        sender.num_reserved_bytes = TURN_BYTES
        self._shared.spend(TURN_BYTES, now_s)
        return max(address_wait_s, shared_wait_s)

    def forget(self, connection: Hashable, now_s: float) -> None:
        """Forget a connection that has ended; the turn that it waited for is free again."""
        sender = self._senders.pop(connection, None)
        if sender is not None:
            self._shared.spend(-sender.num_reserved_bytes, now_s)

    def _compute_equal_share_bytes_per_s(self, now_s: float) -> float:
        """Return the bytes per second for each connection if all active ones get the same."""
        num_active = sum(now_s - sender.updated_s < ACTIVE_S for sender in self._senders.values())
        return self._limits.bytes_per_s / num_active

    def _get_or_add_budget(self, address: str) -> TokenBucket:
        """Return the budget of an address; a new one is full."""
        budget = self._budget_by_address.get(address)
        if budget is None:
            if len(self._budget_by_address) >= MAX_ADDRESSES:
                self._forget_addresses_without_debt()
            budget = TokenBucket(
                self._limits.bytes_per_s_and_address, self._limits.burst_bytes_of_address
            )
            self._budget_by_address[address] = budget
        return budget

    def _forget_addresses_without_debt(self) -> None:
        """Forget the addresses that may read at once; they begin again with a full budget."""
        self._budget_by_address = {
            address: budget
            for address, budget in self._budget_by_address.items()
            if budget.num_tokens < 0
        }
