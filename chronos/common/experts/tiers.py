"""The two tiers: disk to byte slots in host memory, and host slots to the slots of an accelerator.

`SlotTier` alone serves a CPU, whose compute slots are the bytes read. `StagedTier` stands on a
`SlotTier` (page-locked, or a small staging area) and moves records on through a `CopyEngine`, which
knows slots by their numbers. The host waits for disk reads only: copies are ordered among
themselves and against the computation by events. Both stand on one lock, that of `Tier`.
Not covered: what a slot is and how bytes move between slots, which each backend knows.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from chronos.common.disk.io import ALIGN, address, aligned_buffer
from chronos.common.disk.reader import RangedReader, Request
from chronos.common.errors import StoreError
from chronos.common.experts.lease import Load
from chronos.common.experts.residency import Policy
from chronos.common.experts.stats import LayerStats, StoreStats
from chronos.common.experts.tier import CANCELLED, Tier, View
from chronos.common.model.weights import Key

if TYPE_CHECKING:
    from chronos.common.layout import Layout, Record


class Event(Protocol):
    """A point in an accelerator's work; `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """True once everything before it is finished."""

    def synchronize(self) -> None:
        """Block the host until then."""


class CopyEngine(Protocol):
    """Moves records from host slots to an accelerator's without making the host wait."""

    def start(self, source: int, target: int, *, demand: bool, after: Sequence[Event]) -> Event:
        """Queue a copy of host slot `source` that begins after all of `after`; its end.

        In chunks, so that a demand copy shares the link with prefetches instead of queueing
        behind them. Called under the tier's lock; must not wait.
        """

    def mark(self) -> Event:
        """The end of all computation queued so far."""

    def wait(self, event: Event) -> None:
        """Hold back computation queued from now on until `event`; the host does not wait."""


class SlotTier(Tier):
    """Disk to byte slots in host memory: one arena, claimed once, touched as slots are filled."""

    def __init__(
        self,
        layout: Layout,
        slots: int,
        reader: RangedReader,
        policy: Policy,
        *,
        arena: memoryview | None = None,
        view: View | None = None,
        verify: bool = True,
    ) -> None:
        """arena: slots * layout.record_nbytes writable bytes, page-aligned for direct reads.
        view: what to yield for a slot, its bytes by default. verify: check the records' digests.
        """
        super().__init__(layout, slots, policy, view or self._bytes_of)
        self._stride, self._reader, self._verify = layout.record_nbytes, reader, verify
        self._arena = aligned_buffer(slots * self._stride) if arena is None else arena
        self._paths: dict[str, str] = {}
        # Slots begin where the first one does, to a page: records are whole pages.
        self._aligned = address(self._arena) % ALIGN == 0 and self._stride % ALIGN == 0
        self._landed: deque[Load] = deque()  # appended to by the reader's threads
        self._changed = threading.Condition(self.lock)
        self._waiting = 0  # threads that wait for `_changed`

    def claim(self, key: Key, *, demand: bool) -> Load | None:
        """For a tier above: `key`'s load with a pin on its slot, `done` where it is here already.
        None: no slot is free. A load that failed has lost the pin."""
        self.residency.reconsider()
        slot = self.residency.ready.get(key)
        if slot is not None:
            self.residency.pin(slot)
            here = Load(key, self._records[key], slot, demand, "")
            here.done = True
            return here
        load = self.load(key, demand=demand)
        self._begin_all()
        return load

    def promote(self, load: Load) -> None:
        """For a tier above: what it claimed ahead of need is needed now."""
        if not (load.done or load.demand):
            self._promote(load)

    def cancel(self, load: Load) -> bool:
        """For a tier above: give up a claim whose read has not begun; the pin goes with it."""
        if load.done or load.demand or not self._cancel(load):
            return False
        self._finish(load, CANCELLED)
        return True

    def _begin(self, loads: Sequence[Load]) -> None:
        requests = [self._request(load) for load in loads]
        for load, request in zip(loads, requests, strict=True):
            load.handle = request
        self._reader.submit_many(requests)

    def _request(self, load: Load) -> Request:
        record = load.record
        path = self._paths.get(record.file)
        if path is None:
            path = self._paths[record.file] = str(self.layout.path(load.key))
        return Request(
            path,
            record.offset,
            self._bytes_of(load.slot, record),
            load.demand,
            record.digest if self._verify else None,
            f"layer {load.key[0]}, expert {load.key[1]}",
            partial(self._land, load),
            aligned=self._aligned,
        )

    def _land(self, load: Load, request: Request) -> None:
        """On a reader's thread. Who waits took the lock before it looked at what has landed."""
        self._landed.append(load)
        if self._waiting:
            self._wake()

    def _advance(self) -> None:
        landed = self._landed
        while landed:
            load = landed.popleft()
            request = load.handle
            if request.error is None:
                self.ledger.read(load.key[0], request.nbytes)
            else:
                self.ledger.total.read_errors += 1
            self._finish(load, request.error)

    def _wait(self) -> None:
        self._waiting += 1
        try:
            if not self._landed:
                self._changed.wait()
        finally:
            self._waiting -= 1

    def _wake(self) -> None:
        if self._waiting:
            with self._changed:
                self._changed.notify_all()

    def _cancel(self, load: Load) -> bool:
        return load.handle is None or self._reader.cancel(load.handle)

    def _promote(self, load: Load) -> None:
        load.demand = True
        if load.handle is not None:
            self._reader.promote(load.handle)

    def _reused(self, slot: int) -> None:
        """What consumers do with host memory is done before they let go of it."""

    def _copied(self, slot: int) -> bool:
        return True

    def _bytes_of(self, slot: int, record: Record) -> memoryview:
        return self._arena[slot * self._stride : slot * self._stride + record.nbytes]


class StagedTier(Tier):
    """Slots of an accelerator, filled from a `SlotTier` by copies.

    What has landed in a host slot is copied at the tier's next call, at the latest when the next
    layer asks. The host slot is pinned until the copy is finished; loads that find none free are
    kept in a backlog. A slot is overwritten only after the computation queued before its eviction:
    nothing queued later can use it, since it was not pinned, so one event per eviction replaces one
    per use. All computation must be queued on one stream (the one `mark` and `wait` act on).
    """

    def __init__(
        self, host: SlotTier, slots: int, copies: CopyEngine, policy: Policy, view: View
    ) -> None:
        super().__init__(host.layout, slots, policy, view, host.lock)
        self._host, self._copies = host, copies
        self._fences: dict[int, list[Event]] = {}  # what must end before a slot is overwritten
        self._copying: deque[tuple[Event, int]] = deque()  # copies under way and their host slots
        self._reading: deque[Load] = deque()  # with a claim on the host tier, their handle
        self._backlog: deque[Load] = deque()

    def stats(self) -> StoreStats:
        with self.lock:
            stats, host = super().stats(), self._host.stats()
        stats.bytes_read, stats.read_errors = host.bytes_read, host.read_errors
        return stats

    def layer_stats(self) -> dict[int, LayerStats]:
        with self.lock:
            found, host = super().layer_stats(), self._host.layer_stats()
        for layer, read in host.items():
            found.setdefault(layer, LayerStats()).bytes_read = read.bytes_read
        return found

    def held(self) -> frozenset[Key]:
        with self.lock:
            return super().held() | self._host.held()

    def close(self) -> None:
        super().close()
        while self._copying:
            self._copying.popleft()[0].synchronize()
        self._host.close()

    def taken(self, slot: int) -> Any:
        if slot in self._events:
            self._copies.wait(self._events.pop(slot))
        return super().taken(slot)

    def _begin(self, loads: Sequence[Load]) -> None:
        demands = [load for load in loads if load.demand]
        warm = self._host.residency.ready
        warm_hits = sum(load.key in warm for load in demands)
        self.ledger.total.warm_hits += warm_hits
        self.ledger.token.warm_hits += warm_hits
        self._backlog.extendleft(reversed(demands))
        self._backlog.extend(load for load in loads if not load.demand)
        self._advance()

    def _cancel(self, load: Load) -> bool:
        if load in self._backlog:
            self._backlog.remove(load)
            return True
        if load.handle is None:
            return True
        if not self._host.cancel(load.handle):
            return False
        self._reading.remove(load)
        return True

    def _promote(self, load: Load) -> None:
        load.demand = True
        if load in self._backlog:
            self._backlog.remove(load)
            self._backlog.appendleft(load)
            self._advance()
        elif load.handle is not None:
            self._host.promote(load.handle)

    def _wait(self) -> None:
        """For a read; but if what is needed lacks a host slot that a copy holds, for that copy."""
        blocked = bool(self._backlog) and self._backlog[0].demand and bool(self._copying)
        if self._reading and not blocked:
            self._host._wait()
        elif self._copying:
            self._copying[0][0].synchronize()

    def _wake(self) -> None:
        self._host._wake()

    def _reused(self, slot: int) -> None:
        fences = self._fences[slot] = [self._copies.mark()]
        if slot in self._events:  # copied here, never used: its copy may still be under way
            fences.append(self._events.pop(slot))

    def _copied(self, slot: int) -> bool:
        if not self._events[slot].query():
            return False
        del self._events[slot]
        return True

    def _advance(self) -> None:
        """Copy what has landed; claim host slots whose copies have ended for the backlog."""
        self._host.settle()
        self._copy_landed()
        while self._copying and self._copying[0][0].query():
            self._host.residency.unpin(self._copying.popleft()[1])
        while self._backlog:
            claim = self._host.claim(self._backlog[0].key, demand=self._backlog[0].demand)
            if claim is None:
                break
            load = self._backlog.popleft()
            load.handle = claim
            self._reading.append(load)
        self._copy_landed()

    def _copy_landed(self) -> None:
        """Start the copies of all whose reads have ended, in the order they were asked for."""
        done = [load for load in self._reading if load.handle.done]
        for load in done:
            self._reading.remove(load)
            error = load.handle.error
            if error is None:
                error = self._copy(load, load.handle.slot)
            self._finish(load, error)

    def _copy(self, load: Load, host_slot: int) -> Exception | None:
        """Start a copy; why that failed, if it did."""
        try:
            event = self._copies.start(
                host_slot, load.slot, demand=load.demand, after=self._fences.get(load.slot, ())
            )
        except BaseException as failure:
            self._host.residency.unpin(host_slot)
            if isinstance(failure, Exception):
                return failure
            self._finish(load, StoreError(f"interrupted by {failure!r}"))
            raise
        self._fences.pop(load.slot, None)
        self.ledger.total.bytes_copied += load.record.nbytes
        self.ledger.token.copied += 1
        self._events[load.slot] = event
        self._copying.append((event, host_slot))
        return None
