"""Gemini as a detector, as in the paper: one request per image, answered by structured JSON.

An answer is a list of objects, each with a name (`label`) and a 2D box. The model of Gemini and the
prompt are our choice. Retries are our own, because those of Google's client (which are off) neither
wait as long as the service asks nor stop when the day's quota is used up.
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
from spear.labels.fit.image import compute_elementwise_iou_2d, shrink_image
from spear.labels.models.protocols import Detection
from spear.types import Array, Frame
from spear.util.files import write_text
from spear.util.images import encode_jpeg
from spear.util.network import check_proxies, explain_unreachable

MODEL = "gemini-3.8-flash"
KEY_VARIABLES = ("GEMINI_API_KEY", "GOOGLE_API_KEY")
"""Environment variables in which the key is looked for, in this order."""
URL_VARIABLE = "GOOGLE_GEMINI_BASE_URL"  # Google's client reads the service's address from it
SERVICE_URL = "https://generativelanguage.googleapis.com"
ALTERNATIVE_ADVICE = 'find objects without it by --detector owlv2 --vocabulary "mug, spoon".'

MAX_OUTPUT_TOKENS = 16384  # with thinking; a rare answer repeats itself endlessly until this limit
THINKING_LEVEL = "low"  # how much Gemini thinks before it answers
MAX_SIDE_PX = 1536  # images with a longer side are shrunk to it before they are sent
IMAGE_TOKENS = 1120  # largest number of tokens of an image (Gemini 3 at its default resolution)
CHARACTERS_PER_TOKEN = 4  # Google's rule of thumb for text
MAX_CONCURRENT_REQUESTS = 8
TIMEOUT_S = 120.0  # of one request
MAX_ATTEMPTS = 6  # requests for one image, those that an overloaded service refuses included
MAX_UNUSABLE_ANSWERS = 2  # per image; fewer than attempts, because answers cost money
FIRST_WAIT_S = 1.0  # wait after the first failure; it doubles with each further failure
MAX_WAIT_S = 120.0  # if the service asks for a longer wait, the quota is used up
MAX_REASON_LENGTH = 200  # longer messages of the service are shortened to this many characters
MAX_OVERSHOOT = 50  # thousandths by which a box may extend beyond the image, before it is clipped
DUPLICATE_IOU = 0.9  # two boxes with the same name and a higher IoU are one object

# HTTP codes of errors that may pass, and of errors that every request would meet
_RETRYABLE_CODES = (408, 429, 500, 502, 503, 504)
_FATAL_CODES = (401, 403, 404)

_REQUEST = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
PROMPT: str = _REQUEST["prompt"]
VOCABULARY_SENTENCE: str = _REQUEST["vocabulary"]
SCHEMA: dict[str, Any] = _REQUEST["schema"]


class GeminiDetector:
    """Finds and names objects with Gemini.

    It uses Google's client (`google-genai`) and reads the key from the environment. The requests
    for the images of a batch run at the same time. Answers are cached by image, prompt and
    settings, so that a repeated run costs nothing.

    If the service is overloaded (429, 5xx, lost connections), the detector waits as long as the
    service asks, or with exponential backoff, and asks again. After an unusable answer it asks once
    more. An image that the service refuses raises `SpearError`; an image that stays without an
    answer raises `RetryableError`. A problem that concerns all images (key, model, daily quota,
    network) raises `RetryableError` as well, and then all later images fail without a request.

    Args:
        model: Name of Gemini's model.
        cache: Folder of answers, which several processes may share.
        vocabulary: The only names to detect; if it is empty, Gemini chooses objects and names.
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
        self._key = _read_api_key_from_environment()
        genai = import_optional("google.genai", "label", "Gemini")
        check_proxies("Gemini")
        self._types = genai.types
        self._errors = genai.errors
        self._connection_errors = _list_connection_error_types()
        self._url = os.environ.get(URL_VARIABLE, SERVICE_URL)
        timeout_ms = int(1000 * TIMEOUT_S)
        options = genai.types.HttpOptions(api_version="v1beta", timeout=timeout_ms)
        self._client = genai.Client(api_key=self._key, vertexai=False, http_options=options)
        self._config = genai.types.GenerateContentConfig(
            response_mime_type="application/json",
            response_schema=SCHEMA,
            max_output_tokens=MAX_OUTPUT_TOKENS,
            thinking_config=genai.types.ThinkingConfig(thinking_level=THINKING_LEVEL),
        )

        # State that the threads share
        self.usage = Counter[str]()  # requests, cached answers, input and output tokens
        self._min_interval_s = 60 / (requests_per_minute or np.inf)  # 0 without a maximum rate
        self._next_request_s = 0.0  # no request may start before this time (monotonic)
        self._fatal_reason: str | None = None  # why all later images fail
        self._lock = threading.Lock()
        # Hash of a request → its result, of a batch in which an image failed
        self._results_of_failed_batch: dict[str, list[Detection] | SpearError] = {}

    def detect(self, frames: Sequence[Frame]) -> list[list[Detection]]:
        """Detect the objects of each image, in Gemini's order."""
        with ThreadPoolExecutor(MAX_CONCURRENT_REQUESTS) as threads:
            results = list(threads.map(self._detect_in_frame, frames))
        failures = [result for result in results if isinstance(result, SpearError)]
        if not failures:
            # All results are detections; the condition tells the type checker so.
            return [result for result in results if not isinstance(result, SpearError)]
        # After an error the pipeline calls `detect` again, image by image. Keep the results for it,
        # so that no image is requested twice.
        if len(frames) > 1:
            hashes = [self._hash_request(frame.image) for frame in frames]
            self._results_of_failed_batch = dict(zip(hashes, results, strict=True))
        raise failures[0]

    def describe_costs_so_far(self) -> str:
        """One line about the requests that reached the service so far; empty without any.

        Output tokens include those of thinking.
        """
        if not self.usage:
            return ""
        return (
            f"{self.model}: {format_count(self.usage['requests'], 'requests')}, "
            f"{format_count(self.usage['cached'], 'answers')} from cache, "
            f"{self.usage['input']} tokens in, {self.usage['output']} out"
        )

    def _detect_in_frame(self, frame: Frame) -> list[Detection] | SpearError:
        """Detect the objects of one image, or return the error why this failed."""
        request_hash = self._hash_request(frame.image)
        earlier_result = self._results_of_failed_batch.pop(request_hash, None)
        if earlier_result is not None:
            return earlier_result

        # Use the cached answer if it can be read.
        height, width = frame.image.shape[:2]
        path = self.cache / request_hash[:2] / f"{request_hash}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            detections = parse_detections(json.loads(path.read_bytes())["text"], height, width)
            with self._lock:
                self.usage["cached"] += 1
            return detections

        # Otherwise ask the service, and cache its answer.
        try:
            text, detections = self._request_answer(frame)
        except SpearError as error:
            return error
        try:
            write_text(path, json.dumps({"model": self.model, "text": text}))
        except SpearError as error:
            return self._fail_later_images_and_make_error(
                f"cannot store an answer ({error}). Choose another cache folder."
            )
        return detections

    def _hash_request(self, image: Array) -> str:
        """Hash everything on which the answer depends. The hash names the cached answer."""
        # None stands for a setting of earlier versions, whose cached answers stay valid.
        request = [self.model, self.prompt, SCHEMA, THINKING_LEVEL, None, MAX_SIDE_PX, image.shape]
        return hashlib.sha256(json.dumps(request).encode() + image.tobytes()).hexdigest()

    def _request_answer(self, frame: Frame) -> tuple[str, list[Detection]]:
        """Request an answer until it is usable; returns its text and the objects in it."""
        jpeg = encode_jpeg(shrink_image(frame.image, MAX_SIDE_PX))
        image_part = self._types.Part.from_bytes(data=jpeg, mime_type="image/jpeg")
        height, width = frame.image.shape[:2]
        source = frame.source or "the image"
        reason = ""
        num_unusable = 0
        for attempt in range(MAX_ATTEMPTS):
            self._wait_for_turn()
            # A random part of up to half is subtracted, so that many clients that failed together
            # do not ask again at the same time.
            wait_s = min(MAX_WAIT_S, FIRST_WAIT_S * 2.0**attempt) * random.uniform(0.5, 1.0)
            try:
                response = self._client.models.generate_content(
                    model=self.model, contents=[image_part, self.prompt], config=self._config
                )
                self._record_request(response.usage_metadata)
                text = extract_text(response, source)
                return text, parse_detections(text, height, width)
            # A request counts if the service answered it, also if the answer is an error.
            except self._errors.APIError as error:
                self._record_request()
                reason = self._shorten_and_hide_key(
                    f"{error.code} {error.status or ''}: {error.message or ''}"
                )
                wait_s = self._handle_error_and_choose_wait_s(error, reason, source, wait_s)
            except self._connection_errors as error:  # no answer, so there is nothing to count
                reason = self._shorten_and_hide_key(f"no connection: {summarize_error(error)}")
            except UnusableAnswerError as error:  # counted above, before the answer was parsed
                reason = self._shorten_and_hide_key(f"unusable answer: {error}")
                wait_s = 0.0
                num_unusable += 1
            except ValueError as error:  # Google's client could not read the response
                self._record_request()
                reason = self._shorten_and_hide_key(f"unreadable response: {error}")
                num_unusable += 1
            if num_unusable == MAX_UNUSABLE_ANSWERS or attempt + 1 == MAX_ATTEMPTS:
                break
            time.sleep(wait_s)
        raise RetryableError(
            f"Gemini gave no answer to {source} in {format_count(attempt + 1, 'attempts')} "
            f"({reason}). Label it again."
        )

    def _wait_for_turn(self) -> None:
        """Wait until the next request may start.

        Raises:
            RetryableError: No request can succeed any more.
        """
        if self._fatal_reason is None:
            problem = explain_unreachable(self._url)
            if problem:
                self._fail_later_images_and_make_error(
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

    def _shorten_and_hide_key(self, message: str) -> str:
        """Shorten a message of the service, and remove our key from it."""
        message = message.replace(self._key, "[the key]")
        return summarize_error(message)[:MAX_REASON_LENGTH]

    def _handle_error_and_choose_wait_s(
        self, error: Any, reason: str, source: str, default_wait_s: float
    ) -> float:
        """React to an error of the service, and choose how many seconds to wait then.

        If the service says how long to wait, the requests for other images wait as long.

        Args:
            error: The error of Google's client.
            reason: The error in words.
            source: The image's source.
            default_wait_s: The wait if the service asks for none.

        Raises:
            SpearError: Another request for this image, or for any image, would fail as well.
        """
        details = json.dumps(error.details, default=str)
        if error.code in _FATAL_CODES or "API_KEY_INVALID" in details:
            advice = f"Check the key in {' or '.join(KEY_VARIABLES)}."
            if error.code == 404:
                advice = "Choose another model."
            raise self._fail_later_images_and_make_error(
                f"refuses all requests ({reason}). {advice}"
            )
        if error.code not in _RETRYABLE_CODES:
            raise SpearError(
                f"Gemini refused {source} ({reason}). Change the settings, or leave it out."
            )

        advised_s = _find_advised_wait_s(error, details)
        is_daily_quota = "PerDay" in details  # part of the name of Google's daily quotas
        if is_daily_quota or (advised_s or 0) > MAX_WAIT_S:
            when = "tomorrow" if is_daily_quota else f"in {advised_s:.0f} s"
            raise self._fail_later_images_and_make_error(
                f"has no quota left ({reason}). Label again {when}."
            )
        if advised_s is None:
            return default_wait_s
        with self._lock:
            self._next_request_s = max(self._next_request_s, time.monotonic() + advised_s)
        return advised_s

    def _fail_later_images_and_make_error(self, message: str) -> RetryableError:
        """Make all later images fail for one reason. Return the error for the current image."""
        self._fatal_reason = f"{self.model} {message}"
        return RetryableError(self._fatal_reason)

    def _record_request(self, tokens: Any = None) -> None:
        """Count a request, and its tokens if the response tells them."""
        with self._lock:
            self.usage["requests"] += 1
            if tokens is not None:
                self.usage["input"] += tokens.prompt_token_count or 0
                self.usage["output"] += tokens.candidates_token_count or 0
                self.usage["output"] += tokens.thoughts_token_count or 0


def _read_api_key_from_environment() -> str:
    for variable in KEY_VARIABLES:
        key = os.environ.get(variable)
        if key:
            return key
    raise SpearError(
        f"Gemini needs a key. Set {KEY_VARIABLES[0]} (get one at "
        f"https://aistudio.google.com/apikey), or {ALTERNATIVE_ADVICE}"
    )


def _list_connection_error_types() -> tuple[type[Exception], ...]:
    """The classes of errors of a lost connection.

    Google's client uses httpx or its successor httpx2, whichever is installed.
    """
    errors = []
    for name in ("httpx2", "httpx"):
        if importlib.util.find_spec(name):
            errors.append(importlib.import_module(name).TransportError)
    return tuple(errors)


def _find_advised_wait_s(error: Any, details: str) -> float | None:
    """The number of seconds that the service asks to wait; None if it does not ask.

    Args:
        error: The error of Google's client. The header of its response may name the seconds.
        details: The error's details as JSON. A google.rpc.RetryInfo in them, such as
            {"retryDelay": "38s"}, may name the seconds.
    """
    advised_s = [float(text) for text in re.findall(r'"retryDelay": "(\d+\.?\d*)s"', details)]
    header = getattr(error.response, "headers", {}).get("retry-after", "")
    if re.fullmatch(r"\d+\.?\d*", header):  # the header may also be a date, which is ignored
        advised_s.append(float(header))
    return max(advised_s, default=None)


def build_prompt(vocabulary: Sequence[str]) -> str:
    """Build the prompt that goes with every image; a vocabulary restricts the names."""
    if not vocabulary:
        return PROMPT
    return PROMPT + VOCABULARY_SENTENCE.format(names=", ".join(vocabulary))


def estimate_input_tokens(vocabulary: Sequence[str]) -> int:
    """Estimate the number of input tokens of a request, by Google's rules for images and text."""
    text = build_prompt(vocabulary) + json.dumps(SCHEMA)
    return IMAGE_TOKENS + len(text) // CHARACTERS_PER_TOKEN


class UnusableAnswerError(ValueError):
    """An answer of Gemini that does not contain what the prompt asks for."""


class _AnswerObject(BaseModel):
    """One object of an answer.

    `box_2d` is ymin, xmin, ymax, xmax in thousandths of the image's height and width.
    """

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
        Detections in pixels, clipped to the image. An object that repeats an earlier one (same
        name, IoU above `DUPLICATE_IOU`) is dropped.

    Raises:
        UnusableAnswerError: The answer does not follow the schema, or one of its objects has no
            name or no usable box. The whole answer is unusable then. If only that object were left
            out, say one of two cups, questions could be asked about "the cup".
    """
    # Some answers are in a Markdown code block, between ```json and ```.
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
    """Convert an object's box to [4] x0, y0, x1, y1 in pixels, clipped to the image.

    Raises:
        UnusableAnswerError: The box ends before it begins, is not in thousandths, or is less than a
            pixel wide or high.
    """
    y0, x0, y1, x1 = item.box_2d
    box_text = f"the box {item.box_2d} of {item.label!r}"
    if y1 < y0 or x1 < x0:
        raise UnusableAnswerError(f"{box_text} ends before it begins")
    lowest = min(x0, y0)
    highest = max(x1, y1)
    is_in_range = lowest >= -MAX_OVERSHOOT and highest <= 1000 + MAX_OVERSHOOT
    is_fraction = highest <= 1  # of the image, instead of thousandths
    if not is_in_range or is_fraction:
        raise UnusableAnswerError(f"{box_text} is not in thousandths of the image")

    fractions = np.clip(np.array([x0, y0, x1, y1]) / 1000, 0, 1)
    x0, y0, x1, y1 = fractions * (width, height, width, height)
    if min(x1 - x0, y1 - y0) < 1:
        raise UnusableAnswerError(f"{box_text} is less than a pixel wide or high")
    return np.array([x0, y0, x1, y1], np.float32)


def _is_repeated(name: str, box: Array, detections: Sequence[Detection]) -> bool:
    """Whether one of the detections is the object with this name and box [4]."""
    for detection in detections:
        overlap = float(compute_elementwise_iou_2d(detection.box2d, box))
        if detection.name == name and overlap > DUPLICATE_IOU:
            return True
    return False


def extract_text(response: Any, source: str) -> str:
    """Return the text of a response.

    Args:
        response: The response of Google's client.
        source: The image's source, for error messages.

    Raises:
        SpearError: Gemini refused the image.
        UnusableAnswerError: The answer is cut off or empty.
    """
    feedback = response.prompt_feedback
    if feedback and feedback.block_reason:
        raise SpearError(
            f"Gemini blocked {source} ({feedback.block_reason.value}). Leave the image out."
        )
    finish_reason = response.candidates[0].finish_reason if response.candidates else None
    if finish_reason not in ("STOP", "MAX_TOKENS", "MALFORMED_RESPONSE", None):
        raise SpearError(
            f"Gemini refused to answer {source} ({finish_reason.value}). Leave the image out."
        )
    if finish_reason == "MAX_TOKENS":
        raise UnusableAnswerError("cut off at the limit of tokens")
    if not response.text:
        raise UnusableAnswerError("empty")
    return str(response.text)
