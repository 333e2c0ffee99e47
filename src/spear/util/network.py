"""Whether a server can be reached, asked once and briefly, before a client tries for minutes."""

import re
import threading
import urllib.error
import urllib.request
from functools import lru_cache
from pathlib import Path

from spear.errors import SpearError, summarize_error

TIMEOUT_S = 6.0  # after which a server that has not answered counts as unreachable
_GATEWAY_ERRORS = (502, 503, 504)


@lru_cache
def explain_unreachable(url: str) -> str | None:
    """Why a server does not answer, asked once in this process; None if it answers anything."""
    if "all" in urllib.request.getproxies():
        return None  # `urllib` cannot use such a proxy, but clients can
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
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S):
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
    reason = explain_hub_unreachable()
    if reason:
        raise SpearError(
            f"cannot get {model} from the Hugging Face Hub ({reason}), and it is not in the cache. "
            f"Check the network, or give {instead}."
        )
