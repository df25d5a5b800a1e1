"""The routed experts of a streamed model: slots of a fixed number of bytes, filled from disk.

On a CPU the slots computed with are the bytes read: one arena, torch views into it, no copy. On an
accelerator there are slots on the device and, in host memory, page-locked slots (the warm tier, or
a small staging area); records are read into the latter and copied on by a `CopyEngine`.
What to keep and evict is `chronos.common.experts.residency`'s business, when to wait that of
`chronos.common.experts.tier`. What a record's tensors mean is not known here, but in `codecs`.
"""

from __future__ import annotations

import mmap
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from chronos.backends.torch.codecs import codec_of
from chronos.common.disk.io import aligned_buffer
from chronos.common.disk.reader import RangedReader
from chronos.common.errors import BudgetError, ResourceError, UsageError
from chronos.common.experts.residency import DecayedLFU, Policy
from chronos.common.experts.stats import StoreStats
from chronos.common.experts.tiers import CopyEngine, SlotTier, StagedTier
from chronos.common.layout.folder import slots_within
from chronos.common.model.weights import Key

if TYPE_CHECKING:
    from chronos.common.layout import Layout, Record

# Host memory that reads pass through where no warm tier was asked for: enough for the reads and
# copies of a few layers under way, whatever the size of an expert.
_STAGING_BYTES, _STAGING_SLOTS = 256 << 20, 8
# A demand copy queued behind a prefetch waits for one chunk: 0.2 ms at 20 GB/s.
_COPY_CHUNK = 4 << 20
_RATE_BYTES = 64 << 20


class ExpertStore:
    """Experts of a layout within `capacity_bytes`. Close it, or use it as a context."""

    def __init__(
        self,
        layout: Layout,
        capacity_bytes: int,
        *,
        top_k: int = 1,
        warm_bytes: int = 0,
        device: str | torch.device = "cpu",
        miss: str = "exact",
        policy: Policy | None = None,
        reader: RangedReader | None = None,
        copies: CopyEngine | None = None,
        verify: bool = True,
    ) -> None:
        """top_k: experts one token needs in a layer; less room than that is a BudgetError.
        warm_bytes: host memory for experts beside those on an accelerator.
        miss: "exact" waits for an expert, "fallback" yields None for one that is not ready.
        reader: stays the caller's to close. copies: how bytes reach the device (tests).
        Raises BudgetError or UsageError before anything is allocated.
        """
        slots = slots_within(layout, capacity_bytes, top_k)
        device = torch.device(device)
        staged = device.type != "cpu" or copies is not None
        _check_options(miss, warm_bytes, staged)
        self.exact = miss == "exact"
        self.policy = policy or DecayedLFU(layout.num_layers, layout.num_experts)
        self._capacity_bytes, self._warm_bytes = capacity_bytes, warm_bytes
        host_slots = _host_slots(layout, warm_bytes, top_k) if staged else slots
        arena = aligned_buffer(host_slots * layout.record_nbytes)
        with torch.inference_mode(False):  # else other threads could not copy into these
            rows = torch.frombuffer(arena, dtype=torch.uint8).view(host_slots, -1)
            self._rows = _device_rows(slots, rows.shape[1], device) if staged else rows
        self._host_rows = rows
        self._copies = copies = copies or _copies_for(device) if staged else None
        self._evicts = staged or slots < len(layout.records)
        self._arena, self._stride = arena, layout.record_nbytes
        self._unlock_pages = _lock_pages(self, rows) if device.type == "cuda" else None
        self._owns_reader = reader is None
        self._reader = reader or RangedReader()
        view = None if staged else self._view
        host = SlotTier(
            layout, host_slots, self._reader, self.policy, arena=arena, view=view, verify=verify
        )
        self._tier: SlotTier | StagedTier = host
        if copies is not None:
            self._tier = StagedTier(
                host, slots, copies, list(rows), list(self._rows), self.policy, self._view
            )

    def prefetch(self, keys: Sequence[Key]) -> int:
        """Ask for experts, best first; those already here are kept a while. A hint: what finds no
        room is dropped. Returns the bytes newly asked for."""
        return self._tier.prefetch(keys)

    def acquire(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Start the missing reads now; yield each expert once, ready ones first, then as they land.

        An expert is valid until the next one is asked for. None: not ready, with miss="fallback".
        Raises what the read of a needed expert raised, and stays usable.
        """
        return self._tier.acquire(layer, experts, exact=self.exact)

    def record_fallback(self, weight: float) -> None:
        """Routing weight that a None of `acquire` stood for."""
        self._tier.counters.fallback_weight += weight

    def end_token(self) -> None:
        """One decode step is over: histories fade, unused prefetches lose their protection."""
        self._tier.end_token()

    def begin_prompt(self) -> None:
        """From now on whole chunks of a prompt ask for their experts."""
        self._tier.begin_prompt()

    def end_prompt(self, ids_TLK: np.ndarray) -> None:
        """The prompt is over; its tokens were routed like this, which predictors begin from."""
        self._tier.end_prompt(ids_TLK)

    def resident(self) -> frozenset[Key]:
        return self._tier.resident()

    def held(self) -> frozenset[Key]:
        """What needs no read: resident, or in host memory behind an accelerator's slots."""
        return self._tier.held()

    def copy_rate(self) -> float | None:
        """Bytes per second of records from host memory to the device, a few of them timed now; None
        on a CPU."""
        if self._copies is None:
            return None
        with torch.inference_mode(False):
            target = torch.empty_like(self._rows[0])
        after = [self._copies.mark()]  # its memory may have had another use
        count = -(-_RATE_BYTES // self._stride)
        for copies in (1, count):  # the first one warms up
            begin = time.perf_counter()
            ends = [
                self._copies.start(
                    self._host_rows[i % len(self._host_rows)], target, demand=False, after=after
                )
                for i in range(copies)
            ]
            ends[-1].synchronize()
        return count * self._stride / (time.perf_counter() - begin)

    def stats(self) -> StoreStats:
        stats = self._tier.stats()
        stats.capacity_bytes = self._capacity_bytes
        stats.warm_capacity_bytes = self._warm_bytes
        return stats

    def close(self) -> None:
        """End the reads, join the threads, close the files. Safe to call twice."""
        self._tier.close()
        if self._owns_reader:
            self._reader.close()
        if self._unlock_pages is not None:
            self._unlock_pages()

    def __enter__(self) -> ExpertStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _view(self, slot: int, record: Record) -> Any:
        """The expert where it lies, as its codec has it."""
        release = None if self._evicts else partial(self._release, slot)
        return codec_of(record.encoding).view(self._rows[slot], record, release)

    def _release(self, slot: int) -> None:
        """Free the memory of a slot whose bytes nobody looks at any more."""
        if hasattr(mmap, "MADV_DONTNEED"):
            memory: Any = self._arena.obj  # see `aligned_buffer`
            # Whole pages, which may be larger than a record's alignment.
            start = -(-slot * self._stride // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (slot + 1) * self._stride // mmap.PAGESIZE * mmap.PAGESIZE
            if end > start:
                memory.madvise(mmap.MADV_DONTNEED, start, end - start)


def _check_options(miss: str, warm_bytes: int, staged: bool) -> None:
    if miss not in ("exact", "fallback"):
        raise UsageError(f"miss must be exact or fallback, not {miss!r}")
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


def _copies_for(device: torch.device) -> CopyEngine:
    return CudaCopies(device) if device.type == "cuda" else DirectCopies()


class CudaCopies:
    """Page-locked host rows to device rows, on two streams beside the computation's.

    Both streams feed the same copy engine, which alternates between them chunk by chunk; on one
    stream a demand would queue behind every prefetch. The computation is the current stream of
    the thread that acquires.
    """

    def __init__(self, device: torch.device, chunk_bytes: int = _COPY_CHUNK) -> None:
        self._device, self._chunk = device, chunk_bytes
        self._demand = torch.cuda.Stream(device, priority=-1)
        self._prefetch = torch.cuda.Stream(device)

    def start(
        self, source: Tensor, target: Tensor, *, demand: bool, after: Sequence[Any]
    ) -> torch.cuda.Event:
        stream = self._demand if demand else self._prefetch
        with torch.cuda.stream(stream):
            for event in after:
                stream.wait_event(event)
            for start in range(0, len(source), self._chunk):
                piece = slice(start, start + self._chunk)
                target[piece].copy_(source[piece], non_blocking=True)
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

    def start(self, source: Tensor, target: Tensor, *, demand: bool, after: Sequence[Any]) -> Done:
        target.copy_(source)
        return Done()

    def mark(self) -> Done:
        return Done()

    def wait(self, event: Any) -> None:
        pass
