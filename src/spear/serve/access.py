"""Who may reach the server, and at which address."""

import asyncio
import contextlib
import hmac
import socket
from urllib.parse import urlsplit

from websockets.http11 import Request
from websockets.streams import StreamReader

from spear.errors import SpearError

PRIVATE_NAME_ENDINGS = (".localhost", ".local", ".internal", ".home.arpa")
"""Endings of host names that nobody outside of this network can point anywhere."""
ANY_ADDRESS = ("", "0.0.0.0", "::")
DISCARD_PORT = 9


def parse_request(data: bytes) -> Request | None:
    """Parse the bytes of a whole request without a body; None if they are anything else."""
    reader = StreamReader()
    reader.feed_data(data)
    parser = Request.parse(reader.read_line)
    try:
        next(parser)
    except StopIteration as finished:
        request: Request = finished.value
        return None if reader.buffer else request
    except Exception:  # of many types, for what is no request
        return None
    return None  # it is not whole


def malformed_request_error(request: Request) -> str | None:
    """Say what is wrong with a request's path, Host or Origin; None if all three can be read."""
    hosts = request.headers.get_all("Host")
    origins = request.headers.get_all("Origin")
    if len(hosts) > 1 or len(origins) > 1:
        return "send one Host header, and one Origin header at most\n"
    if not all(_is_url(f"//{host}") for host in hosts):
        return "the Host header is no address: send HOST:PORT\n"
    if not all(_is_url(origin) for origin in origins):
        return "the Origin header is no address: send http://HOST:PORT\n"
    if not _is_url(request.path):
        return "the path is no address\n"
    return None


def _is_url(text: str) -> bool:
    """Return whether Python can take an address apart."""
    try:
        _ = urlsplit(text).port  # Python checks the port when it is read
    except ValueError:
        return False
    return True


def foreign_page_error(request: Request, token: str | None) -> str | None:
    """Say why a request may come from a web page of somebody else; None if it does not.

    A browser sends the page's address as Origin. If somebody points the name of their own page to
    this machine (DNS rebinding), the Host header shows that name; a server with a token is safe
    from that. Programs send no Origin. The request is not malformed (`malformed_request_error`).
    """
    hosts = request.headers.get_all("Host")
    origins = request.headers.get_all("Origin")
    if any(urlsplit(origin).netloc not in hosts for origin in origins):
        return "this server is not for other web pages\n"
    if token is None and not all(_is_private_host(host) for host in hosts):
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
    sent = headers[0].encode(errors="surrogateescape")
    return hmac.compare_digest(sent, f"Api-Key {token}".encode())


def _is_private_host(host: str) -> bool:
    """Return whether a Host header is an address, or a name that only this machine or its network
    has.
    """
    name = (urlsplit("//" + host).hostname or "").rstrip(".")
    is_ipv6 = ":" in name
    is_ipv4 = name.replace(".", "").isdecimal()
    is_local_name = "." not in name or name.endswith(PRIVATE_NAME_ENDINGS)
    return is_ipv6 or is_ipv4 or is_local_name


def find_reachable_host(host: str) -> str:
    """Return where clients reach a server that listens on `host`, in brackets if it is an IPv6
    address.

    For a server that listens on all addresses it is the one that other machines can use.
    """
    if host in ANY_ADDRESS:
        host = _find_own_address(is_ipv6=host == "::")
    return f"[{host}]" if ":" in host else host


def _find_own_address(is_ipv6: bool) -> str:
    """Return the address of this machine from which the operating system would reach another
    network.
    """
    family = socket.AF_INET6 if is_ipv6 else socket.AF_INET
    documentation_address = "2001:db8::1" if is_ipv6 else "192.0.2.1"
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as datagrams:
        datagrams.connect((documentation_address, DISCARD_PORT))  # sends nothing
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
        raise listen_error(host, port, error) from error


def listen_error(host: str, port: int, error: BaseException) -> SpearError:
    """Make the error for an address that is taken or does not exist."""
    return SpearError(f"cannot listen on {host}:{port}: {error}. Choose another --port or --host.")
