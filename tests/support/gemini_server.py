"""A local HTTP server with Gemini's API, to which tests connect the real client."""

import base64
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from spear.types import Array
from spear.util.images import load_image


@dataclass
class Reply:
    """One response of the server.

    Attributes:
        status: HTTP status code.
        body: a value that is sent as JSON, or a text that is sent as it is.
        headers: further HTTP headers.
    """

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


def make_boxes_reply(*items: tuple[str, list[float]]) -> Reply:
    """Make a reply in which the model has detected objects.

    items: (label, [ymin, xmin, ymax, xmax]) of each object, in thousandths of the image's size.
    """
    return make_text_reply(json.dumps([{"label": name, "box_2d": box} for name, box in items]))


def make_text_reply(answer: str, end: str = "STOP", **more: Any) -> Reply:
    """Make a reply in which the model answers with a text.

    Args:
        answer: the text.
        end: why the model stopped to write; "STOP" if the text is complete.
        more: further keys of the reply.
    """
    candidate = {
        "content": {"role": "model", "parts": [{"text": answer}]},
        "finishReason": end,
        "index": 0,
    }
    tokens = {"promptTokenCount": 1200, "candidatesTokenCount": 80, "thoughtsTokenCount": 20}
    return Reply(
        body={"candidates": [candidate], "usageMetadata": tokens, "modelVersion": "test", **more}
    )


def make_error_reply(
    status: int, name: str, message: str, *details: dict[str, Any], **headers: str
) -> Reply:
    """Make a reply with an error; underscores in the names of headers stand for dashes."""
    body = {"error": {"code": status, "message": message, "status": name, "details": list(details)}}
    return Reply(status, body, {key.replace("_", "-"): value for key, value in headers.items()})


def make_retry_info(delay: str) -> dict[str, Any]:
    """Make the detail of an error that asks the client to wait, for example "2s"."""
    return {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}


def to_camel_case(value: Any) -> Any:
    """Convert the keys of a JSON value to camel case.

    The API accepts snake case, too, and the client sends both.
    """
    if isinstance(value, dict):
        converted = {}
        for key, entry in value.items():
            camel_key = re.sub("_([a-z])", lambda match: match[1].upper(), key)
            converted[camel_key] = to_camel_case(entry)
        return converted
    if isinstance(value, list):
        return [to_camel_case(entry) for entry in value]
    return value


def read_picture(request: dict[str, Any]) -> Array:
    """Return the image [h, w, 3] in a request."""
    inline = request["contents"][0]["parts"][0]["inlineData"]
    assert inline["mimeType"] == "image/jpeg"
    return load_image(base64.urlsafe_b64decode(inline["data"]))


class Server:
    """The replies that the server gives, and the requests that it got.

    The server gives one of `replies` after the other, and the last one again and again. If the
    function `answer` is set, it makes the reply from the JSON of the request instead.
    """

    def __init__(self) -> None:
        self.replies: list[Reply] = [make_boxes_reply()]
        self.answer: Callable[[dict[str, Any]], Reply] | None = None
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.lock = threading.Lock()
        self.address = ""

    def record_and_reply(
        self, path: str, headers: dict[str, str], request: dict[str, Any]
    ) -> Reply:
        """Record a request, and return the reply to it."""
        with self.lock:
            self.times.append(time.monotonic())
            self.requests.append(request)
            self.paths.append(path)
            self.headers.append(headers)
            if self.answer is None:
                is_last_reply = len(self.replies) == 1
                return self.replies[0] if is_last_reply else self.replies.pop(0)
        return self.answer(request)


@contextmanager
def run_server() -> Iterator[Server]:
    """Run the server in threads, on a free port of this machine, and stop it at the end."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {key.lower(): value for key, value in self.headers.items()}
            reply = server.record_and_reply(self.path, headers, to_camel_case(json.loads(content)))
            data = reply.body if isinstance(reply.body, str) else json.dumps(reply.body)
            self.send_response(reply.status)
            for key, value in {"Content-Type": "application/json", **reply.headers}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data.encode())))
            self.end_headers()
            self.wfile.write(data.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.address = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
