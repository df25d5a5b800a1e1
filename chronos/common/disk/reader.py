"""Ranged reads on a thread pool, into buffers the caller supplies; demand before prefetch.

A request is one extent of one file, read in chunks, so that a demand read overtakes prefetches
after at most one chunk; small neighbours queued together share one `preadv`. Aligned requests
bypass the page cache where the file system can. Records are checked against their xxh3_128, the
chunks being hashed in order as they land. The reader knows nothing of experts, layers or slots.
Not covered: asynchronous submission (io_uring); Python costs some 15 us per request.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

import xxhash

from chronos.common.disk.io import (
    ALIGN,
    FileIO,
    OpenFiles,
    StrPath,
    address,
    read_error,
    read_some,
    round_up,
    short_read,
)
from chronos.common.errors import ChronosError, CorruptClusterError, ResourceError, StoreError

_MAX_JOINED = 16  # neighbours in one preadv; more would make the first of them wait for the last
_log = logging.getLogger("chronos")


READERS = 4  # threads, where nobody asks for another number


@dataclass(slots=True, eq=False)
class Request:
    """One submitted extent. `done` turns true once; `error` is then None or why it failed."""

    path: str
    offset: int
    buffer: memoryview
    demand: bool
    digest: bytes | None = None
    label: str = ""
    on_done: Callable[[Request], None] | None = None
    aligned: bool | None = None  # whether `buffer` begins on a page; None: look
    nbytes: int = 0
    done: bool = False
    error: ChronosError | None = None
    started_at: float = 0.0  # time.perf_counter(); 0 before
    finished_at: float = 0.0
    _queued: bool = False
    _direct: bool = False
    _next: int = 0  # bytes handed to workers
    _active: int = 0  # pieces being read
    _landed: dict[int, int] = field(default_factory=dict)  # pieces read and not yet hashed
    _hashed: int = 0  # bytes hashed, always a prefix
    _hashing: bool = False
    _hash: xxhash.xxh3_128 | None = None
    _gate: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.nbytes = len(self.buffer)
        aligned = address(self.buffer) % ALIGN == 0 if self.aligned is None else self.aligned
        self._direct = aligned and self.offset % ALIGN == 0
        self._gate.acquire()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until finished and `on_done` has returned; false when `timeout` seconds passed."""
        if self._gate.acquire(timeout=-1 if timeout is None else timeout):
            self._gate.release()
            return True
        return False


@dataclass
class ReaderStats:
    """What a reader did so far. `busy_s`: wall time with at least one read in flight."""

    bytes_read: int = 0
    reads: int = 0
    busy_s: float = 0.0


class RangedReader:
    """Reads extents of files into memory with `threads` workers; a context manager."""

    def __init__(
        self,
        threads: int = READERS,
        chunk_bytes: int = 1 << 20,
        io: FileIO | None = None,
        max_open: int = 32,
    ) -> None:
        self.stats = ReaderStats()
        self._io = io or FileIO()
        self._chunk = round_up(chunk_bytes, ALIGN)
        self._files = OpenFiles(self._io, max(max_open, 2 * threads))
        self._demand: deque[Request] = deque()
        self._prefetch: deque[Request] = deque()
        # A token wakes one sleeping worker; SimpleQueue wakes in half the time of a Condition.
        self._tokens: SimpleQueue[None] = SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._unfinished = self._prefetch_bytes = self._busy = self._prefetching = 0
        self._busy_since = 0.0
        self._workers = max(1, threads)
        self._max_prefetching = max(1, threads - 1)  # one worker is always free for a demand read
        self._threads: list[threading.Thread] = []
        try:
            for number in range(threads):
                thread = threading.Thread(target=self._work, name=f"read-{number}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError as error:
            self.close()
            raise ResourceError(f"cannot start {threads} threads", fix="see `ulimit -u`") from error

    def submit(
        self,
        path: StrPath,
        offset: int,
        buffer: memoryview,
        *,
        demand: bool,
        digest: bytes | None = None,
        label: str = "",
        on_done: Callable[[Request], None] | None = None,
    ) -> Request:
        """Queue a read of `len(buffer)` bytes at `offset`; `buffer` is ours until it is finished.

        `on_done(request)` is called once on a worker thread, on failure too; it must be short.
        """
        request = Request(os.fspath(path), offset, buffer, demand, digest, label, on_done)
        self.submit_many([request])
        return request

    def submit_many(self, requests: Sequence[Request]) -> None:
        """Queue reads together, all or none: a worker is woken once, not once for each of them."""
        pieces = 0
        with self._lock:
            if self._closed and requests:
                raise StoreError("the reader is closed", requests[0].label)
            for request in requests:
                request._queued = True
                pieces += -(-request.nbytes // self._chunk) or 1
                (self._demand if request.demand else self._prefetch).append(request)
                self._prefetch_bytes += 0 if request.demand else request.nbytes
            self._unfinished += len(requests)
        for _ in range(min(len(self._threads), pieces)):
            self._tokens.put(None)

    def promote(self, request: Request) -> None:
        """Turn a prefetch into a demand read; nothing is read twice."""
        with self._lock:
            if request.demand or request.done:
                return
            if request._queued:
                self._prefetch.remove(request)
                self._demand.append(request)
                self._tokens.put(None)  # the worker kept free for demand reads may take it
            self._prefetch_bytes -= request.nbytes
            request.demand = True

    def cancel(self, request: Request) -> bool:
        """Withdraw a request no worker has begun: true, it failed and `on_done` is not called. True
        as well for one that was never submitted."""
        with self._lock:
            if request.started_at or request.done or request.error is not None:
                return False
            if not request._queued:
                return True
            self._fail(request, StoreError("the read was cancelled", request.label))
            request.on_done = None
        self._finish(request)
        return True

    def queue_depth(self) -> int:
        """Requests submitted and not finished."""
        return self._unfinished

    def in_flight_prefetch_bytes(self) -> int:
        """Bytes of prefetch requests submitted and neither finished nor promoted."""
        return self._prefetch_bytes

    def close(self) -> None:
        """Fail what is still queued, let running reads end, join the workers, close the files."""
        with self._lock:
            self._closed = True
            queued = [*self._demand, *self._prefetch]
            for request in queued:
                self._fail(request, StoreError("the reader was closed", request.label))
            idle = [request for request in queued if not (request._active or request._hashing)]
        for _ in self._threads:
            self._tokens.put(None)
        for request in idle:
            self._finish(request)
        for thread in self._threads:
            thread.join()
        self._files.close()

    def __enter__(self) -> RangedReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What follows runs on the workers. "Locked" means the caller holds `_lock`.

    def _work(self) -> None:
        while not self._closed:
            self._tokens.get()
            while (piece := self._take()) is not None:
                try:
                    self._read(*piece)
                except BaseException as error:  # whoever waits must hear of it
                    self._give_up(piece[0], error)

    def _give_up(self, requests: list[Request], error: BaseException) -> None:
        """A fault of ours in the middle of a read: its requests fail with it, the worker lives."""
        _log.error("a reader's thread failed", exc_info=error)
        for request in requests:
            with self._lock:
                done = request.done
                self._fail(request, StoreError(f"reading failed: {error!r}", request.path))
            if not done:
                self._finish(request)

    def _take(self) -> tuple[list[Request], int, int, bool] | None:
        """The next piece: whole small neighbours, or bytes [start, stop) of one request."""
        with self._lock:
            if self._demand:
                queue = self._demand
            elif self._prefetch and self._prefetching < self._max_prefetching:
                queue = self._prefetch
            else:
                return None
            request = queue[0]
            start = request._next
            stop = min(start + self._piece(request), request.nbytes)
            requests = [request]
            self._begin(queue, stop)
            if stop - start == request.nbytes:
                while len(requests) < _MAX_JOINED and self._joins(queue, request, stop):
                    request = queue[0]
                    stop += request.nbytes
                    requests.append(request)
                    self._begin(queue, request.nbytes)
            if self._busy == 0:
                self._busy_since = time.perf_counter()
            self._busy += 1
            self._prefetching += queue is self._prefetch
            return requests, start, stop, queue is self._prefetch

    def _piece(self, request: Request) -> int:
        """Bytes to read at once: large pieces are faster, small ones let a demand read overtake.

        Idle workers share a demand read, but in no pieces below one and a half chunks: 3 MB read as
        three pieces took the system twice the time of one (bench/log/reads.md).
        """
        if not request.demand:
            return self._chunk
        parts = max(1, self._workers // len(self._demand))  # the others have requests of their own
        part = round_up(request.nbytes // parts, ALIGN)
        least = round_up(self._chunk * 3 // 2, ALIGN)
        return min(max(least, part), 16 * self._chunk)

    @staticmethod
    def _begin(queue: deque[Request], stop: int) -> None:
        """Hand bytes up to `stop` of the first request to a worker. Locked."""
        request = queue[0]
        request.started_at = request.started_at or time.perf_counter()
        request._next = stop
        request._active += 1
        if stop == request.nbytes:
            queue.popleft()
            request._queued = False

    def _joins(self, queue: deque[Request], last: Request, total: int) -> bool:
        candidate = queue[0] if queue else None
        return (
            candidate is not None
            and candidate.offset == last.offset + last.nbytes
            and candidate.path == last.path
            and candidate._direct == last._direct
            and total + candidate.nbytes <= self._chunk
        )

    def _read(self, requests: list[Request], start: int, stop: int, prefetch: bool) -> None:
        if len(requests) > 1 and self._fill_joined(requests):
            errors: list[ChronosError | None] = [None] * len(requests)
        else:
            errors = [self._try_fill(r, start, min(stop, r.nbytes)) for r in requests]
        with self._lock:
            self._prefetching -= prefetch
            self._busy -= 1
            if self._busy == 0:
                self.stats.busy_s += time.perf_counter() - self._busy_since
            self.stats.reads += 1
            self.stats.bytes_read += stop - start
        for request, error in zip(requests, errors, strict=True):
            if start or stop < request.nbytes:
                self._land(request, start, stop, error)
            else:
                request.error = request.error or error or self._check(request)
                self._finish(request)

    def _try_fill(self, request: Request, start: int, stop: int) -> ChronosError | None:
        try:
            self._fill(request, start, stop)
        except ChronosError as error:
            return error
        except OSError as error:
            return read_error(request.path, error)
        except Exception as error:  # a worker that died would leave its waiters waiting for ever
            return StoreError(f"reading failed: {error!r}", request.path)
        return None

    def _fill(self, request: Request, start: int, stop: int) -> None:
        """Read bytes [start, stop); odd ends, impossible for direct reads, go through the cache."""
        direct = request._direct
        while start < stop:
            direct = direct and start % ALIGN == 0 and stop - start >= ALIGN
            end = start + (stop - start) // ALIGN * ALIGN if direct else stop
            try:
                count = self._read_some(
                    request.path, direct, [request.buffer[start:end]], request.offset + start
                )
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                direct = False  # a file system that takes the flag and not the read
                continue
            if count == 0:
                raise short_read(request.path, request.offset, request.nbytes, start)
            start += count

    def _fill_joined(self, requests: list[Request]) -> bool:
        first = requests[0]
        buffers = [request.buffer for request in requests]
        try:
            count = self._read_some(first.path, first._direct, buffers, first.offset)
        except (OSError, ChronosError):
            return False  # each is read by itself and gets its own retries and error
        return count == sum(request.nbytes for request in requests)

    def _read_some(self, path: str, direct: bool, buffers: list[memoryview], offset: int) -> int:
        handle = self._files.use(path, direct)
        try:
            return read_some(self._io, handle.fd, buffers, offset)
        finally:
            self._files.release(handle)

    def _land(self, request: Request, start: int, stop: int, error: ChronosError | None) -> None:
        """Account for a piece; hash what is now contiguous; finish the request after the last."""
        with self._lock:
            request._active -= 1
            if error and request.error is None:
                self._fail(request, error)
            request._landed[start] = stop
            if request._hashing:
                return  # the worker that hashes will see this piece
            request._hashing = True
        while True:
            with self._lock:
                end = None if request.error else request._landed.pop(request._hashed, None)
                if end is None:
                    request._hashing = False
                    complete = not (request._queued or request._active)
                    break
            if request.digest is not None:
                request._hash = request._hash or xxhash.xxh3_128()
                request._hash.update(request.buffer[request._hashed : end])
            request._hashed = end
        if complete:
            request.error = request.error or self._check(request)
            self._finish(request)

    def _check(self, request: Request) -> ChronosError | None:
        """Compare the digest; on a mismatch read once more, past whatever garbled the bytes."""
        if request.digest is None:
            return None
        digest = request._hash.digest() if request._hash else None
        if (digest or xxhash.xxh3_128_digest(request.buffer)) == request.digest:
            return None
        error = self._try_fill(request, 0, request.nbytes)
        if error or xxhash.xxh3_128_digest(request.buffer) == request.digest:
            return error
        return CorruptClusterError(
            f"checksum mismatch in {os.path.basename(request.path)}: {request.nbytes} bytes"
            f" at offset {request.offset} are not what was packed",
            f"{request.label} in {request.path}" if request.label else request.path,
            "pack the model again, or restore the file",
        )

    def _fail(self, request: Request, error: ChronosError) -> None:
        """Take a request off its queue with `error`; pieces being read still land. Locked."""
        request.error = error
        if request._queued:
            (self._demand if request.demand else self._prefetch).remove(request)
            request._queued = False

    def _finish(self, request: Request) -> None:
        request.finished_at = time.perf_counter()
        with self._lock:
            self._unfinished -= 1
            if not request.demand:
                self._prefetch_bytes -= request.nbytes
            request.done = True
        if request.on_done is not None:
            try:
                request.on_done(request)
            except Exception:
                _log.exception("on_done of a read request raised")
        request._gate.release()
