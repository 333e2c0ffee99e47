"""Runs a headless Chromium and controls it through its DevTools protocol.

Tests that need a browser are skipped on machines without Chromium.
"""

import json
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect

from processes import wait_until

PROGRAM_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
TIMEOUT_S = 240  # for actions that take a second on an idle machine


class Tab:
    """One page of the browser. It records the errors of the page's scripts.

    Args:
        port: the port at which the browser's DevTools listen.
    """

    def __init__(self, port: int) -> None:
        new = urllib.request.Request(f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT")
        with urllib.request.urlopen(new, timeout=TIMEOUT_S) as reply:
            address = json.load(reply)["webSocketDebuggerUrl"]
        self._socket = connect(address, max_size=None, compression=None, proxy=None)
        self._num_calls = 0
        self.errors: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol, and return its result."""
        self._num_calls += 1
        self._socket.send(json.dumps({"id": self._num_calls, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=TIMEOUT_S))
            self._record_error(message)
            if message.get("id") == self._num_calls:
                assert "error" not in message, message["error"]
                return dict(message["result"])

    def _record_error(self, message: dict[str, Any]) -> None:
        """Record the error of the page's scripts that a message may report."""
        method = message.get("method")
        if method == "Runtime.exceptionThrown":
            exception = message["params"]["exceptionDetails"]["exception"]
            self.errors.append(exception["description"])
        if method == "Log.entryAdded":
            entry = message["params"]["entry"]
            if entry["level"] == "error":
                self.errors.append(entry["text"])

    def open(self, url: str, width: int = 1400, height: int = 1000, is_phone: bool = False) -> None:
        """Open a URL in a window of this size, or on a phone with a touch screen of this size."""
        scale = 2 if is_phone else 1
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": is_phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setTouchEmulationEnabled", enabled=is_phone, maxTouchPoints=5)
        self.call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression on the page."""
        result = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, script: str, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until a JavaScript expression on the page is true."""

        def is_true() -> bool:
            result = self.call("Runtime.evaluate", expression=f"!!({script})", returnByValue=True)
            return result["result"].get("value") is True

        wait_until(is_true, script, timeout_s=timeout_s)

    def find_box(self, selector: str) -> list[float]:
        """Scroll to an element, and return its left, top, width and height in the window."""
        script = "(e => { e.scrollIntoViewIfNeeded(); const r = e.getBoundingClientRect();"
        script += (
            f" return [r.x, r.y, r.width, r.height]; }})(document.querySelector({selector!r}))"
        )
        return [float(value) for value in self.run(script)]

    def click(self, selector: str) -> None:
        """Click on the middle of the element that a CSS selector finds."""
        left_px, top_px, width, height = self.find_box(selector)
        x = left_px + width / 2
        y = top_px + height / 2
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def touch(self, selector: str, *fingers: Sequence[float]) -> None:
        """Move fingers on an element at the same time.

        Args:
            selector: CSS selector of the element.
            fingers: for each finger the x and y where it begins, and the x and y where it ends, as
                fractions of the element's width and height.
        """
        left_px, top_px, width, height = self.find_box(selector)
        moments = [("touchStart", 0.0), ("touchMove", 0.5), ("touchMove", 1.0)]
        for kind, progress in moments:
            points = []
            for index, (from_x, from_y, to_x, to_y) in enumerate(fingers):
                x = from_x + progress * (to_x - from_x)
                y = from_y + progress * (to_y - from_y)
                points.append({"x": left_px + x * width, "y": top_px + y * height, "id": index})
            self.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def type(self, selector: str, text: str) -> None:
        """Replace the text in an input field."""
        self.run(f"(e => {{ e.focus(); e.select(); }})(document.querySelector({selector!r}))")
        self.call("Input.insertText", text=text)

    def key(self, name: str, **more: Any) -> None:
        """Press a key by its name in JavaScript, such as "ArrowLeft"."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, **more)

    def enter(self) -> None:
        """Press the key Enter, which sends a form."""
        self.key("Enter", windowsVirtualKeyCode=13, text="\r")  # the code and the text of Enter


@contextmanager
def run_chromium(folder: Path) -> Iterator[int]:
    """Run Chromium with an empty profile in `folder`, and yield the port of its DevTools.

    The environment variable SPEAR_CHROMIUM can name another program.
    """
    installed = [name for name in PROGRAM_NAMES if shutil.which(name)]
    program = os.environ.get("SPEAR_CHROMIUM") or next(iter(installed), None)
    if program is None:
        pytest.skip("no Chromium found (set SPEAR_CHROMIUM)")
    options = ["headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run"]
    options += ["disable-extensions", "disable-background-networking", "remote-debugging-port=0"]
    options += [f"user-data-dir={folder}"]
    command = [program, *(f"--{option}" for option in options), "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file = folder / "DevToolsActivePort"  # its first line is the port

        def has_started_or_ended() -> bool:
            has_port = port_file.exists() and "\n" in port_file.read_text()
            return has_port or process.poll() is not None

        wait_until(has_started_or_ended, program, timeout_s=TIMEOUT_S)
        if process.poll() is not None:
            pytest.skip(f"{program} does not start here (exit code {process.returncode})")
        yield int(port_file.read_text().splitlines()[0])
    finally:
        process.terminate()
        process.wait(timeout=60)
