"""The judge behind an endpoint, against a server on this machine that behaves as badly as servers do."""

from __future__ import annotations

import email.utils
import json
import threading
import time
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from fedloom.data.example import Example
from fedloom.errors import ConfigError
from fedloom.evaluation.backends import RUBRICS, PromptJudge, shipped_prompt
from fedloom.evaluation.cache import Cache
from fedloom.evaluation.endpoint import Endpoint, Estimate, Prices, estimate_cost
from fedloom.evaluation.judge import compare
from fedloom.evaluation.verdicts import Failed
from tests.evaluation.endpoint_server import SECRET, Server, fair, refusal, serve

__all__ = ["serve"]  # a fixture
QUESTIONS = [Example(f"Private question {i}?", f"Private reference {i}.", id=str(i)) for i in range(4)]
OURS = ["long answer"] * 4
THEIRS = ["short"] * 4


def endpoint(server: Server, **options: Any) -> Endpoint:
    return Endpoint(server.url, "gpt-test", **{"first_wait": 0.01, "timeout": 5.0, **options})


def judged(server: Server, cache: Cache | None = None, **options: Any):
    judge = PromptJudge(endpoint(server, **options), RUBRICS["total"], shipped_prompt(RUBRICS["total"]))
    return compare(judge, QUESTIONS, OURS, THEIRS, cache=Cache() if cache is None else cache)


def test_an_honest_server_gives_a_whole_table(serve):
    found = judged(serve(fair))
    assert (found.judged, found.win.count, found.order_disagreement.count, found.unread) == (4, 4, 0, {})
    assert found.totals == (36.0, 12.0)  # 4 x 9, 4 x 3


def test_the_request_is_what_the_endpoint_expects(serve):
    server = serve(fair)
    judged(server, temperature=0.2, max_tokens=77)
    assert set(server.paths) == {"/v1/chat/completions"}
    body = {k: v for k, v in server.bodies[0].items() if k != "messages"}
    assert body == {"model": "gpt-test", "temperature": 0.2, "max_tokens": 77}


def test_what_a_model_does_not_take_can_be_left_out_or_renamed(serve):
    server = serve(fair)
    judged(server, temperature=None, limit_parameter="max_completion_tokens")
    assert {k for k in server.bodies[0] if k != "messages"} == {"model", "max_completion_tokens"}


def test_tokens_that_the_server_counted_are_kept(serve, tmp_path):
    judged(serve(fair), Cache(tmp_path / "v.jsonl"))
    lines = (tmp_path / "v.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["tokens"] for line in lines] == [[70, 5]] * 8


@pytest.mark.parametrize(
    "text",
    ["I like both.", "", None, "9/10 3/10", "\x00\ud800"],
    ids=["prose", "empty", "refused", "fractions", "garbage"],
)
def test_malformed_verdicts_are_asked_again_and_counted(serve, text):
    server = serve(lambda n, prompt: text)
    found = judged(server)
    assert (found.judged, found.unread) == (0, {"malformed reply": 8})
    assert len(server.prompts) == 24  # 4 questions x 2 orders x (1 + 2 retries)
    assert found.questions == 4


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "reply that is not a chat completion"),
        (b"<html>", "reply that is not a chat completion"),
        (b"[]", "reply that is not a chat completion"),
        (b'{"choices": []}', "reply that is not a chat completion"),
        (b'{"choices": [{"message": null}]}', "reply that is not a chat completion"),
        (b"\xff\xfe", "reply that is not a chat completion"),
        (b"[" * 100_000, "reply that is not a chat completion"),
    ],
)
def test_a_body_that_is_no_completion_is_a_failure(serve, data, reason):
    found = judged(serve(lambda n, prompt: (200, {}, data)), tries=2)
    assert (found.judged, found.unread) == (0, {f"{reason}, 2 tries": 8})


def test_a_server_that_fails_now_and_then_costs_only_time(serve):
    found = judged(serve(lambda n, prompt: refusal(500) if n % 2 == 0 else fair(n, prompt)), concurrency=1)
    assert (found.judged, found.unread) == (4, {})


def test_a_server_that_always_fails_ends_in_a_table_that_says_so(serve):
    server = serve(lambda n, prompt: refusal(500))
    found = judged(server, tries=3, give_up_after=2, concurrency=1)
    assert found.judged == 0
    assert found.unread == {
        "HTTP 500 Internal Server Error (server_error), 3 tries": 2,
        "not asked, after 2 failures in a row": 6,
    }
    assert len(server.prompts) == 6  # 2 prompts x 3 tries


def test_a_refused_key_stops_at_once(serve, monkeypatch):
    monkeypatch.setenv("A_KEY", SECRET)
    server = serve(lambda n, prompt: refusal(401, "invalid_api_key"))
    found = judged(server, key_variable="A_KEY", concurrency=1)
    reason = "HTTP 401 Unauthorized (invalid_api_key)"
    assert found.unread == {reason: 1, f"not asked, after {reason}": 7}
    assert len(server.prompts) == 1


def test_spent_money_is_not_a_rate_limit(serve):
    server = serve(lambda n, prompt: refusal(429, "insufficient_quota"))
    judged(server, concurrency=1)
    assert len(server.prompts) == 1


def test_a_question_that_is_refused_does_not_stop_the_others(serve):
    found = judged(
        serve(lambda n, prompt: refusal(400, "content_filter") if "question 2" in prompt else fair(n, prompt))
    )
    assert (found.judged, found.unread) == (3, {"HTTP 400 Bad Request (content_filter)": 2})


def test_a_rate_limit_is_waited_out(serve):
    limited = refusal(429, "rate_limit_exceeded", **{"Retry-After": "0.2"})
    times: list[float] = []

    def plan(n: int, prompt: str) -> Any:
        times.append(time.monotonic())
        return limited if n == 0 else fair(n, prompt)

    found = judged(serve(plan), concurrency=1)
    assert found.judged == 4
    assert times[1] - times[0] >= 0.2  # never earlier; later does no harm


def test_a_rate_limit_given_as_a_date_is_waited_out(serve):
    def plan(n: int, prompt: str) -> Any:
        past = email.utils.formatdate(time.time() - 100, usegmt=True)
        return refusal(429, **{"Retry-After": past}) if n == 0 else fair(n, prompt)

    assert judged(serve(plan)).judged == 4


@pytest.mark.parametrize("nonsense", ["soon", "-5", "", "Tue, 99 Foo 2026"])
def test_a_senseless_retry_after_is_no_obstacle(serve, nonsense):
    plan = lambda n, prompt: refusal(503, **{"Retry-After": nonsense}) if n == 0 else fair(n, prompt)  # noqa: E731
    assert judged(serve(plan)).judged == 4


def test_a_rate_limit_longer_than_allowed_is_a_failure(serve):
    server = serve(lambda n, prompt: refusal(429, "rate_limit_exceeded", **{"Retry-After": "86400"}))
    found = judged(server, give_up_after=100)
    assert set(found.unread) == {
        "HTTP 429 Too Many Requests (rate_limit_exceeded), asking for a longer wait than allowed"
    }
    assert len(server.prompts) == 8  # each once


def test_a_slow_server_is_left_after_the_timeout(serve):
    released = threading.Event()
    server = serve(lambda n, prompt: released.wait(20) and fair(n, prompt))
    found = judged(server, timeout=0.1, tries=2, concurrency=8)
    released.set()
    assert found.unread == {"no reply within 0.1 s, 2 tries": 8}


def test_a_server_that_drips_is_left_after_the_timeout(serve):
    released = threading.Event()

    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        while not released.wait(0.02):
            handler.wfile.write(b" ")

    found = judged(serve(lambda n, prompt: drip), timeout=0.3, tries=1, concurrency=8)
    released.set()
    assert found.unread == {"no reply within 0.3 s": 8}


def test_an_endless_reply_is_cut_off(serve):
    def flood(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b" " * (1 << 20))

    found = judged(serve(lambda n, prompt: flood), tries=1, concurrency=1, give_up_after=1)
    assert found.unread == {"connection lost (HTTPException)": 1, "not asked, after 1 failures in a row": 7}


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.close()


def hang_up_in_the_middle(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices"')


def speak_nonsense(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"Private question 1?\r\n\r\n")


@pytest.mark.parametrize("rudely", [hang_up, hang_up_in_the_middle, speak_nonsense])
def test_a_server_that_hangs_up_is_tried_again(serve, rudely):
    server = serve(lambda n, prompt: rudely if n % 2 == 0 else fair(n, prompt))
    assert judged(server, concurrency=1).judged == 4


@pytest.mark.parametrize("rudely", [hang_up, hang_up_in_the_middle, speak_nonsense])
def test_a_server_that_only_hangs_up_ends_in_an_honest_table(serve, rudely):
    found = judged(serve(lambda n, prompt: rudely), tries=2)
    assert (found.judged, sum(found.unread.values())) == (0, 8)
    assert "Private" not in str(found.unread)


def test_nobody_there_ends_in_an_honest_table(serve):
    server = serve(fair)
    server.url = "http://127.0.0.1:9/v1"  # the discard port
    assert judged(server, tries=1).unread == {"no connection (ConnectionRefusedError)": 8}


def test_redirects_are_not_followed(serve):
    elsewhere = serve(fair)
    server = serve(lambda n, prompt: (302, {"Location": elsewhere.url}, b""))
    found = judged(server, concurrency=1)
    assert elsewhere.paths == []
    assert found.unread["HTTP 302 Found"] == 1


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(serve, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert judged(serve(fair)).judged == 4


def test_an_interrupted_evaluation_pays_only_for_what_is_missing(serve, tmp_path):
    server, path = serve(fair), tmp_path / "v.jsonl"
    judge = PromptJudge(endpoint(server, concurrency=1), RUBRICS["total"], shipped_prompt(RUBRICS["total"]))

    def stop(done: int, all: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(judge, QUESTIONS, OURS, THEIRS, cache=Cache(path), on_progress=stop)
    kept = len(path.read_text().splitlines())
    before = len(server.prompts)
    found = compare(judge, QUESTIONS, OURS, THEIRS, cache=Cache(path))
    assert found.judged == 4
    assert kept == 3
    assert before <= 4  # the three that are kept, and perhaps one that was under way
    fresh = server.prompts[before:]
    assert len([p for p in fresh if p in server.prompts[:3]]) == 0
    asked = len(server.prompts)
    assert compare(judge, QUESTIONS, OURS, THEIRS, cache=Cache(path)) == found
    assert len(server.prompts) == asked


def test_no_more_requests_at_a_time_than_allowed(serve):
    server = serve(lambda n, prompt: time.sleep(0.02) or fair(n, prompt))
    judged(server, concurrency=2)
    assert server.busiest <= 2


def test_requests_are_spaced_as_asked(serve):
    began = time.monotonic()
    judged(serve(fair), per_minute=1200, concurrency=8)  # 50 ms apart
    assert time.monotonic() - began >= 7 * 0.05  # from the first slot to the eighth; never earlier


# --- secrets and private text ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        lambda n, prompt: refusal(500),
        lambda n, prompt: refusal(400, SECRET),
        lambda n, prompt: refusal(401, "Private question 1?"),
        lambda n, prompt: f"9 3\nYour key is {SECRET}.",
        lambda n, prompt: f"{SECRET}",
        lambda n, prompt: speak_nonsense,
    ],
)
def test_neither_key_nor_prompt_appears_anywhere(serve, tmp_path, monkeypatch, capfd, plan):
    monkeypatch.setenv("A_KEY", f"{SECRET}\n")
    server, path = serve(plan), tmp_path / "v.jsonl"
    found = judged(server, Cache(path), key_variable="A_KEY", tries=1)
    assert {h["Authorization"] for h in server.headers} == {f"Bearer {SECRET}"}
    assert "Private" not in path.read_text("utf-8")  # a judge that quotes is another matter
    assert SECRET not in path.read_text("utf-8")
    printed = capfd.readouterr()
    for said in (
        repr(found),
        str(found.plain()),
        repr(endpoint(server, key_variable="A_KEY")),
        printed.out,
        printed.err,
    ):
        assert SECRET not in said
        assert "Private" not in said


def test_without_a_key_variable_no_key_is_sent(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server = serve(fair)
    judged(server)
    assert all("Authorization" not in h for h in server.headers)


def test_a_key_that_is_not_set_is_named_before_anything_is_sent(monkeypatch):
    monkeypatch.delenv("A_KEY", raising=False)
    with pytest.raises(ConfigError, match="environment variable A_KEY, which is not set"):
        Endpoint("https://example.org/v1", "m", "A_KEY")


@pytest.mark.parametrize("odd", [f"{SECRET} {SECRET}", f"{SECRET}\n{SECRET}", f"{SECRET}\u00e9"])
def test_an_unusable_key_is_refused_without_showing_it(monkeypatch, odd):
    monkeypatch.setenv("A_KEY", odd)
    with pytest.raises(ConfigError, match="A_KEY") as refused:
        Endpoint("https://example.org/v1", "m", "A_KEY")
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["", "example.org/v1", "ftp://example.org", "file:///etc/passwd", "http://", "https://"]
)
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(ConfigError, match="base URL"):
        Endpoint(url, "m")


@pytest.mark.parametrize(
    "url", [f"https://user:{SECRET}@example.org/v1", f"https://example.org/v1?key={SECRET}"]
)
def test_a_key_in_the_url_is_refused_without_showing_it(url):
    with pytest.raises(ConfigError) as refused:
        Endpoint(url, "m")
    assert SECRET not in str(refused.value)


def test_a_key_does_not_travel_unencrypted_to_another_machine(monkeypatch):
    monkeypatch.setenv("A_KEY", SECRET)
    with pytest.raises(ConfigError, match="unencrypted"):
        Endpoint("http://example.org/v1", "m", "A_KEY")


# --- cost ------------------------------------------------------------------------------------------------


def test_cost_is_tokens_times_prices():
    found = estimate_cost(["x" * 3000] * 2, max_tokens=100, retries=1, prices=Prices(prompt=2.0, reply=10.0))
    assert found == Estimate(
        2, 2000, 200, 0.006, 0.012
    )  # (2000 x 2 + 200 x 10) / 1e6; twice if each is asked again


def test_cost_without_prices_is_unknown_and_not_free():
    found = estimate_cost(["x"], max_tokens=100, retries=0, prices=None)
    assert (found.cost, found.is_free) == (None, False)


@pytest.mark.parametrize("prices", [None, Prices(2.0, 10.0)])
def test_nothing_to_ask_is_free(prices):
    assert estimate_cost([], max_tokens=100, retries=2, prices=prices).is_free


def test_prices_of_zero_are_free():
    assert estimate_cost(["x"], max_tokens=100, retries=2, prices=Prices(0, 0)).is_free


def test_leaving_early_sends_nothing_more(serve):
    server = serve(lambda n, prompt: "9 3")
    replies = endpoint(server, concurrency=1).write({str(i): f"prompt {i}" for i in range(50)})
    next(replies)
    replies.close()
    assert len(server.prompts) <= 2  # the one taken, and perhaps the next


def test_an_outcome_is_a_reply_or_a_reason(serve):
    [said] = endpoint(serve(lambda n, p: refusal(404, "a code nobody knows"))).write({"k": "prompt"})
    assert said == ("k", Failed("HTTP 404 Not Found"))
