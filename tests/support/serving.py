"""A server in this process, on a port of loopback, for tests that talk to it as clients do."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import uvicorn

from chronos.run.engine import Engine, load
from chronos.serve.app import application
from chronos.serve.ask import Service
from chronos.serve.guard import Rules
from chronos.serve.metrics import Metrics
from chronos.serve.served import Catalogue, Served
from chronos.serve.server import bind, settings
from chronos.serve.worker import Worker

HELLO = [{"role": "user", "content": "def add(left, right):"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@dataclass
class Running:
    """A server that answers, and what it stands on."""

    url: str
    service: Service
    http: httpx2.Client
    model: str

    @property
    def worker(self) -> Worker:
        return self.service.worker

    @property
    def engine(self) -> Engine:
        engine = self.worker._engine
        assert engine is not None
        return engine

    def post(self, path: str, **body: Any) -> httpx2.Response:
        return self.http.post(path, json=body)

    def chat(self, **fields: Any) -> Any:
        """The answer to a chat of a few tokens, as JSON."""
        response = self.post(CHAT, **({"messages": HELLO, "max_tokens": 8} | fields))
        assert response.status_code == 200, response.text
        return response.json()

    def text(self, prompt: Any, **fields: Any) -> Any:
        """The answer to a text or token ids, as JSON."""
        response = self.post(TEXT, **({"prompt": prompt, "max_tokens": 8} | fields))
        assert response.status_code == 200, response.text
        return response.json()

    def events(self, path: str, **body: Any) -> list[Any]:
        """The data of a stream's events; [DONE] as text."""
        found = []
        with self.http.stream("POST", path, json=body | {"stream": True}) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: "):
                    text = line.removeprefix("data: ")
                    found.append(text if text == "[DONE]" else json.loads(text))
        return found

    def until(self, done: Callable[[], bool], seconds: float = 20.0) -> None:
        """Wait for something that other threads do."""
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.005)


@contextmanager
def serving(
    *folders: Path,
    backend: str,
    rules: Rules | None = None,
    aliases: tuple[str, ...] = (),
    stop_ids: frozenset[int] | None = frozenset(),
    load_options: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[Running]:
    """options: of the worker. load_options: of `load`. stop_ids: in place of the models' own,
    since random weights like them; None leaves them."""
    cards = [Served.open(str(folder)) for folder in folders]

    def opener(card: Served) -> Callable[[], Engine]:
        def opened() -> Engine:
            engine = load(
                card.folder, backend=backend, **({"budget": "25%"} | (load_options or {}))
            )
            if stop_ids is not None:
                engine.stop_ids = stop_ids
            return engine

        return opened

    worker = Worker({card.name: opener(card) for card in cards}, **options)
    service = Service(Catalogue(cards, aliases), worker, Metrics(worker))
    server = uvicorn.Server(settings(application(service, rules or Rules())))
    with bind("127.0.0.1", 0) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        thread = threading.Thread(target=server.run, args=([sock],))
        worker.start()
        thread.start()
        try:
            worker.loaded.result()
            with httpx2.Client(base_url=url, timeout=60) as http:
                yield Running(url, service, http, cards[0].name)
        finally:
            worker.close()
            server.should_exit = True
            thread.join()
