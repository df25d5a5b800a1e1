"""The two tiers: disk to byte slots in host memory, and host slots to the slots of an accelerator.

`SlotTier` alone serves a CPU, whose compute slots are the bytes read. `StagedTier` stands on a
`SlotTier` (page-locked, or a small staging area) and moves records on through a `CopyEngine`; the
engine's row objects are opaque here. The host waits for disk reads only: copies are ordered among
themselves and against the computation by events. Both stand on one lock, that of `Tier`.
Not covered: what a row is and how bytes move between rows, which each backend knows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from chronos.common.disk.io import aligned_buffer
from chronos.common.disk.reader import RangedReader, Request
from chronos.common.experts.residency import Policy
from chronos.common.experts.stats import StoreStats
from chronos.common.experts.tier import CANCELLED, Load, Then, Tier, View
from chronos.common.model.weights import Key

if TYPE_CHECKING:
    from chronos.common.layout import Layout, Record

__all__ = ["CopyEngine", "Event", "SlotTier", "StagedTier", "Tier"]


class Event(Protocol):
    """A point in an accelerator's work; `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """True once everything before it is finished."""

    def synchronize(self) -> None:
        """Block the host until then."""


class CopyEngine(Protocol):
    """Moves records between rows of memory without making the host wait."""

    def start(self, source: Any, target: Any, *, demand: bool, after: Sequence[Event]) -> Event:
        """Queue a copy that begins after all of `after`; the event is its end.

        In chunks, so that a demand copy shares the link with prefetches instead of queueing
        behind them. Called from any thread, under the tier's lock; must not wait.
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

    def fetch(self, key: Key, then: Then, *, demand: bool) -> bool:
        """For a tier above: pin `key`'s slot and call then(slot, error) once it is filled.

        That may be at once, or later on a reader's thread; after an error there is no pin.
        False: no slot is free, `then` is not called.
        """
        slot = self.residency.ready.get(key)
        if slot is not None:
            self.residency.pin(slot)
            then(slot, None)
            return True
        load = self._loads.get(key)
        if load is None:
            load = self._admit(key, demand=demand)
            if load is None:
                return False
            self._begin_all()
        elif demand and not load.demand:
            self._urge(load)
        if load.error is not None:
            then(load.slot, load.error)
            return True
        self.residency.pin(load.slot)
        load.then.append(then)
        return True

    def urge(self, key: Key) -> None:
        """For a tier above: a prefetch it fetched is needed now."""
        load = self._loads.get(key)
        if load is not None and not load.demand:
            self._urge(load)

    def withdraw(self, key: Key) -> bool:
        """For a tier above: give up a fetch that has not begun (`then` gets CANCELLED)."""
        load = self._loads.get(key)
        if load is None or load.demand or not self._cancel(load):
            return False
        self._finish(load, CANCELLED)
        return True

    def _begin(self, loads: Sequence[Load]) -> None:
        requests = [self._request(load) for load in loads]
        for load, request in zip(loads, requests, strict=True):
            load.request = request
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
            partial(self._landed, load),
        )

    def _landed(self, load: Load, request: Request) -> None:
        with self.lock:
            if request.error is None:
                self.counters.bytes_read += request.nbytes
            else:
                self.counters.read_errors += 1
            self._finish(load, request.error)

    def _cancel(self, load: Load) -> bool:
        return load.request is not None and self._reader.cancel(load.request)

    def _urge(self, load: Load) -> None:
        load.demand = True
        if load.request is not None:
            self._reader.promote(load.request)

    def _reused(self, slot: int) -> None:
        """What consumers do with host memory is done before they let go of it."""

    def _copied(self, slot: int) -> bool:
        return True

    def _bytes_of(self, slot: int, record: Record) -> memoryview:
        return self._arena[slot * self._stride : slot * self._stride + record.nbytes]


class StagedTier(Tier):
    """Slots of an accelerator, filled from a `SlotTier` by copies.

    A read that lands in a host slot starts its copy from the reader's thread. The host slot is
    pinned until the copy is finished; loads that find none free are kept in a backlog. A slot is
    overwritten only after the computation queued before its eviction: nothing queued later can
    use it, since it was not pinned, so one event per eviction replaces one per use.
    All computation must be queued on one stream (the one `mark` and `wait` act on).
    """

    def __init__(
        self,
        host: SlotTier,
        slots: int,
        copies: CopyEngine,
        sources: Sequence[Any],
        targets: Sequence[Any],
        policy: Policy,
        view: View,
    ) -> None:
        """sources, targets: the engine's row for each host slot and each slot of this tier."""
        super().__init__(host.layout, slots, policy, view, host.lock)
        self._host, self._copies = host, copies
        self._sources, self._targets = sources, targets
        self._fences: dict[int, list[Event]] = {}  # what must end before a slot is overwritten
        self._copying: deque[tuple[Event, int]] = deque()  # copies under way and their host slots
        self._backlog: deque[Load] = deque()
        self._staging = False

    def stats(self) -> StoreStats:
        with self.lock:
            stats, host = super().stats(), self._host.stats()
        stats.bytes_read, stats.read_errors = host.bytes_read, host.read_errors
        return stats

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
        self.counters.warm_hits += sum(load.key in warm for load in demands)
        self._backlog.extendleft(reversed(demands))
        self._backlog.extend(load for load in loads if not load.demand)
        self._stage()

    def _cancel(self, load: Load) -> bool:
        if load in self._backlog:
            self._backlog.remove(load)
            return True
        return self._host.withdraw(load.key)

    def _urge(self, load: Load) -> None:
        load.demand = True
        if load in self._backlog:
            self._backlog.remove(load)
            self._backlog.appendleft(load)
            self._stage()
        else:
            self._host.urge(load.key)

    def _wait(self) -> None:
        """For a read; but if what is needed lacks a host slot that a copy holds, for that copy."""
        self._stage()
        if self._backlog and self._backlog[0].demand and self._copying:
            self._copying[0][0].synchronize()
            self._stage()
        else:
            super()._wait()

    def _reused(self, slot: int) -> None:
        fences = self._fences[slot] = [self._copies.mark()]
        if slot in self._events:  # copied here, never used: its copy may still be under way
            fences.append(self._events.pop(slot))

    def _copied(self, slot: int) -> bool:
        if not self._events[slot].query():
            return False
        del self._events[slot]
        return True

    def _stage(self) -> None:
        """Free host slots whose copies have ended and hand them to the backlog."""
        if self._staging:  # called back from a fetch that was answered at once
            return
        self._staging = True
        try:
            while self._copying and self._copying[0][0].query():
                self._host.residency.unpin(self._copying.popleft()[1])
            while self._backlog:
                load = self._backlog.popleft()
                if not self._host.fetch(load.key, partial(self._fetched, load), demand=load.demand):
                    self._backlog.appendleft(load)
                    break
        finally:
            self._staging = False

    def _fetched(self, load: Load, host_slot: int, error: Exception | None) -> None:
        """A record is in (and pins) a host slot, or its read has failed."""
        if error is None:
            try:
                event = self._copies.start(
                    self._sources[host_slot],
                    self._targets[load.slot],
                    demand=load.demand,
                    after=self._fences.pop(load.slot, ()),
                )
                self.counters.bytes_copied += load.record.nbytes
                self._events[load.slot] = event
                self._copying.append((event, host_slot))
            except Exception as failure:
                self._host.residency.unpin(host_slot)
                error = failure
        self._finish(load, error)
        self._stage()
