"""A local HTTP server that speaks Gemini's API, for the real client to talk to."""

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
    """status, JSON body (or raw text), headers of one response."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


def boxes_reply(*items: tuple[str, list[float]]) -> Reply:
    """An answer with labels and boxes [ymin, xmin, ymax, xmax] in thousandths."""
    return text_reply(json.dumps([{"label": name, "box_2d": box} for name, box in items]))


def text_reply(answer: str, end: str = "STOP", **more: Any) -> Reply:
    candidate = {
        "content": {"role": "model", "parts": [{"text": answer}]},
        "finishReason": end,
        "index": 0,
    }
    tokens = {"promptTokenCount": 1200, "candidatesTokenCount": 80, "thoughtsTokenCount": 20}
    return Reply(
        body={"candidates": [candidate], "usageMetadata": tokens, "modelVersion": "test", **more}
    )


def error_reply(
    status: int, name: str, message: str, *details: dict[str, Any], **headers: str
) -> Reply:
    body = {"error": {"code": status, "message": message, "status": name, "details": list(details)}}
    return Reply(status, body, {key.replace("_", "-"): value for key, value in headers.items()})


def make_retry_info(delay: str) -> dict[str, Any]:
    return {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}


def to_camel_case(value: Any) -> Any:
    """JSON with its keys in camel case: the API takes both spellings, and the client sends both."""
    if isinstance(value, dict):
        return {
            re.sub("_([a-z])", lambda m: m[1].upper(), k): to_camel_case(v)
            for k, v in value.items()
        }
    return [to_camel_case(v) for v in value] if isinstance(value, list) else value


def read_picture(request: dict[str, Any]) -> Array:
    """The image [h, w, 3] in a request."""
    inline = request["contents"][0]["parts"][0]["inlineData"]
    assert inline["mimeType"] == "image/jpeg"
    return load_image(base64.b64decode(inline["data"].replace("-", "+").replace("_", "/")))


class Server:
    """Answers with `replies` in turn, the last one for ever; or as `answer` says, from the
    request's JSON."""

    def __init__(self) -> None:
        self.replies: list[Reply] = [boxes_reply()]
        self.answer: Callable[[dict[str, Any]], Reply] | None = None
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.lock = threading.Lock()
        self.address = ""

    def reply(self, path: str, headers: dict[str, str], request: dict[str, Any]) -> Reply:
        with self.lock:
            self.times.append(time.monotonic())
            self.requests.append(request)
            self.paths.append(path)
            self.headers.append(headers)
            if self.answer is None:
                return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        return self.answer(request)


@contextmanager
def run_server() -> Iterator[Server]:
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {key.lower(): value for key, value in self.headers.items()}
            reply = server.reply(self.path, headers, to_camel_case(json.loads(content)))
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
