"""Finds out whether a server can be reached, with one short request.

The clients of the Hugging Face Hub and of Gemini would otherwise try for minutes before they fail.
"""

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
"""HTTP status codes of a proxy that cannot reach the server."""


class ProxyProblem(NamedTuple):
    """Why the HTTP client cannot use a proxy that the environment names.

    Attributes:
        reason: A clause that names the variable.
        cure: A sentence that says what to do.
    """

    reason: str
    cure: str


def find_proxy_problem() -> ProxyProblem | None:
    """Return why the HTTP client cannot start with the environment's proxies; None if it can.

    The client checks all proxies when it starts, including those that it will not use.
    """
    for protocol, proxy in _read_proxies().items():
        variable = _get_proxy_variable(protocol)
        scheme = _get_proxy_scheme(proxy)
        if scheme not in CLIENT_PROXY_SCHEMES:
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


def check_proxies(subject: str) -> None:
    """Raise `SpearError` when the HTTP client cannot use a proxy that the environment names.

    Args:
        subject: What the client would reach, as the subject of "cannot be reached".
    """
    problem = find_proxy_problem()
    if problem is not None:
        raise SpearError(f"{subject} cannot be reached, because {problem.reason}. {problem.cure}")


def explain_unreachable(url: str) -> str | None:
    """Return why a server does not answer; None if it answers anything.

    Each server is asked once in this process. Also returns None, without asking, if the environment
    names a proxy that only the HTTP client can use, because then only the client can ask.
    """
    problem = find_proxy_problem()
    if problem is not None:
        return problem.reason
    if _has_proxy_for_client_only():
        return None
    return _explain_no_answer_once(url)


def _has_proxy_for_client_only() -> bool:
    """Return whether the client uses a proxy that `urllib`, which this module uses, does not.

    `urllib` ignores the variable ALL_PROXY, and can use HTTP proxies only.
    """
    proxies = _read_proxies()
    if "all" in proxies:
        return True
    return any(_get_proxy_scheme(proxy) != "http" for proxy in proxies.values())


def _read_proxies() -> dict[str, str]:
    """Return the proxies that the client uses, by protocol ("http", "https", or "all")."""
    settings = urllib.request.getproxies()
    no_proxy = settings.get("no", "")  # the variable NO_PROXY: hosts that need no proxy
    excluded_hosts = [host.strip() for host in no_proxy.split(",")]
    if "*" in excluded_hosts:
        return {}
    proxies = {}
    for protocol in ("http", "https", "all"):
        if settings.get(protocol):
            proxies[protocol] = settings[protocol]
    return proxies


def _get_proxy_scheme(proxy: str) -> str:
    """Return the scheme of a proxy's URL: "http" if it has none, "" if the URL is not valid."""
    url = proxy if "://" in proxy else f"http://{proxy}"
    try:
        split_url = urllib.parse.urlsplit(url)
        _ = split_url.port  # raises for a port that is no number
    except ValueError:
        return ""
    return split_url.scheme


def _get_proxy_variable(protocol: str) -> str:
    """Return the environment variable that names a protocol's proxy, in the user's spelling.

    On macOS and Windows, the proxy may also come from the settings of the system.
    """
    name = f"{protocol}_proxy"
    if os.environ.get(name):  # lower case takes precedence
        return name
    for variable in os.environ:
        if variable.lower() == name and os.environ[variable]:
            return variable
    return "the network setting of this system"


@lru_cache
def _explain_no_answer_once(url: str) -> str | None:
    """Return why a server does not answer a request; None if it answers.

    `lru_cache` keeps the result, so that this process asks each server only once.
    """
    reasons: list[str | None] = []

    def ask() -> None:
        reasons.append(_explain_no_answer_to_head(url))

    # The request runs in a thread, because looking up the server's name has no time-out and can
    # take longer than `TIMEOUT_S`.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    return reasons[0] if reasons else f"no answer within {TIMEOUT_S:.0f} s"


def _explain_no_answer_to_head(url: str) -> str | None:
    """Return why a server does not answer a HEAD request; None if it answers."""
    request = urllib.request.Request(url, method="HEAD")
    opener = urllib.request.build_opener()  # `urlopen` keeps the proxies of its first call
    try:
        with opener.open(request, timeout=TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:
        # The server itself has answered, unless a gateway on the way answered in its place.
        return str(error) if error.code in _GATEWAY_ERRORS else None
    except (OSError, ValueError) as error:
        return summarize_error(error)


def is_hub_name(name: str) -> bool:
    """Return whether a name looks like a repository of the Hugging Face Hub.

    The repository may be followed by @REVISION.

    >>> is_hub_name("google/paligemma-3b-pt-224"), is_hub_name("nano")
    (True, False)
    """
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w.-]+)?", name) is not None


def explain_hub_unreachable() -> str | None:
    """Return why only the local cache of the Hugging Face Hub can be used; None if the Hub can."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return explain_unreachable(constants.ENDPOINT)


def is_hub_reachable() -> bool:
    """Return whether the Hugging Face Hub can be used; otherwise only its local cache can."""
    return explain_hub_unreachable() is None


def check_hub_reachable_or_cached(model: str, instead: str) -> None:
    """Raise `SpearError` for a name on the Hub that is neither reachable nor in the cache.

    Args:
        model: a name. Nothing is checked if it is the path of a file or folder, or does not look
            like a name on the Hub.
        instead: what the user can give instead of a name, for the message.
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
