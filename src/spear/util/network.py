"""Whether a server can be reached, asked once and briefly, before a client tries for minutes."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from functools import lru_cache

from spear.errors import first_line

PATIENCE = 6.0
"""Seconds after which a server that has not answered counts as out of reach."""


@lru_cache
def unreachable(url: str) -> str | None:
    """Why no answer of any kind comes from a server, asked once in this process; None when one comes."""
    if "all" in urllib.request.getproxies():
        return None  # this cannot ask through such a proxy, clients can
    found: list[str] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE):
                found.append("")
        except urllib.error.HTTPError as error:
            found.append(str(error) if error.code in (502, 503, 504) else "")
        except (OSError, ValueError) as error:
            found.append(first_line(error) or "no answer")

    thread = threading.Thread(target=ask, daemon=True)  # looking up a name can take longer than the time-out
    thread.start()
    thread.join(PATIENCE)
    return (found[0] if found else f"no answer within {PATIENCE:.0f} s") or None


def hub_unreachable() -> str | None:
    """Why the Hugging Face Hub cannot be asked, only its cache on this machine; None when it can."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return unreachable(constants.ENDPOINT)
