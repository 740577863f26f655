"""A judge behind any OpenAI-compatible endpoint: GPT-4, vLLM, Ollama. Nothing else here uses the network.

It contacts the address that the user named and no other: redirects are not followed. The key is read from
the environment for each request, sent in one header, and appears in no message, file or repr; it is removed
from a reply that repeats it. Only the status and a well-known code of a server's error are shown, since the
error's text may quote the prompt.
"""

from __future__ import annotations

import email.utils
import http
import http.client
import ipaddress
import json
import math
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

from fedloom import rng
from fedloom.errors import ConfigError
from fedloom.evaluation.backends import Reply
from fedloom.evaluation.verdicts import Failed

LARGEST_REPLY = 4 << 20  # bytes
BYTES_PER_TOKEN = 3.0  # for estimates; English has about 4, so they err on the high side
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
POINTLESS = frozenset({401, 402, 403, 404, 405})  # the next question would fail, too
POINTLESS_CODES = frozenset(
    {
        "billing_hard_limit_reached",
        "insufficient_quota",
        "invalid_api_key",
        "model_not_found",
        "unsupported_parameter",
        "unsupported_value",
    }
)
CODES = POINTLESS_CODES | {
    "content_filter",
    "context_length_exceeded",
    "invalid_request_error",
    "rate_limit_exceeded",
    "server_error",
}


@dataclass(frozen=True)
class Endpoint:
    """A `Writer`. `url` is the base, as in https://api.openai.com/v1; "/chat/completions" is added.

    Each prompt gets at most `tries` requests. Between them it waits `first_wait` seconds, then twice that,
    and so on up to `longest_wait`, or as long as the server's Retry-After asks, which holds back all other
    prompts too; a Retry-After beyond `longest_wait` is a failure. After `give_up_after` failed prompts in a
    row, or a refusal that concerns all of them (a wrong key, an unknown model), the rest are not asked.
    """

    url: str
    model: str
    key_variable: str | None = None  # the environment variable that holds the key; None: no key is sent
    temperature: float | None = 0.0  # None: not sent, for models that accept only their own
    max_tokens: int = 400  # of a reply
    limit_parameter: str = "max_tokens"  # newer OpenAI models want "max_completion_tokens"
    timeout: float = 60.0  # seconds: to connect, between two pieces, and for a whole reply
    tries: int = 5
    first_wait: float = 1.0  # seconds
    longest_wait: float = 60.0  # seconds
    concurrency: int = 4  # requests at a time
    per_minute: float | None = None  # requests, evenly spaced; None: unlimited
    give_up_after: int = 10

    def __post_init__(self) -> None:
        place = urlsplit(self.url)
        if place.scheme not in ("http", "https") or not place.hostname:
            raise ConfigError(
                "Expected the endpoint's base URL, like https://api.openai.com/v1 or http://localhost:11434/v1."
            )
        if place.username or place.password or place.query or place.fragment:
            raise ConfigError(
                "The endpoint's URL holds a user, a password, a query or a fragment. Expected a plain base URL; "
                "put the key into an environment variable and name that variable."
            )
        if self.key_variable and place.scheme == "http" and not _is_here(place.hostname):
            raise ConfigError(
                f"The key in {self.key_variable} would travel unencrypted to {place.hostname}. Expected an https URL."
            )
        if min(self.max_tokens, self.tries, self.concurrency, self.give_up_after) < 1:
            raise ConfigError("Expected max_tokens, tries, concurrency and give_up_after of at least 1.")
        if not all(x > 0 for x in (self.timeout, self.first_wait, self.longest_wait, self.per_minute or 1)):
            raise ConfigError("Expected timeout, first_wait, longest_wait and per_minute above 0.")
        self._key()

    @property
    def identity(self) -> Mapping[str, Any]:
        return {
            "writer": "endpoint",
            "url": self.url.rstrip("/"),
            "model": self.model,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }

    @property
    def varies(self) -> bool:
        return True  # even at temperature 0, since servers batch

    def write(self, prompts: Mapping[str, str]) -> Generator[tuple[str, Reply | Failed], None, None]:
        """Replies in the order of arrival. At most `concurrency` requests run ahead of the consumer, so
        stopping early loses no more than that."""
        traffic = _Traffic(self.per_minute, self.give_up_after)
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="judge")
        waiting, running = iter(prompts.items()), dict[Future[Reply | Failed], str]()
        try:
            while True:
                for key, prompt in islice(waiting, self.concurrency - len(running)):
                    running[pool.submit(self._answer, key, prompt, traffic)] = key
                if not running:
                    return
                for job in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(job), job.result()
        finally:
            traffic.close("not asked: the evaluation was stopped")
            pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, key: str, prompt: str, traffic: _Traffic) -> Reply | Failed:
        pause = 0.0  # seconds
        trouble = _Trouble("")
        for turn in range(self.tries):
            traffic.sleep(pause)
            if (closed := traffic.wait_turn()) is not None:
                return trouble.failed(turn) if turn else Failed(closed)
            outcome = self._post(prompt)
            if isinstance(outcome, Reply):
                traffic.succeeded()
                return outcome
            trouble = outcome
            if trouble.concerns_all:
                traffic.close(f"not asked, after {trouble.reason}")
            if not trouble.again:
                return trouble.failed(1)
            jitter = 0.5 + rng.key(turn, "judge", "backoff", key) / 2**64  # in [0.5, 1)
            pause = min(self.longest_wait, self.first_wait * 2**turn) * jitter
            if trouble.retry_after is not None:
                if trouble.retry_after > self.longest_wait:
                    traffic.failed()
                    return Failed(f"{trouble.reason}, asking for a longer wait than allowed")
                traffic.hold(trouble.retry_after)
                pause = 0.0
        traffic.failed()
        return trouble.failed(self.tries)

    def _post(self, prompt: str) -> Reply | _Trouble:
        secret = self._key()
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            self.limit_parameter: self.max_tokens,
        }
        if self.temperature is not None:
            body["temperature"] = self.temperature
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "fedloom"}
        if secret:
            headers["Authorization"] = f"Bearer {secret}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers, method="POST"
        )
        deadline = time.monotonic() + self.timeout
        try:
            with self._opener().open(request, timeout=self.timeout) as response:
                data = _all_of(response, deadline)
        except urllib.error.HTTPError as refused:
            with refused:
                return _refusal(refused, deadline)
        except TimeoutError:
            return _Trouble(f"no reply within {self.timeout:g} s", again=True)
        except urllib.error.URLError as failed:
            slow = isinstance(failed.reason, TimeoutError)
            why = (
                f"no reply within {self.timeout:g} s"
                if slow
                else f"no connection ({type(failed.reason).__name__})"
            )
            return _Trouble(why, again=True)
        except (http.client.HTTPException, OSError) as broken:
            return _Trouble(f"connection lost ({type(broken).__name__})", again=True)
        return _reply(data, secret)

    def _opener(self) -> urllib.request.OpenerDirector:
        handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
        if _is_here(urlsplit(self.url).hostname or ""):
            handlers.append(urllib.request.ProxyHandler({}))  # no proxy for a server on this machine
        return urllib.request.build_opener(*handlers)

    def _key(self) -> str | None:
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise ConfigError(
                f"Expected the endpoint's key in the environment variable {self.key_variable}, which is not set."
            )
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(
                f"The environment variable {self.key_variable} holds no usable key: it contains spaces or odd characters."
            )
        return key


@dataclass(frozen=True)
class Prices:
    """Per million tokens, in any currency."""

    prompt: float
    reply: float


@dataclass(frozen=True)
class Estimate:
    """The price of asking: `cost` if every reply is well formed and as long as allowed, `most` if each is
    also retried as often as allowed. None if no prices are known."""

    calls: int
    prompt_tokens: int
    reply_tokens: int
    cost: float | None
    most: float | None

    @property
    def is_free(self) -> bool:
        return self.calls == 0 or self.most == 0


def estimate_cost(
    prompts: Sequence[str], *, max_tokens: int, retries: int, prices: Prices | None
) -> Estimate:
    """Before anything is sent. Prompt tokens are estimated from bytes: only the server can count them."""
    sent = sum(math.ceil(len(p.encode(errors="replace")) / BYTES_PER_TOKEN) for p in prompts)
    said = len(prompts) * max_tokens
    if not prompts:
        return Estimate(0, 0, 0, 0.0, 0.0)
    if prices is None:
        return Estimate(len(prompts), sent, said, None, None)
    cost = (sent * prices.prompt + said * prices.reply) / 1e6
    return Estimate(len(prompts), sent, said, cost, cost * (1 + retries))


# --- one request -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trouble:
    reason: str
    again: bool = False  # worth another try
    concerns_all: bool = False  # every other prompt would meet the same
    retry_after: float | None = None  # seconds, as the server asks

    def failed(self, tries: int) -> Failed:
        return Failed(f"{self.reason}, {tries} tries" if tries > 1 else self.reason)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None  # urllib then reports the 3xx as an error


def _all_of(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The body. It may arrive slowly, but not past the deadline, and hold at most LARGEST_REPLY bytes."""
    data = bytearray()
    while piece := response.read1(1 << 16):
        data += piece
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(data) > LARGEST_REPLY:
            raise http.client.HTTPException
    return bytes(data)


def _refusal(refused: urllib.error.HTTPError, deadline: float) -> _Trouble:
    status, code = refused.code, ""
    try:
        error = json.loads(_all_of(refused.fp, deadline))["error"]  # type: ignore[arg-type]
        code = next((c for c in (error.get("code"), error.get("type")) if c in CODES), "")
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        OSError,
        http.client.HTTPException,
    ):
        pass  # an error without a readable explanation is still that error
    concerns_all = status in POINTLESS or 300 <= status < 400 or code in POINTLESS_CODES
    return _Trouble(
        f"HTTP {status}{_phrase(status)}" + (f" ({code})" if code else ""),
        again=status in RETRIED and not concerns_all,
        concerns_all=concerns_all,
        retry_after=_retry_after(refused.headers.get("Retry-After")),
    )


def _phrase(status: int) -> str:
    """Our own phrase: the server's may say anything."""
    return f" {http.HTTPStatus(status).phrase}" if status in http.HTTPStatus.__members__.values() else ""


def _retry_after(value: str | None) -> float | None:
    """Seconds from now; the header holds seconds or a date."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _reply(data: bytes, secret: str | None) -> Reply | _Trouble:
    """The text of a chat completion; without text, as in a refusal, the reply is empty."""
    try:
        said = json.loads(data)
        text = said["choices"][0]["message"].get("content")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return _Trouble("reply that is not a chat completion", again=True)
    text = text if isinstance(text, str) else ""
    usage = said.get("usage")
    counted = [usage.get(k) if isinstance(usage, dict) else 0 for k in ("prompt_tokens", "completion_tokens")]
    tokens = [n if type(n) is int and n >= 0 else 0 for n in counted]
    return Reply(text.replace(secret, "[key]") if secret else text, *tokens)


def _is_here(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# --- state shared by requests in flight ------------------------------------------------------------------


class _Traffic:
    """Decides which request may go, which must wait, and whether to go on at all."""

    def __init__(self, per_minute: float | None, give_up_after: int):
        self._gap = 60.0 / per_minute if per_minute else 0.0  # seconds between two requests
        self._give_up_after = give_up_after
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._closed: str | None = None
        self._next = 0.0  # monotonic time of the next free slot
        self._held = 0.0  # monotonic time until which the server wants no requests
        self._failures = 0  # prompts in a row

    def wait_turn(self) -> str | None:
        """Returns when it is this request's turn: None, or the reason not to send it after all."""
        with self._lock:
            slot = max(self._next, time.monotonic())
            self._next = slot + self._gap
        self.sleep(slot - time.monotonic())
        # The hold may have grown meanwhile.
        while self._closed is None and (left := self._held - time.monotonic()) > 0:
            self.sleep(left)
        return self._closed

    def sleep(self, seconds: float) -> None:
        """Returns early once traffic is closed."""
        self._over.wait(max(0.0, seconds))

    def hold(self, seconds: float) -> None:
        with self._lock:
            self._held = max(self._held, time.monotonic() + seconds)

    def succeeded(self) -> None:
        with self._lock:
            self._failures = 0

    def failed(self) -> None:
        with self._lock:
            self._failures += 1
            enough = self._failures >= self._give_up_after
        if enough:
            self.close(f"not asked, after {self._give_up_after} failures in a row")

    def close(self, reason: str) -> None:
        with self._lock:
            self._closed = self._closed or reason
        self._over.set()
