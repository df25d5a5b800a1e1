"""What clients do to a server, and what happens to its thread: others go on being answered.

Rows V3 to V6 and V9 of the faults; the others stand in test_wire (nonsense, V1), test_guard (keys,
hosts, origins, V2 and V8) and test_process (signals, V7).
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvicorn

from chronos.serve import server as servers
from chronos.serve import worker as workers
from chronos.serve.guard import MOST_BODY
from tests.support.serving import CHAT, HELLO, Running, serving


def connect(server: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20)


def head(path: str, *more: str, length: int | None = None) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *more]
    lines += [] if length is None else [f"Content-Length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


def answer(connection: socket.socket) -> bytes:
    """All that comes until the server closes, or a whole head and something behind it."""
    found = b""
    while b"\r\n\r\n" not in found and (more := connection.recv(1 << 16)):
        found += more
    return found


def test_headers_without_end_are_refused(server: Running) -> None:
    with connect(server) as connection:
        connection.sendall(head(CHAT, "X: " + "y" * (100 << 10), length=2)[:-4])
        assert answer(connection).startswith(b"HTTP/1.1 4")
    assert server.chat()["usage"]["completion_tokens"] == 8


def test_a_body_that_is_larger_than_it_says_or_has_no_end_takes_no_memory(server: Running) -> None:
    before = psutil.Process().memory_info().rss
    with connect(server) as connection:
        connection.sendall(head(CHAT, length=99_999_999_999))
        assert answer(connection).startswith(b"HTTP/1.1 413")
    with connect(server) as connection:
        chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
        connection.sendall(head(CHAT, "Transfer-Encoding: chunked"))
        try:
            for _ in range(2 * MOST_BODY >> 20):
                connection.sendall(chunk)
        except OSError:  # closed while we were sending
            pass
        else:
            assert answer(connection).startswith(b"HTTP/1.1 413")
    assert psutil.Process().memory_info().rss - before < 4 * MOST_BODY
    assert server.chat()["usage"]["completion_tokens"] == 8


def closed(connection: socket.socket) -> bool:
    """Whether the server ended it; reads what it said before."""
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def test_slow_headers_end_by_a_deadline_and_others_are_served(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often a byte of them comes."""
    monkeypatch.setattr(servers, "HEADERS_S", 0.3)
    with ExitStack() as stack:
        slow = [stack.enter_context(closing(connect(server))) for _ in range(50)]
        for connection in slow[1:]:  # one says nothing at all
            connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\n")
        assert server.chat()["usage"]["completion_tokens"] == 8
        end = time.monotonic() + 0.6
        while time.monotonic() < end:
            try:
                slow[-1].sendall(b"X: y\r\n")
            except OSError:
                break
            time.sleep(0.05)
        assert all(map(closed, slow))


def test_who_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """An application that writes as our streams do hears that its client has gone."""
    monkeypatch.setattr(servers, "READ_S", 0.1)
    heard = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

        async def write() -> None:
            while True:
                body = bytes(1 << 20)
                await send({"type": "http.response.body", "body": body, "more_body": True})

        writing = asyncio.ensure_future(write())
        while (await receive())["type"] != "http.disconnect":
            pass
        heard.set()
        writing.cancel()

    server = uvicorn.Server(servers.settings(app))
    with servers.bind("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        with socket.create_connection(sock.getsockname(), timeout=20) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert heard.wait(20)
            assert closed(connection)
        server.should_exit = True
        thread.join()


def test_more_than_there_is_room_for_come_back_and_nobody_is_lost(
    one_backend: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openai = pytest.importorskip("openai")
    monkeypatch.setattr(workers, "_FIRST_GUESS_S", 0.0)
    with serving(folder, backend=one_backend, sequences=1, queue=2) as server:
        with ThreadPoolExecutor(12) as pool:
            body = {"messages": HELLO, "max_tokens": 60}
            found = list(pool.map(lambda _: server.post(CHAT, **body), range(12)))
        refused = [each for each in found if each.status_code == 503]
        assert {each.status_code for each in found} == {200, 503} and len(refused) <= 9
        assert len({each.json()["choices"][0]["message"]["content"]
                    for each in found if each.status_code == 200}) == 1  # fmt: skip
        assert all(int(each.headers["retry-after"]) >= 1 for each in refused)
        assert all(each.json()["error"]["code"] == "queue_full" for each in refused)
        counted = f'admission_rejections_total{{reason="queue_full"}} {len(refused)}.0'
        assert counted in server.http.get("/metrics").text

        def ask(_: int) -> str:
            with openai.OpenAI(
                base_url=f"{server.url}/v1", api_key="none", max_retries=9
            ) as client:
                reply = client.chat.completions.create(
                    model=server.model, messages=HELLO, max_tokens=60
                )
                return str(reply.choices[0].message.content)

        with ThreadPoolExecutor(6) as pool:
            assert len(set(pool.map(ask, range(6)))) == 1


def test_an_engine_whose_thread_ended_is_not_healthy_and_hangs_nobody(
    one_backend: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(folder, backend=one_backend) as server:
        monkeypatch.setattr(threading, "excepthook", lambda args: None)

        def ends(self: workers.Worker) -> None:
            raise SystemExit

        monkeypatch.setattr(workers.Worker, "_pass", ends)
        told = server.post(CHAT, messages=HELLO)
        assert told.status_code == 503
        server.until(lambda: not server.worker._thread.is_alive())
        health = server.http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        told = server.post(CHAT, messages=HELLO)
        assert told.status_code == 503 and told.json()["error"]["code"] == "failed"
        assert server.http.get("/v1/models").status_code == 200
