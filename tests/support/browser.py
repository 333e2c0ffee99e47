"""A headless Chromium, driven through its DevTools protocol; tests that need it skip where there is none."""

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

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 240
"""Seconds for what takes one on an idle machine."""


class Tab:
    """One page, in the browser whose tools listen at this port. Notes the errors that its scripts make."""

    def __init__(self, port: int) -> None:
        new = urllib.request.Request(f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT")
        with urllib.request.urlopen(new, timeout=PATIENCE) as reply:
            address = json.load(reply)["webSocketDebuggerUrl"]
        self._socket = connect(address, max_size=None, compression=None, proxy=None)
        self._count = 0
        self.errors: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=PATIENCE))
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(
                    message["params"]["exceptionDetails"]["exception"]["description"]
                )
            elif (
                message.get("method") == "Log.entryAdded"
                and message["params"]["entry"]["level"] == "error"
            ):
                self.errors.append(message["params"]["entry"]["text"])
            elif message.get("id") == self._count:
                assert "error" not in message, message["error"]
                return dict(message["result"])

    def open(self, url: str, width: int = 1400, height: int = 1000, phone: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1 + phone, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone, maxTouchPoints=5)
        self.call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The value of an expression on the page."""
        result = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, script: str, patience: float = PATIENCE) -> None:
        def true() -> bool:
            result = self.call("Runtime.evaluate", expression=f"!!({script})", returnByValue=True)
            return result["result"].get("value") is True

        wait_until(true, script, timeout_s=patience)

    def where(self, selector: str) -> list[float]:
        """Left, top, width and height of an element in the window, scrolled to if need be."""
        script = "(e => { e.scrollIntoViewIfNeeded(); const r = e.getBoundingClientRect();"
        script += (
            f" return [r.x, r.y, r.width, r.height]; }})(document.querySelector({selector!r}))"
        )
        return [float(v) for v in self.run(script)]

    def click(self, selector: str) -> None:
        left, top, width, height = self.where(selector)
        x, y = left + width / 2, top + height / 2
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def touch(self, selector: str, *fingers: Sequence[float]) -> None:
        """Fingers on an element, each [from x, y, to x, y] as parts of its width and height."""
        left, top, width, height = self.where(selector)
        for kind, part in (
            ("touchStart", 0.0),
            ("touchMove", 0.5),
            ("touchMove", 1.0),
            ("touchEnd", None),
        ):
            at = (
                []
                if part is None
                else [(a + part * (c - a), b + part * (d - b)) for a, b, c, d in fingers]
            )
            points = [
                {"x": left + x * width, "y": top + y * height, "id": i}
                for i, (x, y) in enumerate(at)
            ]
            self.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)

    def type(self, selector: str, text: str) -> None:
        """Replace what is in an input field."""
        self.run(f"(e => {{ e.focus(); e.select(); }})(document.querySelector({selector!r}))")
        self.call("Input.insertText", text=text)

    def key(self, name: str, **more: Any) -> None:
        """Press a key, "ArrowLeft" for one."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, **more)

    def enter(self) -> None:
        self.key("Enter", windowsVirtualKeyCode=13, text="\r")


@contextmanager
def chromium(folder: Path) -> Iterator[int]:
    """Chromium with an empty profile in `folder`: the port of its tools. SPEAR_CHROMIUM: another program."""
    program = os.environ.get("SPEAR_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium found (set SPEAR_CHROMIUM)")
    options = ["headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run"]
    options += ["disable-extensions", "disable-background-networking", "remote-debugging-port=0"]
    options += [f"user-data-dir={folder}"]
    command = [program, *(f"--{option}" for option in options), "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ready = folder / "DevToolsActivePort"
        begun = lambda: process.poll() is not None or (ready.exists() and "\n" in ready.read_text())  # noqa: E731
        wait_until(begun, program, timeout_s=PATIENCE)
        if process.poll() is not None:
            pytest.skip(f"{program} does not start here (exit code {process.returncode})")
        yield int(ready.read_text().splitlines()[0])
    finally:
        process.terminate()
        process.wait(60)
