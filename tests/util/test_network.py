"""A server is asked once and briefly whether it is there."""

from __future__ import annotations

import socket

from gemini_server import serving
from spear.util.network import unreachable


def test_any_answer_is_an_answer_and_a_closed_door_none() -> None:
    with serving() as server:
        assert unreachable(server.address) is None
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        assert unreachable(f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert unreachable("http://nowhere.invalid")
