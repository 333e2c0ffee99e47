import json
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gemini_server import Reply, Server, boxes, error, picture, retry_info, serving, text
from labels_stand_ins import noise
from refusals import refuses
from spear.errors import RetryableError, SpearError
from spear.labels.models import gemini as module
from spear.labels.models.gemini import PROMPT, GeminiDetector, UnusableAnswerError, parse_detections
from spear.labels.pipeline import admit_frame, detect_objects
from spear.types import Frame

pytest.importorskip("google.genai")

CUP = ("red cup", [100, 250, 500, 750])
OF_THE_DAY = {
    "@type": "x/google.rpc.QuotaFailure",
    "violations": [{"quotaId": "RequestsPerDayPerProject"}],
}
BUSY = error(429, "RESOURCE_EXHAUSTED", "Slow down.", retry_info("0.3s"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving() as running:
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", running.address)
        yield running


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GEMINI_API_KEY", "secret-key")
    monkeypatch.delenv("GOOGLE_API_KEY", raising=False)
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def detector(**changes: Any) -> GeminiDetector:
    """With an empty cache of its own if it is given none."""
    return GeminiDetector(**{"cache": Path(tempfile.mkdtemp()), **changes})


def found(detections: Any) -> list[tuple[str, list[float]]]:
    return [(d.name, [round(float(v), 3) for v in d.box2d]) for d in detections]


def test_the_request_holds_image_prompt_and_schema(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SIDE_PX", 200)
    smooth = np.linspace(0, 255, 400 * 100 * 3).reshape(100, 400, 3).astype(np.uint8)
    detector(model="gemini-x", vocabulary=["cup", "fork"]).detect([Frame(smooth)])
    (request,) = server.requests
    assert server.paths == ["/v1beta/models/gemini-x:generateContent"]
    assert server.headers[0]["x-goog-api-key"] == "secret-key"
    sent, prompt = picture(request), request["contents"][0]["parts"][1]
    assert sent.shape == (50, 200, 3) and np.abs(sent.astype(int) - smooth[::2, ::2]).mean() < 4
    assert prompt["text"].startswith(PROMPT) and "cup, fork" in prompt["text"]
    config = request["generationConfig"]
    assert (
        config["responseMimeType"] == "application/json"
        and config["responseSchema"]["type"] == "ARRAY"
    )
    assert set(config["responseSchema"]["items"]["required"]) == {"box_2d", "label"}
    assert config["thinkingConfig"] == {"thinkingLevel": "LOW"}


def test_boxes_outside_the_image_are_cut_or_left_out_and_an_answer_may_stand_in_a_fence() -> None:
    answer = [
        {"label": "cut", "box_2d": [-100, 900, 300, 1200]},
        {"label": "outside", "box_2d": [100, 1100, 300, 1300]},
        {"label": "upside down", "box_2d": [500, 100, 100, 600]},
        {"label": "thin", "box_2d": [100, 100, 500, 110]},
        {"label": "", "box_2d": [100, 100, 500, 600]},
        {"label": "cup", "box_2d": [100, 100, 500, 600]},
        {"label": "cup", "box_2d": [101, 100, 500, 600.5]},
        {"label": "mug", "box_2d": [100, 100, 500, 600]},
    ]
    assert found(parse_detections(json.dumps(answer), 100, 50)) == [
        ("cut", [45, 0, 50, 30]),
        ("cup", [5, 10, 30, 50]),
        ("mug", [5, 10, 30, 50]),
    ]
    alone = json.dumps(answer[5:6])
    for fenced in (f"```json\n{alone}\n```", f"Here it is:\n```\n{alone}\n```\n"):
        assert found(parse_detections(fenced, 100, 50)) == [("cup", [5, 10, 30, 50])]


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("I see a cup.", "JSON"),
        ('[{"box_2d": [1, 2, 3, 4], "label": "cup"', "JSON"),
        ("[" * 100_000, "JSON"),
        ('[{"label": "\\ud800", "box_2d": [1, 2, 3, 4]}]', "JSON"),
        ('{"label": "cup"}', "array"),
        ('[{"box_2d": [1, 2, 3, 4]}]', r"0\.label"),
        ('[{"label": "cup"}]', r"0\.box_2d"),
        *(
            (f'[{{"label": "cup", "box_2d": [1, 2, 3{more}]}}]', r"0\.box_2d")
            for more in ("", ', "4"', ", NaN", ", true", ", 1" + "0" * 400)
        ),
    ],
)
def test_answers_that_are_not_as_asked_are_unusable(answer: str, named: str) -> None:
    with pytest.raises(UnusableAnswerError, match=named):
        parse_detections(answer, 10, 10)


@pytest.mark.parametrize(
    "reply",
    [
        error(400, "INVALID_ARGUMENT", "x" * 150 + " the key secret-key is bad"),
        error(403, "secret-key", "API key secret-key has no access."),
        error(503, "UNAVAILABLE", "secret-key"),
        Reply(body="<html> secret-key"),
        text("secret-key"),
    ],
)
def test_a_key_that_the_service_repeats_is_not_said(server: Server, reply: Reply) -> None:
    server.replies = [reply]
    gemini = detector()
    assert "secret" not in refuses("", gemini.detect, [noise(0), noise(1)]) + str(gemini.bill())


def test_requests_are_spread_over_a_minute(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "MAX_CONCURRENT_REQUESTS", 1)
    detector(per_minute=20).detect([noise(i) for i in range(4)])
    assert clock.now == pytest.approx(9.0) and len(server.requests) == 4


def test_rate_limiting_waits_as_long_as_asked(server: Server) -> None:
    server.replies = [
        BUSY,
        error(429, "RESOURCE_EXHAUSTED", "More.", Retry_After="0.4"),
        boxes(CUP),
    ]
    (detections,) = detector().detect([noise(0)])
    assert [d.name for d in detections] == ["red cup"]
    first, second, third = server.times
    assert second - first >= 0.3 and third - second >= 0.4


def test_overload_ends_or_concerns_one_image(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    overloaded = error(503, "UNAVAILABLE", "The model is overloaded.")
    others = Reply(502, "<html>Bad gateway</html>"), error(500, "INTERNAL", "Oops.")
    server.replies = [overloaded, *others, boxes(CUP)]
    gemini = detector()
    assert [d.name for d in gemini.detect([noise(0)])[0]] == ["red cup"]
    assert gemini.usage["requests"] == len(server.requests) == 4
    server.replies = [*[overloaded] * 3, boxes(CUP)]
    monkeypatch.setattr(module, "MAX_ATTEMPTS", 3)
    gemini = detector()
    with pytest.raises(RetryableError, match=r"0\.jpg .*503"):
        gemini.detect([noise(0)])
    assert len(gemini.detect([noise(1)])[0]) == 1


@pytest.mark.parametrize(
    ("reply", "named", "then"),
    [
        (text("I see a cup."), "JSON", "again"),
        (text("[{", end="MAX_TOKENS"), "cut off", "again"),
        (text(""), "empty", "again"),
        (Reply(body={"candidates": [{"finishReason": "MALFORMED_RESPONSE"}]}), "empty", "again"),
        (Reply(body="<html>"), "unreadable response", "again"),
        (error(400, "INVALID_ARGUMENT", "Unable to process input image."), "400 .*Unable", "next"),
        (Reply(body={"promptFeedback": {"blockReason": "SAFETY"}}), "SAFETY", "next"),
        (Reply(body={"candidates": [{"finishReason": "SAFETY", "index": 0}]}), "SAFETY", "next"),
        (text("[]", end="SOMETHING_NEW"), "SOMETHING_NEW", "next"),
        (error(429, "RESOURCE_EXHAUSTED", "Daily quota.", retry_info("7200s")), "7200 s", "never"),
        (
            error(429, "RESOURCE_EXHAUSTED", "Quota.", OF_THE_DAY, retry_info("9s")),
            "tomorrow",
            "never",
        ),
        (error(404, "NOT_FOUND", "models/gemini-x is not found"), "404 .*gemini-x", "never"),
        (error(403, "PERMISSION_DENIED", "No."), "403 .*GEMINI_API_KEY", "never"),
        (
            error(400, "INVALID_ARGUMENT", "No.", {"reason": "API_KEY_INVALID"}),
            "GEMINI_API_KEY",
            "never",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is not a valid")
def test_what_comes_instead_of_an_answer(
    server: Server, reply: Reply, named: str, then: str
) -> None:
    """An unusable answer is asked for once more; a refusal concerns one image; what fails for all, once."""
    server.replies = [reply, boxes(CUP)]
    gemini = detector()
    if then == "again":
        assert len(gemini.detect([noise(0)])[0]) == 1
        server.replies = [reply]
        gemini = detector()
    with pytest.raises(SpearError, match=named) as stop:
        gemini.detect([noise(0)])
    assert isinstance(stop.value, RetryableError) == (then != "next")
    server.replies = [boxes(CUP)]
    if then == "never":
        with pytest.raises(RetryableError, match=named):
            gemini.detect([noise(1)])
    else:
        assert "0.jpg" in str(stop.value) and len(gemini.detect([noise(1)])[0]) == 1
    assert len(server.requests) == {"again": 5, "next": 2, "never": 1}[then]


def test_images_of_a_batch_are_asked_about_at_the_same_time_and_keep_their_answers(
    server: Server,
) -> None:
    together = threading.Barrier(3, timeout=60)

    def answer(request: dict[str, Any]) -> Reply:
        together.wait()
        width = picture(request).shape[1]
        time.sleep(0.02 * (66 - width))
        return boxes((f"thing {width}", [0, 0, 1000, 1000]))

    server.answer = answer
    names = [
        [d.name for d in found]
        for found in detector().detect([noise(i, 40, 60 + i) for i in range(6)])
    ]
    assert names == [[f"thing {60 + i}"] for i in range(6)]


def test_known_answers_make_no_request(server: Server, tmp_path: Path) -> None:
    server.replies = [boxes(CUP)]
    first = detector(cache=tmp_path).detect([noise(0)])
    again = detector(cache=tmp_path)
    assert found(again.detect([noise(0)])[0]) == found(first[0])
    assert len(server.requests) == 1 and again.usage == {"cached": 1}
    again.detect([noise(0), noise(1)])
    assert again.usage == {"requests": 1, "cached": 2, "input": 1200, "output": 100}
    assert all(number in again.bill() for number in ("1 request,", "2 answers", "1200", "100"))
    for other in ({"vocabulary": ["cup"]}, {"model": "other"}):
        detector(cache=tmp_path, **other).detect([noise(0)])
    assert len(server.requests) == 4
    for path in tmp_path.rglob("*.json"):
        path.write_text("broken")
    detector(cache=tmp_path).detect([noise(0)])
    assert len(server.requests) == 5
    assert "secret-key" not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))


def test_in_the_pipeline_nothing_is_asked_twice(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_CONCURRENT_REQUESTS", 1)
    server.replies = [Reply(body={"promptFeedback": {"blockReason": "SAFETY"}}), boxes(CUP)]
    gemini, works = detector(), [admit_frame(noise(i)) for i in range(4)]
    detect_objects(works, gemini)
    assert [w.source for w in works if w.error is None and w.detections] == [
        "1.jpg",
        "2.jpg",
        "3.jpg",
    ]
    assert "0.jpg (SAFETY)" in str(works[0].error)
    assert len(server.requests) == 4 and gemini.usage["cached"] == 0
    assert works[1].provenance["detector"] == gemini.name


def test_without_a_key_there_is_no_detector(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMINI_API_KEY", "")
    refuses(r"GEMINI_API_KEY.*--detector", detector)
    monkeypatch.setenv("GOOGLE_API_KEY", "other-key")
    detector().detect([noise(0)])
    assert server.headers[0]["x-goog-api-key"] == "other-key"


def test_without_a_network_it_says_so_once_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        gemini = detector()
        with pytest.raises(RetryableError, match="network"):
            gemini.detect([noise(0)])
        monkeypatch.setattr(module, "MAX_ATTEMPTS", 10**9)  # would never return if it tried again
        with pytest.raises(RetryableError, match="network"):
            gemini.detect([noise(1)])
