"""Gemini as a detector: one request per image, boxes and names as structured JSON, as the paper
did.

Which of Gemini's models is our choice, and so is the prompt. Retries are ours, because those of
Google's client (off) neither wait as long as the service asks nor stop when the day's quota is used
up.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import random
import re
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Len
from pydantic import BaseModel, ConfigDict, FiniteFloat, TypeAdapter, ValidationError

from spear.errors import RetryableError, SpearError, format_count, import_optional, summarize_error
from spear.labels.fit.image import compute_iou_2d, shrink_image
from spear.labels.models.protocols import Detection
from spear.types import Array, Frame
from spear.util.files import write_text
from spear.util.images import encode_jpeg
from spear.util.network import check_proxies, explain_unreachable

MODEL = "gemini-3.8-flash"
KEY_VARIABLES = ("GEMINI_API_KEY", "GOOGLE_API_KEY")
"""Environment variables in which the key is looked for, in this order."""
URL_VARIABLE = "GOOGLE_GEMINI_BASE_URL"  # where the client reads it too
SERVICE_URL = "https://generativelanguage.googleapis.com"
ALTERNATIVE_ADVICE = 'find objects without it: --detector owlv2 --vocabulary "mug, spoon"'

MAX_OUTPUT_TOKENS = 16384  # thinking included; ends the rare answer that repeats itself for ever
THINKING_LEVEL = "low"  # how much Gemini thinks before it answers
MAX_SIDE_PX = 1536  # larger images are sent scaled down
IMAGE_TOKENS = 1120  # at most, of a picture (Gemini 3 at its default resolution)
CHARACTERS_PER_TOKEN = 4  # of text, by Google's rule
MAX_CONCURRENT_REQUESTS = 8
TIMEOUT_S = 120.0  # of one request
MAX_ATTEMPTS = 6  # requests per image before it is given up, overload included
MAX_UNUSABLE_ANSWERS = 2  # per image; they are paid for
FIRST_WAIT_S = 1.0  # after the first failure; doubled after each
MAX_WAIT_S = 120.0  # if the service asks for a longer wait, no quota is left
MAX_REASON_LENGTH = 200  # characters of a message of the service that are repeated
MAX_OVERSHOOT = 50  # thousandths by which a box may end outside the image, where it is clipped
DUPLICATE_IOU = 0.9  # a box of the same label with a higher IoU is the same object

_RETRYABLE_CODES = (408, 429, 500, 502, 503, 504)
_FATAL_CODES = (401, 403, 404)

_REQUEST = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
PROMPT: str = _REQUEST["prompt"]
VOCABULARY_SENTENCE: str = _REQUEST["vocabulary"]
SCHEMA: dict[str, Any] = _REQUEST["schema"]


class GeminiDetector:
    """Finds and names objects with Gemini (`google-genai`; the key comes from the environment).

    The requests for the images of a batch run at the same time. The detector waits when the service
    is overloaded (429, 5xx, lost connections), as long as the service asks or with exponential
    backoff. It asks once more after an unusable answer. An image that the service refuses is a
    `SpearError`, one that stays unanswered a `RetryableError`. So is what would fail for every
    image (key, model, daily quota, no network); all later images then fail at once.

    Answers are cached by image, prompt and settings, so that a repeated run costs nothing.

    Args:
        model: Name of Gemini's model.
        cache: Folder of answers, which several processes may share.
        vocabulary: The only names to detect; when empty, whatever is there.
        requests_per_minute: Maximum number of requests per minute, evenly spread; 0 leaves the rate
            to the service.

    Raises:
        SpearError: There is no key, google-genai is not installed, or its HTTP client cannot use a
            proxy that the environment names.
    """

    def __init__(
        self,
        model: str = MODEL,
        *,
        cache: Path,
        vocabulary: Sequence[str] = (),
        requests_per_minute: int = 0,
    ) -> None:
        self.model = model
        self.cache = cache
        self.prompt = build_prompt(vocabulary)
        prompt_hash = hashlib.sha256(self.prompt.encode()).hexdigest()[:8]
        settings = f"thinking {THINKING_LEVEL}, max side {MAX_SIDE_PX}"
        self.name = f"gemini {model} (prompt {prompt_hash}, {settings})"

        # Google's client
        self._key = _read_key()
        genai = import_optional("google.genai", "label", "Gemini")
        check_proxies("Gemini")
        self._types = genai.types
        self._errors = genai.errors
        self._connection_errors = _find_connection_errors()
        self._url = os.environ.get(URL_VARIABLE, SERVICE_URL)
        options = genai.types.HttpOptions(api_version="v1beta", timeout=int(1000 * TIMEOUT_S))
        self._client = genai.Client(api_key=self._key, vertexai=False, http_options=options)
        self._config = genai.types.GenerateContentConfig(
            response_mime_type="application/json",
            response_schema=SCHEMA,
            max_output_tokens=MAX_OUTPUT_TOKENS,
            thinking_config=genai.types.ThinkingConfig(thinking_level=THINKING_LEVEL),
        )

        # What the threads share
        self.usage = Counter[str]()
        self._min_interval_s = 60 / (requests_per_minute or np.inf)
        self._next_request_s = 0.0  # no request before then (monotonic time)
        self._fatal_reason: str | None = None
        self._lock = threading.Lock()
        self._results_of_failed_batch: dict[str, list[Detection] | SpearError] = {}  # by image

    def detect(self, frames: Sequence[Frame]) -> list[list[Detection]]:
        """The objects of each image, as Gemini lists them."""
        with ThreadPoolExecutor(MAX_CONCURRENT_REQUESTS) as threads:
            results = list(threads.map(self._detect_in_frame, frames))
        failures = [result for result in results if isinstance(result, SpearError)]
        if not failures:
            return [result for result in results if not isinstance(result, SpearError)]
        if len(frames) > 1:  # the pipeline asks again image by image, which must cost nothing
            hashes = [self._hash_request(frame.image) for frame in frames]
            self._results_of_failed_batch = dict(zip(hashes, results, strict=True))
        raise failures[0]

    def bill(self) -> str:
        """What was asked so far: requests that reached the service, and tokens (out: thinking as
        well)."""
        if not self.usage:
            return ""
        return (
            f"{self.model}: {format_count(self.usage['requests'], 'requests')}, "
            f"{format_count(self.usage['cached'], 'answers')} from cache, "
            f"{self.usage['input']} tokens in, {self.usage['output']} out"
        )

    def _detect_in_frame(self, frame: Frame) -> list[Detection] | SpearError:
        """The objects of one image, or why there are none."""
        request_hash = self._hash_request(frame.image)
        earlier_result = self._results_of_failed_batch.pop(request_hash, None)
        if earlier_result is not None:
            return earlier_result

        # The cache
        height, width = frame.image.shape[:2]
        path = self.cache / request_hash[:2] / f"{request_hash}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            detections = parse_detections(json.loads(path.read_bytes())["text"], height, width)
            with self._lock:
                self.usage["cached"] += 1
            return detections

        # The service
        try:
            text, detections = self._ask(frame)
        except SpearError as error:
            return error
        try:
            write_text(path, json.dumps({"model": self.model, "text": text}))
        except SpearError as error:
            return self._stop(f"cannot store an answer ({error}). Choose another cache folder.")
        return detections

    def _hash_request(self, image: Array) -> str:
        request = [self.model, self.prompt, SCHEMA, THINKING_LEVEL, None, MAX_SIDE_PX, image.shape]
        return hashlib.sha256(json.dumps(request).encode() + image.tobytes()).hexdigest()

    def _ask(self, frame: Frame) -> tuple[str, list[Detection]]:
        """The text of a usable answer, and the objects in it."""
        jpeg = encode_jpeg(shrink_image(frame.image, MAX_SIDE_PX))
        image_part = self._types.Part.from_bytes(data=jpeg, mime_type="image/jpeg")
        height, width = frame.image.shape[:2]
        source = frame.source or "the image"
        reason = ""
        num_unusable = 0
        for attempt in range(MAX_ATTEMPTS):
            self._wait_for_turn()
            # less up to half by chance, so that many clients do not come back at once
            wait_s = min(MAX_WAIT_S, FIRST_WAIT_S * 2.0**attempt) * random.uniform(0.5, 1.0)
            try:
                response = self._client.models.generate_content(
                    model=self.model, contents=[image_part, self.prompt], config=self._config
                )
                self._count_request(response.usage_metadata)
                text = extract_text(response, source)
                return text, parse_detections(text, height, width)
            except self._errors.APIError as error:
                self._count_request()
                reason = self._quote(f"{error.code} {error.status or ''}: {error.message or ''}")
                wait_s = self._choose_wait(error, reason, source, wait_s)
            except self._connection_errors as error:
                reason = self._quote(f"no connection: {summarize_error(error)}")
            except UnusableAnswerError as error:
                reason = self._quote(f"unusable answer: {error}")
                wait_s = 0.0
                num_unusable += 1
            except ValueError as error:  # the client could not read the response
                self._count_request()
                reason = self._quote(f"unreadable response: {error}")
                num_unusable += 1
            if num_unusable == MAX_UNUSABLE_ANSWERS or attempt + 1 == MAX_ATTEMPTS:
                break
            time.sleep(wait_s)
        raise RetryableError(
            f"Gemini gave no answer to {source} in {format_count(attempt + 1, 'attempts')} "
            f"({reason}). Label it again."
        )

    def _wait_for_turn(self) -> None:
        """Return when a request may be made; raise `RetryableError` when none can succeed any
        more."""
        if self._fatal_reason is None:
            problem = explain_unreachable(self._url)
            if problem:
                self._stop(
                    f"cannot reach the service ({problem}). Check the network and label again, or "
                    f"{ALTERNATIVE_ADVICE}"
                )
        while self._fatal_reason is None:
            with self._lock:
                wait_s = self._next_request_s - time.monotonic()
                if wait_s <= 0:
                    self._next_request_s = time.monotonic() + self._min_interval_s
                    return
            time.sleep(wait_s)
        raise RetryableError(self._fatal_reason)

    def _quote(self, message: str) -> str:
        """The beginning of a message of the service, without our key, which it may have
        repeated."""
        return summarize_error(message.replace(self._key, "[the key]"))[:MAX_REASON_LENGTH]

    def _choose_wait(self, error: Any, reason: str, source: str, default_wait_s: float) -> float:
        """Seconds until the next attempt after an error of the service; `SpearError` when it is
        pointless."""
        details = json.dumps(error.details, default=str)
        if error.code in _FATAL_CODES or "API_KEY_INVALID" in details:
            advice = f"Check the key in {' or '.join(KEY_VARIABLES)}."
            if error.code == 404:
                advice = "Choose another model."
            raise self._stop(f"refuses all requests ({reason}). {advice}")
        if error.code not in _RETRYABLE_CODES:
            raise SpearError(
                f"Gemini refused {source} ({reason}). Change the settings, or leave it out."
            )

        advised_s = _find_advised_wait(error, details)
        is_daily_quota = "PerDay" in details  # as Google names the quota of a day
        if is_daily_quota or (advised_s or 0) > MAX_WAIT_S:
            when = "tomorrow" if is_daily_quota else f"in {advised_s:.0f} s"
            raise self._stop(f"has no quota left ({reason}). Label again {when}.")
        if advised_s is None:
            return default_wait_s
        with self._lock:
            self._next_request_s = max(self._next_request_s, time.monotonic() + advised_s)
        return advised_s

    def _stop(self, message: str) -> RetryableError:
        """Make this and all later images fail for one reason."""
        self._fatal_reason = f"{self.model} {message}"
        return RetryableError(self._fatal_reason)

    def _count_request(self, tokens: Any = None) -> None:
        with self._lock:
            self.usage["requests"] += 1
            if tokens is not None:
                self.usage["input"] += tokens.prompt_token_count or 0
                self.usage["output"] += tokens.candidates_token_count or 0
                self.usage["output"] += tokens.thoughts_token_count or 0


def _read_key() -> str:
    for variable in KEY_VARIABLES:
        key = os.environ.get(variable)
        if key:
            return key
    raise SpearError(
        f"Gemini needs a key. Set {KEY_VARIABLES[0]} (get one at "
        f"https://aistudio.google.com/apikey), or {ALTERNATIVE_ADVICE}"
    )


def _find_connection_errors() -> tuple[type[Exception], ...]:
    """The errors of a lost connection, of httpx or its successor httpx2, whichever is installed."""
    errors = []
    for name in ("httpx2", "httpx"):
        if importlib.util.find_spec(name):
            errors.append(importlib.import_module(name).TransportError)
    return tuple(errors)


def _find_advised_wait(error: Any, details: str) -> float | None:
    """The seconds that the service asks to wait, in google.rpc.RetryInfo ("38s") or the header;
    else None."""
    advised_s = [float(text) for text in re.findall(r'"retryDelay": "(\d+\.?\d*)s"', details)]
    header = getattr(error.response, "headers", {}).get("retry-after", "")
    if re.fullmatch(r"\d+\.?\d*", header):  # not a date
        advised_s.append(float(header))
    return max(advised_s, default=None)


def build_prompt(vocabulary: Sequence[str]) -> str:
    """The prompt that goes with every image."""
    if not vocabulary:
        return PROMPT
    return PROMPT + VOCABULARY_SENTENCE.format(names=", ".join(vocabulary))


def estimate_input_tokens(vocabulary: Sequence[str]) -> int:
    """About how many tokens a request takes, by Google's rules for pictures and text."""
    text = build_prompt(vocabulary) + json.dumps(SCHEMA)
    return IMAGE_TOKENS + len(text) // CHARACTERS_PER_TOKEN


class UnusableAnswerError(ValueError):
    """An answer that is not what was asked for."""


class _AnswerObject(BaseModel):
    """One object of an answer; box_2d is ymin, xmin, ymax, xmax in thousandths of the image."""

    model_config = ConfigDict(strict=True)
    label: str
    box_2d: Annotated[list[FiniteFloat], Len(4, 4)]


_ANSWER = TypeAdapter(list[_AnswerObject])


def parse_detections(text: str, height: int, width: int) -> list[Detection]:
    """Read an answer of Gemini.

    Args:
        text: The answer.
        height: Height of the image in pixels.
        width: Width of the image in pixels.

    Returns:
        Detections in pixels, clipped to the image. Repeated ones (same label, IoU above
        `DUPLICATE_IOU`) are dropped.

    Raises:
        UnusableAnswerError: The answer is not what the schema says, or one of its objects has no
            name or no usable box. Leaving only that object out would make the image's other cup
            "the cup".
    """
    fenced = re.search(r"```(?:json)?\s(.*?)```", text, re.DOTALL)
    try:
        answer = _ANSWER.validate_json(fenced[1] if fenced else text)
    except ValidationError as error:
        raise UnusableAnswerError(summarize_error(error)) from error

    detections: list[Detection] = []
    for item in answer:
        name = " ".join(item.label.lower().split())
        if not name:
            raise UnusableAnswerError(f"an object at {item.box_2d} has no name")
        box = _to_pixel_box(item, height, width)
        if not _is_repeated(name, box, detections):
            detections.append(Detection(name, box))
    return detections


def _to_pixel_box(item: _AnswerObject, height: int, width: int) -> Array:
    """The box [4] x0, y0, x1, y1 of an object in pixels, clipped to the image.

    Raises:
        UnusableAnswerError: The box is upside down, on another scale than thousandths, or less than
            a pixel wide or high.
    """
    y0, x0, y1, x1 = item.box_2d
    box = f"the box {item.box_2d} of {item.label!r}"
    if y1 < y0 or x1 < x0:
        raise UnusableAnswerError(f"{box} ends before it begins")
    lowest = min(x0, y0)
    highest = max(x1, y1)
    is_in_range = lowest >= -MAX_OVERSHOOT and highest <= 1000 + MAX_OVERSHOOT
    if not is_in_range or highest <= 1:
        raise UnusableAnswerError(f"{box} is not in thousandths of the image")

    x0, y0, x1, y1 = np.clip(np.array([x0, y0, x1, y1]) / 1000, 0, 1) * (
        width,
        height,
        width,
        height,
    )
    if min(x1 - x0, y1 - y0) < 1:
        raise UnusableAnswerError(f"{box} is less than a pixel wide or high")
    return np.array([x0, y0, x1, y1], np.float32)


def _is_repeated(name: str, box: Array, detections: Sequence[Detection]) -> bool:
    for detection in detections:
        overlap = float(compute_iou_2d(detection.box2d, box))
        if detection.name == name and overlap > DUPLICATE_IOU:
            return True
    return False


def extract_text(response: Any, source: str) -> str:
    """The text of a response.

    Raises:
        SpearError: Gemini refused the image.
        UnusableAnswerError: The answer is cut off or empty.
    """
    feedback = response.prompt_feedback
    if feedback and feedback.block_reason:
        raise SpearError(
            f"Gemini blocked {source} ({feedback.block_reason.value}). Leave the image out."
        )
    end = response.candidates[0].finish_reason if response.candidates else None
    if end not in ("STOP", "MAX_TOKENS", "MALFORMED_RESPONSE", None):
        raise SpearError(f"Gemini refused to answer {source} ({end.value}). Leave the image out.")
    if end == "MAX_TOKENS":
        raise UnusableAnswerError("cut off at the limit of tokens")
    if not response.text:
        raise UnusableAnswerError("empty")
    return str(response.text)
