"""Which new connections a server takes, and when: limits of rates per address and in all.

A new connection costs the server milliseconds before its client has sent anything, so a flood of
new connections would delay the robots that are connected. Therefore new connections wait as bare
sockets, which cost microseconds, until the limits let them in. Addresses take turns, so that an
address that floods the server does not delay the others.
"""

import ipaddress
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Generic, TypeVar

Connection = TypeVar("Connection")
# Addresses with the same first 64 bits count as one, because a provider gives each customer at
# least a network of that size.
IPV6_NETWORK_BITS = 64
WaitSeconds = float  # how long to wait until something is allowed
MAX_BUCKETS = 1024  # when this many addresses have buckets, full buckets are forgotten


@dataclass(frozen=True)
class AdmissionLimits:
    """How many new connections a server takes. All numbers are our choice.

    A plain request, such as `GET /metrics`, is a connection of its own.
    """

    per_s_and_address: float = 10.0
    """New connections per second from one address, once its burst is used up."""
    burst_of_address: int = 64
    """New connections that one address may make at once, for example a fleet of robots that starts
    behind one address."""
    per_s: float = 20.0
    """New connections per second from all addresses, once the burst is used up."""
    burst: int = 128
    """New connections that all addresses together may make at once."""
    max_waiting_of_address: int = 64
    """New connections of one address that may wait; the server closes further ones."""
    max_waiting: int = 256
    """New connections that may wait in all; beyond this the address with the most loses one."""


class TokenBucket:
    """Allows `capacity` events at once, and `per_s` events per second in the long run.

    An event takes a token. The bucket begins with `capacity` tokens, and gets `per_s` new ones per
    second, up to `capacity`. The number may become negative if what has happened already is counted
    (`spend`).
    """

    def __init__(self, per_s: float, capacity: float) -> None:
        self._per_s = per_s
        self.capacity = capacity
        self.num_tokens = capacity
        self._updated_s: float | None = None

    def has_token(self, now_s: float) -> bool:
        """Return whether an event is allowed."""
        self._refill(now_s)
        return self.num_tokens >= 1

    def is_full(self, now_s: float) -> bool:
        """Return whether the bucket is full, as if there had been no event."""
        self._refill(now_s)
        return self.num_tokens >= self.capacity

    def take_token(self) -> None:
        """Take the token of an event that `has_token` allowed."""
        self.num_tokens -= 1

    def spend(self, num_tokens: float, now_s: float) -> WaitSeconds:
        """Count what took many tokens; return the seconds until the bucket has no debt."""
        self._refill(now_s)
        self.num_tokens -= num_tokens
        return max(0.0, -self.num_tokens / self._per_s)

    def _refill(self, now_s: float) -> None:
        """Add the tokens for the time since the last call."""
        if self._updated_s is not None:
            num_new_tokens = self._per_s * (now_s - self._updated_s)
            self.num_tokens = min(self.capacity, self.num_tokens + num_new_tokens)
        self._updated_s = now_s


class AdmissionQueue(Generic[Connection]):
    """New connections that wait, by address.

    Addresses take turns. The connections of one address are taken in the order of their arrival.
    """

    def __init__(self, limits: AdmissionLimits) -> None:
        self._limits = limits
        # The address whose turn is next is the first one.
        self._waiting: OrderedDict[str, deque[Connection]] = OrderedDict()
        self._num_waiting = 0
        self._bucket = TokenBucket(limits.per_s, limits.burst)  # for all addresses together
        self._bucket_by_address: dict[str, TokenBucket] = {}

    def __len__(self) -> int:
        """Return the number of connections that wait."""
        return self._num_waiting

    def add_and_pop_surplus(self, address: str, connection: Connection) -> Connection | None:
        """Let a connection wait.

        Returns:
            The connection that the caller has to close because too many wait: this one, or the
            newest one of the address with the most. None if there is room for all.
        """
        waiting = self._waiting.setdefault(address, deque())
        if len(waiting) >= self._limits.max_waiting_of_address:
            return connection
        waiting.append(connection)
        self._num_waiting += 1
        if self._num_waiting <= self._limits.max_waiting:
            return None
        busiest_address = max(self._waiting, key=lambda address: len(self._waiting[address]))
        return self._remove(busiest_address, is_newest=True)

    def take(self, now_s: float) -> Connection | None:
        """Remove and return the next connection that the limits let in now; None if none is."""
        if not self._bucket.has_token(now_s):
            return None
        for address in self._waiting:
            bucket = self._get_or_add_bucket(address, now_s)
            if bucket.has_token(now_s):
                bucket.take_token()
                self._bucket.take_token()
                self._waiting.move_to_end(address)
                return self._remove(address, is_newest=False)
        return None

    def remove_all(self) -> list[Connection]:
        """Remove and return all connections that wait."""
        connections = [connection for waiting in self._waiting.values() for connection in waiting]
        self._waiting.clear()
        self._num_waiting = 0
        return connections

    def _remove(self, address: str, is_newest: bool) -> Connection:
        """Remove and return the newest or the oldest waiting connection of an address."""
        waiting = self._waiting[address]
        connection = waiting.pop() if is_newest else waiting.popleft()
        if not waiting:
            del self._waiting[address]
        self._num_waiting -= 1
        return connection

    def _get_or_add_bucket(self, address: str, now_s: float) -> TokenBucket:
        """Return the bucket of an address; a new one is full."""
        bucket = self._bucket_by_address.get(address)
        if bucket is None:
            if len(self._bucket_by_address) >= MAX_BUCKETS:
                self._forget_full_buckets(now_s)
            bucket = TokenBucket(self._limits.per_s_and_address, self._limits.burst_of_address)
            self._bucket_by_address[address] = bucket
        return bucket

    def _forget_full_buckets(self, now_s: float) -> None:
        """Forget the full buckets, which a new bucket would equal."""
        buckets = self._bucket_by_address.items()
        self._bucket_by_address = {
            address: bucket for address, bucket in buckets if not bucket.is_full(now_s)
        }


def get_rate_limit_key(address: str) -> str:
    """Return what all clients have in common that share limits: the address, or the IPv6 network.

    >>> get_rate_limit_key("192.0.2.7"), get_rate_limit_key("2001:db8:1:2:3:4:5:6")
    ('192.0.2.7', '2001:db8:1:2::')
    """
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped:
        return str(parsed.ipv4_mapped)
    num_host_bits = parsed.max_prefixlen - IPV6_NETWORK_BITS
    # Shifting right and left again sets the bits of the host to 0.
    return str(ipaddress.IPv6Address(int(parsed) >> num_host_bits << num_host_bits))
