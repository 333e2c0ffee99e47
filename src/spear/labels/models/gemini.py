"""Gemini as a detector: one request per image, boxes and names as structured JSON.

The paper's images were labelled so; which of Gemini's models is our choice. The prompt, and how answers are
read, are in `gemini_answer`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spear.errors import RetryableError, SpearError
from spear.labels.models.gemini_answer import PROMPT, SCHEMA, VOCABULARY, Unusable, answer_text, parse
from spear.labels.models.protocols import Detection
from spear.labels.models.remote import PRICES_READ, AnswerCache, Pace, Usage, advised_wait, backoff, price
from spear.types import Array, Frame
from spear.util.images import encode_jpeg

MODEL = "gemini-3.8-flash"
KEYS = ("GEMINI_API_KEY", "GOOGLE_API_KEY")
"""Where the key is looked for in the environment, in this order."""

MAX_TOKENS = 16384
"""Of an answer with its thinking; ends the rare answer that repeats itself for ever."""

_AGAIN = (408, 429, 500, 502, 503, 504)
_FATAL = (401, 403, 404)
_ANSWERS = 2
"""How many unusable answers are paid for before an image is given up."""


class GeminiDetector:
    """Finds and names objects with Gemini (`google-genai`; the key comes from the environment, see `KEYS`).

    Images of a batch are asked about at the same time. Overload (429, 5xx, lost connections) is waited out,
    as long as the service asks or with exponential backoff; an unusable answer is asked for once more. An
    image that is refused or stays unanswered is a `SpearError` of its own. What would fail for every image
    (key, model, daily quota, no network) makes no further requests: every following image fails at once, with
    the same message. These failures, and images that stay unanswered, are a `RetryableError`: later the
    images may go well.

    Answers are kept by image, prompt and settings, so that a repeated run costs nothing, and a failure in a
    batch does not make the rest of it be asked again.

    Args:
        model: name of the model.
        vocabulary: the only names to detect; None for whatever is there.
        cache: folder of answers; None keeps the last ones in memory.
        concurrency: requests at the same time.
        per_minute: most requests per minute; None for no limit of ours.
        thinking: "minimal", "low", "medium" or "high" for Gemini 3 and later, a budget of tokens for Gemini
            2.5, None for the model's default.
        temperature: None for the model's default, which Gemini 3 wants.
        max_side: larger images are sent scaled down to this many pixels.
        attempts: requests per image, overload included.
        first_wait, longest_wait: seconds, of the backoff. A service that asks for more than the longest is
        taken to
            have no quota left.
        timeout: seconds for one request.
        base_url: another address of the API.

    Raises:
        SpearError: no key, google-genai is not installed, or a setting makes no sense.
    """

    def __init__(
        self,
        model: str = MODEL,
        *,
        vocabulary: Sequence[str] | None = None,
        cache: str | Path | None = None,
        concurrency: int = 8,
        per_minute: float | None = None,
        thinking: str | int | None = "low",
        temperature: float | None = None,
        max_side: int = 1536,
        attempts: int = 6,
        first_wait: float = 1.0,
        longest_wait: float = 120.0,
        timeout: float = 120.0,
        base_url: str | None = None,
    ) -> None:
        if min(attempts, concurrency, max_side) < 1:
            raise SpearError("Gemini: attempts, concurrency and max_side are at least 1")
        self.model, self.max_side = model, max_side
        self.prompt = PROMPT + (VOCABULARY.format(names=", ".join(vocabulary)) if vocabulary else "")
        self.thinking, self.temperature = thinking, temperature
        self.cache, self.concurrency, self.per_minute = cache, concurrency, per_minute
        self.attempts, self.first_wait, self.longest_wait = attempts, first_wait, longest_wait
        self.timeout, self.base_url = timeout, base_url
        prompt = hashlib.sha256(self.prompt.encode()).hexdigest()[:8]
        warmth = "" if temperature is None else f", temperature {temperature:g}"
        self.name = f"gemini {model} (prompt {prompt}, thinking {thinking}{warmth}, max side {max_side})"
        self._start()

    def _start(self) -> None:
        """What does not travel to another process: the connection, the pace, the memory."""
        try:
            genai = importlib.import_module("google.genai")
        except ImportError as error:
            raise SpearError('Gemini needs google-genai: pip install "spear-vla[label]"') from error
        key = next((value for name in KEYS if (value := os.environ.get(name))), None)
        if key is None:
            raise SpearError(f"Gemini: no key: set {KEYS[0]} (get one at https://aistudio.google.com/apikey)")
        self._types, self._errors = genai.types, genai.errors
        timeout = int(1000 * self.timeout)
        options = genai.types.HttpOptions(base_url=self.base_url, api_version="v1beta", timeout=timeout)
        self._client = genai.Client(api_key=key, vertexai=False, http_options=options)
        self._offline = _transport_errors()
        self._pace = Pace(self.per_minute)
        self._answers = AnswerCache(self.cache)
        self._lock = threading.Lock()
        self._failed: dict[str, SpearError] = {}
        self._fatal: str | None = None
        self._reached = False
        self.usage = Usage()

    def __getstate__(self) -> dict[str, Any]:
        kept = {k: v for k, v in self.__dict__.items() if not k.startswith("_")}
        del kept["usage"]
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def detect(self, frames: Sequence[Frame]) -> list[list[Detection]]:
        """The objects of each image, as Gemini lists them."""
        batch = len(frames) > 1
        with ThreadPoolExecutor(max(1, min(self.concurrency, len(frames)))) as threads:
            asked = [threads.submit(self._detect, frame, batch) for frame in frames]
        return [answer.result() for answer in asked]

    def bill(self) -> str:
        """What was asked so far, and what it cost at list price."""
        u = self.usage
        dollars = u.dollars(price(self.model, datetime.now(UTC).date()))
        cost = "cost unknown" if dollars is None else f"${dollars:.4f} (prices of {PRICES_READ})"
        return (
            f"{self.model}: {u.requests} requests, {u.cached} answers from the cache, {u.input_tokens} tokens in, "
            f"{u.output_tokens} out, {cost}"
        )

    def _detect(self, frame: Frame, batch: bool) -> list[Detection]:
        """The objects of one image; of a batch, which is asked again image by image when one fails, the
        failure is remembered once."""
        key = self._key(frame.image)
        with self._lock:
            if (failure := self._failed.pop(key, None)) is not None:
                raise failure
        answer = self._answers.get(key)
        if answer is not None:
            try:
                found = parse(answer["text"], *frame.image.shape[:2])
            except (KeyError, Unusable):
                pass
            else:
                with self._lock:
                    self.usage.cached += 1
                return found
        try:
            text, found = self._ask(frame)
        except SpearError as error:
            if batch:
                with self._lock:
                    self._failed[key] = error
            raise
        try:
            self._answers.put(key, {"model": self.model, "text": text})
        except SpearError as error:
            raise self._stop(str(error)) from error
        return found

    def _key(self, image: Array) -> str:
        asked = [self.model, self.prompt, SCHEMA, self.thinking, self.temperature, self.max_side, image.shape]
        hashed = hashlib.sha256(json.dumps(asked).encode())
        hashed.update(np.ascontiguousarray(image).tobytes())
        return hashed.hexdigest()

    def _ask(self, frame: Frame) -> tuple[str, list[Detection]]:
        """The text of a usable answer, and what is in it."""
        contents = [self._image(frame.image), self.prompt]
        where, reason, unusable = frame.source or "image", "", 0
        for attempt in range(self.attempts):
            if self._fatal is not None:
                raise RetryableError(self._fatal)
            self._pace.wait()
            wait = backoff(attempt, self.first_wait, self.longest_wait)
            try:
                response = self._client.models.generate_content(
                    model=self.model, contents=contents, config=self._config()
                )
            except self._errors.APIError as error:
                self._count()
                wait = self._wait(error, where, wait)
                reason = _reason(error)
            except self._offline as error:
                reason = f"no connection: {_first_line(error)}"
            except ValueError as error:  # the client could not read the response
                self._count()
                reason, unusable = f"unreadable response: {_first_line(error)}", unusable + 1
            else:
                self._count(response.usage_metadata)
                try:
                    text = answer_text(response, where)
                    return text, parse(text, *frame.image.shape[:2])
                except Unusable as error:
                    reason, wait, unusable = f"unusable answer: {error}", 0.0, unusable + 1
            if unusable == _ANSWERS:
                break
            if attempt + 1 < self.attempts:
                time.sleep(wait)
        if not self._reached:
            raise self._stop(f"cannot reach the service ({reason}): check the network, then label again")
        raise RetryableError(
            f"{where}: Gemini gave no answer after {attempt + 1} attempts ({reason}): label it again"
        )

    def _wait(self, error: Any, where: str, wait: float) -> float:
        """Seconds until the next attempt after an error of the service.

        Raises:
            SpearError: there is no point in another attempt.
        """
        reason = _reason(error)
        if error.code in _FATAL or "API_KEY_INVALID" in json.dumps(error.details, default=str):
            hint = "choose another model" if error.code == 404 else f"check the key in {' or '.join(KEYS)}"
            raise self._stop(f"{reason}: {hint}")
        if error.code not in _AGAIN:
            raise SpearError(
                f"{where}: Gemini refused the request ({reason}): change the settings, or leave it out"
            )
        advised = advised_wait(getattr(error.response, "headers", {}), error.details)
        if advised is None:
            return wait
        if advised > self.longest_wait:
            raise self._stop(f"no quota left for {advised:.0f} s ({reason}): label again later")
        self._pace.hold(advised)
        return advised

    def _stop(self, message: str) -> RetryableError:
        self._fatal = f"Gemini, {self.model}: {message}"
        return RetryableError(self._fatal)

    def _count(self, tokens: Any = None) -> None:
        with self._lock:
            self._reached = True
            self.usage.requests += 1
            if tokens is not None:
                self.usage.input_tokens += tokens.prompt_token_count or 0
                self.usage.output_tokens += (tokens.candidates_token_count or 0) + (
                    tokens.thoughts_token_count or 0
                )

    def _image(self, image: Array) -> Any:
        height, width = image.shape[:2]
        scale = self.max_side / max(height, width)
        if scale < 1:
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
        return self._types.Part.from_bytes(data=encode_jpeg(image), mime_type="image/jpeg")

    def _config(self) -> Any:
        if self.thinking is None:
            thinking = None
        elif isinstance(self.thinking, int):
            thinking = self._types.ThinkingConfig(thinking_budget=self.thinking)
        else:
            thinking = self._types.ThinkingConfig(thinking_level=self.thinking.upper())
        return self._types.GenerateContentConfig(
            response_mime_type="application/json",
            response_schema=SCHEMA,
            temperature=self.temperature,
            max_output_tokens=MAX_TOKENS,
            thinking_config=thinking,
        )


def _reason(error: Any) -> str:
    return f"{error.code} {error.status or ''}: {_first_line(error.message or '')}".strip()


def _first_line(text: object) -> str:
    return (str(text).splitlines() or [type(text).__name__])[0][:200]


def _transport_errors() -> tuple[type[Exception], ...]:
    """What the client's HTTP library (either of two) raises when the service cannot be reached."""
    found: list[type[Exception]] = []
    for name in ("httpx2", "httpx"):
        try:
            found.append(importlib.import_module(name).TransportError)
        except ImportError:
            continue
    return tuple(found)
