"""Gives freed memory, which the C library keeps for later, back to the operating system."""

import asyncio
import ctypes
import sys

TRIM_INTERVAL_S = 2.0  # between two times at which memory is given back


async def trim_memory_until_cancelled() -> None:
    """Give back freed memory every few seconds, until cancelled. It takes about a millisecond."""
    while True:
        await asyncio.sleep(TRIM_INTERVAL_S)
        await asyncio.to_thread(trim_memory)


def trim_memory() -> None:
    """Give back freed memory now. Only the GNU C library (Linux) can do it."""
    if not sys.platform.startswith("linux"):
        return
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
