"""Visitors of `chronos serve`, for locust: what `bench.runs.soak` lets loose on a server.

They come through all doors, ask for streams and for whole replies, with short prompts and long;
every third leaves in the middle, wherever its reply is then. An answer is 200, or 503 (529 at
Anthropic's door) with Retry-After, after which a visitor comes back; all else is a failure. A file
of locust's, so it imports nothing of Chronos: locust may live in an environment of its own.

    locust -f bench/lib/visitors.py --headless --users 4 --run-time 30m --host http://127.0.0.1:8000
"""

from __future__ import annotations

import random
from argparse import ArgumentParser
from typing import Any

import gevent
from locust import HttpUser, events, task

_DOORS = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")
# A reply that takes longer is lost, however busy the machine is.
_PATIENCE_S = 600


@events.init_command_line_parser.add_listener
def _options(parser: ArgumentParser) -> None:
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between two visits")


class Visitor(HttpUser):
    def wait_time(self) -> float:
        return float(self.environment.parsed_options.pause)

    @task
    def visit(self) -> None:
        path, leaves = random.choice(_DOORS), random.random() < 1 / 3
        body = body_of(path)
        # Whoever leaves a whole reply hangs up before it comes, and a streamed one behind its head.
        stays = random.choice((0.001, 0.02, 0.3)) if leaves else _PATIENCE_S
        name = f"left {path}" if leaves else path
        with self.client.post(
            path,
            json=body,
            name=name,
            headers={"connection": "close"},
            stream=True,
            timeout=stays,
            catch_response=True,
        ) as response:
            if leaves:
                if response.raw is not None:
                    gevent.sleep(stays)
                    response.close()
                response.success()
            elif response.status_code in (503, 529):
                response.request_meta["name"] = "told to come back"
                gevent.sleep(int(response.headers["retry-after"]))
                response.success()
            elif response.status_code != 200:
                response.failure(f"status {response.status_code} {response.error or ''}")
            elif b'"error":{' in response.content or b"event: error" in response.content:
                response.failure("an error in a stream")


def body_of(path: str) -> dict[str, Any]:
    """A request to a door; some begin alike, so that kept beginnings are used and given up."""
    words = random.choice((3, 40, 700))
    text = f"{random.choice('abcdef')} " * words + str(random.random())
    body: dict[str, Any] = {"temperature": random.choice((0, 1)), "stream": random.random() < 0.5}
    length = "max_output_tokens" if path.endswith("responses") else "max_tokens"
    body[length] = random.randint(1, 60)
    if path.endswith("responses"):
        return body | {"input": text}
    if path == "/v1/completions":
        return body | {"prompt": text}
    return body | {"messages": [{"role": "user", "content": text}]}
