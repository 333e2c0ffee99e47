"""Who may use the server (requests from other web pages, tokens), and the address to reach it."""

import asyncio
import contextlib
import hmac
import os
import socket
from urllib.parse import urlsplit

from websockets.http11 import Request
from websockets.streams import StreamReader

from spear.errors import SpearError, summarize_error

PRIVATE_NAME_ENDINGS = (".localhost", ".local", ".internal", ".home.arpa")
"""Endings of host names that exist only within a network, so no outsider can own such a name."""
ANY_ADDRESS = ("", "0.0.0.0", "::")  # hosts that stand for all addresses of this machine
DISCARD_PORT = 9  # any port would do, because nothing is sent to it


def parse_request(data: bytes) -> Request | None:
    """Parse an HTTP request without a body.

    Returns None if `data` is no request, an incomplete one, or has bytes after the request.
    """
    reader = StreamReader()
    reader.feed_data(data)
    parser = Request.parse(reader.read_line)
    # The parser is a generator. It returns the request at the end of the request, or asks for more
    # bytes if there is no end.
    try:
        next(parser)
    except StopIteration as finished:
        request: Request = finished.value
        return None if reader.buffer else request
    except Exception:  # bytes that are no request raise exceptions of many types
        return None
    return None


def explain_malformed_request(request: Request) -> str | None:
    """Say what is wrong with a request's path, Host or Origin; None if all three can be read."""
    hosts = request.headers.get_all("Host")
    origins = request.headers.get_all("Origin")
    if len(hosts) > 1 or len(origins) > 1:
        return "send one Host header, and one Origin header at most\n"
    if not all(_is_parsable_address(f"//{host}") for host in hosts):
        return "the Host header is no address. Send HOST:PORT.\n"
    if not all(_is_parsable_address(origin) for origin in origins):
        return "the Origin header is no address. Send http://HOST:PORT.\n"
    if not _is_parsable_address(request.path):
        return "the path is no address\n"
    return None


def _is_parsable_address(text: str) -> bool:
    """Return whether Python can parse an address (of any kind), including its port."""
    try:
        _ = urlsplit(text).port  # Python checks the port when it is read
    except ValueError:
        return False
    return True


def explain_foreign_page(request: Request, server_token: str | None) -> str | None:
    """Say why a request may come from somebody else's web page; None if it cannot.

    A browser sends the address of the page that makes a request as Origin. Programs send no Origin.
    An attacker may also point the host name of their own page to this machine (DNS rebinding). Then
    Origin and Host agree, but the Host header has a name that is not private. A server with a token
    is safe from this attack, because the page does not know the token.

    Args:
        request: a request in which `explain_malformed_request` finds no error.
        server_token: the server's token, or None.
    """
    hosts = request.headers.get_all("Host")
    origins = request.headers.get_all("Origin")
    if any(urlsplit(origin).netloc not in hosts for origin in origins):
        return "this server is not for other web pages\n"
    if server_token is None and not all(_is_ip_address_or_local_name(host) for host in hosts):
        return (
            "use this server by its address (http://127.0.0.1:PORT), or start it with a --token\n"
        )
    return None


def is_authorized(request: Request, token: str | None) -> bool:
    """Return whether a request has the server's token, if the server has one."""
    if token is None:
        return True
    headers = request.headers.get_all("Authorization")
    if len(headers) != 1:
        return False
    sent_header = headers[0].encode(errors="surrogateescape")
    # This comparison takes the same time for all wrong tokens, so its time reveals nothing.
    return hmac.compare_digest(sent_header, f"Api-Key {token}".encode())


def _is_ip_address_or_local_name(host: str) -> bool:
    """Return whether a Host header is an IP address, or a name within this machine or network."""
    name = (urlsplit("//" + host).hostname or "").rstrip(".")
    is_ipv6 = ":" in name
    is_ipv4 = name.replace(".", "").isdecimal()
    is_local_name = "." not in name or name.endswith(PRIVATE_NAME_ENDINGS)
    return is_ipv6 or is_ipv4 or is_local_name


def get_reachable_host(host: str) -> str:
    """Return the host name or address at which clients reach a server that listens on `host`.

    An IPv6 address is in brackets. If the server listens on all addresses, the result is the one
    that other machines can use.
    """
    if host in ANY_ADDRESS:
        host = _get_own_address(is_ipv6=host == "::")
    return f"[{host}]" if ":" in host else host


def _get_own_address(is_ipv6: bool) -> str:
    """Return this machine's address in the network through which it reaches other networks.

    Connecting a datagram socket sends nothing, but lets the operating system choose this address.
    """
    family = socket.AF_INET6 if is_ipv6 else socket.AF_INET
    documentation_address = "2001:db8::1" if is_ipv6 else "192.0.2.1"
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as datagrams:
        datagrams.connect((documentation_address, DISCARD_PORT))
        return str(datagrams.getsockname()[0])
    return "::1" if is_ipv6 else socket.gethostname()  # there is no network


def check_can_listen(host: str, port: int) -> None:
    """Raise `SpearError` for an address on which a server cannot listen."""

    async def listen() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(asyncio.Protocol, host, port)
        server.close()

    try:
        asyncio.run(listen())
    except (OSError, UnicodeError) as error:
        raise make_listen_error(host, port, error) from error


def make_listen_error(host: str, port: int, error: BaseException) -> SpearError:
    """Make the error for an address that is taken or does not exist."""
    # The text of an error of the event loop repeats the address.
    reason = summarize_error(error)
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        reason = os.strerror(error.errno)  # the number is negative for an unknown host
    return SpearError(
        f"the server cannot listen on {host}:{port} ({reason}). Choose another --port or --host."
    )
