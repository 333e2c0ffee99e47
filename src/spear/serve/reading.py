"""How fast a server reads: limits of bytes per second, per address and in all.

Reading is work, too: 16 MiB take the server some 40 ms, whatever is in them. So a few clients that
send large messages without end would delay all others. The server stops reading from an address
that has used up its bytes, until it has new ones. What it does not read waits in the client, so
nothing is lost, and a client that sends less than its share never waits.
"""

from dataclasses import dataclass

from spear.serve.admission import TokenBucket

MIB = 2**20
MAX_ADDRESSES = 1024  # when so many addresses are remembered, those without a debt are forgotten


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
    """Bytes per second from all addresses together, once the burst is used up. Then only addresses
    that have used more than half of their own burst have to wait."""
    burst_bytes: float = 128 * MIB
    """Bytes that all addresses together may send at once."""


class ReadingBudgets:
    """The budgets of all addresses, and the one that they share; a token is a byte."""

    def __init__(self, limits: ReadingLimits) -> None:
        self._limits = limits
        self._shared = TokenBucket(limits.bytes_per_s, limits.burst_bytes)
        self._budget_by_address: dict[str, TokenBucket] = {}

    def spend(self, address: str, num_bytes: int, now_s: float) -> float:
        """Count bytes that were read from an address.

        Args:
            address: the address, or the network that counts as one.
            num_bytes: how many bytes were read.
            now_s: the time, from any fixed moment on.

        Returns:
            For how long to read nothing more from this address, s.
        """
        budget = self._find_budget(address)
        wait_s = budget.spend(num_bytes, now_s)
        shared_wait_s = self._shared.spend(num_bytes, now_s)
        # An address with more than half of its burst left does not wait for the others.
        if budget.num_tokens > budget.capacity / 2:
            return wait_s
        return max(wait_s, shared_wait_s)

    def _find_budget(self, address: str) -> TokenBucket:
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
