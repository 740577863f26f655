"""An OpenAI-compatible server on this machine that behaves as a test plans it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

SECRET = "sk-Tr0ub4dor-and-3"


@dataclass
class Server:
    """Answers request number n by `plan(n, prompt)`: a reply's text, a status with headers, or something done by hand."""

    plan: Callable[[int, str], Any]
    prompts: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    busy: int = 0
    busiest: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


class Quiet(ThreadingHTTPServer):
    """Says nothing when a client hangs up, which here is what clients are meant to do."""

    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


def fair(n: int, prompt: str) -> str:
    """The longer answer gets 9, the other 3."""
    shown = [part.partition("\n[End of answer")[0] for part in prompt.split("[Answer of assistant ")[1:]]
    first, second = (len(part) for part in shown)
    return "9 3\nMore to say." if first > second else "3 9"


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[int, str], Any]], Server]]:
    running = []

    def start(plan: Callable[[int, str], Any]) -> Server:
        state = Server(plan)

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                state.paths.append(self.path)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with state.lock:
                    n = len(state.prompts)
                    state.prompts.append(body["messages"][0]["content"])
                    state.headers.append(dict(self.headers))
                    state.paths.append(self.path)
                    state.bodies.append(body)
                    state.busy += 1
                    state.busiest = max(state.busiest, state.busy)
                try:
                    self.act(state.plan(n, state.prompts[n]))
                except OSError:
                    pass  # the client has gone
                finally:
                    with state.lock:
                        state.busy -= 1

            def act(self, said: Any) -> None:
                if callable(said):
                    said(self)
                    return
                status, headers, data = said if isinstance(said, tuple) else (200, {}, completion(said))
                self.send_response(status, "key " + SECRET)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        server = Quiet(("127.0.0.1", 0), Handler)
        state.url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        running.append(server)
        return state

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def completion(text: str | None) -> bytes:
    return json.dumps(
        {
            "choices": [{"message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 70, "completion_tokens": 5},
        }
    ).encode()


def refusal(status: int, code: str = "server_error", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """An error that, as some servers do, quotes the prompt and the key."""
    error = {"message": f"Private question 1? {SECRET}", "code": code, "type": SECRET}
    return status, headers, json.dumps({"error": error}).encode()
