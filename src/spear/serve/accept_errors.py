"""What the server says when it runs out of open files: one line, not a traceback per attempt."""

import asyncio
import errno
import logging
import time
from typing import Any

LOG = logging.getLogger("spear.serve")
RESOURCE_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""The errors after which asyncio accepts no connection for a second, and then tries again."""
LOG_INTERVAL_S = 60.0


def quiet_accept_errors(loop: asyncio.AbstractEventLoop) -> None:
    """Let an event loop log at most once a minute that it cannot accept a connection.

    Asyncio pauses accepting by itself, but it tries up to a hundred times before that, and logs a
    traceback each time.
    """
    last_logged_s = -LOG_INTERVAL_S

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal last_logged_s
        error = context.get("exception")
        is_about_accepting = "accept" in context.get("message", "")
        is_out_of_resources = isinstance(error, OSError) and error.errno in RESOURCE_ERRNOS
        if not is_about_accepting or not is_out_of_resources:
            loop.default_exception_handler(context)
            return
        if time.monotonic() - last_logged_s >= LOG_INTERVAL_S:
            last_logged_s = time.monotonic()
            LOG.error(
                "No new client can connect for now: %s. Robots that are connected are still"
                " answered. Allow more open files: ulimit -n 4096.",
                getattr(error, "strerror", error),
            )

    loop.set_exception_handler(handle)
