"""Gemini as a detector: one request per image, boxes and names as structured JSON, as the paper's labels were
made. Which of Gemini's models is our choice, and so is the prompt. Retries are ours: those of Google's client
(off) neither wait as long as the service asks nor stop when the day's quota is used up."""

import contextlib
import hashlib
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
from spear.util.network import explain_unreachable

MODEL = "gemini-3.8-flash"
KEY_VARIABLES = ("GEMINI_API_KEY", "GOOGLE_API_KEY")
"""Where the key is looked for in the environment, in this order."""
SERVICE_URL = "https://generativelanguage.googleapis.com"
ALTERNATIVE_ADVICE = 'or find objects without it: --detector owlv2 --vocabulary "mug, spoon"'
MAX_OUTPUT_TOKENS = 16384
"""Of an answer with its thinking; ends the rare answer that repeats itself for ever."""
THINKING_LEVEL = "low"
"""How much it thinks before it answers."""
MAX_SIDE_PX = 1536
"""Larger images are sent scaled down to this many pixels."""
MAX_CONCURRENT_REQUESTS, TIMEOUT_S = 8, 120.0
"""Requests at the same time, and seconds for one."""
MAX_ATTEMPTS, MAX_UNUSABLE_ANSWERS = 6, 2
"""Requests per image before it is given up, overload included; and unusable answers that are paid for."""
FIRST_WAIT_S, MAX_WAIT_S = 1.0, 120.0
"""Seconds after the first failure, doubled after each, and at most. Who asks for more has no quota left."""

_AGAIN = (408, 429, 500, 502, 503, 504)
_FATAL = (401, 403, 404)

_ASKED = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
PROMPT, VOCABULARY, SCHEMA = (_ASKED[name] for name in ("prompt", "vocabulary", "schema"))


class GeminiDetector:
    """Finds and names objects with Gemini (`google-genai`; the key comes from the environment, see `KEYS`).

    Images of a batch are asked about at the same time. Overload (429, 5xx, lost connections) is waited out,
    as long as the service asks or with exponential backoff; an unusable answer is asked for once more. An
    image that is refused is a `SpearError`, one that stays unanswered a `RetryableError`. So is what would
    fail for every image (key, model, daily quota, no network): all that follow then fail at once.

    Answers are kept by image, prompt and settings, so that a repeated run costs nothing.

    cache       folder of answers, which several processes may share.
    vocabulary  the only names to detect; none for whatever is there.
    per_minute  requests begun in a minute at most, evenly spread; 0 leaves that to the service.

    Raises `SpearError`: no key, or google-genai is not installed.
    """

    def __init__(
        self,
        model: str = MODEL,
        *,
        cache: Path,
        vocabulary: Sequence[str] = (),
        per_minute: int = 0,
    ) -> None:
        self.model, self.cache, self.pause = model, cache, 60 / (per_minute or np.inf)
        self.prompt = build_prompt(vocabulary)
        prompt = hashlib.sha256(self.prompt.encode()).hexdigest()[:8]
        self.name = (
            f"gemini {model} (prompt {prompt}, thinking {THINKING_LEVEL}, max side {MAX_SIDE_PX})"
        )
        key = next((value for name in KEY_VARIABLES if (value := os.environ.get(name))), None)
        if key is None:
            get = f"set {KEY_VARIABLES[0]} (get one at https://aistudio.google.com/apikey)"
            raise SpearError(f"Gemini: no key: {get}, {ALTERNATIVE_ADVICE}")
        genai = import_optional("google.genai", "label", "Gemini")
        self._types, self._errors, self._key = genai.types, genai.errors, key
        self._address = os.environ.get(
            "GOOGLE_GEMINI_BASE_URL", SERVICE_URL
        )  # where the client reads it too
        options = genai.types.HttpOptions(api_version="v1beta", timeout=int(1000 * TIMEOUT_S))
        self._client = genai.Client(api_key=key, vertexai=False, http_options=options)
        self._config = genai.types.GenerateContentConfig(
            response_mime_type="application/json",
            response_schema=SCHEMA,
            max_output_tokens=MAX_OUTPUT_TOKENS,
            thinking_config=genai.types.ThinkingConfig(thinking_level=THINKING_LEVEL),
        )
        # the client's HTTP library is one of the two
        libraries = (
            importlib.import_module(n) for n in ("httpx2", "httpx") if importlib.util.find_spec(n)
        )
        self._offline = tuple(library.TransportError for library in libraries)
        self._lock = threading.Lock()
        self._last: dict[
            str, list[Detection] | SpearError
        ] = {}  # by key, of a batch with a failure in it
        self._fatal: str | None = None
        self._held = 0.0  # no request before then (monotonic seconds)
        self.usage = Counter[str]()

    def detect(self, frames: Sequence[Frame]) -> list[list[Detection]]:
        """The objects of each image, as Gemini lists them."""
        with ThreadPoolExecutor(MAX_CONCURRENT_REQUESTS) as threads:
            found = list(threads.map(self._detect, frames))
        for failure in found:
            if isinstance(failure, SpearError):
                if (
                    len(frames) > 1
                ):  # the pipeline asks again image by image, which must cost nothing
                    self._last = {
                        self._digest(f.image): one for f, one in zip(frames, found, strict=True)
                    }
                raise failure
        return [one for one in found if not isinstance(one, SpearError)]

    def bill(self) -> str:
        """What was asked so far, or "": requests that reached the service, tokens (out: thinking as well)."""
        used = self.usage
        asked = (
            f"{format_count(used['requests'], 'requests')}, "
            f"{format_count(used['cached'], 'answers')} from cache"
        )
        tokens = f"{used['input']} tokens in, {used['output']} out"
        return f"{self.model}: {asked}, {tokens}" if used else ""

    def _detect(self, frame: Frame) -> list[Detection] | SpearError:
        """The objects of one image, or why there are none."""
        key = self._digest(frame.image)
        if (known := self._last.pop(key, None)) is not None:
            return known
        path = self.cache / key[:2] / f"{key}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = parse_detections(json.loads(path.read_bytes())["text"], *frame.image.shape[:2])
            with self._lock:
                self.usage["cached"] += 1
            return found
        try:
            text, found = self._ask(frame)
        except SpearError as error:
            return error
        try:  # several processes may share the folder
            write_text(path, json.dumps({"model": self.model, "text": text}))
        except SpearError as error:
            return self._stop(f"cannot keep an answer: {error}, or choose another cache folder")
        return found

    def _digest(self, image: Array) -> str:
        asked = [self.model, self.prompt, SCHEMA, THINKING_LEVEL, None, MAX_SIDE_PX, image.shape]
        return hashlib.sha256(json.dumps(asked).encode() + image.tobytes()).hexdigest()

    def _ask(self, frame: Frame) -> tuple[str, list[Detection]]:
        """The text of a usable answer, and what is in it."""
        sent = encode_jpeg(shrink_image(frame.image, MAX_SIDE_PX))
        contents = [self._types.Part.from_bytes(data=sent, mime_type="image/jpeg"), self.prompt]
        where, reason, unusable = frame.source or "image", "", 0
        for attempt in range(MAX_ATTEMPTS):
            self._wait_for_turn()
            # less up to half by chance, so that many clients do not come back at once
            wait = min(MAX_WAIT_S, FIRST_WAIT_S * 2.0**attempt) * random.uniform(0.5, 1.0)
            try:
                asked = {"model": self.model, "contents": contents, "config": self._config}
                response = self._client.models.generate_content(**asked)
                self._count(response.usage_metadata)
                text = extract_text(response, where)
                return text, parse_detections(text, *frame.image.shape[:2])
            except self._errors.APIError as error:
                self._count()
                reason = self._said(f"{error.code} {error.status or ''}: {error.message or ''}")
                wait = self._wait(error, reason, where, wait)
            except self._offline as error:
                reason = self._said(f"no connection: {summarize_error(error)}")
            except UnusableAnswerError as error:
                reason, wait, unusable = self._said(f"unusable answer: {error}"), 0.0, unusable + 1
            except ValueError as error:  # the client could not read the response
                self._count()
                reason, unusable = self._said(f"unreadable response: {error}"), unusable + 1
            if unusable == MAX_UNUSABLE_ANSWERS or attempt + 1 == MAX_ATTEMPTS:
                break
            time.sleep(wait)
        tried = f"no answer by Gemini in {format_count(attempt + 1, 'attempts')}"
        raise RetryableError(f"{where}: {tried} ({reason}): label it again")

    def _wait_for_turn(self) -> None:
        """Returns when a request may be made; `RetryableError` when none is worth it any more."""
        if self._fatal is None and (why := explain_unreachable(self._address)):
            self._stop(
                f"cannot reach the service ({why}): check the network and label again, {ALTERNATIVE_ADVICE}"
            )
        while self._fatal is None:
            with self._lock:
                rest = self._held - time.monotonic()
                if rest <= 0:
                    self._held = time.monotonic() + self.pause
                    return
            time.sleep(rest)
        raise RetryableError(self._fatal)

    def _said(self, message: str) -> str:
        """The beginning of what a service says, without our key, which it may have repeated."""
        return summarize_error(message.replace(self._key, "[the key]"))[:200]

    def _wait(self, error: Any, reason: str, where: str, wait: float) -> float:
        """Seconds until the next attempt after an error of the service; `SpearError` when it is pointless."""
        details = json.dumps(error.details, default=str)
        if error.code in _FATAL or "API_KEY_INVALID" in details:
            hint = (
                "choose another model"
                if error.code == 404
                else f"check the key in {' or '.join(KEY_VARIABLES)}"
            )
            raise self._stop(f"{reason}: {hint}")
        if error.code not in _AGAIN:
            raise SpearError(
                f"{where}: Gemini refused ({reason}): change the settings, or leave it out"
            )
        # google.rpc.RetryInfo, as in "38s", and the header; a date there is not read
        asked = re.findall(r'"retryDelay": "(\d+\.?\d*)s"', details)
        asked += re.findall(
            r"^\d+\.?\d*$", getattr(error.response, "headers", {}).get("retry-after", "")
        )
        advised = max(map(float, asked), default=None)
        if "PerDay" in details or (advised or 0) > MAX_WAIT_S:  # as Google names the quota of a day
            when = "tomorrow" if "PerDay" in details else f"in {advised:.0f} s"
            raise self._stop(f"no quota left ({reason}): label again {when}")
        if advised is None:
            return wait
        with self._lock:
            self._held = max(self._held, time.monotonic() + advised)
        return advised

    def _stop(self, message: str) -> RetryableError:
        self._fatal = f"Gemini, {self.model}: {message}"
        return RetryableError(self._fatal)

    def _count(self, tokens: Any = None) -> None:
        with self._lock:
            self.usage["requests"] += 1
            if tokens is not None:
                self.usage["input"] += tokens.prompt_token_count or 0
                self.usage["output"] += tokens.candidates_token_count or 0
                self.usage["output"] += tokens.thoughts_token_count or 0


def build_prompt(vocabulary: Sequence[str]) -> str:
    """What Gemini is asked about every image."""
    return PROMPT + (VOCABULARY.format(names=", ".join(vocabulary)) if vocabulary else "")


def estimate_input_tokens(vocabulary: Sequence[str]) -> int:
    """About what asking about an image takes, by Google's rules: at most 1,120 tokens for a picture (Gemini 3
    at its default resolution), and one for four characters of the prompt and the answer's schema."""
    return 1120 + len(build_prompt(vocabulary) + json.dumps(SCHEMA)) // 4


class UnusableAnswerError(ValueError):
    """An answer that is not what was asked for."""


class _Object(BaseModel):
    """One object of an answer; box_2d is ymin, xmin, ymax, xmax in thousandths of the image."""

    model_config = ConfigDict(strict=True)
    label: str
    box_2d: Annotated[list[FiniteFloat], Len(4, 4)]


_OBJECTS = TypeAdapter(list[_Object])


def parse_detections(text: str, height: int, width: int) -> list[Detection]:
    """Gemini's answer as detections in pixels; `Unusable` when it is not what the schema says. Boxes are cut
    at the edge of the image; left out are those of less than a pixel inside it, and a box that was given
    before (same label, IoU above 0.9)."""
    fenced = re.search(r"```(?:json)?\s(.*?)```", text, re.DOTALL)
    try:
        items = _OBJECTS.validate_json(fenced[1] if fenced else text)
    except ValidationError as error:
        raise UnusableAnswerError(summarize_error(error)) from error
    found: list[Detection] = []
    for item in items:
        label = " ".join(item.label.lower().split())
        sides = (height, width) * 2
        y0, x0, y1, x1 = (
            np.clip(v / 1000, 0, 1) * n for v, n in zip(item.box_2d, sides, strict=True)
        )
        pixels = np.array([x0, y0, x1, y1], np.float32)
        again = any(d.name == label and float(compute_iou_2d(d.box2d, pixels)) > 0.9 for d in found)
        if label and min(x1 - x0, y1 - y0) >= 1 and not again:
            found.append(Detection(label, pixels))
    return found


def extract_text(response: Any, where: str) -> str:
    """The answer's text; `SpearError` when Gemini refused, `Unusable` when it is cut off or empty."""
    if (feedback := response.prompt_feedback) and feedback.block_reason:
        raise SpearError(
            f"{where}: Gemini blocked the image ({feedback.block_reason.value}): leave it out"
        )
    end = response.candidates[0].finish_reason if response.candidates else None
    if end not in ("STOP", "MAX_TOKENS", "MALFORMED_RESPONSE", None):
        raise SpearError(f"{where}: Gemini refused to answer ({end.value}): leave the image out")
    if end == "MAX_TOKENS":
        raise UnusableAnswerError("cut off at the limit of tokens")
    if not response.text:
        raise UnusableAnswerError("empty")
    return str(response.text)
