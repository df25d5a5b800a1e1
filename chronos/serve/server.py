"""A process that serves: its socket, its signals, its end.

The socket is bound before anything is read, so a port that is taken is refused at once. On SIGTERM
or Ctrl-C nothing new is taken in and what is under way goes on, for DRAIN_S at most.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from chronos.common.errors import ResourceError, UsageError
from chronos.serve import statlog
from chronos.serve.worker import Worker

DRAIN_S = 30.0
_HEADER_BYTES = 32 << 10
HEADERS_S = 30.0  # for the headers of a request to arrive
READ_S = 60.0  # for a client to take what waits for it
_CONNECTIONS = 512  # at a time; more are refused, whatever they want


class _Protocol(H11Protocol):
    """With deadlines where uvicorn has none: for a request's headers, and for a client that does
    not read what it is sent. Each holds a connection meanwhile, of which there are so many."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def handle_events(self) -> None:
        super().handle_events()
        if (
            self._answers
        ):  # else some bytes of headers have come, which are no reason to wait longer
            self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._clear()

    @property
    def _answers(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch(self) -> None:
        """Begin to count the time of what the client owes now."""
        self._clear()
        if self.flow.write_paused or not self._answers:
            seconds = READ_S if self.flow.write_paused else HEADERS_S
            self._deadline = self.loop.call_later(seconds, self.transport.abort)

    def _clear(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class _Uvicorn(uvicorn.Server):
    """With our signals in place of its own, which would end it before it is drained."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UsageError for a host that is none, ResourceError for a port
    that cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UsageError(f"{host!r} is no host: {error.strerror}", "--host") from None
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(128)
    except OSError as error:
        sock.close()
        what = f"port {port} of {host} cannot be had: {(error.strerror or '').lower()}"
        raise ResourceError(what, "--port", "name another, or 0 for any that is free") from None
    return sock


def run(
    app: ASGIApp,
    worker: Worker,
    sock: socket.socket,
    say: Callable[[str], None],
    stats: Path | None = None,
) -> None:
    """Serve until a signal. say: is told where it listens. stats: a file that `statlog` appends to.
    Raises what loading the first model raises, ResourceError where `stats` cannot be written."""
    config = settings(app)
    # uvloop's, where it is installed: it hands the interpreter's lock to and from the engine's
    # thread less often for each token.
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_serve(_Uvicorn(config), worker, sock, say, stats))


def settings(app: ASGIApp) -> uvicorn.Config:
    """Uvicorn's, with our limits."""
    return uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=_HEADER_BYTES,
    )


async def _serve(
    server: uvicorn.Server,
    worker: Worker,
    sock: socket.socket,
    say: Callable[[str], None],
    stats: Path | None,
) -> None:
    loop, asked, again = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (again if asked.is_set() else asked).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    worker.start()
    serving = asyncio.create_task(server.serve([sock]))
    stopping = asyncio.create_task(asked.wait())
    following = None if stats is None else asyncio.create_task(statlog.follow(worker, stats))
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        say(f"listening on http://{_address(sock)}")
        loading = asyncio.wrap_future(worker.loaded)
        ends: set[asyncio.Future[Any]] = {stopping, serving}
        if following is not None:
            ends.add(following)
        await asyncio.wait({loading, *ends}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            say("ready: the model is loaded")
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        worker.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while (worker.running or worker.waiting) and not again.is_set():
                    await asyncio.sleep(0.05)
        if following is not None and following.done():
            following.result()
    finally:
        stopping.cancel()
        if following is not None:
            following.cancel()
        await asyncio.to_thread(worker.close)
        server.should_exit = True
        server.force_exit = again.is_set()
        await serving


def _address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
