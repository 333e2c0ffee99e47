"""Gemini as a detector: requests, answers, waiting, failures, and the cache of answers.

The real client talks to a local server (`gemini_server`). The server sends `server.replies` one
after another and repeats the last one; without replies it detects nothing. Frame number i of
`make_noise_frame` has the source "i.jpg".
"""

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

from gemini_server import (
    Reply,
    Server,
    make_boxes_reply,
    make_error_reply,
    make_retry_info,
    make_text_reply,
    read_picture,
    run_server,
)
from labels_stand_ins import make_noise_frame
from refusals import refuses
from spear.errors import RetryableError, SpearError
from spear.labels.models import gemini as module
from spear.labels.models.gemini import PROMPT, GeminiDetector, UnusableAnswerError, parse_detections
from spear.labels.pipeline import detect_and_add_detections, make_checked_pending_image
from spear.types import Frame

pytest.importorskip("google.genai")

CUP = ("red cup", [100, 250, 500, 750])  # ymin, xmin, ymax, xmax in thousandths of the image
DAILY_QUOTA = {  # details of an error that says that the daily quota is used up
    "@type": "x/google.rpc.QuotaFailure",
    "violations": [{"quotaId": "RequestsPerDayPerProject"}],
}
BUSY = make_error_reply(429, "RESOURCE_EXHAUSTED", "Slow down.", make_retry_info("0.3s"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with run_server() as running:
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", running.address)
        yield running


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A key in the environment, short waits, and temporary folders inside `tmp_path`."""
    monkeypatch.setenv("GEMINI_API_KEY", "secret-key")
    monkeypatch.delenv("GOOGLE_API_KEY", raising=False)
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def make_detector(cache: Path | None = None, **changes: Any) -> GeminiDetector:
    """Make a detector; without `cache` it has a new, empty cache."""
    return GeminiDetector(cache=cache or Path(tempfile.mkdtemp()), **changes)


def to_rows(detections: Any) -> list[tuple[str, list[float]]]:
    """The name and the rounded 2D box of each detection, to compare them."""
    return [(d.name, [round(float(v), 3) for v in d.box2d]) for d in detections]


SMOOTH_IMAGE = np.linspace(0, 255, 400 * 100 * 3).reshape(100, 400, 3).astype(np.uint8)
"""An image of 400 × 100 pixels without details, which JPEG and resizing hardly change."""


@pytest.fixture
def request_body(server: Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The body of the request for `SMOOTH_IMAGE`, which is sent with at most 200 pixels a side."""
    monkeypatch.setattr(module, "MAX_SIDE_PX", 200)
    make_detector(model="gemini-x", vocabulary=["cup", "fork"]).detect([Frame(SMOOTH_IMAGE)])
    (body,) = server.requests
    return body


def test_the_request_goes_to_the_model_with_the_key(
    server: Server, request_body: dict[str, Any]
) -> None:
    assert server.paths == ["/v1beta/models/gemini-x:generateContent"]
    assert server.headers[0]["x-goog-api-key"] == "secret-key"


def test_the_request_contains_the_image_scaled_down(request_body: dict[str, Any]) -> None:
    sent_image = read_picture(request_body)

    assert sent_image.shape == (50, 200, 3)
    assert np.abs(sent_image.astype(int) - SMOOTH_IMAGE[::2, ::2]).mean() < 4


def test_the_request_contains_the_prompt_with_the_vocabulary(request_body: dict[str, Any]) -> None:
    prompt = request_body["contents"][0]["parts"][1]["text"]

    assert prompt.startswith(PROMPT)
    assert "cup, fork" in prompt


def test_the_request_contains_the_schema_of_answers(request_body: dict[str, Any]) -> None:
    config = request_body["generationConfig"]

    assert config["responseMimeType"] == "application/json"
    assert config["responseSchema"]["type"] == "ARRAY"
    assert set(config["responseSchema"]["items"]["required"]) == {"box_2d", "label"}
    assert config["thinkingConfig"] == {"thinkingLevel": "LOW"}


def test_boxes_are_clipped_and_repeated_ones_dropped() -> None:
    answer = [
        {"label": "cut", "box_2d": [-40, 900, 300, 1050]},  # reaches beyond the image
        {"label": "cup", "box_2d": [100, 100, 500, 600]},
        {"label": "cup", "box_2d": [101, 100, 500, 600.5]},  # nearly the same box
        {"label": "mug", "box_2d": [100, 100, 500, 600]},  # the same box with another name
    ]

    detections = parse_detections(json.dumps(answer), height=100, width=50)

    assert to_rows(detections) == [
        ("cut", [45, 0, 50, 30]),
        ("cup", [5, 10, 30, 50]),
        ("mug", [5, 10, 30, 50]),
    ]


UNUSABLE_OBJECTS = [
    (("cup", [500, 100, 100, 600]), "ends before it begins"),
    (("cup", [100, 600, 500, 100]), "ends before it begins"),
    (("cup", [100, 1100, 300, 1300]), "thousandths"),  # in pixels of a large image
    (("cup", [-300, 100, 500, 600]), "thousandths"),
    (("cup", [0.1, 0.25, 0.5, 0.75]), "thousandths"),  # in fractions of the image
    (("cup", [100, 100, 500, 110]), "less than a pixel"),  # 0.5 pixels wide
    (("cup", [0, 0, 0, 0]), "thousandths"),
    (("cup", [200, 300, 200, 300]), "less than a pixel"),
    ((" ", [100, 100, 500, 600]), "no name"),
]


@pytest.mark.parametrize(("unusable", "reason"), UNUSABLE_OBJECTS)
def test_one_unusable_object_makes_the_answer_unusable(
    unusable: tuple[str, list[float]], reason: str
) -> None:
    other_cup = ("cup", [100, 250, 500, 750])
    answer = [{"label": name, "box_2d": box} for name, box in (other_cup, unusable)]

    with pytest.raises(UnusableAnswerError, match=reason):
        parse_detections(json.dumps(answer), height=100, width=50)


@pytest.mark.parametrize(
    "box",
    [
        [800, 250, 500, 750],  # upside down
        [100, 250, 500, 1900],  # not in thousandths
        [0, 0.2, 0.5, 0.9],  # in fractions
    ],
)
def test_after_an_unusable_box_the_detector_asks_again_and_caches_the_second_answer(
    server: Server, tmp_path: Path, box: list[float]
) -> None:
    server.replies = [make_boxes_reply(CUP, ("red cup", box)), make_boxes_reply(CUP)]
    frame = make_noise_frame(0)

    make_detector(tmp_path / "answers").detect([frame])
    (detections,) = make_detector(tmp_path / "answers").detect([frame])

    assert [d.name for d in detections] == ["red cup"]
    assert len(server.requests) == 2  # both by the first detector


@pytest.mark.parametrize("box", [[800, 250, 500, 750], [0.1, 0.2, 0.5, 0.9]])
def test_unusable_boxes_are_not_cached_as_an_empty_answer(
    server: Server, tmp_path: Path, box: list[float]
) -> None:
    cache = tmp_path / "answers"
    server.replies = [make_boxes_reply(("red cup", box))]

    with pytest.raises(RetryableError, match=r"0\.jpg.*red cup"):
        make_detector(cache).detect([make_noise_frame(0)])

    assert not list(cache.rglob("*.json"))


@pytest.mark.parametrize("template", ["```json\n{}\n```", "Here it is:\n```\n{}\n```\n"])
def test_an_answer_may_be_in_a_code_block(template: str) -> None:
    answer = json.dumps([{"label": "cup", "box_2d": [100, 100, 500, 600]}])

    detections = parse_detections(template.format(answer), height=100, width=50)

    assert to_rows(detections) == [("cup", [5, 10, 30, 50])]


@pytest.mark.parametrize(
    ("answer", "part_of_message"),
    [
        ("I see a cup.", "JSON"),
        ('[{"box_2d": [1, 2, 3, 4], "label": "cup"', "JSON"),  # cut off
        ("[" * 100_000, "JSON"),
        ('[{"label": "\\ud800", "box_2d": [1, 2, 3, 4]}]', "JSON"),  # half of a character
        ('{"label": "cup"}', "array"),
        ('[{"box_2d": [1, 2, 3, 4]}]', r"0\.label"),
        ('[{"label": "cup"}]', r"0\.box_2d"),
    ],
)
def test_an_answer_that_does_not_follow_the_schema_is_unusable(
    answer: str, part_of_message: str
) -> None:
    with pytest.raises(UnusableAnswerError, match=part_of_message):
        parse_detections(answer, height=10, width=10)


@pytest.mark.parametrize("box", ["1, 2, 3", '1, 2, 3, "4"', "1, 2, 3, NaN", "1, 2, 3, true"])
def test_a_box_that_is_not_four_numbers_is_unusable(box: str) -> None:
    with pytest.raises(UnusableAnswerError, match=r"0\.box_2d"):
        parse_detections(f'[{{"label": "cup", "box_2d": [{box}]}}]', height=10, width=10)


def test_a_box_with_a_number_too_large_for_a_float_is_unusable() -> None:
    number = "1" + "0" * 400

    with pytest.raises(UnusableAnswerError, match=r"0\.box_2d"):
        parse_detections(
            f'[{{"label": "cup", "box_2d": [1, 2, 3, {number}]}}]', height=10, width=10
        )


@pytest.mark.parametrize(
    "reply",
    [
        # The message is shortened to 200 characters, which must not cut the key in two.
        make_error_reply(400, "INVALID_ARGUMENT", "x" * 150 + " the key secret-key is bad"),
        make_error_reply(403, "secret-key", "API key secret-key has no access."),
        make_error_reply(503, "UNAVAILABLE", "secret-key"),
        Reply(body="<html> secret-key"),
        make_text_reply("secret-key"),
    ],
)
def test_messages_do_not_contain_a_key_that_the_service_repeats(
    server: Server, reply: Reply
) -> None:
    server.replies = [reply]
    gemini = make_detector()

    message = refuses("", gemini.detect, [make_noise_frame(0), make_noise_frame(1)])

    assert "secret" not in message
    assert "secret" not in gemini.describe_costs_so_far()


def test_requests_are_spread_over_a_minute(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock on which only sleeping takes time replaces the module `time`.
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "MAX_CONCURRENT_REQUESTS", 1)

    make_detector(requests_per_minute=20).detect([make_noise_frame(i) for i in range(4)])

    assert clock.now == pytest.approx(9.0)  # three intervals of 60 s / 20 before the last request
    assert len(server.requests) == 4


def test_rate_limiting_waits_as_long_as_asked(server: Server) -> None:
    # The first reply asks for 0.3 s in its details, the second one for 0.4 s in its header.
    server.replies = [
        BUSY,
        make_error_reply(429, "RESOURCE_EXHAUSTED", "More.", Retry_After="0.4"),
        make_boxes_reply(CUP),
    ]

    (detections,) = make_detector().detect([make_noise_frame(0)])

    assert [d.name for d in detections] == ["red cup"]
    first_time, second_time, third_time = server.times
    assert second_time - first_time >= 0.3
    assert third_time - second_time >= 0.4


OVERLOADED = make_error_reply(503, "UNAVAILABLE", "The model is overloaded.")


def test_overload_that_ends_is_waited_out(server: Server) -> None:
    bad_gateway = Reply(502, "<html>Bad gateway</html>")
    internal_error = make_error_reply(500, "INTERNAL", "Oops.")
    server.replies = [OVERLOADED, bad_gateway, internal_error, make_boxes_reply(CUP)]
    gemini = make_detector()

    (detections,) = gemini.detect([make_noise_frame(0)])

    assert [d.name for d in detections] == ["red cup"]
    assert len(server.requests) == 4
    assert gemini.usage["requests"] == 4


def test_overload_that_does_not_end_concerns_one_image(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ATTEMPTS", 3)
    server.replies = [OVERLOADED, OVERLOADED, OVERLOADED, make_boxes_reply(CUP)]
    gemini = make_detector()

    with pytest.raises(RetryableError, match=r"0\.jpg .*503"):
        gemini.detect([make_noise_frame(0)])

    assert len(gemini.detect([make_noise_frame(1)])[0]) == 1


# Three kinds of failing replies, each with a part of the error's message: answers after which the
# detector asks once more, refusals of one image, and errors that every image would meet
UNUSABLE = [
    (make_text_reply("I see a cup."), "JSON"),
    (make_text_reply("[{", end="MAX_TOKENS"), "cut off"),
    (make_text_reply(""), "empty"),
    (Reply(body={"candidates": [{"finishReason": "MALFORMED_RESPONSE"}]}), "empty"),
    (Reply(body="<html>"), "unreadable response"),
]
REFUSALS = [
    (make_error_reply(400, "INVALID_ARGUMENT", "Unable to process input image."), "400 .*Unable"),
    (Reply(body={"promptFeedback": {"blockReason": "SAFETY"}}), "SAFETY"),
    (Reply(body={"candidates": [{"finishReason": "SAFETY", "index": 0}]}), "SAFETY"),
    (make_text_reply("[]", end="SOMETHING_NEW"), "SOMETHING_NEW"),
]
FATAL = [
    (
        make_error_reply(429, "RESOURCE_EXHAUSTED", "Daily quota.", make_retry_info("7200s")),
        "7200 s",
    ),
    (
        make_error_reply(429, "RESOURCE_EXHAUSTED", "Quota.", DAILY_QUOTA, make_retry_info("9s")),
        "tomorrow",
    ),
    (make_error_reply(404, "NOT_FOUND", "models/gemini-x is not found"), "404 .*gemini-x"),
    (make_error_reply(403, "PERMISSION_DENIED", "No."), "403 .*GEMINI_API_KEY"),
    (
        make_error_reply(400, "INVALID_ARGUMENT", "No.", {"reason": "API_KEY_INVALID"}),
        "GEMINI_API_KEY",
    ),
]


@pytest.mark.parametrize(("reply", "reason"), UNUSABLE)
@pytest.mark.filterwarnings("ignore:.*is not a valid")
def test_after_an_unusable_answer_the_detector_asks_once_more(
    server: Server, reply: Reply, reason: str
) -> None:
    server.replies = [reply, make_boxes_reply(CUP)]

    (detections,) = make_detector().detect([make_noise_frame(0)])

    assert len(detections) == 1
    assert len(server.requests) == 2


@pytest.mark.parametrize(("reply", "reason"), UNUSABLE)
@pytest.mark.filterwarnings("ignore:.*is not a valid")
def test_an_image_with_two_unusable_answers_may_be_retried(
    server: Server, reply: Reply, reason: str
) -> None:
    server.replies = [reply]
    gemini = make_detector()

    with pytest.raises(RetryableError, match=rf"0\.jpg.*{reason}"):
        gemini.detect([make_noise_frame(0)])

    assert len(server.requests) == 2
    server.replies = [make_boxes_reply(CUP)]
    assert len(gemini.detect([make_noise_frame(1)])[0]) == 1


@pytest.mark.parametrize(("reply", "reason"), REFUSALS)
@pytest.mark.filterwarnings("ignore:.*is not a valid")
def test_a_refusal_concerns_one_image(server: Server, reply: Reply, reason: str) -> None:
    server.replies = [reply, make_boxes_reply(CUP)]
    gemini = make_detector()

    with pytest.raises(SpearError, match=reason) as refusal:
        gemini.detect([make_noise_frame(0)])

    assert not isinstance(refusal.value, RetryableError)
    assert "0.jpg" in str(refusal.value)
    assert len(gemini.detect([make_noise_frame(1)])[0]) == 1
    assert len(server.requests) == 2


@pytest.mark.parametrize(("reply", "reason"), FATAL)
def test_after_an_error_that_every_image_would_meet_nothing_is_requested(
    server: Server, reply: Reply, reason: str
) -> None:
    server.replies = [reply, make_boxes_reply(CUP)]
    gemini = make_detector()

    with pytest.raises(RetryableError, match=reason):
        gemini.detect([make_noise_frame(0)])
    with pytest.raises(RetryableError, match=reason):
        gemini.detect([make_noise_frame(1)])

    assert len(server.requests) == 1


def test_images_of_a_batch_are_requested_at_the_same_time_and_get_their_own_answers(
    server: Server,
) -> None:
    """The images have widths of 60 to 65 pixels; an answer names the width of its image."""
    barrier = threading.Barrier(3, timeout=60)

    def answer(request: dict[str, Any]) -> Reply:
        barrier.wait()  # until three requests have arrived
        width = read_picture(request).shape[1]
        time.sleep(0.02 * (66 - width))  # earlier images are answered later
        return make_boxes_reply((f"thing {width}", [0, 0, 1000, 1000]))

    server.answer = answer

    frames = [make_noise_frame(i, height=40, width=60 + i) for i in range(6)]
    detections = make_detector().detect(frames)

    names = [d.name for (d,) in detections]
    assert names == [f"thing {60 + i}" for i in range(6)]


def test_cached_answers_make_no_request(server: Server, tmp_path: Path) -> None:
    server.replies = [make_boxes_reply(CUP)]
    (detections,) = make_detector(tmp_path).detect([make_noise_frame(0)])
    gemini = make_detector(tmp_path)

    (cached_detections,) = gemini.detect([make_noise_frame(0)])

    assert to_rows(cached_detections) == to_rows(detections)
    assert len(server.requests) == 1
    assert gemini.usage == {"cached": 1}


def test_the_bill_counts_requests_answers_and_tokens(server: Server, tmp_path: Path) -> None:
    server.replies = [make_boxes_reply(CUP)]
    make_detector(tmp_path).detect([make_noise_frame(0)])
    gemini = make_detector(tmp_path)

    gemini.detect([make_noise_frame(0), make_noise_frame(1)])

    # The server's replies count 1200 input tokens and 80 + 20 output tokens (with thinking).
    assert gemini.usage == {"requests": 1, "cached": 1, "input": 1200, "output": 100}
    for phrase in ("1 request,", "1 answer ", "1200", "100"):
        assert phrase in gemini.describe_costs_so_far()


@pytest.mark.parametrize("changes", [{"vocabulary": ["cup"]}, {"model": "other"}])
def test_other_settings_have_other_answers(
    server: Server, tmp_path: Path, changes: dict[str, Any]
) -> None:
    server.replies = [make_boxes_reply(CUP)]
    make_detector(tmp_path).detect([make_noise_frame(0)])

    make_detector(tmp_path, **changes).detect([make_noise_frame(0)])

    assert len(server.requests) == 2


def test_a_broken_answer_in_the_cache_is_requested_again(server: Server, tmp_path: Path) -> None:
    server.replies = [make_boxes_reply(CUP)]
    make_detector(tmp_path).detect([make_noise_frame(0)])
    for path in tmp_path.rglob("*.json"):
        path.write_text("broken")

    make_detector(tmp_path).detect([make_noise_frame(0)])

    assert len(server.requests) == 2


def test_the_cache_does_not_contain_the_key(server: Server, tmp_path: Path) -> None:
    server.replies = [make_boxes_reply(CUP)]
    make_detector(tmp_path).detect([make_noise_frame(0)])

    files = [path.read_text() for path in tmp_path.rglob("*.json")]
    assert files
    assert not any("secret-key" in content for content in files)


def test_in_the_pipeline_no_image_is_requested_twice(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service refuses the first of four images, so the pipeline calls again image by image."""
    monkeypatch.setattr(module, "MAX_CONCURRENT_REQUESTS", 1)  # so that replies keep their order
    server.replies = [
        Reply(body={"promptFeedback": {"blockReason": "SAFETY"}}),
        make_boxes_reply(CUP),
    ]
    gemini = make_detector()
    images = [make_checked_pending_image(make_noise_frame(i)) for i in range(4)]

    detect_and_add_detections(images, gemini)

    sources = [image.source for image in images if image.error is None and image.detections]
    assert sources == ["1.jpg", "2.jpg", "3.jpg"]
    assert "0.jpg (SAFETY)" in str(images[0].error)
    assert len(server.requests) == 4
    assert gemini.usage["cached"] == 0
    assert images[1].provenance["detector"] == gemini.name


def test_without_a_key_there_is_no_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMINI_API_KEY", "")

    refuses(r"GEMINI_API_KEY.*--detector", make_detector)


def test_the_key_may_be_in_the_second_variable(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMINI_API_KEY", "")
    monkeypatch.setenv("GOOGLE_API_KEY", "other-key")

    make_detector().detect([make_noise_frame(0)])

    assert server.headers[0]["x-goog-api-key"] == "other-key"


def test_without_a_network_later_images_fail_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        # The socket is bound but does not listen, so connections to it are refused.
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", f"http://127.0.0.1:{port}")
        gemini = make_detector()

        with pytest.raises(RetryableError, match="network"):
            gemini.detect([make_noise_frame(0)])

        # If the detector tried again, it would not end.
        monkeypatch.setattr(module, "MAX_ATTEMPTS", 10**9)
        with pytest.raises(RetryableError, match="network"):
            gemini.detect([make_noise_frame(1)])


@pytest.mark.parametrize("variable", ["ALL_PROXY", "https_proxy"])
def test_a_proxy_that_the_client_cannot_use_is_refused_with_advice(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "socks4://127.0.0.1:9")

    refuses(rf"Gemini .*{variable}.*\. Set it", make_detector)
