"""What never reaches a route: foreign hosts and origins, missing keys, wrong types, large bodies.

In this process, without a model: what comes through is told apart by what is wrong with it.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx2
import pytest

from chronos.common.errors import StoreError
from chronos.serve import guard
from chronos.serve.app import GETS, POSTS, application
from chronos.serve.ask import Service
from chronos.serve.guard import LOOPBACK, Rules
from chronos.serve.metrics import Metrics
from chronos.serve.problem import MOST_CHARACTERS, Problem, of_error
from chronos.serve.served import Catalogue, Served
from chronos.serve.worker import Worker

CHAT = "/v1/chat/completions"
FOREIGN = ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io")


@pytest.fixture(scope="module")
def service() -> Service:
    """Of the demo, which is never loaded: the worker does not run."""
    worker = Worker({"demo": lambda: pytest.fail("nobody asked for the model")})
    return Service(Catalogue([Served.open("demo")]), worker, Metrics(worker))


def ask(service: Service, rules: Rules, method: str, path: str, **fields: Any) -> httpx2.Response:
    async def asked() -> httpx2.Response:
        transport = httpx2.ASGITransport(application(service, rules))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **fields)

    return asyncio.run(asked())


def every_route() -> list[tuple[str, str]]:
    gets = [("GET", path.replace("{name:path}", "demo")) for path in GETS]
    return [*gets, *(("POST", door.path) for door in POSTS), ("GET", "/no/such/route")]


@pytest.mark.parametrize(("method", "path"), every_route())
def test_every_route_but_health_asks_for_the_key(service: Service, method: str, path: str) -> None:
    rules = Rules(keys=("right", "also-right"))
    body = {"json": {}} if method == "POST" else {}
    refused = ask(service, rules, method, path, **body)
    if path == "/health":
        assert refused.status_code == 503  # not loaded, and said to anyone
        return
    assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
    for headers in (
        {"authorization": "Bearer wrong"}, {"x-api-key": "righ"}, {"authorization": "right"},
        {"x-api-key": "", "authorization": "Basic right"}, {"x-api-key": "r\u00efght"},
    ):  # fmt: skip
        encoded = {name: value.encode() for name, value in headers.items()}
        assert ask(service, rules, method, path, headers=encoded, **body).status_code == 401
    for headers in ({"authorization": "Bearer right"}, {"x-api-key": "also-right"}):
        assert ask(service, rules, method, path, headers=headers, **body).status_code != 401


@pytest.mark.parametrize(
    "host",
    [*FOREIGN, "x/?", "", "localhost:8000/health", "user@localhost", "[::1", "localhost:port"],
)
def test_only_names_of_this_machine_are_hosts(service: Service, host: str) -> None:
    response = ask(service, Rules(), "GET", "/v1/models", headers={"host": host})
    assert response.status_code == 421
    opened = Rules(keys=("k",), hosts=None)  # with a key any name will do, if it is one
    headers = {"host": host, "x-api-key": "k"}
    status = ask(service, opened, "GET", "/v1/models", headers=headers).status_code
    assert status == (
        200 if host in ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io") else 421
    )


@pytest.mark.parametrize(
    "host", [*sorted(LOOPBACK - {"::1"}), "[::1]", "LOCALHOST:8000", "[::1]:80"]
)
def test_this_machine_is(service: Service, host: str) -> None:
    assert ask(service, Rules(), "GET", "/", headers={"host": host}).status_code == 200


def test_pages_of_other_origins_may_not_ask(service: Service) -> None:
    rules = Rules(origins=frozenset({"https://mine.example"}))
    for origin in ("https://evil.example", "null", "https://mine.example.evil.example", "http://x"):
        for method, path in (("GET", "/v1/models"), ("OPTIONS", CHAT)):
            response = ask(service, rules, method, path, headers={"origin": origin})
            assert response.status_code == 403
            assert "access-control-allow-origin" not in response.headers
    mine = {"origin": "https://mine.example"}
    response = ask(service, rules, "GET", "/v1/models", headers=mine)
    assert response.headers["access-control-allow-origin"] == mine["origin"]
    assert "access-control-allow-credentials" not in response.headers
    assert ask(service, rules, "OPTIONS", CHAT, headers=mine).status_code == 204
    own = {"origin": "http://localhost"}
    assert ask(service, rules, "GET", "/v1/models", headers=own).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "", "application/x-www-form-urlencoded", "json"])
def test_a_body_that_needs_no_preflight_is_refused(service: Service, kind: str) -> None:
    response = ask(service, Rules(), "POST", CHAT, content=b"{}", headers={"content-type": kind})
    assert response.status_code == 415
    good = {"content-type": "application/json; charset=utf-8"}
    assert ask(service, Rules(), "POST", CHAT, content=b"{}", headers=good).status_code == 400


def test_large_bodies_are_not_read(service: Service) -> None:
    headers = {"content-type": "application/json"}
    for length in ("99999999999", "9" * 40, "-1", "many"):
        said = {**headers, "content-length": length}
        response = ask(service, Rules(), "POST", CHAT, content=b"{}", headers=said)
        assert response.status_code == 413, length

    async def endless() -> Any:
        while True:
            yield b" " * (1 << 20)

    response = ask(service, Rules(), "POST", CHAT, content=endless(), headers=headers)
    assert response.status_code == 413


def test_a_body_that_does_not_come_is_given_up(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "BODY_S", 0.02)

    async def slow() -> Any:
        yield b"{"
        await asyncio.sleep(30)

    headers = {"content-type": "application/json"}
    response = ask(service, Rules(), "POST", CHAT, content=slow(), headers=headers)
    assert response.status_code == 408


def test_while_the_model_is_loaded_a_client_is_told_when_to_come_back(service: Service) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
    response = ask(service, Rules(), "POST", CHAT, json=body)
    assert response.status_code == 503 and int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["code"] == "loading"
    response = ask(service, Rules(), "POST", "/v1/messages", json=body)
    assert response.status_code == 529
    assert response.json()["error"]["type"] == "overloaded_error"
    models = ask(service, Rules(), "GET", "/v1/models").json()
    assert [model["id"] for model in models["data"]] == ["demo"]
    counted = ask(service, Rules(), "POST", "/v1/messages/count_tokens", json=body)
    assert counted.json()["input_tokens"] > 0


def test_errors_are_short_and_name_no_file(tmp_path: Path) -> None:
    secret = StoreError("no expert", str(tmp_path / "secret"), f"look into {tmp_path}")
    for error in (secret, OSError(2, "gone", str(tmp_path)), Problem(400, "y" * 10_000)):
        problem = of_error(error)
        for text in (str(problem.openai()), str(problem.anthropic("r"))):
            assert str(tmp_path) not in text and len(text) < MOST_CHARACTERS + 150
