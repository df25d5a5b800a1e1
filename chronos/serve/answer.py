"""What the event loop has of the jobs of one request: their events as they come, and their end.

Every answer, streamed or whole, ends its jobs when it ends itself, however that happens: the client
has gone, the handler failed, all is said.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chronos.run.generation import GenerationResult, Step
from chronos.serve.guard import described
from chronos.serve.metrics import Metrics
from chronos.serve.problem import Problem, of_error
from chronos.serve.worker import Event, Job, Read, Worker

PING_S = 10.0  # of silence, after which a stream says that it is alive


class Answer:
    """Iterate for (number of the job, step), with (-1, None) after each PING_S of silence; raises
    what a job ended with. results: by number, of jobs that have ended.

    Each wake of the loop takes time from the engine's thread, so a reply that is not streamed wakes
    it at its end, and what comes together wakes it once.
    """

    def __init__(self, worker: Worker, metrics: Metrics, streamed: bool) -> None:
        self._worker, self._metrics, self._streamed = worker, metrics, streamed
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[int, Event, float]] = deque()
        self._came = asyncio.Event()
        self._woken = False
        self._quiet_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.jobs: list[Job] = []
        self.results: dict[int, GenerationResult] = {}
        self._failed: set[int] = set()
        self._read = 0

    def add(self, **fields: Any) -> None:
        """One more job, of Job's fields."""
        number = len(self.jobs)

        def send(event: Event) -> None:
            self._events.append((number, event, time.monotonic()))
            waits = not self._streamed and isinstance(event, Step | Read)
            if waits or self._woken:
                return
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._came.set)
            except RuntimeError:  # the loop has ended, and with it whoever asked
                return

        self.jobs.append(Job(send=send, **fields))

    def submit(self) -> None:
        """Raises Problem where the worker has no room."""
        try:
            self._worker.submit(self.jobs)
        except Problem as problem:
            self._metrics.rejected(problem.code or "")
            raise

    def close(self) -> None:
        """Nobody wants what has not come yet."""
        if self._timer is not None:
            self._timer.cancel()
        over = self.results.keys() | self._failed
        open_jobs = [job for at, job in enumerate(self.jobs) if at not in over]
        self._worker.cancel(open_jobs)
        for job in open_jobs:
            self._metrics.gone(job)

    @property
    def cached(self) -> int:
        return sum(job.cached for job in self.jobs)

    def state(self) -> str:
        """How far it is, for people who look at a silent stream."""
        if all(job.begun for job in self.jobs):
            return f"prefill {self._read}/{len(self.jobs[0].prompt)}"
        return f"queued {self._worker.ahead(self.jobs[0])}"

    async def __aiter__(self) -> AsyncIterator[tuple[int, Step | None]]:
        last: dict[int, float] = {}
        while len(self.results) < len(self.jobs):
            if not self._events:
                if not await self._waited():
                    yield -1, None
                self._came.clear()
                self._woken = False  # before looking: what comes from now on wakes again
                continue
            number, event, now = self._events.popleft()
            job = self.jobs[number]
            if isinstance(event, Read):
                self._read = event.tokens
            elif isinstance(event, Step):
                if event.token is not None:
                    since = now - last.get(number, job.asked)
                    self._metrics.token(job, since, number not in last)
                    last[number] = now
                yield number, event
            elif isinstance(event, GenerationResult):
                self.results[number] = event
                self._metrics.ended(job, event)
                if event.finish_reason == "error":
                    raise Problem(500, event.error, code="no_token")
            else:
                self._failed.add(number)
                self._metrics.failed(job)
                raise event

    async def _waited(self) -> bool:
        """Wait for an event; False after PING_S without one. One timer follows all waits of an
        answer, since making one for each token costs more than the wait."""
        self._quiet_at = self._loop.time() + PING_S
        if self._timer is None:
            self._timer = self._loop.call_at(self._quiet_at, self._on_timer)
        await self._came.wait()
        return bool(self._events) or self._loop.time() < self._quiet_at

    def _on_timer(self) -> None:
        """Wake a wait that is over; begin anew where other waits have begun since."""
        self._timer = None
        if self._loop.time() >= self._quiet_at:
            self._came.set()
        else:
            self._timer = self._loop.call_at(self._quiet_at, self._on_timer)


class Whole(Response):
    """JSON that is made while the connection is watched: `made` is awaited, and given up with its
    answer when the client goes."""

    def __init__(self, made: Any, answer: Answer) -> None:
        self._made, self._answer = made, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _while_connected(self._write(scope, receive, send), receive, self._answer)

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = Response(dumps(await self._made), media_type="application/json")
        except Exception as error:
            response = described(of_error(error), scope)
        await response(scope, receive, send)


class Events(Response):
    """Server-sent events. chunks: an iterator of their text; what it raises becomes a last event,
    since the status has been sent."""

    def __init__(self, chunks: AsyncIterator[str], answer: Answer, on_error: Any) -> None:
        """on_error: a Problem as the text of this door's error event."""
        self._chunks, self._answer, self._on_error = chunks, answer, on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _while_connected(self._write(send), receive, self._answer)

    async def _write(self, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # a proxy is to pass each event on at once
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for chunk in self._chunks:
                await _body(send, chunk)
        except Exception as error:
            await _body(send, self._on_error(of_error(error)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _body(send: Send, text: str) -> None:
    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})


async def _while_connected(work: Any, receive: Receive, answer: Answer) -> None:
    """Run `work` to its end or until the client has gone; the answer ends with it."""
    writing = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({writing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if writing.done():
            writing.result()
    finally:
        answer.close()
        for task in (writing, gone):
            task.cancel()
        await asyncio.gather(writing, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def dumps(value: Any) -> str:
    return _ENCODER.encode(value)


def event(data: Any, name: str = "") -> str:
    """One server-sent event. data: JSON, or its text."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {data if isinstance(data, str) else dumps(data)}\n\n"


def usage_numbers(results: Sequence[GenerationResult]) -> dict[str, Any]:
    """What the experts of these replies did, under our own name in `usage`."""
    stats = [result.stats for result in results]
    return {
        "hits": sum(each["hits"] for each in stats),
        "misses": sum(each["misses"] + each["late"] for each in stats),
        "bytes_read": sum(each["bytes_read"] for each in stats),
        "prefill_ms": round(1e3 * sum(each["ttft_s"] for each in stats), 1),
        "decode_ms": round(1e3 * sum(each["decode_s"] for each in stats), 1),
    }
