"""FakeCopyEngine: an accelerator's streams and events, made of threads.

Copies and computation run in their own order, late and at once, as on a GPU; a store that forgets
to order them hands out wrong bytes here too. `compute` queues what a kernel would do; `gate` holds
copies back until a test opens it. Not covered: two copies sharing one link.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any


class FakeEvent:
    """A point in a stream's work."""

    def __init__(self) -> None:
        self._passed = threading.Event()

    def query(self) -> bool:
        return self._passed.is_set()

    def synchronize(self) -> None:
        if not self._passed.wait(30):
            raise TimeoutError("an event was never reached")

    def set(self) -> None:
        self._passed.set()


class FakeStream:
    """Runs what is queued, in order, on a thread of its own."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], None]) -> None:
        self._work.put(work)

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()


class FakeCopyEngine:
    """Copies that take `latency_s`. Counts what it did; close it after the feed."""

    def __init__(self, latency_s: float = 0.0) -> None:
        self.latency_s = latency_s
        self.copies = self.demand_copies = 0
        self.failures: list[BaseException] = []  # raised by computation
        self.gate = threading.Event()
        self.gate.set()
        self._compute, self._demand, self._prefetch = FakeStream(), FakeStream(), FakeStream()

    def over(self, sources: Any, targets: Any) -> FakeCopies:
        """A CopyEngine between the rows of two arrays, on these streams."""
        return FakeCopies(self, list(sources), list(targets))

    def copy(
        self, source: Any, target: Any, *, demand: bool, after: Sequence[FakeEvent]
    ) -> FakeEvent:
        done = FakeEvent()

        def copy() -> None:
            for event in after:
                event.synchronize()
            self.gate.wait()
            time.sleep(self.latency_s)
            target[:] = source
            done.set()

        self.copies += 1
        self.demand_copies += demand
        (self._demand if demand else self._prefetch).put(copy)
        return done

    def mark(self) -> FakeEvent:
        return self._behind(self._compute)

    def wait(self, event: FakeEvent) -> None:
        self._compute.put(event.synchronize)

    def compute(self, work: Callable[[], None]) -> None:
        """Queue what a kernel would do; exceptions are kept in `failures`."""

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self.failures.append(error)

        self._compute.put(run)

    def synchronize(self) -> None:
        """Wait for all computation queued so far; not through `mark`, which a test may break."""
        self._behind(self._compute).synchronize()

    def drain(self) -> None:
        """Wait for all copies queued so far."""
        for stream in (self._demand, self._prefetch):
            self._behind(stream).synchronize()

    def _behind(self, stream: FakeStream) -> FakeEvent:
        event = FakeEvent()
        stream.put(event.set)
        return event

    def close(self) -> None:
        self.gate.set()
        for stream in (self._demand, self._prefetch, self._compute):
            stream.close()


class FakeCopies:
    """The CopyEngine of two arrays' rows."""

    def __init__(self, engine: FakeCopyEngine, sources: list[Any], targets: list[Any]) -> None:
        self._engine, self._sources, self._targets = engine, sources, targets

    def start(
        self, source: int, target: int, *, demand: bool, after: Sequence[FakeEvent]
    ) -> FakeEvent:
        rows = self._sources[source], self._targets[target]
        return self._engine.copy(*rows, demand=demand, after=after)

    def mark(self) -> FakeEvent:
        return self._engine.mark()

    def wait(self, event: FakeEvent) -> None:
        self._engine.wait(event)
