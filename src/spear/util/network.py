"""Whether a server can be reached, asked once and briefly, before a client tries for minutes."""

import importlib.util
import os
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from spear.errors import SpearError, summarize_error

TIMEOUT_S = 6.0  # after which a server that has not answered counts as unreachable
CLIENT_PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")
"""Kinds of proxies that the HTTP client of Gemini and of the Hugging Face Hub can use."""
_GATEWAY_ERRORS = (502, 503, 504)


class ProxyProblem(NamedTuple):
    """Why the HTTP client cannot use a proxy that the environment names.

    Attributes:
        reason: A clause that names the variable.
        cure: A sentence that says what to do.
    """

    reason: str
    cure: str


def find_proxy_problem() -> ProxyProblem | None:
    """Why the HTTP client would refuse to start with the proxies of the environment, or None.

    The client looks at all proxies when it starts, whatever server it is for.
    """
    for protocol, proxy in _read_proxies().items():
        variable = _find_variable(protocol)
        scheme, port_is_valid = _parse_proxy(proxy)
        if scheme not in CLIENT_PROXY_SCHEMES or not port_is_valid:
            schemes = ", ".join(CLIENT_PROXY_SCHEMES)
            return ProxyProblem(
                f"{variable} names a proxy that the HTTP client cannot use",
                f"Set it to SCHEME://HOST:PORT, where SCHEME is one of {schemes}, or unset it.",
            )
        if scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
            return ProxyProblem(
                f"{variable} names a SOCKS proxy, for which a package is missing",
                "Run `pip install socksio`, or unset the variable.",
            )
    return None


def check_proxies(purpose: str) -> None:
    """Raise `SpearError` when the HTTP client cannot use a proxy that the environment names.

    Args:
        purpose: What needs the client, as the subject of "cannot be reached".
    """
    problem = find_proxy_problem()
    if problem is not None:
        raise SpearError(f"{purpose} cannot be reached, because {problem.reason}. {problem.cure}")


def explain_unreachable(url: str) -> str | None:
    """Why a server does not answer, asked once in this process; None if it answers anything.

    Where the environment names a proxy that only the HTTP client can use, the answer is None,
    because only the client can tell.
    """
    problem = find_proxy_problem()
    if problem is not None:
        return problem.reason
    if _has_proxy_for_client_only():
        return None
    return _ask_server(url)


def _has_proxy_for_client_only() -> bool:
    """Whether there is a proxy that `urllib`, which asks here, cannot use as the client does."""
    proxies = _read_proxies()
    return "all" in proxies or any(_parse_proxy(proxy)[0] != "http" for proxy in proxies.values())


def _read_proxies() -> dict[str, str]:
    """The proxies that the client uses, by protocol ("http", "https", or "all")."""
    settings = urllib.request.getproxies()
    excluded_hosts = [host.strip() for host in settings.get("no", "").split(",")]
    if "*" in excluded_hosts:
        return {}
    proxies = {}
    for protocol in ("http", "https", "all"):
        if settings.get(protocol):
            proxies[protocol] = settings[protocol]
    return proxies


def _parse_proxy(proxy: str) -> tuple[str, bool]:
    """The scheme of a proxy's URL ("http" where it has none), and whether its port is a number."""
    try:
        parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        _ = parts.port
    except ValueError:
        return "", False
    return parts.scheme, True


def _find_variable(protocol: str) -> str:
    """The environment variable of a protocol's proxy, as it is spelled there."""
    name = f"{protocol}_proxy"
    if os.environ.get(name):  # lower case takes precedence
        return name
    for variable in os.environ:
        if variable.lower() == name and os.environ[variable]:
            return variable
    return "the network setting of this system"


@lru_cache
def _ask_server(url: str) -> str | None:
    """Why a server does not answer a request, made once in this process; None if it answers."""
    reasons: list[str | None] = []

    def ask() -> None:
        reasons.append(_request_head(url))

    # In a thread, because looking up the server's name can take longer than the time-out.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    return reasons[0] if reasons else f"no answer within {TIMEOUT_S:.0f} s"


def _request_head(url: str) -> str | None:
    """Why a server does not answer a HEAD request; None if it answers."""
    request = urllib.request.Request(url, method="HEAD")
    opener = urllib.request.build_opener()  # `urlopen` keeps the proxies of its first call
    try:
        with opener.open(request, timeout=TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:
        return str(error) if error.code in _GATEWAY_ERRORS else None
    except (OSError, ValueError) as error:
        return summarize_error(error)


def is_hub_name(name: str) -> bool:
    """Whether a name looks like a repository of the Hugging Face Hub, perhaps with @REVISION.

    >>> is_hub_name("google/paligemma-3b-pt-224"), is_hub_name("nano")
    (True, False)
    """
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w.-]+)?", name) is not None


def explain_hub_unreachable() -> str | None:
    """Why only the local cache of the Hugging Face Hub can be used; None if the Hub can."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return explain_unreachable(constants.ENDPOINT)


def is_hub_reachable() -> bool:
    """Whether the Hugging Face Hub can be used; otherwise only its local cache can."""
    return explain_hub_unreachable() is None


def check_available_on_hub(model: str, instead: str) -> None:
    """Raise `SpearError` for a name on the Hub that is neither reachable nor in the cache.

    Args:
        model: the name. Paths, and words that are no names on the Hub, are not checked.
        instead: what the user can give instead, for the message.
    """
    from huggingface_hub import constants

    if not is_hub_name(model) or Path(model).exists():
        return
    repository = model.partition("@")[0].replace("/", "--")
    if Path(constants.HF_HUB_CACHE, f"models--{repository}").is_dir():
        return
    if not constants.HF_HUB_OFFLINE:
        check_proxies(f"The Hugging Face Hub, which has {model},")
    reason = explain_hub_unreachable()
    if reason:
        raise SpearError(
            f"cannot get {model} from the Hugging Face Hub ({reason}), and it is not in the cache. "
            f"Check the network, or give {instead}."
        )
