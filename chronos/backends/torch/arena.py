"""Memory for the routed experts of a streamed model: slots of a fixed number of bytes.

On a CPU the slots computed with are the bytes read: one arena, torch views into it, no copy. On an
accelerator there are slots on the device and, in host memory, page-locked slots (the warm tier, or
a small staging area); records are read into the latter and copied on by a `CopyEngine`.
What is read, kept and evicted is the business of `chronos.common.experts`; what a record's tensors
mean, that of `codecs`.
"""

from __future__ import annotations

import mmap
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from chronos.backends.torch.codecs import codec_of
from chronos.common.disk.io import aligned_buffer
from chronos.common.errors import BudgetError, ResourceError, UsageError
from chronos.common.experts.tiers import CopyEngine
from chronos.common.layout.folder import slots_within

if TYPE_CHECKING:
    from chronos.common.experts.feed import FeedOptions
    from chronos.common.layout import Layout, Record

# Host memory that reads pass through where no warm tier was asked for: enough for the reads and
# copies of a few layers under way, whatever the size of an expert.
_STAGING_BYTES, _STAGING_SLOTS = 256 << 20, 8
# A demand copy queued behind a prefetch waits for one chunk: 0.2 ms at 20 GB/s.
_COPY_CHUNK = 4 << 20
_RATE_BYTES = 64 << 20
# Rows [slots, bytes] of host memory and of the device, to what copies between them.
Copies = Callable[[Tensor, Tensor], CopyEngine]


class Arena:
    """`slots` experts to compute with, and the host memory that reads land in."""

    def __init__(
        self, layout: Layout, slots: int, options: FeedOptions, copies: Copies | None = None
    ) -> None:
        """copies: how bytes reach the device (tests). Raises BudgetError or UsageError before
        anything is allocated."""
        device = torch.device(options.device or "cpu")
        staged = device.type != "cpu" or copies is not None
        _check_warm(options.warm_bytes, staged)
        host_slots = _host_slots(layout, options.warm_bytes, options.top_k) if staged else slots
        self.slots, self._stride = slots, layout.record_nbytes
        self._evicts = staged or slots < len(layout.records)
        self.host = aligned_buffer(host_slots * self._stride)
        self.copies: CopyEngine | None = None
        with torch.inference_mode(False):  # else other threads could not copy into these
            self._host_rows = torch.frombuffer(self.host, dtype=torch.uint8).view(host_slots, -1)
            self._rows = self._host_rows
            if staged:
                self._rows = _device_rows(slots, self._stride, device)
                self._open_copies = copies or _copies_for(device)
                self.copies = self._open_copies(self._host_rows, self._rows)
        self._unlock_pages = _lock_pages(self, self._host_rows) if device.type == "cuda" else None

    def view(self, slot: int, record: Record) -> Any:
        """The expert where it lies, as its codec has it."""
        release = None if self._evicts else partial(self._release, slot)
        with torch.inference_mode(False):  # a session may ask first, and a backward pass then
            return codec_of(record.encoding).view(self._rows[slot], record, release)

    def copy_rate(self) -> float | None:
        """Bytes per second of records from host memory to the device, a few of them timed now; None
        on a CPU."""
        if self.copies is None:
            return None
        with torch.inference_mode(False):
            row = torch.empty_like(self._rows[:1])
        copies = self._open_copies(self._host_rows, row)
        after = [copies.mark()]  # the row's memory may have had another use
        count = -(-_RATE_BYTES // self._stride)
        for number in (1, count):  # the first one warms up
            begin = time.perf_counter()
            for i in range(number):
                end = copies.start(i % len(self._host_rows), 0, demand=False, after=after)
            end.synchronize()
        return count * self._stride / (time.perf_counter() - begin)

    def close(self) -> None:
        """Unlock the host memory's pages. Safe to call twice."""
        if self._unlock_pages is not None:
            self._unlock_pages()

    def _release(self, slot: int) -> None:
        """Free the memory of a slot whose bytes nobody looks at any more."""
        if hasattr(mmap, "MADV_DONTNEED"):
            memory: Any = self.host.obj  # see `aligned_buffer`
            # Whole pages, which may be larger than a record's alignment.
            start = -(-slot * self._stride // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (slot + 1) * self._stride // mmap.PAGESIZE * mmap.PAGESIZE
            if end > start:
                memory.madvise(mmap.MADV_DONTNEED, start, end - start)


def _check_warm(warm_bytes: int, staged: bool) -> None:
    if warm_bytes and not staged:
        raise UsageError(
            "a warm tier needs an accelerator with memory of its own",
            "",
            "on a CPU, add its bytes to the budget",
        )


def _host_slots(layout: Layout, warm_bytes: int, top_k: int) -> int:
    if warm_bytes:
        return slots_within(layout, warm_bytes, top_k)
    staging = max(_STAGING_SLOTS, _STAGING_BYTES // layout.record_nbytes)
    return min(staging, len(layout.records))


def _device_rows(slots: int, stride: int, device: torch.device) -> Tensor:
    try:
        return torch.empty((slots, stride), dtype=torch.uint8, device=device)
    except torch.cuda.OutOfMemoryError as error:
        raise BudgetError(
            f"the device has no room for {slots * stride} bytes of experts",
            str(device),
            "give a smaller budget",
        ) from error


def _lock_pages(owner: object, rows: Tensor) -> Callable[[], object]:
    """Page-lock host memory, which copies beside the computation need; undone by the result.

    torch's own pinned memory comes in powers of two: up to twice what a budget allows.
    """
    cudart: Any = torch.cuda.cudart()
    if int(cudart.cudaHostRegister(rows.data_ptr(), rows.numel(), 0)) != 0:
        raise ResourceError(
            f"cannot page-lock {rows.numel()} bytes of host memory", "", "lower the warm budget"
        )
    unlock = weakref.finalize(owner, cudart.cudaHostUnregister, rows.data_ptr())
    unlock.atexit = False  # the driver may be gone by then
    return unlock


def _copies_for(device: torch.device) -> Copies:
    return CudaCopies if device.type == "cuda" else DirectCopies


class CudaCopies:
    """Page-locked host rows to device rows, on two streams beside the computation's.

    Both streams feed the same copy engine, which alternates between them chunk by chunk; on one
    stream a demand would queue behind every prefetch. The computation is the current stream of
    the thread that acquires. Slots are rows of the two stacks.
    """

    def __init__(self, sources: Tensor, targets: Tensor, chunk_bytes: int = _COPY_CHUNK) -> None:
        """sources, targets: rows of bytes [slots, bytes] in host memory and on the device."""
        self._sources, self._targets = list(sources), list(targets)
        self._device, self._chunk = targets.device, chunk_bytes
        self._demand = torch.cuda.Stream(self._device, priority=-1)
        self._prefetch = torch.cuda.Stream(self._device)

    def start(
        self, source: int, target: int, *, demand: bool, after: Sequence[Any]
    ) -> torch.cuda.Event:
        stream = self._demand if demand else self._prefetch
        row, into = self._sources[source], self._targets[target]
        with torch.cuda.stream(stream):
            for event in after:
                stream.wait_event(event)
            for start in range(0, len(row), self._chunk):
                piece = slice(start, start + self._chunk)
                into[piece].copy_(row[piece], non_blocking=True)
            done = torch.cuda.Event()
            done.record(stream)
        return done

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, event: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)


class Done:
    """The event of work that was finished when it was queued."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class DirectCopies:
    """For devices without streams of their own in torch (MPS): each copy ends before `start` does.

    Copies and computation share the device's one queue, which keeps them in order.
    """

    def __init__(self, sources: Tensor, targets: Tensor) -> None:
        self._sources, self._targets = list(sources), list(targets)

    def start(self, source: int, target: int, *, demand: bool, after: Sequence[Any]) -> Done:
        self._targets[target].copy_(self._sources[source])
        return Done()

    def mark(self) -> Done:
        return Done()

    def wait(self, event: Any) -> None:
        pass
