"""Whether a server can be reached, asked once and briefly, before a client tries for minutes."""

import re
import threading
import urllib.error
import urllib.request
from functools import lru_cache
from pathlib import Path

from spear.errors import SpearError, summarize_error

TIMEOUT_S = 6.0
"""Seconds after which a server that has not answered counts as out of reach."""


@lru_cache
def explain_unreachable(url: str) -> str | None:
    """Why no answer of any kind comes from a server, asked once in this process; None when one comes."""
    if "all" in urllib.request.getproxies():
        return None  # this cannot ask through such a proxy, clients can
    found: list[str] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT_S
            ):
                found.append("")
        except urllib.error.HTTPError as error:
            found.append(str(error) if error.code in (502, 503, 504) else "")
        except (OSError, ValueError) as error:
            found.append(summarize_error(error))

    thread = threading.Thread(
        target=ask, daemon=True
    )  # looking up a name can take longer than the time-out
    thread.start()
    thread.join(TIMEOUT_S)
    return (found[0] if found else f"no answer within {TIMEOUT_S:.0f} s") or None


def is_hub_name(name: str) -> bool:
    """Whether this looks like a Hub repository: "google/paligemma-3b-pt-224", perhaps with @REVISION."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w.-]+)?", name) is not None


def explain_hub_unreachable() -> str | None:
    """Why the Hugging Face Hub cannot be asked, only its cache on this machine; None when it can."""
    from huggingface_hub import constants

    return (
        "HF_HUB_OFFLINE is set"
        if constants.HF_HUB_OFFLINE
        else explain_unreachable(constants.ENDPOINT)
    )


def check_available_on_hub(model: str, instead: str) -> None:
    """Raises `SpearError` for a name on the Hub that is neither within reach nor in the cache.

    instead: what to give, for the message. Paths, and names that are none, pass.
    """
    from huggingface_hub import constants

    if not is_hub_name(model) or Path(model).exists():
        return
    cached = Path(
        constants.HF_HUB_CACHE, f"models--{model.partition('@')[0].replace('/', '--')}"
    ).is_dir()
    if not cached and (why := explain_hub_unreachable()):
        lacks = f"cannot get {model} from the Hugging Face Hub ({why}), and it is not in the cache"
        raise SpearError(f"{lacks}: check the network, or give {instead}")
